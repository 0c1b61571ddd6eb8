"""Low-rank updates: what the forward pass multiplies with, what learns, what merging leaves, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.config import validate
from qat.errors import ConfigError, QatError, UnsupportedError
from qat.lora import LoraConfig, adapters, attach, is_adapter, merge, take_off
from qat.modes import served
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


@pytest.mark.parametrize("config", BOTH)
def test_served_rounds_the_sum_and_not_its_factors(config: LoraConfig, tmp_path: Path) -> None:
    model = student(tmp_path, config)
    with served(model):
        before = logits(model)
    merge(model)
    with served(model):
        assert torch.equal(logits(model), before)


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


BESIDE = LoraConfig(rank=4, alpha=10, merge=False)


def in_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


@pytest.mark.parametrize("held", ["dense", "packed"])
def test_beside_the_weight_nothing_of_it_changes(held: Any, tmp_path: Path) -> None:
    """Q(W) x of the rounded input, and s BA x of the input itself, by factors as they are stored; gradients reach the
    factors as if those were exact."""
    model = student(tmp_path, BESIDE.model_copy(update={"base": held}), learn="none")
    plain = student(tmp_path, learn="none")
    layer, base = (m.model.layers[0].mlp.down_proj for m in (model, plain))
    x, out = torch.randn(5, 256), torch.randn(5, 128)
    y = layer(x)
    A, B = in_bf16(layer.lora.A), in_bf16(layer.lora.B * 2.5)
    assert torch.equal(y, base(x) + functional.linear(functional.linear(x, A), B))
    assert not torch.equal(B, layer.lora.B * 2.5) and torch.equal(layer.matrix("weight"), layer.matrix("weight"))
    (y * out).sum().backward()
    assert torch.allclose(layer.lora.A.grad, B.t() @ out.t() @ x, rtol=1e-5, atol=1e-5)
    assert torch.allclose(layer.lora.B.grad, 2.5 * out.t() @ (x @ A.t()), rtol=1e-5, atol=1e-5)
    before = logits(model)
    merge(model)
    assert len(adapters(model)) == 14 and layer.held is None and torch.equal(logits(model), before)
    assert len(take_off(model)) == 28 and not adapters(model) and torch.equal(logits(model), logits(plain))


def test_beside_the_weight_dropout_is_by_token(tmp_path: Path) -> None:
    layer = student(tmp_path, BESIDE.model_copy(update={"dropout": 0.5}), learn="none").model.layers[0].mlp.down_proj
    x = torch.randn(1, 256).expand(6, 256)
    kept = layer.train()(x)
    assert not torch.equal(kept[0], kept[1])
    kept = layer.eval()(x)
    assert torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("more", ["dora", "norms"])
def test_what_an_adapter_file_cannot_say_is_refused(more: str) -> None:
    with pytest.raises(ConfigError, match=f"{more} changes more than an adapter"):
        validate(LoraConfig, {"merge": False, more: True}, "lora")


@pytest.mark.parametrize("learn", ["lsq", "refit"])
def test_beside_the_weight_scales_stay(learn: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora.merge: false keeps the packed weights .*scheme.learn: none"):
        student(tmp_path, BESIDE, learn=learn)


def test_no_adapter_beside_the_head(tmp_path: Path) -> None:
    rules = [{"match": "*", "weight": "nvfp4"}]
    model = quantized(tiny_model("qwen3", tmp_path / "model"), rules, learn="none")
    with pytest.raises(UnsupportedError, match="lm_head is the output head"):
        attach(model, BESIDE)


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


def experts_student(folder: Path, kind: str, config: LoraConfig) -> Any:
    """A tiny mixture of experts with adapters that differ from zero."""
    source = tiny_model(kind, folder / "model", **{**KINDS[kind], "num_hidden_layers": 1})
    rules = [pair_rules("int4_g32", None, "*.experts.*"), pair_rules("int4_g32", None, "*_proj"), RULES[1]]
    model = quantized(source, rules)
    attach(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name) and name.endswith("B"):
                parameter.normal_(0, 0.02)
    return model


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_each_expert_has_its_own_update_before_rounding(kind: str, tmp_path: Path) -> None:
    """Whether the class keeps its stacks transposed or not; merging changes no bit, and gradients reach the factors of
    the experts that were asked."""
    config = LoraConfig(rank=4, alpha=8, targets="*.experts.*")
    model = experts_student(tmp_path, kind, config)
    found = {path: site for path, site in weights(model).items() if ".experts." in path}
    assert len(found) == 2 and list(adapters(model)) == ["model.layers.0.mlp.experts"]
    for site in found.values():
        plain = site.parameter.transpose(-1, -2) if site.owner.TRANSPOSED else site.parameter
        update: Any = site.owner.lora[site.slot]
        for expert, weight in enumerate(plain):
            expected = weight.double() + 2 * update.B[expert].double() @ update.A[expert].double()
            assert torch.allclose(site.weight[expert].double(), expected, rtol=1e-6, atol=1e-7)
            assert not torch.allclose(site.weight[expert], weight, atol=1e-3)
    model(torch.arange(2, 34).view(1, -1)).logits.square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert sum(is_adapter(name) for name in trained) == 4
    assert all(is_adapter(name) or "log_" in name for name in trained)
    before, values = logits(model), {path: site.value() for path, site in found.items()}
    merge(model)
    assert not adapters(model) and not any(is_adapter(name) for name in model.state_dict())
    assert torch.equal(logits(model), before)
    assert all(torch.equal(site.value(), values[path]) for path, site in weights(model).items() if path in values)


def test_experts_get_an_adapter_only_where_named(tmp_path: Path) -> None:
    model = experts_student(tmp_path, "qwen3_moe", LoraConfig(rank=4))
    assert list(adapters(model)) == [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]


@pytest.mark.parametrize("more", [{"dora": True}, {"dropout": 0.1}, {"merge": False}])
def test_what_peft_has_not_for_experts_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"experts.gate_up_proj is a stack of experts, for which peft has no"):
        experts_student(tmp_path, "qwen3_moe", LoraConfig(rank=4, targets="*.experts.*", **more))


# --- a base that is held packed -------------------------------------------------------------------

PACKED = [LoraConfig(rank=4, base="packed"), LoraConfig(rank=4, base="packed", dora=True)]


@pytest.mark.parametrize("weight", ["nvfp4", "mxfp4", "int4_g32", "int4_g32_asym"])
def test_a_packed_base_starts_at_the_quantized_model(weight: str, tmp_path: Path) -> None:
    model = quantized(tiny_model("qwen3", tmp_path / "model"), [pair_rules(weight, None), RULES[1]], learn="dual_lsq")
    for site in weights(model).values():  # rounding with one scale, as `attach` finds it
        torch.nn.init.zeros_(site.quantizer.log_divisor)
        torch.nn.init.zeros_(site.quantizer.log_scale)
    before = logits(model)
    attach(model, LoraConfig(rank=4, base="packed", targets="*q_proj"))
    assert torch.equal(logits(model), before) and len(adapters(model)) == 2
    left = {name for name, p in model.named_parameters() if p.dim() > 1 and "log_" not in name and "lora" not in name}
    assert left == {"model.embed_tokens.weight", "lm_head.weight"}
    assert torch.equal(model(torch.arange(2, 34).view(1, -1)).logits, before)  # with gradients, made anew


@pytest.mark.parametrize("learn", ["none", "lsq", "dual_lsq"])
@pytest.mark.parametrize("config", PACKED)
def test_gradients_of_a_packed_base_are_autograds(config: LoraConfig, learn: str, tmp_path: Path) -> None:
    """Against the same model with its base dense, at the middles of the cells."""
    torch.manual_seed(3)
    model, twin = (student(tmp_path, learn=learn) for _ in range(2))
    for each in (model, twin):
        for site in weights(each).values():
            for parameter in site.quantizer.parameters():
                torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        for site in weights(twin).values():
            site.parameter.copy_(site.quantizer.quantize(site.weight).dequantize())
    for each, lora in ((model, config), (twin, config.model_copy(update={"base": "dense"}))):
        torch.manual_seed(4)
        attach(each, lora)
        move(each)
    for each in (model, twin):
        each(torch.arange(2, 34).view(1, -1)).logits.square().mean().backward()
    assert torch.equal(logits(model), logits(twin))
    own = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-4, atol=1e-6)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("config", PACKED)
def test_merging_a_packed_base_changes_no_bit(config: LoraConfig, tmp_path: Path) -> None:
    model = student(tmp_path, config, learn="none")
    before, values = logits(model), {path: site.value() for path, site in weights(model).items()}
    codes = {path: site.quantizer.quantize(site.weight).codes for path, site in weights(model).items()}
    merge(model)
    assert not adapters(model) and torch.equal(logits(model), before)
    for path, site in weights(model).items():
        assert torch.equal(site.value(), values[path]) and site.weight is site.parameter
        assert torch.equal(site.quantizer.quantize(site.weight).codes, codes[path])
    assert not [name for name in model.state_dict() if ".held." in name]


def test_small_adapters_flip_few_codes(tmp_path: Path) -> None:
    """Every weight is in the middle of its cell: nothing changes until an update reaches an edge."""
    model = student(tmp_path, LoraConfig(rank=4, base="packed"), learn="none")
    layer = model.model.layers[0].mlp.down_proj
    before = layer.weight_quantizer.quantize(layer.held.dequantize())
    scales = before.scales.effective()
    for largest, expected in ((0.2 * scales.min(), False), (scales.max(), True)):  # E2M1's first edge is 0.25
        with torch.no_grad():
            layer.lora.B.mul_(largest / (layer.lora.B @ layer.lora.A * layer.lora.scaling).abs().max())
        flipped = layer.weight_quantizer.quantize(layer.matrix("weight")).codes != before.codes
        assert bool(flipped.any()) == expected


def test_both_passes_leave_out_the_same_channels(tmp_path: Path) -> None:
    model = student(tmp_path, LoraConfig(rank=4, dropout=0.5, base="packed"), learn="none").train()
    layer, x = model.model.layers[0].mlp.down_proj, torch.eye(256)
    torch.manual_seed(0)
    y = layer(x)
    y.square().sum().backward()
    torch.manual_seed(0)
    kept = functional.dropout(torch.ones(256), 0.5) != 0
    assert torch.equal(layer.lora.A.grad.abs().sum(0) > 0, kept)


def test_bases_that_cannot_be_packed_are_named(tmp_path: Path) -> None:
    model = quantized(tiny_model("qwen3", tmp_path / "model"), [pair_rules("int3_g64", None), RULES[1]])
    with pytest.raises(QatError, match=r"base: packed: model.layers.0.self_attn.q_proj: int3_g64 .* 3 bits"):
        attach(model, LoraConfig(rank=4, base="packed"))
    folder = tiny_model("gpt2", tmp_path / "conv1d", num_hidden_layers=1)
    rules = [pair_rules("int4_g32", None, "*.c_attn"), pair_rules("int4_g32", None, "lm_head"), RULES[1]]
    with pytest.raises(QatError, match=r"c_attn \(QatConv1D\) is quantized, too, and would stay dense"):
        attach(quantized(folder, rules), LoraConfig(rank=4, base="packed"))
    folder = tiny_model("qwen3_moe", tmp_path / "experts", **{**KINDS["qwen3_moe"], "num_hidden_layers": 1})
    model = quantized(folder, [pair_rules("int3_g32", None, "*.experts.*"), pair_rules("int4_g32", None), RULES[1]])
    with pytest.raises(QatError, match=r"base: packed: .*experts.gate_up_proj: int3_g32 .* 3 bits"):
        attach(model, LoraConfig(rank=4, base="packed"))
