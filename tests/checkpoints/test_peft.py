"""peft itself as the second implementation: it loads the adapter of a student and merges to the same weights, and
beside a packed export it computes what was trained."""

import json
import shutil
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qat
from qat.checkpoints.export import export, export_model
from qat.checkpoints.exported import load_exported
from qat.checkpoints.hf import ModelConfig, load_configured
from qat.checkpoints.peft import write_adapter
from qat.checkpoints.resume import load_student, student_tensors
from qat.checkpoints.verify import verify
from qat.engines.transformers import load_packed
from qat.errors import QatError
from qat.lora import LoraConfig, adapters, take_off
from qat.sites import weights
from qat.trainers.job import load_job
from qat.trainers.run import train
from qat.trainers.why import moved
from tests.qat.test_lora import experts_student, student
from tests.tiny import tiny_model
from tests.trainers.jobs import write

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("base_is", ["dense", "packed"])
@pytest.mark.parametrize("dora", [False, True])
def test_peft_merges_to_the_same_weights(dora: bool, base_is: Any, tmp_path: Path) -> None:
    config = LoraConfig(rank=4, alpha=8, dora=dora, targets=("*.self_attn.*_proj", "*down_proj"), base=base_is)
    model = student(tmp_path, config, learn="none")
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", student_tensors(model), config)
    base = load_configured(ModelConfig(id=str(tmp_path / "model")), tmp_path / "model")
    with torch.no_grad():
        for path, layer in adapters(model).items():
            base.get_submodule(path).weight.copy_(layer.weight if layer.held is None else layer.held.dequantize())
    base_weights = {path: base.get_submodule(path).weight.clone() for path in adapters(model)}
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    assert len(adapters(model)) == 10
    for path, layer in adapters(model).items():
        merged = layer.matrix("weight")
        assert torch.allclose(theirs.get_submodule(path).weight, merged, rtol=1e-6, atol=1e-7), path
        assert not torch.allclose(merged, base_weights[path], atol=1e-3)


@pytest.mark.parametrize("targets", ["*.experts.*", "*.down_proj", ("*.gate_up_proj", "*q_proj")])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_peft_merges_experts_to_the_same_weights(kind: str, targets: Any, tmp_path: Path) -> None:
    """Stacks as they multiply and transposed ones, one adapted and both."""
    config = LoraConfig(rank=4, alpha=8, targets=targets)
    model = experts_student(tmp_path, kind, config)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", student_tensors(model), config)
    base = load_configured(ModelConfig(id=str(tmp_path / "model")), tmp_path / "model")
    values = {f"{site.module}.{site.slot}": site for site in weights(model).values()}
    with torch.no_grad():
        for name, site in values.items():
            base.get_parameter(name).copy_(site.parameter)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    wanted = [targets] if isinstance(targets, str) else targets
    changed = {name for name in before if not torch.equal(theirs.get_parameter(name), before[name])}
    assert changed == {name for name in values if any(fnmatch(values[name].path, one) for one in wanted)}
    for name in changed:
        ours = values[name].weight.detach()
        ours = ours.transpose(-1, -2) if values[name].owner.TRANSPOSED else ours
        assert torch.allclose(theirs.get_parameter(name), ours, rtol=1e-5, atol=1e-6), name


