"""What stands between the `qat` command and a terminal, a pipe or a log: text that can be read and written anywhere,
and a process that starts and ends fast."""

import atexit
import contextlib
import gc
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from qat.errors import ConfigError


def print_anything() -> None:
    """What a terminal or a pipe cannot encode is escaped: no run may fail because it prints its result."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Unbreakable:
    """A stderr whose reader may leave and whose disk may fill up: what it cannot take is lost, and the work goes on.

    Ctrl-C reaches everything in `qat train 2>&1 | tee log`: tee ends at once, and the run still has a step to save.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Characters that count as written."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Hand over what is buffered."""
        self._attempt(self._stream.flush)

    def close_up(self) -> None:
        """Before Python ends, which reports what it cannot flush as a failure."""
        try:
            self._stream.flush()
        except OSError:
            self._to_nobody()

    def _attempt(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except BrokenPipeError:
            self._to_nobody()
        except OSError:  # a full disk may have room again later
            pass

    def _to_nobody(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unbreakable_stderr() -> Iterator[None]:
    """`sys.stderr` is `Unbreakable` inside the block."""
    before = sys.stderr
    if before is None:  # closed by whoever started us
        yield
        return
    sys.stderr = unbreakable = Unbreakable(before)
    try:
        yield
    finally:
        unbreakable.close_up()
        sys.stderr = before


@contextlib.contextmanager
def rarely_collecting() -> Iterator[None]:
    """Inside the block Python looks through all objects for unused cycles ten times as rarely.

    torch and transformers make a million objects that stay. By default all of them are looked at each time that they
    have grown by a quarter, which takes a second of the start; young objects are looked at as often as ever.
    """
    young, middle, old = before = gc.get_threshold()
    gc.set_threshold(young, middle, 10 * old)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def leave(status: int) -> int:
    """End the process with this status where only files are left of it: Python would take another second to free the
    objects of torch and transformers one by one. What asked to be called at the end is called.

    Returns:
        The status, for an end as usual: after training, while somebody's thread works, or where output is not taken.
    """
    working = [thread for thread in threading.enumerate() if not thread.daemon]
    if "lightning" in sys.modules or working != [threading.main_thread()]:
        return status
    atexit._run_exitfuncs()
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except OSError:
        return status  # Python tries again, and says so
    os._exit(status)


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


def import_library(name: str) -> None:
    """Import what takes seconds while Ctrl-C ends the process at once, as the system does it.

    Python's KeyboardInterrupt may be swallowed inside such an import, and the command then go on with half a library.
    """
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        importlib.import_module(name)
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
