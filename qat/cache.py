"""Where everything lies that can be made again: converted models, rows of tokens, compiled kernels.

One folder for all of them, so that one variable moves them all: `$QAT_CACHE`, else `$XDG_CACHE_HOME/qat`, else
`~/.cache/qat`. Nobody chose the last two, so where they cannot be written a temporary folder takes their place, with a
note; a `$QAT_CACHE` that cannot be written is an error.
"""

import atexit
import errno
import os
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path

from qat.errors import ConfigError


def cache_folder(kind: str) -> Path:
    """The folder for one kind of cached thing ("models", "data", "kernels"), created if need be.

    Raises:
        ConfigError: `$QAT_CACHE` is set to something that cannot be written.
    """
    override = os.environ.get("QAT_CACHE")
    if override:
        try:
            return _writable(Path(override).expanduser() / kind)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"QAT_CACHE={override} cannot be written ({_reason(error)}); set it to a folder"
            ) from error
    try:
        return _writable(_usual() / kind)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        return _writable(_temporary(_reason(error)) / kind)


def _usual() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    # The XDG specification says to ignore a relative path.
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "qat"


def _writable(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


@cache
def _temporary(reason: str) -> Path:
    """One folder per process: a name that others can guess could be theirs, and compiled kernels are loaded from it."""
    folder = Path(tempfile.mkdtemp(prefix="qat-cache-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    warnings.warn(
        f"no cache folder ({reason}); using {folder} until the end: set QAT_CACHE to keep what is made", stacklevel=3
    )
    return folder


def _reason(error: Exception) -> str:
    """Without the path, which differs from kind to kind: the note is given once."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
