"""A progress bar on stderr that appears only when the work turns out to be slow.

Short work (a cache hit, a small file) prints nothing, so that scripts and `--json` output stay clean.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

QUIET_SECONDS = 2.0


@contextlib.contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield `advance(count)`; the bar is drawn once `QUIET_SECONDS` have passed and removed at the end.

    Args:
        description: what is being done, for example "tokenising embedded".
        total: how many counts make it complete; None when nobody knows.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=total)
    begin, shown = time.monotonic(), False

    def advance(count: int) -> None:
        nonlocal shown
        if not shown and time.monotonic() - begin > QUIET_SECONDS:
            shown = True
            bar.start()
        bar.advance(task, count)

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
