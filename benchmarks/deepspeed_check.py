"""DeepSpeed on one GPU: ZeRO-1, 2, 3 and 3 with offload against the same job on one plain device.

    PYTHONPATH=. python benchmarks/deepspeed_check.py [--seconds 60]

Each case is a process of its own, with the time that is left as its limit, and prints one JSON line: the largest
relative difference of losses and of gradient norms, the share of equal codes, whether an export of the trained run is
the same to the byte when made again from its state, and whether a run that was stopped and resumed has the curve of
one that was not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero3-offload": {"stage": 3, "offload": "all"},
}
SETTINGS: dict[str, Any] = {
    "scheme": {
        "rules": [
            {"match": "lm_head", "skip": "kept in BF16"},
            {"match": "model.embed_tokens", "skip": "kept in BF16"},
            {"match": "re:.*_proj", "weight": "nvfp4", "input": "nvfp4"},
        ],
        "learn": "dual_lsq",
    },
    "micro_rows": 1,
    "steps": 6,
    "checkpoint_every": 3,
    "precision": "fp32",
}


def case(home: Path, name: str) -> dict[str, Any]:
    """Train, stop, resume and export one case."""
    from qat.cli import main
    from qat.trainers.job import load_job
    from tests.trainers.jobs import metrics, write

    chosen = {**SETTINGS}
    if CASES[name]:
        chosen |= {"strategy": "deepspeed", "deepspeed": CASES[name]}
    path = write(home, home / "model", name=name, **chosen)
    begin = time.monotonic()
    if main(["train", str(path)]):
        return {"failed": "train"}
    trained = time.monotonic() - begin
    rows = metrics(load_job(path))
    found: dict[str, Any] = {"seconds": round(trained, 1), "losses": [float(row["loss"]) for row in rows]}
    found["norms"] = [float(row["grad_norm"]) for row in rows]
    found["kl"] = [float(row["heldout_kl"]) for row in rows if row["heldout_kl"]]
    run = load_job(path).folder
    if main(["export", str(run), str(home / f"export-{name}")]):
        return {**found, "failed": "export"}
    if name != "plain":
        found |= _resumed(home, name, chosen, rows)
    return found


def _resumed(home: Path, name: str, chosen: dict[str, Any], rows: list[dict[str, str]]) -> dict[str, Any]:
    """The same job, whose state of step 3 is taken up by a run of its own."""
    from qat.cli import main
    from qat.trainers.job import load_job
    from tests.trainers.jobs import metrics, write

    half = write(home, home / "model", name=f"{name}-half", **{**chosen, "steps": 6})
    import qat.trainers.callbacks as callbacks

    give_up = callbacks.StepLoop.give_up

    def stop(loop: Any) -> bool:
        return give_up(loop) or loop._last_step == 3

    callbacks.StepLoop.give_up = stop  # type: ignore[method-assign]
    main(["train", str(half)])
    callbacks.StepLoop.give_up = give_up  # type: ignore[method-assign]
    if main(["train", str(half), "--resume"]):
        return {"failed": "resume"}
    again = metrics(load_job(half))
    return {
        "resumed_losses": [float(row["loss"]) for row in again],
        "resumed_equal": [row["loss"] for row in again] == [row["loss"] for row in rows],
    }


def compare(home: Path, name: str, found: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """What of a case differs from the plain one."""
    if "losses" not in found or "losses" not in plain:
        return {}
    said: dict[str, Any] = {}
    for key in ("losses", "norms", "kl"):
        pairs = zip(found[key], plain[key], strict=False)
        said[f"{key}_apart"] = max(abs(a - b) / abs(b) for a, b in pairs)
    folders = [home / f"export-{which}" for which in ("plain", name)]
    if all(folder.is_dir() for folder in folders):
        from safetensors.torch import load_file

        one, other = (load_file(next(folder.glob("*.safetensors"))) for folder in folders)
        packed = [key for key in one if key.endswith("packed")]
        equal = sum(int((one[key] == other[key]).sum()) for key in packed)
        said["codes_equal"] = equal / max(1, sum(one[key].numel() for key in packed))
        said["same_names"] = one.keys() == other.keys()
    return said


def _run(home: Path, name: str, seconds: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", name, "--home", str(home)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        said = error.stderr if isinstance(error.stderr, str) else (error.stderr or b"").decode(errors="replace")
        return {"failed": f"no answer in {seconds:.0f} s", "stderr": said[-1500:]}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"failed": f"status {done.returncode}", "stderr": done.stderr[-3000:]}
    found: dict[str, Any] = json.loads(lines[-1])
    if "failed" in found:
        found["stderr"] = done.stderr[-3000:]
    return found


def main_check(seconds: float) -> None:
    """All cases, one after another."""
    from tests.tiny import tiny_model

    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        small = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 2}
        tiny_model("llama", home / "model", **small)
        plain: dict[str, Any] = {}
        for index, name in enumerate(CASES):
            left = (end - time.monotonic()) / (len(CASES) - index) * 1.5
            begin = time.monotonic()
            found = _run(home, name, max(5.0, min(left, end - time.monotonic())))
            plain = plain or found
            compared = compare(home, name, found, plain) if name != "plain" else {}
            took = round(time.monotonic() - begin, 1)
            print(json.dumps({"case": name, "took": took, **compared, **found}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--case", choices=[*CASES])
    parser.add_argument("--home", type=Path)
    given = parser.parse_args()
    if given.case is None:
        main_check(given.seconds)
    else:
        try:
            print(json.dumps(case(given.home, given.case)))
        except BaseException as error:
            print(json.dumps({"failed": f"{type(error).__name__}: {error}"[:800]}))
            traceback.print_exc()
