"""Low-rank updates: what the forward pass multiplies with, what learns, what merging leaves, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.errors import ConfigError, QatError
from qat.lora import LoraConfig, adapters, attach, merge
from qat.sites import weights
from qat.training.low_rank import LowRank
from tests.checkpoints.exports import pair_rules, quantized
from tests.qat.adapters.test_experts import KINDS
from tests.tiny import tiny_model

RULES = [pair_rules("nvfp4", None, "*_proj"), {"match": "*", "skip": "the rest"}]
BOTH = [LoraConfig(rank=4), LoraConfig(rank=4, dora=True)]


def student(folder: Path, config: LoraConfig | None = None, kind: str = "qwen3", **scheme: Any) -> Any:
    """A tiny quantized model (grouped queries), with adapters that differ from zero."""
    model = quantized(tiny_model(kind, folder / "model"), RULES, **scheme)
    if config is not None:
        attach(model, config)
        move(model)
    return model


@torch.no_grad()
def move(model: nn.Module) -> None:
    for index, layer in enumerate(adapters(model).values()):
        torch.manual_seed(index)
        layer.lora.B.normal_(0, 0.02)
        if layer.lora.magnitude is not None:
            layer.lora.magnitude.mul_(1.1)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.arange(2, 34).view(1, -1)).logits
    return result


def test_the_start_equals_the_base(tmp_path: Path) -> None:
    for config in BOTH:
        model = student(tmp_path)
        before = logits(model)
        attach(model, config)
        assert len(adapters(model)) == 14 and torch.equal(logits(model), before)


def by_hand(weight: Tensor, lora: LowRank, scaling: float) -> Tensor:
    total = weight.double() + scaling * (lora.B.double() @ lora.A.double())
    if lora.magnitude is None:
        return total
    return total * (lora.magnitude.double() / total.norm(dim=1))[:, None]


@pytest.mark.parametrize("config", BOTH)
def test_the_weight_is_updated_before_it_is_rounded(config: LoraConfig, tmp_path: Path) -> None:
    model = student(tmp_path, config)
    layer = model.model.layers[0].self_attn.q_proj
    expected = by_hand(layer.weight, layer.lora, config.alpha / config.rank)
    assert torch.allclose(layer.matrix("weight").double(), expected, rtol=1e-6, atol=1e-7)
    x = torch.randn(3, 128)
    value = layer.weight_quantizer(layer.lora.merged(layer.weight))
    assert torch.equal(layer(x), functional.linear(x, value))
    assert not torch.equal(value, layer.weight_quantizer(layer.weight))


@pytest.mark.parametrize("config", BOTH)
def test_merging_changes_no_bit(config: LoraConfig, tmp_path: Path) -> None:
    model = student(tmp_path, config)
    before, values = logits(model), {path: site.value() for path, site in weights(model).items()}
    codes = {path: site.quantizer.quantize(site.weight).codes for path, site in weights(model).items()}
    merge(model)
    assert not adapters(model) and not [name for name in model.state_dict() if ".lora." in name]
    assert torch.equal(logits(model), before)
    for path, site in weights(model).items():
        assert torch.equal(site.value(), values[path]) and site.weight is site.parameter
        assert torch.equal(site.quantizer.quantize(site.weight).codes, codes[path])


@pytest.mark.parametrize("learn", ["none", "lsq", "dual_lsq"])
def test_gradients_reach_adapters_and_scales_only(learn: str, tmp_path: Path) -> None:
    model = student(tmp_path, LoraConfig(rank=4, dora=True), learn=learn)
    model(torch.arange(2, 34).view(1, -1)).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        trained = ".lora." in name or name.endswith((".log_scale", ".log_divisor"))
        assert parameter.requires_grad == trained
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == trained, name


def test_gradients_are_those_of_the_sum(tmp_path: Path) -> None:
    """Straight through the rounding: dB = s G A^T and dA = s B^T G, with G of the merged weight."""
    layer = student(tmp_path, LoraConfig(rank=4, alpha=8)).model.layers[0].mlp.down_proj
    x, out = torch.randn(5, 256), torch.randn(5, 128)
    (layer(x) * out).sum().backward()
    whole = out.t() @ x
    assert torch.allclose(layer.lora.B.grad, 2 * whole @ layer.lora.A.t(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(layer.lora.A.grad, 2 * layer.lora.B.t() @ whole, rtol=1e-4, atol=1e-4)


def test_norms_are_trained_where_asked(tmp_path: Path) -> None:
    model = student(tmp_path, LoraConfig(rank=4, norms=True))
    trained = {name.rsplit(".", 2)[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert {"lora", "input_layernorm", "norm"} <= trained and "q_proj" not in trained


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": "lm_head"}, r"'lm_head' matches lm_head, which the scheme does not quantize"),
        ({"targets": "*_porj"}, r"'\*_porj' matches no layer; quantized are \*q_proj"),
        ({"targets": ("*q_proj", "*nothing")}, r"'\*nothing' matches no layer"),
        ({"rank": 65}, r"lora.rank 65 is larger than model.layers.0.self_attn.k_proj \(64 x 128\)"),
    ],
)
def test_bad_targets_are_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        attach(student(tmp_path), LoraConfig(**changes))


def test_experts_cannot_carry_one(tmp_path: Path) -> None:
    folder = tiny_model("qwen3_moe", tmp_path / "model", **{**KINDS["qwen3_moe"], "num_hidden_layers": 1})
    rules = [pair_rules("int4_g32", None, "*.experts.*"), pair_rules("int4_g32", None, "*_proj"), RULES[1]]
    model = quantized(folder, rules)
    with pytest.raises(QatError, match=r"experts.gate_up_proj .* cannot carry an adapter, only linear layers"):
        attach(model, LoraConfig(rank=4, targets="*_proj"))
    attach(model, LoraConfig(rank=4))
    assert list(adapters(model)) == [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
