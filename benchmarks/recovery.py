"""Tables of recovery: run recipes on the embedded model, several at once where there is room, and print what each
closes of the PTQ gap.

    python benchmarks/recovery.py [--table benchmarks/tables/recovery.yaml] [--jobs 1] [--only TEXT] [a.b=c ...]

A table is a YAML file of rows: a name, and a recipe below configs/ with its overrides. Every run is a process of its
own (`qat train`), with its output in `<runs>/logs/`. Finished runs are kept and not repeated, interrupted ones go on,
so a table can be continued; a run that fails is a row that says so. Overrides on the command line reach every run.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "configs"


def rows(table: Path, only: str) -> dict[str, list[str]]:
    """Arguments of `qat train` by the row's name."""
    read: dict[str, list[str]] = yaml.safe_load(table.read_text(encoding="utf-8"))
    return {name: [str(CONFIGS / first), *more] for name, (first, *more) in read.items() if only in name}


def folder_name(row: str) -> str:
    """A run's name."""
    return re.sub(r"[^a-z0-9.]+", "-", row.lower()).strip("-")


def start(row: str, arguments: list[str], runs: Path, threads: int) -> subprocess.Popen[bytes]:
    """One run in the background."""
    from qat.checkpoints.resume import has_state

    name = folder_name(row)
    command = [sys.executable, "-m", "qat.cli", "train", *arguments, f"name={name}", f"runs={runs}"]
    command += ["--resume"] if has_state(runs / name) else []
    (runs / "logs").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (runs / "logs" / f"{name}.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def run(wanted: dict[str, list[str]], runs: Path, jobs: int, console: Console) -> None:
    """Run what is missing, `jobs` at a time."""
    missing = {row: arguments for row, arguments in wanted.items() if report(row, runs) is None}
    going: dict[str, subprocess.Popen[bytes]] = {}
    began = time.monotonic()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    try:
        while missing or going:
            while missing and len(going) < jobs:
                row = next(iter(missing))
                going[row] = start(row, missing.pop(row), runs, threads)
            time.sleep(0.2)
            for row in [row for row, process in going.items() if process.poll() is not None]:
                status, minutes = going.pop(row).returncode, (time.monotonic() - began) / 60
                said = "finished" if not status else f"FAILED with status {status}, see {runs}/logs"
                left = f"{len(missing) + len(going)} left"
                console.print(f"{minutes:5.1f} min  {row}: {said}; {left}", highlight=False, markup=False)
    finally:
        for process in going.values():
            process.terminate()  # which saves a state
        for process in going.values():
            process.wait()


def report(row: str, runs: Path) -> dict[str, Any] | None:
    """What a run reported, or None."""
    path = runs / folder_name(row) / "report.json"
    return json.loads(path.read_text()) if path.is_file() else None


def markdown(wanted: dict[str, list[str]], runs: Path) -> str:
    """The table, and the means of rows that differ by their seed only."""
    lines = ["| run | KL RTN | KL initialisation | KL student | KL gap closed | NLL gap closed | step | tokens | s |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    gaps: dict[str, list[float]] = {}
    for row in wanted:
        if (said := report(row, runs)) is None:
            lines.append(f"| {row} | failed | | | | | | | |")
            continue
        kl, closed = {entry["name"]: entry["kl"] for entry in said["rows"]}, said["gap_closed"]
        gaps.setdefault(re.sub(r" seed \d+$", "", row), []).append(closed["kl"])
        lines.append(
            f"| {row} | {kl['ptq']:.4f} | {kl['best_ptq']:.4f} | {kl['student']:.4f} | {closed['kl']:.1%} "
            f"| {closed['nll']:.1%} | {said['best_step']} | {said['tokens']:,} | {said['seconds']:.0f} |"
        )
    several = {name: values for name, values in gaps.items() if len(values) > 1}
    means = [f"{n}: {statistics.mean(v):.1%} +- {statistics.stdev(v):.1%}, {len(v)} seeds" for n, v in several.items()]
    return "\n".join(lines + (["", *means] if means else []))


def main() -> None:
    """Run what is missing, print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--table", type=Path, default=HERE / "tables" / "recovery.yaml", help="default: %(default)s")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/recovery"), help="default: %(default)s")
    arguments = parser.parse_args()
    wanted = {row: [*given, *arguments.overrides] for row, given in rows(arguments.table, arguments.only).items()}
    if not wanted:
        parser.error(f"no row of {arguments.table} holds {arguments.only!r}")
    console = Console(stderr=True)
    run(wanted, arguments.runs, arguments.jobs, console)
    print(markdown(wanted, arguments.runs), flush=True)
    sys.exit(any(report(row, arguments.runs) is None for row in wanted))


if __name__ == "__main__":
    main()
