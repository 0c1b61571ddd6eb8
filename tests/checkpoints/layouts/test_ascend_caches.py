"""C8, the INT8 caches of Ascend checkpoints: what is stored, what is said of it, what is refused, and that it is read
back as it was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.checkpoints.export import RECORD, check_export
from qat.checkpoints.exported import load_exported
from qat.checkpoints.hf import load_model
from qat.checkpoints.layouts import open_export
from qat.checkpoints.layouts.ascend.write import DESCRIPTION
from qat.checkpoints.verify import verify
from qat.errors import CheckpointError, UnsupportedError
from qat.scheme import Scheme
from qat.sites import sites
from qat.surgery import apply
from tests.checkpoints.exports import broken, ids, quantized, quiet_export, rewrite
from tests.tiny import tiny_model

ATTENTION = "model.layers.0.self_attn"
C8 = {"match": "*.self_attn", "key": "int8_column", "value": "int8_column"}
RULES: list[dict[str, Any]] = [
    C8,
    {"match": "*_proj", "weight": "int8_channel", "input": "int8_token"},
    {"match": "*", "skip": "left alone"},
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3", tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture(scope="module")
def model(source: Path) -> nn.Module:
    return quantized(source, RULES, activation_rule="ascend")


@pytest.fixture
def out(model: nn.Module, source: Path, tmp_path: Path) -> Path:
    return quiet_export(model, source, tmp_path / "out", "ascend")


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids(), use_cache=False).logits
    return found


def describe(folder: Path, **changes: Any) -> None:
    said = json.loads((folder / DESCRIPTION).read_text()) | changes
    (folder / DESCRIPTION).write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


def test_every_channel_of_every_head_has_a_scale(model: nn.Module, source: Path, out: Path) -> None:
    """By the definition: the largest magnitude that calibration text gives a channel, over 127, in BF16."""
    seen: dict[str, Tensor] = {}
    dense: Any = load_model(source)
    projection = dense.get_submodule(f"{ATTENTION}.v_proj")
    hook = projection.register_forward_hook(lambda _, args, y: seen.update(value=y.flatten(0, -2)))
    logits(dense)
    hook.remove()
    exported = open_export(out)
    scale = exported.reader.get(f"{ATTENTION}.v_proj.kv_cache_scale")
    assert scale.dtype == torch.float32 and scale.shape == (64,)  # 2 heads of 32
    assert torch.equal(scale, (seen["value"].abs().amax(dim=0) / 127).to(torch.bfloat16).float())
    assert scale.unique().numel() > 32
    for role, name in (("key", "k_proj"), ("value", "v_proj")):
        offset = exported.reader.get(f"{ATTENTION}.{name}.kv_cache_offset")
        assert offset.dtype == torch.float32 and offset.shape == (64,) and not offset.any()
        (site,) = (each for each in sites(model, "key", "value") if (each.path, each.role) == (ATTENTION, role))
        static = exported.cache_scales(ATTENTION)[role == "value"]
        assert torch.equal(static, (site.quantizer.amax / 127).to(torch.bfloat16).float())


def test_the_description_names_them(out: Path) -> None:
    said = json.loads((out / DESCRIPTION).read_text())
    assert said["kv_cache_type"] == said["kv_quant_type"] == "C8"
    named = {name: kind for name, kind in said.items() if "kv_cache_" in name and name != "kv_cache_type"}
    tensors = {f"{name}_proj.kv_cache_{what}" for name in "kv" for what in ("scale", "offset")}
    layers = [f"model.layers.{layer}.self_attn" for layer in (0, 1)]
    assert named == {f"{layer}.{name}": "C8" for layer in layers for name in tensors}
    assert said["model_quant_type"] == "W8A8_DYNAMIC"
    notes = json.loads((out / RECORD).read_text())["notes"]
    assert any(
        "int8_column caches: of the engines known here vllm-ascend alone" in note and "--kv-cache-dtype int8" in note
        for note in notes
    )


def test_it_is_read_back_as_it_was_trained(model: nn.Module, out: Path) -> None:
    from qat.modes import served

    with served(model):
        trained = logits(model)
    assert torch.equal(logits(load_exported(out)), trained)
    assert not torch.equal(logits(load_exported(out, caches=False)), trained)
    report = verify(out)
    assert report.ok, report
    details = {check.name: check.detail for check in report.checks}
    assert details["caches"] == "2 layers cache int8_column; scales are stored"


def test_damage_is_named(out: Path) -> None:
    scale = f"{ATTENTION}.k_proj.kv_cache_scale"
    rewrite(out, lambda tensors: tensors[scale].mul_(-1))
    assert broken(out) == {"weights", "caches"}
    rewrite(out, lambda tensors: tensors.update({scale: tensors[scale].abs()[:32]}))
    with pytest.raises(CheckpointError, match=r"k_proj\.kv_cache_scale is .*\[32\].*each of the 64 rows"):
        load_exported(out)
    rewrite(out, lambda tensors: tensors.pop(scale))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn has no scales|scales a cache"):
        load_exported(out)


def test_offsets_that_no_engine_subtracts_are_refused(out: Path) -> None:
    offset = f"{ATTENTION}.v_proj.kv_cache_offset"
    rewrite(out, lambda tensors: tensors[offset].fill_(3.0))
    with pytest.raises(UnsupportedError, match=r"offset of .*v_proj\.kv_cache_scale is not zero; vllm-ascend adds"):
        load_exported(out)
    rewrite(out, lambda tensors: tensors.pop(offset))
    with pytest.raises(CheckpointError, match=r"v_proj\.kv_cache_offset is missing"):
        load_exported(out)


def test_descriptions_that_do_not_fit(out: Path) -> None:
    describe(out, kv_cache_type="MXFP8")
    with pytest.raises(UnsupportedError, match="kv_cache_type is 'MXFP8'; readable: 'C8'"):
        open_export(out)
    describe(out, kv_cache_type=None, kv_quant_type=None)
    with pytest.raises(CheckpointError, match="scales a cache that"):
        open_export(out)
    describe(out, kv_cache_type="C8", kv_quant_type="C8", **{f"{ATTENTION}.k_proj.kv_cache_scale": "FLOAT"})
    with pytest.raises(CheckpointError, match="kv_cache_scale is 'FLOAT', but 'C8' is what scales of caches are"):
        open_export(out)


def test_without_scales_nobody_calibrated_anything(source: Path, tmp_path: Path) -> None:
    out = quiet_export(quantized(source, RULES[1:], activation_rule="ascend"), source, tmp_path / "plain", "ascend")
    assert "kv_cache_type" not in json.loads((out / DESCRIPTION).read_text())
    describe(out, kv_cache_type="C8")
    with pytest.raises(CheckpointError, match=r"asks for quantized caches, but no k_proj\.kv_cache_scale is stored"):
        open_export(out)


def test_what_cannot_be_is_named_before_training(source: Path, tmp_path: Path) -> None:
    def said(folder: Path, cached: dict[str, Any], rule: str = "ascend") -> list[str]:
        rules = [cached, *RULES[1:]]
        return check_export(apply(load_model(folder), Scheme(rules=rules, init=(), activation_rule=rule)), folder)

    (note,) = said(source, C8)
    assert "compressed-tensors cannot hold int8_column caches" in note and note.endswith("--target ascend")
    with pytest.raises(ValueError, match="int8_column caches need activation_rule: ascend, not vllm"):
        said(source, C8, "vllm")
    with pytest.raises(ValueError, match="int8_column has a scale per column, which only"):
        said(source, {"match": "*_proj", "weight": "int8_column"})
    narrow = tiny_model("qwen3", tmp_path / "narrow", head_dim=16)
    with pytest.raises(UnsupportedError, match=r"heads of 16 columns, but vllm-ascend lays C8 caches out in pieces of"):
        said(narrow, C8)
    with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn has none"):
        said(source, {**C8, "match": "*.0.self_attn"})
    sliding = tiny_model("mistral", tmp_path / "sliding", sliding_window=16)
    with pytest.raises(UnsupportedError, match="its attention has a window of 16 tokens, which vllm-ascend forgets"):
        said(sliding, C8)
