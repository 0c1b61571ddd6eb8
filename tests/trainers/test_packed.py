"""Jobs whose model is quantized already: the scheme that follows from it, runs that go on from it, what is refused."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from qat.checkpoints.export import export
from qat.checkpoints.exported import load_exported
from qat.checkpoints.hf import resolve
from qat.checkpoints.layouts import TARGETS, open_export
from qat.checkpoints.resume import load_student
from qat.checkpoints.verify import verify
from qat.errors import ConfigError
from qat.sites import weights
from qat.trainers.adapted import first_place
from qat.trainers.estimate import estimate
from qat.trainers.job import load_job
from qat.trainers.run import train
from qat.trainers.why import moved
from tests.checkpoints.exports import TARGET, export_pair, forward_weights, quantized, quiet_export
from tests.checkpoints.layouts.test_mxfp4 import EXPERTS, GPT_OSS
from tests.checkpoints.test_packed import by_the_library
from tests.tiny import tiny_model
from tests.trainers.jobs import saved_steps, write

MORE: dict[str, Any] = {"optim": {"lr": 5e-3, "lora_lr": 0.02}, "steps": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3", tmp_path_factory.mktemp("source") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "nvfp4"
    export_pair(source, folder, ("nvfp4", "nvfp4"))
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def path(folder: Path, model: Path, teacher: Path | None, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    """A job on a packed model, without a scheme unless one is given."""
    file = write(folder, model, **({"teacher": {"id": str(teacher)}} if teacher else {}), **{**MORE, **changes})
    job = yaml.safe_load(file.read_text())
    if "scheme" not in changes:
        del job["scheme"]
    file.write_text(yaml.safe_dump({key: value for key, value in job.items() if key not in drop}))
    return file


def test_the_scheme_follows_from_the_checkpoint(tmp_path: Path, source: Path, checkpoint: Path) -> None:
    job = load_job(path(tmp_path, checkpoint, source))
    rules = {rule.match: (rule.weight, rule.input, rule.skip is not None) for rule in job.scheme.rules}
    assert rules.pop("lm_head") == rules.pop("*.embed_tokens") == (None, None, True)
    assert len(rules) == 7 and set(rules.values()) == {("nvfp4", "nvfp4", False)} and job.scheme.init == ()
    learned = load_job(path(tmp_path, checkpoint, source, scheme={"learn": "none"}))
    assert learned.scheme.learn == "none" and learned.scheme.rules == job.scheme.rules


def test_layers_that_are_treated_apart_get_rules_of_their_own(tmp_path: Path, source: Path) -> None:
    tall = tiny_model("qwen3", tmp_path / "tall", num_hidden_layers=3)
    rules = [
        {"match": "model.layers.0.*", "skip": "the first"},
        {"match": "*.self_attn.*_proj", "weight": "int4_g32"},
        {"match": "*_proj", "weight": "int8_channel", "input": "int8_token"},
        {"match": "*", "skip": "the rest"},
    ]
    quiet_export(quantized(tall, rules), tall, tmp_path / "mixed")
    job = load_job(path(tmp_path, tmp_path / "mixed", tall))
    treated = {rule.match: (rule.weight, rule.input) for rule in job.scheme.rules}
    assert treated["model.layers.0.mlp.down_proj"] == treated["model.layers.0.self_attn.q_proj"] == (None, None)
    assert treated["*.q_proj"] == ("int4_g32", None) and treated["*.down_proj"] == ("int8_channel", "int8_token")


@pytest.mark.parametrize("lora", [None, {"rank": 4, "base": "packed"}], ids=["dense", "packed"])
def test_a_run_begins_at_the_checkpoint_and_its_export_is_the_trained_student(
    lora: dict[str, Any] | None, tmp_path: Path, source: Path, checkpoint: Path
) -> None:
    changes = {"lora": lora, "scheme": {"learn": "none"}} if lora else {}
    job = load_job(path(tmp_path, checkpoint, source, **changes))
    said = io.StringIO()
    report = train(job, table=False, console=Console(file=said, width=200))
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["bf16"]["kl"] == pytest.approx(0, abs=1e-6) and rows["ptq"]["kl"] == rows["best_ptq"]["kl"] > 0
    start, exported = load_file(job.folder / "checkpoints" / "start" / "codes.safetensors"), open_export(checkpoint)
    for name, module in exported.modules.items():
        q = TARGETS[exported.METHOD].unpack(module, exported.layer(name))
        assert torch.equal(start[f"{name} codes"], q.codes)
        assert torch.equal(start[f"{name} scale"], q.scales.effective())
    last = saved_steps(job)[-1].name
    export(job.folder, tmp_path / "out", checkpoint=last)
    assert verify(tmp_path / "out").ok
    student, _, _ = load_student(job.folder, last)
    assert 0 < flipped(job.folder, student) < 0.5
    stored = load_exported(tmp_path / "out")
    for name, value in forward_weights(student).items():
        assert torch.equal(stored.get_submodule(name).weight.to(torch.bfloat16), value)
    if lora:
        best = load_file(job.folder / "checkpoints" / "best" / "student.safetensors")
        base = load_file(job.folder / "checkpoints" / "base" / "base.safetensors")
        assert not any("held" in name or name.endswith("_proj.weight") for name in best)
        assert sum(name.endswith("held.words") for name in base) == 7
        assert not any(name.endswith("_proj.weight") for name in base)


def test_an_ordinary_model_is_packed_after_its_initialisation(tmp_path: Path, source: Path) -> None:
    """GPTQ decides the codes; adapters on them, a merged export of the trained values, and a peft adapter."""
    scheme = {
        "rules": [{"match": "*_proj", "weight": "int4_g32"}, {"match": "*", "skip": "the rest"}],
        "init": ["smooth", "gptq"],
        "learn": "none",
    }
    job = load_job(write(tmp_path, source, scheme=scheme, lora={"rank": 4, "base": "packed"}, **MORE))
    train(job, table=False)
    last = saved_steps(job)[-1].name
    assert 0 < flipped(job.folder, load_student(job.folder, last)[0]) < 0.5
    assert (job.folder / "checkpoints" / "best" / "adapter_config.json").is_file()
    export(job.folder, tmp_path / "out", checkpoint=last)
    assert verify(tmp_path / "out").ok


INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_run_trains_packed_experts_of_a_packed_checkpoint(kind: str, tmp_path: Path) -> None:
    """INT4 on experts only, another tool's, one matrix each in the file; and the MXFP4 stacks of gpt-oss. What is
    exported is what was trained, and no stack was ever a parameter."""
    if kind == "gpt_oss":
        dense = tiny_model("gpt_oss", tmp_path / "dense", **GPT_OSS)
        folder, target = tmp_path / "packed", "mxfp4"
        quiet_export(quantized(dense, EXPERTS), dense, folder, target)
    else:
        dense = tiny_model("qwen3_moe", tmp_path / "dense", num_hidden_layers=1)
        folder, target = by_the_library(dense, tmp_path / "packed", "pack-quantized", ".experts.", **INT4), TARGET
    lora = {"rank": 4, "base": "packed", "targets": "*.experts.*"}
    file = path(tmp_path, folder, dense, lora=lora, scheme={"learn": "none"})
    job = load_job(file, ["data.pack=false", "eval.data.pack=false"])
    gpu, unpacked = torch.device("cuda"), resolve(job.model)
    assert first_place(job, unpacked, gpu).type == "cpu" and first_place(job, dense, gpu) == gpu
    assert first_place(job.model_copy(update={"lora": None}), unpacked, gpu) == gpu
    report = train(job, table=False)
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["ptq"]["kl"] == rows["best_ptq"]["kl"] > 0
    again = {row["name"]: row for row in train(job, resume_run=True, table=False)["rows"]}
    assert again == rows  # from disk
    assert all(plan.peak > 0 for plan in estimate(job).plans)
    last = saved_steps(job)[-1].name
    student, _, _ = load_student(job.folder, last)
    start, now = load_file(job.folder / "checkpoints" / "start" / "codes.safetensors"), weights(student)
    served = open_export(folder)
    assert {f"{path} codes" for path in now} <= start.keys() and 0 < flipped(job.folder, student) < 0.5
    assert len(now) == 2 and all(site.shape == start[f"{path} codes"].shape for path, site in now.items())
    codes = {name: TARGETS[served.METHOD].unpack(m, served.layer(name)).codes for name, m in served.modules.items()}
    assert sum(tensor.numel() for tensor in codes.values()) == sum(math.prod(site.shape) for site in now.values())
    base = load_file(job.folder / "checkpoints" / "base" / "base.safetensors")
    assert sum(name.endswith(".words") for name in base) == 2 and not any(name.endswith("_proj") for name in base)
    export(job.folder, tmp_path / "out", target, checkpoint=last)
    assert verify(tmp_path / "out").ok
    stored = load_exported(tmp_path / "out")
    for site in now.values():
        value = site.value().to(torch.bfloat16)
        value = value.transpose(-1, -2) if site.owner.TRANSPOSED else value
        assert torch.equal(stored.get_submodule(site.module).get_parameter(site.slot).to(torch.bfloat16), value)


def flipped(run: Path, student: Any) -> float:
    found = moved(run, student)
    assert found is not None
    return float(found["flipped"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": None}, r"a teacher made of it would know no more .* teacher\.id=ORIGINAL"),
        ({"scheme": {"init": ["gptq"]}}, r"which gptq would replace"),
        ({"scheme": {"rules": [{"match": "*_proj", "weight": "int4_g32"}, {"match": "*", "skip": "x"}]}},
         r"q_proj is nvfp4 in .*, but int4_g32 in the scheme"),
        ({"scheme": {"rules": [{"match": "*mlp*", "weight": "nvfp4"}, {"match": "*", "skip": "x"}]}},
         r"q_proj is nvfp4 in .*, but skipped in the scheme"),
        ({"lora": {"targets": "lm_head", "base": "packed"}}, r"lm_head, which the scheme does not quantize"),
    ],
)  # fmt: skip
def test_jobs_that_would_not_go_on_are_refused_by_name(
    changes: dict[str, Any], words: str, tmp_path: Path, source: Path, checkpoint: Path
) -> None:
    file = path(tmp_path, checkpoint, changes.pop("teacher", source), **changes)
    with pytest.raises(ConfigError, match=words):
        train(load_job(file), table=False)
    with pytest.raises(ConfigError, match=words):
        estimate(load_job(file))


def test_scales_moved_apart_cannot_be_held_packed(tmp_path: Path, source: Path) -> None:
    scheme = {"rules": [{"match": "*", "weight": "int4_g32"}], "init": ["scales", "reconstruct"]}
    with pytest.raises(ConfigError, match=r"packed after reconstruct"):
        load_job(write(tmp_path, source, scheme=scheme, lora={"base": "packed"}))