def test_adapted_experts_are_exported_as_they_were_trained(tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe", tmp_path / "model")
    lora = {"rank": 4, "targets": ["*.experts.*", "*q_proj"]}
    run = run_of(tmp_path, source, "int4_g64", None, lora)
    model, start = load_student(run, LAST)[0], load_student(run, "best")[0]
    export(run, tmp_path / "out", checkpoint=LAST)
    with torch.no_grad(), qat.served(model.eval()):
        expected = of(model)
    assert torch.equal(of(load_exported(tmp_path / "out")), expected) and verify(tmp_path / "out").ok
    moved = {p for p, site in weights(model).items() if not torch.equal(site.value(), weights(start)[p].value())}
    assert any(path.endswith("gate_up_proj") for path in moved) and any(path.endswith("down_proj") for path in moved)


# --- beside a packed model ------------------------------------------------------------------------

LAST = "step-00000004"
BESIDE = {"rank": 4, "alpha": 10, "merge": False}


def run_of(folder: Path, source: Path, weight: str, input: str | None, lora: dict[str, Any]) -> Path:
    """A finished run of a few steps; returns its folder."""
    rules = [{"match": "*_proj", "weight": weight, "input": input}, {"match": "*", "skip": "the rest"}]
    scheme = {"rules": rules, "init": ["scales"], "learn": "none"}
    optim = {"lr": 1e-3, "lora_lr": 2e-2}
    job = load_job(
        write(folder, source, scheme=scheme, lora=lora, optim=optim, method="qat", steps=4, checkpoint_every=4)
    )
    train(job, table=False)
    return job.folder


@pytest.fixture(scope="module", params=[("nvfp4", "nvfp4"), ("int4_g64", None)])
def served_run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose adapters stay beside its packed base, and its export."""
    folder = tmp_path_factory.mktemp("beside")
    source = tiny_model("qwen3", folder / "model")
    run = run_of(folder, source, *request.param, {**BESIDE, "base": "packed"})
    export(run, folder / "out", checkpoint=LAST)
    return run, folder / "out"


def ids() -> Tensor:
    return (torch.arange(48) * 31 + 5).remainder(384)[None]


def trained_logits(run: Path) -> Tensor:
    model, _, _ = load_student(run, LAST)
    with torch.no_grad(), qat.served(model.eval()):
        logits: Tensor = model(ids(), use_cache=False).logits
    return logits


@torch.no_grad()
def of(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids(), use_cache=False).logits
    return logits.float()


def test_plain_transformers_and_peft_compute_what_was_trained(served_run: tuple[Path, Path]) -> None:
    """In float32, as in this training, with the weights that a BF16 server dequantizes. Plain transformers rounds
    inputs by another rule than engines: there our reader stands between, which equals it by that rule (`verify`)."""
    run, out = served_run
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, local_files_only=True).eval()
    alone = of(plain)  # unpacks
    nn.Module.float(plain)
    plain = peft.PeftModel.from_pretrained(plain, str(out / "adapter")).eval()
    expected = trained_logits(run)
    assert torch.equal(of(load_exported(out)), expected)
    scale = float(expected.abs().max())
    if '"input_activations": null' in (out / "config.json").read_text():
        assert float((of(plain) - expected).abs().max()) < 1e-5 * scale
    assert float((alone - expected).abs().max()) > 1e-1 * scale


def test_our_engine_computes_what_was_trained(served_run: tuple[Path, Path]) -> None:
    """Its kernels do not round the weight to BF16 in between, which a random model feels, with the adapter or without;
    the adapter itself is exact, and sees inputs as they were before rounding."""
    run, out = served_run
    model, expected, alone = load_packed(out, torch.float32), trained_logits(run), of(load_exported(out, adapter=False))
    assert float((of(model) - expected).norm()) < 0.1 * float((alone - expected).norm())
    student: Any = load_student(run, LAST)[0]
    layer, trained = (m.model.layers[0].mlp.down_proj for m in (model, student.eval()))
    x = torch.randn(3, 256)
    with torch.no_grad():
        added = trained.lora.beside(x)
        assert torch.equal(layer(x), layer.base_layer(x) + added)
        rounded = x if trained.input_quantizer is None else trained.input_quantizer(x)
        assert torch.equal(trained(x), trained.weight_quantizer.linear(rounded, trained.weight, None) + added)
    report = verify(out)
    said = {check.name: check.detail for check in report.checks}["transformers"]
    assert report.ok and "the adapter of peft beside it, largest logit difference 0.0" in said


def test_the_packed_base_is_the_one_without_adapters(served_run: tuple[Path, Path], tmp_path: Path) -> None:
    """Byte for byte the export of the model that training began from."""
    run, out = served_run
    model, source, _ = load_student(run, LAST)
    assert take_off(model)
    fresh: Any = model
    export_model(fresh, source, tmp_path / "base")
    rules = json.loads((out / "config.json").read_text())
    assert rules == json.loads((tmp_path / "base" / "config.json").read_text())
    ours, base = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "base"))
    start = moved(run, model)
    assert start is None or start["flipped"] == 0
    assert ours.keys() == base.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), base[name].reshape(-1).view(torch.uint8)), name


def test_what_is_stored_needs_no_scaling(served_run: tuple[Path, Path]) -> None:
    """vLLM multiplies a scaling into B, in BF16: 10 / 4 would round again. It takes LoRA of linear layers only."""
    run, out = served_run
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 4 and not config["use_dora"] and config["bias"] == "none"
    assert not config["modules_to_save"] and not config["use_rslora"]
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    student = load_file(run / "checkpoints" / LAST / "student.safetensors")
    assert len(tensors) == 28
    for name, tensor in tensors.items():
        path, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        trained = student[f"{path}.lora.{part[0]}"] * (2.5 if part[0] == "B" else 1)
        assert part in ("A.weight", "B.weight") and torch.equal(tensor, trained.to(torch.bfloat16))
    files = json.loads((out / "qat.json").read_text())["files"]
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= files.keys()


def test_damaged_and_other_adapters_are_refused(served_run: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = served_run
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    first = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    changes: list[tuple[dict[str, Any], Any, str]] = [
        ({"use_dora": True}, {}, "use_dora is not served"),
        ({"bias": "all"}, {}, "bias is not served"),
        ({}, {first: None}, "lacks a factor"),
        ({}, {"base_model.model.model.nothing.lora_A.weight": tensors[first].clone()}, "no such layer"),
    ]
    for number, (settings, more, words) in enumerate(changes):
        folder = shutil.copytree(out, tmp_path / str(number))
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps({**config, **settings}))
        kept = {name: tensor for name, tensor in {**tensors, **more}.items() if tensor is not None}
        save_file(kept, folder / "adapter" / "adapter_model.safetensors")
        with pytest.raises(QatError, match=words):
            load_packed(folder)
        assert not verify(folder, logits=False).ok


def test_a_dense_base_is_left_as_it_was(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "model")
    run = run_of(tmp_path, source, "nvfp4", None, {**BESIDE, "dropout": 0.1, "targets": "*q_proj"})
    export(run, tmp_path / "out", checkpoint=LAST)
    assert torch.equal(of(load_exported(tmp_path / "out")), trained_logits(run))
    assert len(load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")) == 4
