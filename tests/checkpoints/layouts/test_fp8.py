"""Block-scaled FP8 as transformers stores it: plain transformers itself must load the trained weights, bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.checkpoints.exported import load_exported
from qat.checkpoints.hf import quiet
from qat.checkpoints.layouts import TargetLayer, check_layer, open_export
from qat.checkpoints.layouts.arguments import weight_args
from qat.checkpoints.layouts.fp8 import simulate
from qat.checkpoints.layouts.fp8 import write as target
from qat.checkpoints.layouts.npu import DEVICES
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.simulated import distance
from qat.checkpoints.verify import verify
from qat.errors import CheckpointError, UnsupportedError
from qat.modes import served
from qat.numbers.catalog import lookup
from qat.numbers.numerics import quantize
from qat.training.activations import fake_quantize_input
from tests.checkpoints.exports import (
    SKIP_TABLE,
    broken,
    export_pair,
    forward_weights,
    ids,
    quantized,
    quiet_export,
    rewrite,
)
from tests.tiny import tiny_model

PAIR = ("fp8_b128", "fp8_g128")
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("source") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("exported") / "out"
    return export_pair(source, out, PAIR, "fp8"), out


def test_plain_transformers_loads_the_trained_weights(exported: tuple[Any, Path]) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    trained, folder = exported
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    weights = forward_weights(trained)
    assert len(weights) == 7
    for path, weight in weights.items():
        found = model.get_submodule(path).weight
        assert found.dtype == torch.bfloat16 and torch.equal(found, weight)
    ours = load_exported(folder, dtype=torch.bfloat16, quantize_inputs=False)
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, ours(ids()).logits)


def test_an_export_is_the_trained_model(exported: tuple[Any, Path]) -> None:
    trained, out = exported
    report = verify(out)
    assert report.ok, report.checks
    assert report.checks[-1].detail.startswith("weights only, largest logit difference 0.0")
    folder = open_export(out)
    assert all(torch.equal(folder.dense(path), weight) for path, weight in forward_weights(trained).items())
    with torch.no_grad(), served(trained):
        assert torch.equal(load_exported(out)(ids()).logits, trained(ids()).logits)
    assert folder.quantization == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    stored = {name: (folder.reader.info(name).code, folder.reader.info(name).shape) for name in folder.quantized_names}
    assert stored[f"{DOWN}.weight"] == ("F8_E4M3", (128, 256))
    assert stored[f"{DOWN}.weight_scale_inv"] == ("F32", (1, 2)) and len(stored) == 14


@pytest.mark.parametrize("kind", ["gemma", "qwen3_moe"])
def test_architectures(kind: str, tmp_path: Path) -> None:
    """Tied embeddings; and experts that stay dense."""
    source = tiny_model(kind, tmp_path / "source", num_hidden_layers=1)
    rules = [{"match": "*.self_attn.*_proj", "weight": PAIR[0], "input": PAIR[1]}, {"match": "*", "skip": "x"}]
    quiet_export(quantized(source, rules), source, tmp_path / "out", "fp8")
    report = verify(tmp_path / "out")
    assert report.ok, report.checks
    assert "difference 0.0" in report.checks[-1].detail


def test_unpacking_undoes_packing() -> None:
    q = quantize(torch.randn(256, 384, generator=torch.Generator().manual_seed(1)), lookup(PAIR[0]))
    tensors, module = target.pack(q), PackedModule("a.b", "float-quantized", weight_args(q.format) or {}, None)
    found = target.unpack(module, tensors)
    assert torch.equal(found.codes, q.codes) and torch.equal(found.scales.stored, q.scales.stored)
    for name, tensor, message in [
        ("weight_scale_inv", tensors["weight_scale_inv"].bfloat16(), "weight_scale_inv is torch.bfloat16"),
        ("weight_scale_inv", tensors["weight_scale_inv"][:, :2], r"weight_scale_inv is torch.float32 \[2, 2\]"),
        ("weight_scale_inv", -tensors["weight_scale_inv"], "weight_scale_inv must be finite and positive"),
        ("weight_scale_inv", tensors["weight_scale_inv"] * 1.01, "not exact in bf16"),
        ("weight", tensors["weight"].view(torch.uint8), "weight is torch.uint8"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            target.unpack(module, {**tensors, name: tensor})


@pytest.mark.parametrize(
    ("path", "shape", "weight", "input", "message"),
    [
        ("a.b", (576, 128), *PAIR, r"a\.b: 576 rows are no multiple of 128.*compressed-tensors"),
        ("a.b", (128, 192), *PAIR, r"a\.b: 192 columns are no multiple"),
        ("lm_head", (384, 128), *PAIR, "lm_head: engines keep the output layer"),
        ("a.b", (128, 128), "fp8_b128", None, r"without quantized inputs \(compressed-tensors can\); .*: fp8_g128"),
        ("a.b", (128, 128), "fp8_channel", "fp8_token", r"fp8_channel weights \(compressed-tensors, modelopt can\)"),
    ],
)
def test_refusals(path: str, shape: tuple[int, int], weight: str, input: str | None, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        check_layer(target, TargetLayer(path, shape, lookup(weight), lookup(input) if input else None))
    check_layer(target, TargetLayer("a.b", (64, 256), lookup(PAIR[0]), lookup(PAIR[1])))


def test_a_quantized_head_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    model = quantized(source, [*SKIP_TABLE, {"match": "*", "weight": PAIR[0], "input": PAIR[1]}])
    with pytest.raises(UnsupportedError, match="lm_head"):
        quiet_export(model, source, tmp_path / "out", "fp8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(96, 48), (256, 384), (64, 96)])
@pytest.mark.parametrize("device", DEVICES[:3])
def test_simulated_on_npus(device: str, shape: tuple[int, int]) -> None:
    """BF16 weights and inputs; on 950 both rounded to MXFP8 by the NPU's rule, where groups of 32 divide a row; bias
    added before the one rounding. Another device's arithmetic, or a scale of a neighbour, is far outside the bound."""
    generator = torch.Generator().manual_seed(4)
    weight, bias = torch.randn(shape, generator=generator) * 0.05, torch.linspace(-2, 2, shape[0])
    weight[:, ::7] *= 40  # so that blocks differ
    q = quantize(weight, lookup(PAIR[0]))
    x = torch.randn(3, 5, shape[1], generator=generator).bfloat16()
    tensors, mx = target.pack(q), device == "950" and shape[1] % 32 == 0
    held, read = q.dequantize(torch.bfloat16).float(), x.float()
    assert simulate.rounds_again(device, shape[1]) == (lookup("mxfp8") if mx else None)
    rounded = [fake_quantize_input(t, lookup("mxfp8"), "ascend", "ste", None) for t in (read, held)] if mx else []
    wanted = torch.nn.functional.linear(*(rounded or (read, held)), bias)
    y = simulate.simulated(tensors, (128, 128), device, bias)(x)
    assert y.dtype == torch.bfloat16 and y.shape == (3, 5, shape[0]) and distance(y.float(), wanted) <= 1
    other = simulate.simulated(tensors, (128, 128), "a2" if mx else "950", bias)(x)
    assert distance(other.float(), wanted) > 3 or shape[1] % 32
    assert distance(simulate.simulated(tensors, (128, 128), device)(x).float() + bias, wanted) <= 2
    if shape[1] > 128:
        tensors["weight_scale_inv"] = tensors["weight_scale_inv"] * torch.tensor([1.0, 1.5, 2.0])
        assert distance(simulate.simulated(tensors, (128, 128), device, bias)(x).float(), wanted) > 10


def invert(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight_scale_inv"] = tensors[f"{DOWN}.weight_scale_inv"].reciprocal()


def shift(tensors: dict[str, Tensor]) -> None:
    for path, dim in ((DOWN, 1), (UP, 0)):  # two blocks each, whose scales may be equal by chance
        tensors[f"{path}.weight_scale_inv"] = tensors[f"{path}.weight_scale_inv"].roll(1, dim)


def transpose(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight_scale_inv"] = tensors[f"{UP}.weight_scale_inv"].t()


@pytest.mark.parametrize(("damage", "check"), [(invert, "weights"), (shift, "weights"), (transpose, "tensors")])
def test_mutations_are_found(damage: Any, check: str, exported: tuple[Any, Path], tmp_path: Path) -> None:
    shutil.copytree(exported[1], tmp_path / "out")
    rewrite(tmp_path / "out", damage)
    assert check in broken(tmp_path / "out")
