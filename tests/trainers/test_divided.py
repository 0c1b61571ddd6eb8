"""Models that are divided before they have numbers: the very ones that are divided afterwards, and no bigger."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat import sharded
from qat.checkpoints.hf import load_configured
from qat.checkpoints.resume import student_tensors
from qat.surgery import apply, report
from qat.trainers import divided
from qat.trainers.footprint import job_facts, memory
from qat.trainers.job import Job, load_job
from qat.trainers.strategy import ALONE, Ranks
from tests.tiny import tiny_model
from tests.trainers.jobs import write

CPU = torch.device("cpu")
EXPERTS = {"rules": [{"match": "re:.*(_proj|experts.*)", "weight": "int4_g32_asym"}, {"match": "*", "skip": "rest"}]}
TABLE = {
    "rules": [{"match": "re:.*(_proj|embed_tokens)", "weight": "int4_g32", "input": None}, {"match": "*", "skip": "x"}]
}


def job(folder: Path, kind: str, **changes: Any) -> Job:
    model = folder / kind
    if not model.exists():
        tiny_model(kind, model)
    return load_job(write(folder, model, strategy="fsdp", devices=2, micro_rows=1, **changes))


def whole(job: Job, source: Path) -> nn.Module:
    return apply(load_configured(job.model, source), job.scheme, defer_init=True)


def logits(model: Any) -> Tensor:
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        found: Tensor = sharded.read(model, lambda: model(tokens).logits)
    return found


CASES: dict[str, dict[str, Any]] = {
    "llama": {"scheme": {"rules": [{"match": "*_proj", "weight": "nvfp4"}, {"match": "*", "skip": "rest"}]}},
    "gemma": {
        "scheme": {"rules": [{"match": "*_proj", "weight": "mxfp4", "input": "mxfp4"}, {"match": "*", "skip": "tied"}]}
    },
    "qwen3_moe": {"scheme": {**EXPERTS, "learn": "dual_lsq"}},
    "qwen3": {"scheme": {**TABLE, "learn": "lsq"}},
}


@pytest.mark.parametrize("kind", CASES)
def test_models_that_begin_divided_are_those_divided_later(kind: str, tmp_path: Path, one: None) -> None:
    wanted = job(tmp_path, kind, **CASES[kind])
    source = tmp_path / kind
    expected = whole(wanted, source)
    coverage = report(load_configured(wanted.model, source), wanted.scheme)
    student, teacher, covered, parameters = divided.load(wanted, source, source, CPU, ALONE)
    assert covered == coverage and parameters == sum(
        p.numel() for p in load_configured(wanted.model, source).parameters()
    )
    assert sharded.is_divided(student) and teacher is not None and sharded.is_divided(teacher)
    assert not any(p.requires_grad for p in teacher.parameters())
    own, other = student_tensors(student), student_tensors(expected)
    assert own.keys() == other.keys()
    assert [name for name in own if not torch.equal(own[name].nan_to_num(7), other[name].nan_to_num(7))] == []
    assert torch.equal(logits(student), logits(expected))
    assert torch.equal(logits(teacher), logits(load_configured(wanted.model, source)))
    trained = {name for name, p in expected.named_parameters() if p.requires_grad}
    assert {name for name, p in student.named_parameters() if p.requires_grad} == trained
    assert [str(getattr(model.config, "dtype", "")) for model in (student, expected)] == ["torch.float32"] * 2


def test_a_process_never_holds_more_than_its_share_and_one_block(
    tmp_path: Path, two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job(tmp_path, "llama")
    model: Any = whole(wanted, tmp_path / "llama")
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    most: list[int] = []
    fill = divided._Fill.__call__

    def watched(self: Any, block: nn.Module) -> None:
        fill(self, block)
        tensors = (*self.model.parameters(), *self.model.buffers())
        most.append(sum(sharded.share(t).nbytes for t in tensors if not t.is_meta))

    monkeypatch.setattr(divided._Fill, "__call__", watched)
    student, *_ = divided.load(wanted, tmp_path / "llama", None, CPU, Ranks(0, 2, 0, 2))
    blocks = [sum(t.nbytes for t in (*block.parameters(), *block.buffers())) for block in model.model.layers]
    outside = everything - sum(blocks)
    assert len(most) == len(blocks) + 1
    assert max(most) <= 0.51 * everything + max(*blocks, outside) / 2
    assert sum(sharded.share(t).nbytes for t in (*student.parameters(), *student.buffers())) < 0.51 * everything


def test_files_of_another_type_are_read_exactly(tmp_path: Path, one: None) -> None:
    """A weight between two BF16 numbers, and a class whose buffers are rounded with its type."""
    wanted = job(tmp_path, "llama")
    file = tmp_path / "llama" / "model.safetensors"
    assert next(divided._mapped(wanted.model, file.parent).parameters()).dtype is torch.bfloat16
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].float() + 2**-20
    save_file(tensors, file, {"format": "pt"})
    student, *_ = divided.load(wanted, file.parent, None, CPU, ALONE)
    assert torch.equal(sharded.whole(student.get_parameter(name)), tensors[name])


def test_what_needs_whole_models_is_said(tmp_path: Path) -> None:
    assert divided.obstacle(job(tmp_path, "llama")) is None and divided.first(job(tmp_path, "llama"))
    walk = [{"kind": "smooth"}, {"kind": "gptq", "sequential": True}]
    rules = [{"match": "*_proj", "weight": "nvfp4"}, {"match": "*", "skip": "rest"}]
    assert divided.first(job(tmp_path, "llama", scheme={"rules": rules, "init": walk}))
    for changes, expected in (
        ({"lora": {"rank": 2}}, "lora puts its adapters on whole models"),
        ({"scheme": {"rules": rules, "init": [*walk, "reconstruct"]}}, "reconstruct of scheme.init"),
        ({"scheme": {"rules": [{**rules[0], "init": ["reconstruct"]}, rules[1]]}}, "reconstruct of scheme.init"),
        ({"data": {"source": "teacher", "seq_len": 32}}, "the teacher writes text"),
    ):
        wanted = job(tmp_path, "llama", **changes)
        assert expected in (divided.obstacle(wanted) or "") and not divided.first(wanted)
    assert not divided.first(load_job(tmp_path / "tiny.yaml", ["devices=1", "data.source=embedded"]))


def test_the_plan_of_a_large_model_fits() -> None:
    """What made 70B impossible: every device held all of it before the first step."""
    wanted = load_job(Path(__file__).parents[2] / "configs" / "qad" / "llama-3.1-70b-nvfp4-64gpu.yaml")
    facts = job_facts(wanted)
    parts = memory(wanted, facts, "cuda", True)
    assert sum(parts.values()) < 0.95 * 80 * 2**30 and parts["initialisation, beyond that"] == 0
    initial = divided.initial_bytes(wanted, facts, parts)
    assert initial < 30 * 2**30 < 4 * facts.student.parameters
    factored = wanted.model_copy(update={"scheme": wanted.scheme.model_validate(
        {**wanted.scheme.model_dump(), "init": [{"kind": "gptq", "sequential": True}]}
    )})  # fmt: skip
    more = divided.initial_bytes(factored, job_facts(factored), parts) - initial
    assert more > 8 * 28672**2, "GPTQ inverts the matrix of the widest input in float64"
    assert divided.first(factored)
