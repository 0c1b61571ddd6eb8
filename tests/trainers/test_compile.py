"""Compiled blocks: the numbers of blocks that are not, one graph for all that are alike, and names for what stays out.

Most tests record graphs and run them as they are (`aot_eager`); `slow` ones have them compiled.
"""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from qat.checkpoints.export import export
from qat.checkpoints.resume import load_student
from qat.checkpoints.verify import verify
from qat.errors import UnsupportedError
from qat.sites import weights
from qat.trainers import compile
from qat.trainers.estimate import estimate
from qat.trainers.job import Job, load_job
from qat.trainers.run import train
from tests.tiny import tiny_model
from tests.trainers.jobs import metrics, saved_steps, write

LAYERS = 3
SAME = 1e-5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3", tmp_path_factory.mktemp("source") / "model", num_hidden_layers=LAYERS)


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def rules(weight: str, input: str | None) -> dict[str, Any]:
    quantized = {"match": "*_proj", "weight": weight, **({"input": input} if input else {})}
    return {"rules": [{"match": "lm_head", "skip": "x"}, {"match": "*.embed_tokens", "skip": "x"}, quantized]}


def job(folder: Path, model: Path, name: str, **changes: Any) -> Job:
    return load_job(write(folder, model, name=name, **{"steps": 4, **changes}))


def trained(job: Job, **how: Any) -> tuple[dict[str, Any], str]:
    said = io.StringIO()
    report = train(job, table=False, console=Console(file=said, width=500), **how)
    return report, said.getvalue()


def codes(job: Job) -> dict[str, torch.Tensor]:
    student, _, _ = load_student(job.folder, saved_steps(job)[-1].name)
    return {name: site.quantizer.quantize(site.weight).codes for name, site in weights(student).items()}


def close(one: Job, other: Job) -> None:
    for left, right in zip(metrics(one), metrics(other), strict=True):
        for key in ("loss", "grad_norm", "heldout_kl"):
            if left[key]:
                assert float(right[key]) == pytest.approx(float(left[key]), rel=SAME), (key, left["step"])
    first, second = codes(one), codes(other)
    assert first.keys() == second.keys() and all(torch.equal(codes, second[name]) for name, codes in first.items())


CASES: dict[str, dict[str, Any]] = {
    "weights": {"scheme": rules("int4_g64", None)},
    "both": {"scheme": rules("nvfp4", "nvfp4")},
    "each": {"scheme": rules("nvfp4", "nvfp4"), "hold_weights": False},
    "recomputed": {"scheme": rules("nvfp4", "nvfp4"), "activation_checkpointing": True},
    "ranges": {"scheme": {**rules("fp8_channel", "fp8_tensor"), "learn_inputs": True}},
    "adapters": {"scheme": {**rules("nvfp4", "nvfp4"), "learn": "none"}, "lora": {"rank": 4, "dora": True}},
    "beside": {"scheme": {**rules("int4_g64", None), "learn": "none"}, "lora": {"rank": 4, "merge": False}},
    "bf16": {"scheme": rules("nvfp4", "nvfp4"), "precision": "bf16-mixed"},
}


@pytest.mark.parametrize("case", CASES)
def test_compiled_blocks_train_as_others_do(case: str, tmp_path: Path, source: Path) -> None:
    plain, graphed = (job(tmp_path, source, f"{case}-{on}", compile=on, **CASES[case]) for on in (False, True))
    trained(plain)
    report, said = trained(graphed)
    close(plain, graphed)
    expected = [f"compiled of the {name}: {LAYERS} Qwen3DecoderLayer" for name in ("student", "teacher")]
    assert all(any(each.startswith(start) for each in report["compiled"]) for start in expected)
    assert all(start in said for start in expected)
    assert "torch.compile: compiled of the student" in (graphed.folder / "report.md").read_text()
    assert graphs() <= 4, "one for the student, or two where the first block needs no gradient, and the teacher's"
    names = [set(load_file(saved_steps(each)[-1] / "student.safetensors")) for each in (plain, graphed)]
    assert names[0] == names[1]
    export(graphed.folder, tmp_path / "out", checkpoint=saved_steps(graphed)[-1].name)
    assert verify(tmp_path / "out").ok
