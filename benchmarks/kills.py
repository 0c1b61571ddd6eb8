"""kill -9 at random moments of training and of export: runs resume to the same numbers, folders are whole or absent.

Every command runs as a user's process does, but forked from one that has imported everything, so that a kill lands in
the work and not in the imports. A run that left a state is resumed, any other is started again; then its metrics (but
for the times) and its best student must be those of an uninterrupted run, bit for bit. An export must verify or not be
there, over nothing and over an older export; the next export must work and leave nothing behind. Linux only.

    OMP_NUM_THREADS=1 python benchmarks/kills.py [--training 20] [--exports 20] [--seed 0]
"""

import argparse
import csv
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMES = ("seconds", "tokens_per_second")  # columns of metrics.csv that no two runs share
LOOK = 0.003  # seconds between two looks at a process
LATER = 0.03  # at most so many seconds after the moment: waiting for the disk takes no processor time

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Kill, check, and print a line per kill; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", type=int, default=20, help="kills of a training (default: %(default)s)")
    parser.add_argument("--exports", type=int, default=20, help="kills of an export (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT)]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory(prefix="qat-kills-") as folder:
        os.environ["QAT_CACHE"] = str(Path(folder) / "cache")
        trial = Trial(Path(folder), random.Random(arguments.seed))
        failed = trial.trainings(arguments.training) + trial.exports(arguments.exports)
    print(f"{'FAILED: ' + str(failed) if failed else 'all'} of {arguments.training + arguments.exports} kills"
          f"{'' if failed else ' passed'}", flush=True)  # fmt: skip
    return 1 if failed else 0


class Trial:
    """One uninterrupted run, and everything that is compared with it."""

    def __init__(self, folder: Path, moments: random.Random) -> None:
        from tests.tiny import tiny_model
        from tests.trainers.jobs import write

        self.folder, self.moments = folder, moments
        self.model = tiny_model("llama", folder / "model", num_hidden_layers=1)
        self.job = write(folder, self.model, name="whole", steps=12)
        self.log = folder / "log"
        _preload()
        self.whole = folder / "runs" / "whole"
        self._train("whole")  # compiles kernels; the second one is timed
        shutil.rmtree(self.whole)
        self._forget_text()
        self.seconds = self._timed(["train", str(self.job), "name=whole"])
        self.metrics = metrics_of(self.whole)
        print(f"uninterrupted: {len(self.metrics)} steps, {self.seconds:.2f} s of processor time", flush=True)

    def trainings(self, count: int) -> int:
        """Kill `count` trainings; returns how many did not come to the same end."""
        failed = 0
        for number, when in enumerate(self._moments(count, self.seconds), start=1):
            name = f"cut{number}"
            run = self.folder / "runs" / name
            self._forget_text()
            killed = self._killed(["train", str(self.job), f"name={name}"], when)
            rows = len(metrics_of(run, whole_lines=True))
            states = [p.name for p in (run / "checkpoints").glob("step-*")]
            problem = self._resume(name, bool(states))
            failed += bool(problem)
            left = f"{rows} steps, state {states[-1] if states else 'none'}"
            self._say("training", number, count, when, killed, left, problem)
            shutil.rmtree(run, ignore_errors=True)
        return failed

    def exports(self, count: int) -> int:
        """Kill `count` exports, every second one over an older export; returns how many were not whole."""
        if not count:
            return 0
        out, failed = self.folder / "out", 0
        command = ["export", str(self.whole), str(out)]
        seconds = self._timed(command)
        for number, when in enumerate(self._moments(count, seconds), start=1):
            over = number % 2 == 0
            shutil.rmtree(out, ignore_errors=True)
            if over:
                self._must(command)
            killed = self._killed([*command, *(["--overwrite"] if over else [])], when)
            whole = out.exists() and self._status(["verify", str(out), "--no-logits"]) == 0
            problem = "" if whole or not (out.exists() or over) else "the folder is neither whole nor absent"
            problem = problem or self._export_again(command, out)
            failed += bool(problem)
            left = ("older or new export" if over else "new export") if whole else "no folder"
            self._say("export", number, count, when, killed, left, problem)
        return failed

    # --- after a kill ------------------------------------------------------------------------------

    def _resume(self, name: str, resumable: bool) -> str:
        status = self._train(name, *(["--resume"] if resumable else []), must=False)
        if status:
            return f"it does not go on (status {status}): {self.log.read_text()[-500:]}"
        run = self.folder / "runs" / name
        if metrics_of(run) != self.metrics:
            return "other metrics"
        best = "checkpoints/best/student.safetensors"
        if (run / best).read_bytes() != (self.whole / best).read_bytes():
            return "another student"
        return "" if not _unfinished(run / "checkpoints") else "unfinished folders were left"

    def _export_again(self, command: list[str], out: Path) -> str:
        if self._status([*command, "--overwrite"]) or self._status(["verify", str(out), "--no-logits"]):
            return f"the next export fails: {self.log.read_text()[-500:]}"
        return "" if not _unfinished(out.parent) else "unfinished folders were left"

    def _say(self, what: str, number: int, count: int, when: float, killed: bool, left: str, problem: str) -> None:
        how = f"killed after {when:.2f} s" if killed else f"ended before {when:.2f} s"
        print(f"{what} {number:>2} of {count}: {how}, left {left}: {problem or 'ok'}", flush=True)

    # --- processes ---------------------------------------------------------------------------------

    def _moments(self, count: int, seconds: float) -> list[float]:
        """One in each of `count` equal parts of the time, in random order; not in its very end, which varies."""
        found = [(part + self.moments.random()) / count * 0.9 * seconds for part in range(count)]
        self.moments.shuffle(found)
        return found

    def _forget_text(self) -> None:
        shutil.rmtree(self.folder / "cache" / "data", ignore_errors=True)

    def _train(self, name: str, *more: str, must: bool = True) -> int:
        return (self._must if must else self._status)(["train", str(self.job), f"name={name}", *more])

    def _must(self, command: list[str]) -> int:
        status = self._status(command)
        if status:
            raise SystemExit(f"qat {' '.join(command)} ended with {status}:\n{self.log.read_text()}")
        return status

    def _status(self, command: list[str]) -> int:
        _, status = os.waitpid(self._start(command), 0)
        return os.waitstatus_to_exitcode(status)

    def _timed(self, command: list[str]) -> float:
        """Processor seconds of a command that works."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._must(command)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def _killed(self, command: list[str], when: float) -> bool:
        """Kill a command after so much processor time of its own, whatever else the machine does."""
        process = self._start(command)
        while _processor_seconds(process) < when:
            if os.waitpid(process, os.WNOHANG)[0]:
                return False
            time.sleep(LOOK)
        time.sleep(LATER * self.moments.random())
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        return os.WIFSIGNALED(status)

    def _start(self, command: list[str]) -> int:
        process = os.fork()
        if process:
            return process
        status = 70
        try:
            with self.log.open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                status = _main()(command)
        finally:
            os._exit(status)


def _main() -> Callable[[list[str]], int]:
    from qat.cli import main as command

    return command


def _preload() -> None:
    """Import what the commands import, and compute nothing: threads do not survive a fork."""
    import torch

    torch.set_num_threads(1)


def _processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _unfinished(folder: Path) -> list[Path]:
    return [*folder.glob(".*.partial-*"), *folder.glob(".*.old-*")]


def metrics_of(run: Path, whole_lines: bool = False) -> list[dict[str, Any]]:
    """metrics.csv without the times; `whole_lines` leaves out what a kill cut short."""
    path = run / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if whole_lines:
        rows = [row for row in rows if None not in row.values()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
