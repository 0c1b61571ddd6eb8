"""First contact of the kernels with a GPU: every operator, format and odd shape against the CPU's arithmetic.

Goes on after a failure, and writes a line of JSON per check as it goes. Compiling takes longest, so that several
processes share the checks; what is a multiple of a size stays with one of them, which then compiles once.

    python3 benchmarks/contact.py [--device cuda] [--jobs 16] [--out FOLDER] [--only TEXT]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
FATAL = ("illegal memory", "misaligned address", "unspecified launch failure")  # the process has no GPU after these


def run(share: int, shares: int, device: str, only: str, out: Path) -> None:
    """The checks of one share."""
    import torch

    from qat.kernels.load import load
    from tests.kernels.contact import LARGE, TINY, checks

    torch.set_num_threads(1)
    loaded = load() if device == "cuda" else []
    if device == "cuda" and "cuda" not in loaded:
        raise SystemExit("no kernels for cuda here: torch.cuda or Triton is missing, or QAT_KERNELS=0")
    for check in checks(device, LARGE if device == "cuda" else TINY):
        if only not in check.name or zlib.crc32(check.name.split(" M=")[0].encode()) % shares != share:
            continue
        began, row = time.perf_counter(), {"check": check.name, "limit": check.limit}
        try:
            good, found = check.holds()
            if device == "cuda":
                torch.cuda.synchronize()
            row |= {"ok": good, "found": found}
        except Exception as error:  # a check that fails in any way is a result
            row |= {"ok": False, "error": f"{type(error).__name__}: {str(error)[-1200:]}"}
        row["seconds"] = round(time.perf_counter() - began, 3)
        with out.open("a") as file:  # one short write: the shares do not mix their lines
            file.write(json.dumps(row) + "\n")
        if any(text in row.get("error", "") for text in FATAL):
            raise SystemExit(f"{check.name}: {row['error'][-200:]}; the rest of this share is not run")


def summary(out: Path) -> tuple[str, int]:
    """What the file says, by operator, and the number of failures."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in out.read_text().splitlines()]
    passed, failed = Counter[str](), Counter[str]()
    for row in rows:
        (passed if row["ok"] else failed)[row["check"].split(" ")[0]] += 1
    lines = [f"{name}: {passed[name]} passed, {failed[name]} failed" for name in sorted(passed | failed)]
    bad = [row for row in rows if not row["ok"]]
    lines += [f"FAILED {r['check']}: {r.get('error', r.get('found'))!s}"[:300] for r in bad[:40]]
    return "\n".join([*lines, f"{len(rows)} checks, {len(bad)} failed"]), len(bad)


def main() -> None:
    """Share out, wait, sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--only", default="", help="checks whose name holds this")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for checks.jsonl")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out: Path = arguments.out / "checks.jsonl"
    if arguments.share:
        run(int(arguments.share), arguments.jobs, arguments.device, arguments.only, out)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("")
    command = [sys.executable, __file__, *sys.argv[1:], "--jobs", str(arguments.jobs), "--share"]
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("stopped before all checks had run")
    )  # by `timeout`, with a group
    ended: list[int] = []
    try:
        ended += [process.wait() for process in [subprocess.Popen([*command, str(i)]) for i in range(arguments.jobs)]]
    finally:
        text, failed = summary(out)
        print(text, flush=True)
    if broken := sum(status != 0 for status in ended):
        print(f"{broken} of {len(ended)} processes ended early")
    sys.exit(bool(failed or broken))


if __name__ == "__main__":
    main()
