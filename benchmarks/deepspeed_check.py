"""DeepSpeed on one GPU: ZeRO-1, 2, 3 and 3 with offload against the same job on one plain device.

    PYTHONPATH=. python benchmarks/deepspeed_check.py [--seconds 110]

Each case is a process of its own; they run at the same time, and end when the time is over. Each gets one JSON line:
the largest relative difference of losses, gradient norms and held-out KL, the share of equal bytes of packed codes in
the exports, and whether a run that was stopped and resumed has the losses of one that was not.
"""

import argparse
import json
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
    "plain-bf16": {},
    "zero2-bf16": {"stage": 2},
    "zero3-bf16": {"stage": 3},
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
}


def case(home: Path, name: str) -> dict[str, Any]:
    """Train, stop, resume and export one case."""
    from qat.cli import main
    from qat.trainers.job import load_job
    from tests.trainers.jobs import metrics, write

    chosen = {**SETTINGS, "precision": "bf16-mixed" if name.endswith("-bf16") else "fp32"}
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
    print(json.dumps(found), flush=True)
    if CASES[name]:
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

    callbacks.StepLoop.give_up = stop  # type: ignore[method-assign] # a stop at step 3, as a signal makes one
    main(["train", str(half)])
    callbacks.StepLoop.give_up = give_up  # type: ignore[method-assign] # as it was
    if main(["train", str(half), "--resume"]):
        return {"failed": "resume"}
    again = metrics(load_job(half))
    return {
        "resumed_losses": [float(row["loss"]) for row in again],
        "resumed_equal": [row["loss"] for row in again] == [row["loss"] for row in rows],
    }


def plain_of(name: str) -> str:
    """The case without DeepSpeed that computes in the same precision."""
    return "plain-bf16" if name.endswith("-bf16") else "plain"


def compare(home: Path, name: str, found: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """What of a case differs from the plain one."""
    if "losses" not in found or "losses" not in plain:
        return {}
    said: dict[str, Any] = {}
    for key in ("losses", "norms", "kl"):
        pairs = zip(found[key], plain[key], strict=False)
        said[f"{key}_apart"] = max(abs(a - b) / abs(b) for a, b in pairs)
    folders = [home / f"export-{which}" for which in (plain_of(name), name)]
    if all(folder.is_dir() for folder in folders):
        from safetensors.torch import load_file

        one, other = (load_file(next(folder.glob("*.safetensors"))) for folder in folders)
        packed = [key for key in one if key.endswith("packed")]
        equal = sum(int((one[key] == other[key]).sum()) for key in packed)
        said["codes_equal"] = equal / max(1, sum(one[key].numel() for key in packed))
        said["same_names"] = one.keys() == other.keys()
    return said


def _start(home: Path, name: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, __file__, "--case", name, "--home", str(home)]
    with (home / f"{name}.out").open("wb") as out, (home / f"{name}.err").open("wb") as err:
        return subprocess.Popen(command, stdout=out, stderr=err)


def _result(home: Path, name: str, status: int | None) -> dict[str, Any]:
    """What a case printed; each line adds to those before."""
    said = (home / f"{name}.err").read_text(errors="replace")[-3000:]
    found: dict[str, Any] = {}
    for line in (home / f"{name}.out").read_text(errors="replace").splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    if status != 0:
        found["failed"] = "out of time" if status is None else f"status {status}"
    return {**found, "stderr": said} if "failed" in found else found


def main_check(seconds: float, only: str) -> None:
    """The cases whose name holds `only`, at the same time; the results of each when it is done."""
    from tests.tiny import tiny_model

    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        small = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 2}
        tiny_model("llama", home / "model", **small)
        processes = {name: _start(home, name) for name in CASES if only in name}
        while any(each.poll() is None for each in processes.values()) and time.monotonic() - begin < seconds:
            time.sleep(0.2)
        for process in processes.values():
            process.kill()
        results = {name: _result(home, name, process.returncode) for name, process in processes.items()}
        for name, found in results.items():
            compared = compare(home, name, found, results[plain_of(name)]) if CASES[name] else {}
            print(json.dumps({"case": name, **compared, **found}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=110.0)
    parser.add_argument("--only", default="", help="cases whose name holds this, such as bf16")
    parser.add_argument("--case", choices=[*CASES])
    parser.add_argument("--home", type=Path)
    given = parser.parse_args()
    if given.case is None:
        main_check(given.seconds, given.only)
    else:
        try:
            print(json.dumps(case(given.home, given.case)))
        except BaseException as error:
            print(json.dumps({"failed": f"{type(error).__name__}: {error}"[:800]}))
            traceback.print_exc()
