"""Do the tests notice when the arithmetic is wrong? Each mutant changes one line; the tests named with it must fail.

    python tests/mutants.py                     all of them, in copies of this checkout (about ten seconds each)
    python tests/mutants.py losses evaluate     those whose file or line holds one of these words

`mutants.txt` is the table. Changes that no input can tell apart do not belong there. A survivor is a hole in the tests:
write the test, do not drop the mutant. `test_mutants.py` keeps the table true and runs it under the marker `slow`.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds for one mutant; tests that run into it did notice something
_LEFT_OUT = (
    ".git",
    ".venv*",
    ".triton*",
    ".ascend",
    ".deepspeed",
    ".llama-cpp",
    ".versions*",
    "runs",
    ".*_cache",
    "__pycache__",
    ".hypothesis",
    "build",
    "dist",
)


@dataclass(frozen=True)
class Mutant:
    """`before`, which stands in one place of `file`, becomes `after`; `tests` are pytest's arguments."""

    file: str
    before: str
    after: str
    tests: str

    def __str__(self) -> str:
        return f"{self.file}: {self.before.strip()}  ->  {self.after.strip()}"


def mutants(words: list[str] | None = None) -> list[Mutant]:
    """All mutants of mutants.txt, or those whose file or line holds one of the words.

    Raises:
        ValueError: a line that is none of `== file | tests`, `- before` and `+ after`.
    """
    found, file, tests, before = [], "", "", ""
    for line in (ROOT / "tests" / "mutants.txt").read_text(encoding="utf-8").splitlines():
        mark, text = line[:2], line[2:]
        if mark == "==":
            file, _, tests = (part.strip() for part in text.partition("|"))
        elif mark == "- ":
            before = text
        elif mark == "+ ":
            found.append(Mutant(file, before, text, tests))
        elif line and mark != "# ":
            raise ValueError(f"mutants.txt: what is {line!r}?")
    return [m for m in found if not words or any(word in str(m) for word in words)]


def mutated(mutant: Mutant) -> str:
    """The file's text with the change.

    Raises:
        ValueError: the line does not stand in the file exactly once.
    """
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    if text.count(mutant.before) != 1:
        raise ValueError(f"{mutant.file} holds {mutant.before!r} {text.count(mutant.before)} times, not once")
    return text.replace(mutant.before, mutant.after)


# --- running --------------------------------------------------------------------------------------


def _run(mutant: Mutant, changed: bool, log: Path) -> None:
    """In a process of its own: the tests in a copy of the checkout; the exit status is pytest's."""
    import shlex

    with tempfile.TemporaryDirectory(prefix="qat-mutant-") as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        if changed:
            (copy / mutant.file).write_text(mutated(mutant), encoding="utf-8")
        os.chdir(copy)
        os.environ["PYTHONPATH"] = str(copy)
        sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            import pytest

            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(mutant.tests)]))
        os.chdir("/")
    os._exit(status)


def _statuses(jobs: list[tuple[Mutant, bool]], at_once: int) -> Iterator[tuple[Mutant, bool, int | None, float, str]]:
    """(mutant, changed, pytest's status or None after `LIMIT`, seconds, output) in the order in which they end."""
    context = multiprocessing.get_context("fork")  # what is imported here need not be imported again
    logs = Path(tempfile.mkdtemp(prefix="qat-mutants-"))
    running: dict[Any, tuple[Mutant, bool, Path, float]] = {}
    waiting = list(jobs)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                mutant, changed = waiting.pop(0)
                log = logs / f"{len(waiting)}.log"
                process = context.Process(target=_run, args=(mutant, changed, log))
                process.start()
                running[process] = (mutant, changed, log, time.monotonic())
            wait([process.sentinel for process in running], timeout=1)
            for process in list(running):
                mutant, changed, log, began = running[process]
                seconds = time.monotonic() - began
                if process.exitcode is None and seconds > LIMIT:
                    process.kill()
                    process.join()
                    del running[process]
                    yield mutant, changed, None, seconds, log.read_text(errors="replace")
                elif process.exitcode is not None:
                    del running[process]
                    yield mutant, changed, process.exitcode, seconds, log.read_text(errors="replace")
    finally:
        for process in running:
            process.kill()
        shutil.rmtree(logs, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the mutants; 0 if the tests noticed all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants whose file or line holds one of these")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    chosen = mutants(parsed.words)
    for mutant in chosen:
        mutated(mutant)
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", WANDB_MODE="offline")
    import lightning  # noqa: F401 # imported once, before the forks: it takes longer than most tests
    import transformers  # noqa: F401 # likewise

    began = time.monotonic()
    sound = {m.tests: m for m in chosen}.values()
    ends = _statuses([(m, False) for m in sound], parsed.jobs)
    bad = [
        (m, text) for m, _, status, _, text in ends if status != 0 or " passed" not in text
    ]  # skipped: it says nothing
    for mutant, text in bad:
        print(f"{mutant.tests} does not pass as it is:\n{text[-2000:]}")
    if bad:
        return 2
    print(f"{len(sound)} sets of tests pass unchanged ({time.monotonic() - began:.0f} s)", flush=True)
    began, survivors = time.monotonic(), []
    ends = _statuses([(m, True) for m in chosen], parsed.jobs)
    for number, (mutant, _, status, seconds, text) in enumerate(ends, start=1):
        words = {
            0: "SURVIVED" if " passed" in text else "no test ran",
            1: "noticed",
            2: "noticed",
            None: f"noticed (no end in {LIMIT} s)",
        }
        if status not in words:
            print(text[-2000:])
        if status not in words or status == 0:
            survivors.append(mutant)
        left = (time.monotonic() - began) / number * (len(chosen) - number)
        print(f"[{number}/{len(chosen)}, {left:.0f} s left] {words.get(status, f'pytest ended with {status}')} "
              f"in {seconds:.0f} s: {mutant}", flush=True)  # fmt: skip
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants were noticed in {time.monotonic() - began:.0f} s")
    for mutant in survivors:
        print(f"not noticed by {mutant.tests}: {mutant}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
