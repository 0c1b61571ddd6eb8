"""What is pushed to an engine while a model trains is what an export would write, and decodes to the weights of the
forward pass, after every step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qat
from qat.checkpoints.export import export_model
from qat.checkpoints.exported import load_exported
from qat.checkpoints.hf import load_model
from qat.checkpoints.layouts import TARGETS, open_export
from qat.checkpoints.pushed import PackedWeights
from qat.errors import CheckpointError, UnsupportedError
from qat.sites import weights
from tests.checkpoints.exports import SKIP_HEAD, SKIP_TABLE, ids, pair_rules, quantized
from tests.tiny import tiny_model

REST = {"match": "*", "skip": "not a projection"}


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(
    ("kind", "target", "rules"),
    [
        ("llama", "compressed-tensors", [pair_rules("nvfp4", "nvfp4"), REST]),
        ("llama", "compressed-tensors", [pair_rules("fp8_tensor", "fp8_tensor"), REST]),
        ("llama", "modelopt", [pair_rules("nvfp4", "nvfp4"), REST]),
        ("llama", "fp8", [pair_rules("fp8_b128", "fp8_g128"), REST]),
        ("qwen3_moe", "compressed-tensors", [pair_rules("int4_g64", None), REST]),
        ("gemma", "compressed-tensors", [pair_rules("mxfp4", "mxfp4"), REST]),
        (
            "llama",
            "compressed-tensors",
            [
                *SKIP_HEAD,
                *SKIP_TABLE,
                pair_rules("fp8_channel", "fp8_token"),
                {"match": "*.self_attn", "key": "fp8_tensor", "value": "fp8_tensor"},
            ],
        ),
    ],
    ids=["nvfp4", "static", "modelopt", "fp8", "experts", "tied", "caches"],
)
def test_it_is_what_an_export_writes(tmp_path: Path, kind: str, target: str, rules: list[dict[str, Any]]) -> None:
    source = tiny_model(kind, tmp_path / "model")
    model: Any = quantized(source, rules, learn="dual_lsq")
    export_model(model, source, tmp_path / "out", target)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for given in (source, None):
        pushed = dict(PackedWeights(model, target, given))
        assert pushed.keys() == written.keys()
        assert all(same(tensor, written[name]) for name, tensor in pushed.items())
    assert target in TARGETS


def test_after_every_step_the_engine_has_the_weights_of_the_trainer(tmp_path: Path) -> None:
    """The rollout's engine is our reader: it starts from an export, and takes what is pushed for its files."""
    source = tiny_model("llama", tmp_path / "model")
    scheme = {"rules": [pair_rules("nvfp4", "nvfp4"), REST], "init": []}
    model = qat.prepare(load_model(source), scheme, [{"input_ids": ids()}])
    engine = tmp_path / "engine"
    qat.export(model, engine)
    packed = qat.PackedWeights(model, source=source)
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, 1e-3, scale_lr=0.1))
    codes: list[dict[str, Tensor]] = []
    for step in range(3):
        batch = torch.randint(3, 384, (2, 24), generator=torch.Generator().manual_seed(step))
        model.train()(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        codes.append({name: tensor.clone() for name, tensor in packed})
        save_file(codes[-1], engine / "model.safetensors", metadata={"format": "pt"})
        rollout = open_export(engine)
        for path, site in weights(model).items():
            assert torch.equal(rollout.dense(path), site.value().to(torch.bfloat16)), f"step {step}: {path}"
        model.eval()
        with torch.no_grad(), qat.served(model):
            expected = model(ids(), use_cache=False).logits
        with torch.no_grad():
            assert torch.equal(load_exported(engine)(ids(), use_cache=False).logits, expected)
    changed = [name for name in codes[0] if not same(codes[0][name], codes[2][name])]
    assert any("weight_packed" in name for name in changed) and any("weight_scale" in name for name in changed)
    assert json.loads((engine / "config.json").read_text())["quantization_config"]


def test_numbers_that_are_none_are_not_pushed(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "model")
    for name, said in (("model.norm.weight", "model.norm"), ("model.layers.1.mlp.up_proj.weight", "up_proj")):
        model: Any = quantized(source, [pair_rules("int4_g64", None), REST])
        packed = PackedWeights(model, source=source)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[3] = torch.nan
        with pytest.raises(CheckpointError, match=said):
            list(packed)
    with pytest.raises(UnsupportedError):
        PackedWeights(quantized(source, [pair_rules("int4_g64", None), REST]), "fp8")  # type: ignore[arg-type] # any module
