"""The errors a user can meet, in one tree, and the one helper that suggests names.

Each class also derives from the standard exception a caller would already catch. A message says what was given,
what is allowed and what to do; `nearest` supplies the "did you mean" part. Internal invariants use `assert`, user
input never does.
"""

import difflib
from collections.abc import Iterable


class QatError(Exception):
    """Root of every error raised on purpose by this package."""


class ConfigError(QatError, ValueError):
    """A YAML file, an override or an argument is wrong."""


class FormatError(QatError, ValueError):
    """A tensor cannot be stored in a number format, or the format does not exist."""


class UnsupportedError(QatError, RuntimeError):
    """A combination (format, target, device, architecture) that is not implemented; names the nearest that is."""


class CheckpointError(QatError, RuntimeError):
    """A folder or file of weights is missing, incomplete, or does not say what it should."""


class DataError(QatError, ValueError):
    """A text source cannot be read or holds too little."""


class TrainingError(QatError, RuntimeError):
    """Training had to stop (non-finite loss, changed job on resume, ...); the last good state is kept."""


class Interrupted(SystemExit):
    """A signal ended a command that has said so already; its code is the exit status. Not an error of the command."""


def nearest(name: str, options: Iterable[str], count: int = 3) -> str:
    """The `count` options closest to `name`, as 'a, b, c' for an error message."""
    pool = sorted(set(options))
    names = difflib.get_close_matches(name, pool, n=count, cutoff=0.0)
    return ", ".join(names)
