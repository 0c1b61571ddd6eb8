"""What a signal means to a run: finish the step and save where that is possible, end cleanly elsewhere.

Ctrl-C, a scheduler's SIGTERM, SLURM's SIGUSR1 before its time limit and the SIGHUP of a lost terminal all mean the
same. Only a second Ctrl-C does not wait for the step: schedulers may send theirs twice.
"""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from qat.errors import Interrupted

# Exit statuses are a shell's, 128 + the signal's number; SIGUSR1 is a scheduler's way to say SIGTERM.
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGHUP: 129}


class Interruptions:
    """Handles the signals of `STATUS` inside its `with` block (in the main thread; elsewhere Python cannot).

    A signal raises `Interrupted`, or between `finish_steps` and `end_at_once` is only noted in `signal`.

    Args:
        quiet: another process of the run says what a signal does.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.signal: signal.Signals | None = None
        self._finishing = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # nohup starts a program with SIGHUP ignored, a script's `&` with SIGINT, and that must stay.
            numbers = [n for n in STATUS if signal.getsignal(n) != signal.SIG_IGN]
            self._previous = {number: signal.getsignal(number) for number in numbers}
            self._register()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def finish_steps(self) -> None:
        """From here on somebody looks at `signal` after every step."""
        self._finishing = True
        self._register()  # Lightning put its own handler for SIGTERM around ours

    def end_at_once(self) -> None:
        """Nobody looks at `signal` any more."""
        self._finishing = False

    def stop(self) -> Interrupted:
        """What to raise once the step that `signal` interrupted is saved."""
        assert self.signal is not None, "only a signal stops a run this way"
        return Interrupted(STATUS[self.signal])

    def _register(self) -> None:
        for number in self._previous:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None
        name = signal.Signals(number)
        if self._finishing and not (again and name == signal.SIGINT):
            if not again:
                self.signal = name
                if not self.quiet:
                    _say(f"{name.name}: finishing this step, then saving (Ctrl-C again ends at once)")
            return
        self.signal = self.signal or name
        raise Interrupted(STATUS[name])


def _say(text: str) -> None:
    """Past Python's buffers: the signal may have come while they were being written."""
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"\n{text}\n".encode())
