"""What starting the command costs: help comes without torch, the catalogue with torch alone, an export without what
only training needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qat.checkpoints.hf import load_model
from qat.checkpoints.resume import save_best, student_tensors
from qat.scheme import Scheme
from qat.surgery import apply
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ("lightning", "datasets", "peft", "wandb", "matplotlib", "pandas", "scipy", "torch._inductor.lowering")
HEAVY = (
    *TRAINING,
    "torch",
    "torch._dynamo",
    "torch._inductor",
    "transformers",
    "triton",
    "lightning",
    "pydantic",
    "rich",
    "numpy",
)
SECONDS = 1.0  # of processor time, where torch is not needed
SCRIPT = f"""
import json, sys, time
from qat.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
heavy = [name for name in {HEAVY} if name in sys.modules]
print(json.dumps([heavy, time.process_time()]), file=sys.stderr)
"""


def started(*arguments: str) -> tuple[list[str], float]:
    """The libraries that a command has imported, and its processor seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout
    heavy, seconds = json.loads(done.stderr.splitlines()[-1])
    return heavy, seconds


@pytest.mark.parametrize("arguments", ["--help", "train --help", "analyze --help"])
def test_help_imports_no_library(arguments: str) -> None:
    heavy, seconds = started(*arguments.split())
    assert heavy == [] and seconds < SECONDS


@pytest.mark.parametrize("arguments", ["formats", "formats --json"])
def test_the_catalogue_needs_torch_alone(arguments: str) -> None:
    heavy, _ = started(*arguments.split())
    assert "torch" in heavy and set(heavy) <= {"torch", "numpy"}  # torch imports numpy


def test_an_export_imports_nothing_of_training(tmp_path: Path) -> None:
    source, run = tiny_model("llama", tmp_path / "model", num_hidden_layers=1), tmp_path / "run"
    scheme = {"rules": [{"match": "*_proj", "weight": "q4_0"}, {"match": "*", "skip": "the rest"}], "round_bf16": False}
    run.mkdir()
    (run / "job.yaml").write_text(yaml.safe_dump({"model": {"id": str(source)}, "scheme": scheme}), encoding="utf-8")
    save_best(run, student_tensors(apply(load_model(source), Scheme.model_validate(scheme))), {"step": 1})
    heavy, _ = started("export", str(run), str(tmp_path / "out.gguf"), "--target", "gguf")
    assert "transformers" in heavy and not set(heavy) & set(TRAINING)
