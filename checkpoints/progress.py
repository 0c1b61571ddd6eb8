"""How slow work shows that it goes on: a bar on a terminal, a plain line from time to time anywhere else.

Everything goes to stderr. Short work (a cache hit, a small file) prints nothing, so that scripts and `--json` output
stay clean. All bars of a process share one display, because a terminal has only one last line.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

QUIET_SECONDS = 2.0  # before a bar is drawn
FIRST_LINE_SECONDS, LINE_SECONDS = 10.0, 30.0  # without a terminal: before the first line, and between lines

T = TypeVar("T")
_muted = False


def mute() -> None:
    """Show nothing from here on, in this process: another one of the same run does."""
    global _muted
    _muted = True


@contextlib.contextmanager
def progress(description: str, total: int | None, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Yield `advance(count)` for the time of some work.

    Args:
        description: what is being done, for example "packing".
        total: how many counts make it complete; None when nobody knows.
        unit: what is counted, for example "tokens".
    """
    meter = Meter(description, total, unit=unit)
    try:
        yield meter.advance
    except BaseException:
        meter.close(complete=False)
        raise
    meter.close()


def counted(items: Iterable[T], description: str, total: int, unit: str = "") -> Iterator[T]:
    """The items, each counted once it has been worked on."""
    with progress(description, total, unit) as advance:
        for item in items:
            yield item
            advance(1)


class Meter:
    """Counts some work and shows it; `close` it in every case.

    Args:
        description, total, unit: as in `progress`.
        done: how much was complete before this process began.
        quiet_seconds: how long a bar waits before it is drawn.
    """

    def __init__(
        self, description: str, total: int | None, *, unit: str = "", done: int = 0, quiet_seconds: float | None = None
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = self._before = done
        self.note = ""
        self._began = time.monotonic()
        self._terminal = sys.stderr is not None and sys.stderr.isatty() and not _muted
        self._quiet = QUIET_SECONDS if quiet_seconds is None else quiet_seconds
        self._next_line = self._began + FIRST_LINE_SECONDS
        self._lines = 0
        self._task: Any = None

    def advance(self, count: int, note: str = "") -> None:
        """`count` more are done; `note` says more about the last of them."""
        self.done += count
        self.note = note
        now = time.monotonic()
        if not self._terminal:
            if now >= self._next_line:
                self._line(now)
                self._next_line = now + LINE_SECONDS
            return
        if self._task is None and now - self._began > self._quiet:
            self._task = _display.show(self)
        if self._task is not None:
            _display.update(self._task, self)

    def say(self, text: str) -> None:
        """Print a line of text without disturbing the bar."""
        _display.say(text)

    def close(self, complete: bool = True) -> None:
        """Remove the bar; without a terminal, work that was slow enough to be shown ends with a line."""
        if self._task is not None:
            _display.hide(self._task)
            self._task = None
        if complete and not self._terminal and (self._lines or time.monotonic() >= self._next_line):
            self._line(time.monotonic())
        self._next_line = float("inf")  # closed twice says nothing twice
        self._lines = 0

    def _line(self, now: float) -> None:
        """For example: teacher text: 1,200 of 8,192 tokens (15%), 136/s, 0:51 left"""
        seconds = max(now - self._began, 1e-9)
        rate = (self.done - self._before) / seconds
        of = "" if self.total is None else f" of {self.total:,}"
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        unit = f" {self.unit}" if self.unit else ""
        left = f"{_clock((self.total - self.done) / rate)} left" if self.total and rate else ""
        if self.total is None or self.done >= self.total:
            left = f"{_clock(seconds)} so far"
        parts = [f"{self.done:,}{of}{unit}{share}", f"{rate:.3g}/s", left, self.note]
        self._lines += 1
        _print(f"{self.description}: {', '.join(part for part in parts if part)}")


def _print(text: str) -> None:
    if sys.stderr is not None and not _muted:  # print would take stdout for None
        print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Display:
    """The one live display of the process, there while at least one bar is."""

    def __init__(self) -> None:
        self.bars: Progress | None = None

    def show(self, meter: Meter) -> Any:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        if self.bars is None:
            bar = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self.bars = Progress(*bar, *times, console=Console(stderr=True), transient=True)
            self.bars.start()
        return self.bars.add_task(meter.description, total=meter.total, completed=meter.done, note=meter.note)

    def update(self, task: Any, meter: Meter) -> None:
        if self.bars is not None:
            self.bars.update(task, completed=meter.done, note=meter.note)

    def hide(self, task: Any) -> None:
        if self.bars is None:
            return
        self.bars.remove_task(task)
        if not self.bars.tasks:
            self.bars.stop()
            self.bars = None

    def say(self, text: str) -> None:
        if self.bars is not None:
            self.bars.console.print(text, highlight=False, soft_wrap=True)
        else:
            _print(text)


_display = _Display()
