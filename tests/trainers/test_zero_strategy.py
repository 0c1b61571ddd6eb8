"""DeepSpeed's engine on CPU processes (gloo) against one device: curves, codes, saved states, what follows a step.

Skipped where deepspeed is not installed; `make test-deepspeed` installs it beside the environment.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from qat.cli import main
from qat.trainers.job import load_job
from tests.tiny import tiny_model
from tests.trainers.jobs import metrics
from tests.trainers.test_strategy import (
    ROOT,
    SAME_CODES,
    SMALL,
    TIMEOUT,
    close,
    codes,
    free_ports,
    job_file,
    same_codes,
)

pytestmark = [
    pytest.mark.multi,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed (make test-deepspeed)"),
]
STAGES: dict[str, dict[str, Any]] = {
    "first": {"stage": 1},
    "second": {"stage": 2},
    "third": {"stage": 3},
    "offloaded": {"stage": 3, "offload": "all"},
}
PROCESS = """
import json, os, sys
from qat.cli import main
from qat.trainers.callbacks import StepLoop
give_up = StepLoop.give_up
for port, stop, arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = port
    StepLoop.give_up = lambda loop: give_up(loop) or loop._last_step == stop  # as patience that has run out
    if status := main(arguments):
        sys.exit(status)
"""


def pair(commands: list[tuple[int | None, list[str]]]) -> None:
    """Two processes run commands one after another, each up to its step."""
    ports = free_ports(len(commands)).split(",")
    text = json.dumps([[port, stop, arguments] for port, (stop, arguments) in zip(ports, commands, strict=True)])
    processes = []
    for rank in ("0", "1"):
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, text],
                env={**environment, **group},
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    said = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-3000:] for text in said)


def curve(path: Path) -> list[dict[str, str]]:
    timed = ("seconds", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in timed} for row in metrics(load_job(path))]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    for kind, name in (("llama", "dense"), ("qwen3_moe", "experts"), ("gemma", "tied")):
        tiny_model(kind, folder / name, **{**SMALL, "moe_intermediate_size": 64})
    return folder


@pytest.fixture(scope="module")
def alone(home: Path) -> dict[str, Path]:
    files = {kind: job_file(home, kind, f"{kind}-alone") for kind in ("dense", "experts")}
    for path in files.values():
        assert main(["train", str(path)]) == 0
    return files


@pytest.fixture(scope="module")
def divided(home: Path, alone: dict[str, Path]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name, zero in STAGES.items():
        files[name] = job_file(home, "dense", name, strategy="deepspeed", deepspeed=zero, devices=2)
    files["experts"] = job_file(home, "experts", "divided", strategy="deepspeed", deepspeed={"stage": 3}, devices=2)
    files["stopped"] = job_file(home, "dense", "stopped", strategy="deepspeed", deepspeed={"stage": 3}, devices=2)
    pair([(4 if name == "stopped" else None, ["train", str(path)]) for name, path in files.items()])
    return files


@pytest.mark.parametrize("name", [*STAGES, "experts"])
def test_what_is_divided_is_trained_as_on_one_device(
    name: str, alone: dict[str, Path], divided: dict[str, Path]
) -> None:
    one = alone["experts" if name == "experts" else "dense"]
    close(one, divided[name])
    assert same_codes(one, divided[name]) >= SAME_CODES
    rows = [json.loads((load_job(path).folder / "report.json").read_text())["rows"] for path in (one, divided[name])]
    for left, right in zip(*rows, strict=True):
        assert left["tokens"] == right["tokens"] and left["nll"] == pytest.approx(right["nll"], rel=1e-5)


def test_a_stopped_run_goes_on_to_the_same_bits_and_elsewhere_along_the_same_curve(
    home: Path, divided: dict[str, Path]
) -> None:
    second = job_file(home, "dense", "other-stage", strategy="deepspeed", deepspeed={"stage": 2}, devices=2)
    plain = job_file(home, "dense", "plain")
    for path in (second, plain):
        shutil.copytree(load_job(divided["stopped"]).folder, load_job(path).folder)
    assert len(metrics(load_job(second))) == 4
    pair([(None, ["train", str(path), "--resume"]) for path in (divided["stopped"], second)])
    assert curve(divided["stopped"]) == curve(divided["third"])
    assert same_codes(divided["stopped"], divided["third"]) == 1.0
    close(second, divided["third"])
    assert main(["train", str(plain), "--resume"]) == 0
    close(plain, divided["third"])


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "a shared embedding": ("tied", 3, {}),
    "recomputed activations": ("dense", 3, {"activation_checkpointing": True}),
    "only scales": ("dense", 3, {"optim": {"lr": 1e-3, "train": "scales"}}),
    "adapters": ("dense", 3, {"lora": {"rank": 2}, "learn": "none"}),
    "refitted scales": ("dense", 3, {"learn": "refit", "optim": {"lr": 1e-3, "ema": 0.9, "refit_every": 2}}),
    "refitted scales, not divided": ("dense", 2, {"learn": "refit", "optim": {"lr": 1e-3, "refit_every": 2}}),
    "damping": ("dense", 2, {"learn": "lsq", "optim": {"lr": 1e-3, "cage": {"strength": 50, "begin": 0}}}),
    "damping, divided": ("dense", 3, {"learn": "lsq", "optim": {"lr": 1e-3, "cage": {"strength": 50, "begin": 0}}}),
    "bf16": ("dense", 3, {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("name", CASES)
def test_one_device_with_an_engine_computes_what_it_does_without(
    home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Group, engine and gathering are there, and every number is the same to rounding."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    kind, stage, changes = CASES[name]
    rules = [
        {"match": "lm_head", "skip": "kept in BF16"},
        {"match": "model.embed_tokens", "skip": "kept in BF16"},
        {"match": "*_proj", "weight": "nvfp4"},
    ]
    changes = {**changes, "scheme": {"rules": rules, "learn": changes.get("learn", "dual_lsq")}, "steps": 4}
    changes.pop("learn", None)
    slug = f"case-{[*CASES].index(name)}"
    one = job_file(home, kind, f"{slug}-alone", **changes)
    zero = job_file(home, kind, f"{slug}-zero", strategy="deepspeed", deepspeed={"stage": stage}, **changes)
    assert main(["train", str(one)]) == main(["train", str(zero)]) == 0
    tolerance = 1e-4 if name == "bf16" else 1e-5  # where an unequal last bit of the norm changes what rounds
    rows = [*zip(curve(one), curve(zero), strict=True)]
    assert rows[0][0]["loss"] == rows[0][1]["loss"]
    for left, right in rows:
        assert float(left["loss"]) == pytest.approx(float(right["loss"]), rel=tolerance)
        assert float(left["grad_norm"]) == pytest.approx(float(right["grad_norm"]), rel=10 * tolerance)
    assert codes(one).keys() == codes(zero).keys() and same_codes(one, zero) >= SAME_CODES
