"""What stands between the `qat` command and a terminal, a pipe or a log: text that can be read and written anywhere."""

import io
import os
import sys
from collections.abc import Sequence

from qat.errors import ConfigError


def print_anything() -> None:
    """What a terminal or a pipe cannot encode is escaped: no run may fail because it prints its result."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def os_error(error: OSError) -> str:
    """For example: No space left on device: runs/a/metrics.csv"""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return ": ".join([error.strerror or str(error) or type(error).__name__, *([" -> ".join(names)] if names else [])])


def refuse_bytes(argv: Sequence[str]) -> None:
    """Arguments that are not text in the shell's encoding reach Python as lone surrogates, which nothing can write."""
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"the argument {ascii(argument)[:200]} is not Unicode text (at character {error.start + 1}); "
                "give text in UTF-8, and rename files whose names are not"
            ) from None


def warned(message: Warning | str, category: type[Warning]) -> str:
    """A warning without the line of code that gave it, which users did not write."""
    return f"note: {message}" if category is UserWarning else f"{category.__name__}: {message}"


def quiet_libraries() -> None:
    """No advertisements or advice from libraries; their errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
