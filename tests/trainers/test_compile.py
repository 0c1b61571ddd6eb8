"""Compiled blocks: the numbers of blocks that are not, one graph for all that are alike, and names for what stays out.

Graphs are recorded and run as they are (`aot_eager`), which leaves the arithmetic to be equal to the bit; `slow` has
them compiled.
"""

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qat import Scheme, apply, calibrate
from qat.checkpoints.export import export
from qat.checkpoints.resume import load_student
from qat.checkpoints.verify import verify
from qat.errors import UnsupportedError
from qat.lora import LoraConfig, attach
from qat.sharded import blocks
from qat.sites import weights
from qat.trainers import compile
from qat.trainers.estimate import estimate
from qat.trainers.job import Job, load_job
from qat.trainers.run import train
from tests.tiny import tiny_model
from tests.trainers.jobs import metrics, saved_steps, write

LAYERS = 2
SAME = 1e-5
IDS = torch.arange(64).view(2, 32) * 5 % 384


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3", tmp_path_factory.mktemp("source") / "model", num_hidden_layers=LAYERS)


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compile, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    logging.disable(logging.INFO)  # Dynamo's own traces, which pytest would format
    yield
    logging.disable(logging.NOTSET)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def rules(weight: str, input: str | None = None, **changes: Any) -> dict[str, Any]:
    skipped = [{"match": match, "skip": "x"} for match in ("lm_head", "*.embed_tokens")]
    quantized = {"match": "*_proj", "weight": weight, **({"input": input} if input else {})}
    return {"rules": [*skipped, quantized], **changes}


# --- runs -----------------------------------------------------------------------------------------


def job(folder: Path, model: Path, name: str, **changes: Any) -> Job:
    return load_job(write(folder, model, name=name, **changes))


def trained(job: Job, **how: Any) -> tuple[dict[str, Any], str]:
    said = io.StringIO()
    report = train(job, table=False, console=Console(file=said, width=500), **how)
    return report, said.getvalue()


def codes(job: Job) -> dict[str, Tensor]:
    student, _, _ = load_student(job.folder, sorted(saved_steps(job))[-1].name)
    return {name: site.quantizer.quantize(site.weight).codes for name, site in weights(student).items()}


def close(one: Job, other: Job, tolerance: float = SAME) -> None:
    for left, right in zip(metrics(one), metrics(other), strict=True):
        for key in ("loss", "grad_norm", "heldout_kl"):
            if left[key]:
                assert float(right[key]) == pytest.approx(float(left[key]), rel=tolerance), (key, left["step"])


def same_codes(one: Job, other: Job) -> None:
    first, second = codes(one), codes(other)
    assert first.keys() == second.keys() and all(torch.equal(codes, second[name]) for name, codes in first.items())


@pytest.mark.parametrize(
    "changes", [{}, {"activation_checkpointing": True, "precision": "bf16-mixed"}], ids=["held", "recomputed"]
)
def test_a_compiled_run_is_the_run(changes: dict[str, Any], tmp_path: Path, source: Path) -> None:
    """The same losses, codes and names of tensors, resumed after two steps; and what its report says."""
    more = {"scheme": rules("nvfp4", "nvfp4"), **changes}
    for steps in (2, 4):
        plain, graphed = (job(tmp_path, source, f"run-{on}", compile=on, steps=steps, **more) for on in (False, True))
        trained(plain, resume_run=steps > 2)
        report, said = trained(graphed, resume_run=steps > 2)
    assert graphs() == 2, "one for the student's blocks and one for the teacher's"
    close(plain, graphed)
    same_codes(plain, graphed)
    for name in ("student", "teacher"):
        start = f"compiled of the {name}: {LAYERS} Qwen3DecoderLayer"
        assert start in said and any(each.startswith(start) for each in report["compiled"])
    assert "torch.compile: compiled of the student" in (graphed.folder / "report.md").read_text()
    last = sorted(saved_steps(graphed))[-1]
    names = [set(load_file(run.folder / "checkpoints" / last.name / "student.safetensors")) for run in (plain, graphed)]
    assert names[0] == names[1]
    export(graphed.folder, tmp_path / "out", checkpoint=last.name)
    assert verify(tmp_path / "out").ok


@pytest.mark.slow
def test_a_run_that_the_compiler_has_taken_apart(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "BACKEND", "inductor")
    more = {"scheme": rules("int4_g64"), "steps": 4}
    plain, graphed = (job(tmp_path, source, f"run-{on}", compile=on, **more) for on in (False, True))
    trained(plain)
    report, _ = trained(graphed)
    assert f"compiled of the student: {LAYERS} Qwen3DecoderLayer (inductor" in report["compiled"][0]
    close(plain, graphed)
    same_codes(plain, graphed)


# --- blocks ---------------------------------------------------------------------------------------


