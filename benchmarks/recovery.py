"""The recovery table: run the shipped recipes on the embedded model and print what each closes of the PTQ gap.

    python benchmarks/recovery.py [--seeds 3] [--runs runs/recovery] [a.b=c ...]

Finished runs are kept and not repeated, so an interrupted table goes on where it stopped. Overrides reach every run.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[1] / "configs"
NVFP4 = ROOT / "qad" / "smollm2-135m-nvfp4.yaml"


def cases(seeds: int) -> list[tuple[str, Path, list[str]]]:
    """(row, recipe, overrides) in the order of the table."""
    seeded = [(f"NVFP4 W4A4 QAD seed {seed}", NVFP4, [f"seed={seed}"]) for seed in range(seeds)]
    return [
        *seeded[:1],
        ("INT4 g64 W4A16 QAD", ROOT / "qad" / "smollm2-135m-int4-g64.yaml", []),
        ("MXFP4 W4A4 QAD", ROOT / "qad" / "smollm2-135m-mxfp4.yaml", []),
        ("NVFP4 W4A4 QAT", NVFP4, ["method=qat"]),
        *seeded[1:],
    ]


def main() -> None:
    """Run what is missing, print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/recovery"))
    arguments = parser.parse_args()
    from qat.checkpoints.resume import has_state
    from qat.kernels.load import load_for_training
    from qat.trainers.job import load_job
    from qat.trainers.run import train

    load_for_training()  # as the command line does
    console = Console(stderr=True)
    reports = {}
    for row, recipe, changes in cases(arguments.seeds):
        name = row.lower().replace(" ", "-")
        job = load_job(recipe, [*arguments.overrides, *changes, f"name={name}", f"runs={arguments.runs}"])
        path = job.folder / "report.json"
        if not path.is_file():
            console.rule(row)
            train(job, resume_run=has_state(job.folder), console=console, table=False)
        reports[row] = json.loads(path.read_text())
    print("| run | KL RTN | KL initialisation | KL student | KL gap closed | NLL gap closed | step |")
    print("|---|---|---|---|---|---|---|")
    for row, report in reports.items():
        kl = {entry["name"]: entry["kl"] for entry in report["rows"]}
        closed = report["gap_closed"]
        print(
            f"| {row} | {kl['ptq']:.4f} | {kl['best_ptq']:.4f} | {kl['student']:.4f} | {closed['kl']:.1%} "
            f"| {closed['nll']:.1%} | {report['best_step']} |"
        )
    gaps = [report["gap_closed"]["kl"] for row, report in reports.items() if "seed" in row]
    if len(gaps) > 1:
        print(f"\nNVFP4 QAD over {len(gaps)} seeds: {statistics.mean(gaps):.1%} +- {statistics.stdev(gaps):.1%}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
