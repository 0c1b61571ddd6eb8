"""One whole road on a tiny random model: train, go on exactly after a kill, export, verify, generate packed,
in every pair of formats that has a way of its own through the kernels.

Everything goes through the command line where there is a command. Goes on after a failure, and writes a line of JSON
per step as it goes.

    python3 benchmarks/road.py [--device cuda|cpu] [--out FOLDER]
"""

import argparse
import csv
import json
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
PAIRS = (("nvfp4", "nvfp4"), ("int4_g64", None), ("int8_channel", "int8_token"), ("fp8_channel", "fp8_token"),
         ("mxfp4", "mxfp4"))  # fmt: skip
WAIT = 120  # seconds for a process to save its first state


class Road:
    """Runs steps by name, and writes down what each gave."""

    def __init__(self, folder: Path, out: Path, device: str) -> None:
        self.folder, self.out, self.device = folder, out / "road.jsonl", device
        self.failed: list[str] = []
        self.out.write_text("")

    def step(self, name: str, run: Callable[[], Any]) -> None:
        """One step; an exception of any kind is its result."""
        began, row = time.perf_counter(), {"step": name}
        try:
            row |= {"ok": True, "found": run()}
        except BaseException as error:  # a SystemExit of the command too
            if isinstance(error, KeyboardInterrupt):
                raise
            row |= {"ok": False, "error": traceback.format_exc()[-2000:]}
            self.failed.append(name)
        row["seconds"] = round(time.perf_counter() - began, 2)
        with self.out.open("a") as file:
            file.write(json.dumps(row, default=str) + "\n")
        said = str(row.get("found") if row["ok"] else row["error"].strip().splitlines()[-1])[:300]
        print(f"{'ok' if row['ok'] else 'FAILED'} {name} ({row['seconds']} s): {said}", flush=True)

    def job(self, name: str, model: Path, weight: str, input: str | None, steps: int) -> Path:
        """The YAML file of a short run."""
        rules = [{"match": "lm_head", "skip": "head"}, {"match": "model.embed_tokens", "skip": "table"},
                 {"match": "*_proj", "weight": weight, "input": input}]  # fmt: skip
        said = {
            "name": name,
            "model": {"id": str(model)},
            "scheme": {"rules": rules},
            "data": {"source": "embedded", "seq_len": 64, "max_tokens": 16384},
            "eval": {"data": {"source": "heldout", "seq_len": 64, "max_tokens": 2048}, "tokens": 256, "every": 2},
            "optim": {"lr": 1e-3, "ema": 0.9},
            "steps": steps,
            "rows": 4,
            "micro_rows": 2,
            "checkpoint_every": 2,
            "runs": str(self.folder / "runs"),
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(said))  # which is YAML
        return path


def qat(*arguments: object) -> None:
    """A `qat` command in this process.

    Raises:
        RuntimeError: its status is not 0.
    """
    from qat.cli import main

    if status := main([str(argument) for argument in arguments]):
        raise RuntimeError(f"qat {arguments[0]} ended with status {status}")


def curve(run: Path) -> list[tuple[str, ...]]:
    """Step, loss, gradient norm and held-out KL of every step."""
    with (run / "metrics.csv").open(newline="") as file:
        return [(r["step"], r["loss"], r["grad_norm"], r["heldout_kl"]) for r in csv.DictReader(file)]


def killed(road: Road, path: Path) -> str:
    """Train in a process of its own until a state is saved, and kill it."""
    run = road.folder / "runs" / path.stem
    process = subprocess.Popen([sys.executable, "-m", "qat.cli", "train", str(path)], cwd=ROOT)
    end = time.monotonic() + WAIT
    try:
        while not any((p / "state.json").is_file() for p in (run / "checkpoints").glob("step-*")):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no state was saved (status {process.poll()})")
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return f"killed after {len(curve(run))} steps"


def resumed(road: Road, whole: Path, cut: Path) -> str:
    """Go on, and compare with the run that nobody stopped."""
    qat("train", cut, "--resume")
    one, other = (curve(road.folder / "runs" / path.stem) for path in (whole, cut))
    if one != other:
        raise RuntimeError(f"another curve: {one} and {other}")
    return f"{len(one)} steps, equal to the last bit"


def generated(road: Road, export: Path) -> dict[str, Any]:
    """Logits of packed weights on the device beside the dense reading of the same files, and tokens written in the
    dtype that is served. Both logits are in float32: in BF16, quantized inputs would round to other neighbours. Some do
    here, too, because dense weights are rounded to BF16, which moves a random model by up to 6 %."""
    import torch

    from qat.checkpoints.exported import load_exported
    from qat.engines.transformers import load_packed
    from qat.serving.matmul import QuantizedLinear
    from qat.serving.packed import PackedLinear

    model, dense = load_packed(export, torch.float32, road.device), load_exported(export)
    found: dict[str, Any] = {
        kind.__name__: sum(isinstance(m, kind) for m in model.modules()) for kind in (PackedLinear, QuantizedLinear)
    }
    for tokens in (1, 17):
        ids = (torch.arange(tokens) * 31 + 5).remainder(model.config.vocab_size)[None]
        with torch.inference_mode():
            ours, theirs = model(input_ids=ids.to(road.device)).logits.float().cpu(), dense(input_ids=ids).logits
        found[f"error of {tokens} tokens"] = error = round(float((ours - theirs).norm() / theirs.norm()), 5)
        if not error < 0.1:
            raise RuntimeError(f"logits of {tokens} tokens are off by {error}: {found}")
    model, ids = load_packed(export, device=road.device), torch.arange(3, 20)[None].to(road.device)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16)
    return {**found, "written": written[0, ids.shape[1] :].tolist()}


def main() -> None:
    """The road, for every pair of formats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for road.jsonl")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    from tests.tiny import tiny_model

    with tempfile.TemporaryDirectory() as scratch:
        road = Road(Path(scratch), arguments.out, arguments.device)
        model = tiny_model("llama", road.folder / "model")
        whole, cut = (road.job(name, model, *PAIRS[0], steps=6) for name in ("whole", "cut"))
        road.step("train", lambda: qat("train", whole))
        road.step("kill", lambda: killed(road, cut))
        road.step("resume", lambda: resumed(road, whole, cut))
        for weight, input in PAIRS:
            name = "whole" if (weight, input) == PAIRS[0] else f"{weight}-{input}"
            run, out = road.folder / "runs" / name, road.folder / "exports" / name
            if name != "whole":
                path = road.job(name, model, weight, input, steps=2)
                road.step(f"train {name}", lambda path=path: qat("train", path))
            road.step(f"export {name}", lambda run=run, out=out: qat("export", run, out))
            road.step(f"verify {name}", lambda out=out: qat("verify", out))
            road.step(f"generate {name}", lambda out=out: generated(road, out))
        print(f"{len(road.failed)} steps failed: {', '.join(road.failed)}" if road.failed else "the whole road")
        sys.exit(bool(road.failed))


if __name__ == "__main__":
    main()