def quantized(kind: str, folder: Path, scheme: dict[str, Any], lora: dict[str, Any] | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model(kind, folder / kind, num_hidden_layers=LAYERS), dtype=torch.float32
    )
    settled = Scheme.model_validate({"init": [], **scheme})
    apply(model, settled)
    calibrate(model, [{"input_ids": IDS}], settled)
    if lora is not None:
        attach(model, LoraConfig.model_validate({"rank": 4, **lora}))
        for name, parameter in model.named_parameters():
            if name.endswith("lora.B"):
                nn.init.normal_(parameter, std=0.05)
    return model.train()


def passed(model: Any) -> list[Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(**BATCH, labels=IDS, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


BATCH = {"input_ids": IDS, "position_ids": torch.arange(32).expand(2, 32)}


def compiled(model: Any) -> tuple[compile.Compiled, list[compile.Block]]:
    of = compile.Compiled(compile._quiet)
    found = compile.blocks_of(model, "student", of)
    compile.try_blocks(model, "student", found, BATCH)
    compile._summarise({"student": found}, of, 0.0)
    for block in found:
        block.put()
    of.on = True
    return of, found


MOE = {"rules": [*rules("nvfp4")["rules"][:2], {"match": "*.mlp.gate", "skip": "x"}, rules("nvfp4")["rules"][2]]}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "inputs": ("qwen3", rules("nvfp4", "nvfp4"), None),
    "ranges": ("qwen3", rules("fp8_channel", "fp8_tensor", learn_inputs=True), None),
    "adapters": ("qwen3", rules("nvfp4", "nvfp4", learn="none"), {"dora": True}),
    "beside": ("qwen3", rules("int4_g64", learn="none"), {"merge": False}),
    "experts": ("qwen3_moe", MOE, None),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_compute_the_same_as_one_graph(case: str, tmp_path: Path) -> None:
    kind, scheme, lora = CASES[case]
    model = quantized(kind, tmp_path, scheme, lora)
    before, roundings = counted(model)
    of, found = compiled(model)
    assert not any(block.reason for block in found) and len(of.sentences) == 1
    passed(model)
    after, recorded = counted(model)
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert recorded == roundings, "an input is rounded once for all its readers, forward and backward"


def counted(model: Any) -> tuple[list[Tensor], dict[str, int]]:
    """`passed`, and how often which of our operators rounded."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = passed(model)
    return found, {each.key: each.count for each in profile.key_averages() if each.key.startswith("qat::fake")}


class Branching(nn.Module):
    """Does what depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x if bool((x.sum() > 0).item()) else 2 * x


def test_what_cannot_be_compiled_is_named_and_runs_as_it_is(tmp_path: Path) -> None:
    model = quantized("qwen3", tmp_path, rules("int4_g64"))
    model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp, Branching())
    before = passed(model)
    of, found = compiled(model)
    assert found[0].reason is None and "data-dependent" in str(found[1].reason)
    assert of.sentences[0].startswith("compiled of the student: 1 Qwen3DecoderLayer (")
    assert of.sentences[1] == f"not compiled of the student: 1 Qwen3DecoderLayer: {found[1].reason}"
    assert all(torch.equal(a, b) for a, b in zip(before, passed(model), strict=True))
    for block in found:
        block.take_off()
    assert not any("forward" in block.__dict__ for block in blocks(model))


def test_a_graph_that_fails_later_is_named_and_left(tmp_path: Path) -> None:
    """The modes that a first micro-batch did not have may be too many."""
    model = quantized("qwen3", tmp_path, rules("int4_g64"))
    of, found = compiled(model)
    before = passed(model)
    with torch._dynamo.config.patch(recompile_limit=1):
        model.model.layers[0].self_attn.scaling *= 2.0
        assert not torch.equal(passed(model)[0], before[0])
    assert of.sentences[-1].startswith(
        "no longer compiled: student.model.layers.0 (Qwen3DecoderLayer): FailOnRecompile"
    )
    assert [block.reason is None for block in found] == [False, True]


@pytest.mark.parametrize(
    ("scheme", "lora", "words"),
    [
        (rules("nvfp4", "nvfp4", activation_rule="compressed_tensors"), None, "nvfp4 inputs by the rule compressed_t"),
        (rules("int4_g32", learn="none"), {"base": "packed"}, "weights that are held packed"),
    ],
)
def test_blocks_that_would_compute_something_else_are_not_tried(
    scheme: dict[str, Any], lora: dict[str, Any] | None, words: str, tmp_path: Path
) -> None:
    model = quantized("qwen3", tmp_path, scheme, lora)
    of, _ = compiled(model)
    assert graphs() == 0 and len(of.sentences) == 1
    assert of.sentences[0].startswith(f"not compiled of the student: {LAYERS} Qwen3DecoderLayer: {words}")


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_divided_models_are_refused(strategy: str, tmp_path: Path, source: Path) -> None:
    wanted = job(tmp_path, source, "divided", compile=True, strategy=strategy, devices=2)
    with pytest.raises(UnsupportedError, match="use compile=false or strategy=ddp"):
        train(wanted)
    assert any("use compile=false or strategy=ddp" in note for note in estimate(wanted).notes)
