"""A weight held packed: what comes back is what went in, in as many bytes as a file needs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qat.checkpoints.matrices import Matrix
from qat.errors import UnsupportedError
from qat.lora import LoraConfig, adapters, attach, is_adapter, merge
from qat.modes import dense, served
from qat.numbers.catalog import lookup
from qat.numbers.numerics import quantize
from qat.serving.held import HeldWeight
from qat.sites import weights
from tests.checkpoints.exports import pair_rules, quantized
from tests.qat.adapters.test_experts import KINDS
from tests.qat.test_lora import logits
from tests.qat.twins import Alive, packed_and_dense
from tests.tiny import tiny_model

HELD = ("nvfp4", "mxfp4", "int4_g32", "int4_g128_asym", "int2_g64", "int8_channel", "fp8_channel", "mxfp8")


@pytest.mark.parametrize("name", HELD)
def test_what_is_held_is_dequantized_exactly(name: str) -> None:
    torch.manual_seed(0)
    fmt, weight = lookup(name), torch.randn(48, 256)
    q = quantize(weight, fmt)
    held = HeldWeight(fmt, (48, 256), "cpu")
    held.hold(q)
    assert torch.equal(held.dequantize(), q.dequantize())
    other = HeldWeight(fmt, (48, 256), "cpu")
    other.load_state_dict(held.state_dict())
    assert torch.equal(other.half().dequantize(), q.dequantize())  # numbers are moved, never converted
    assert not list(held.parameters())
    stored = sum(buffer.nbytes for buffer in held.buffers())
    assert stored <= 1.01 * weight.numel() * fmt.bits_per_weight(48, 256) / 8 + 48 * 2 + 4


@pytest.mark.parametrize("name", HELD)
def test_each_matrix_of_a_stack_is_made_alone(name: str) -> None:
    """With a global scale of its own; the whole is one below the other."""
    torch.manual_seed(0)
    fmt, stack = lookup(name), torch.randn(3, 48, 256) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    held = HeldWeight(fmt, (3, 48, 256), "cpu")
    each = [quantize(weight, fmt) for weight in stack]
    for expert, q in reversed(list(enumerate(each))):
        held.hold(q, expert)
    for expert, q in enumerate(each):
        assert torch.equal(held.dequantize(expert), q.dequantize())
    assert torch.equal(held.dequantize(), torch.stack([q.dequantize() for q in each]))
    stored = sum(buffer.nbytes for buffer in held.buffers())
    assert stored <= 1.01 * stack.numel() * fmt.bits_per_weight(48, 256) / 8 + 3 * 48 * 2 + 12
    assert held.extra_repr() == f"3 x 48 x 256, {name}"


@pytest.mark.parametrize(("name", "words"), [("int3_g64", "3 bits"), ("nf4_g64", "table"), ("fp8_b128", "groups")])
def test_other_formats_are_refused(name: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} weights cannot be held packed: .*{words}"):
        HeldWeight(lookup(name), (128, 256), "cpu")


def test_shapes_need_no_numbers() -> None:
    assert HeldWeight(lookup("nvfp4"), (8, 64), "meta").dequantize().shape == (8, 64)
    assert HeldWeight(lookup("nvfp4"), (2, 8, 64), "meta").dequantize().shape == (2, 8, 64)


# --- experts that are held packed -----------------------------------------------------------------

CASES = [
    ("qwen3_moe", "nvfp4", "nvfp4", "dual_lsq"),
    ("qwen3_moe", "int4_g32_asym", None, "none"),
    ("mixtral", "int4_g32", None, "lsq"),
    ("gpt_oss", "mxfp4", None, "none"),
    ("gpt_oss", "nvfp4", "fp8_token", "lsq"),
]
REST = {"match": "*", "skip": "the rest"}


@pytest.mark.parametrize(("kind", "weight", "input", "learn"), CASES)
def test_packed_experts_are_the_dense_ones_bit_for_bit(
    kind: str, weight: str, input: str | None, learn: str, tmp_path: Path
) -> None:
    """Forward, every gradient, and what merging leaves, of which nothing is held any more."""
    rules = [pair_rules(weight, input, "*.experts.*"), pair_rules("int4_g32", None, "*.self_attn.*_proj"), REST]
    model, twin = packed_and_dense(tmp_path, kind, rules, learn)
    held = [name for name, _ in model.named_buffers() if "held.down_proj.words" in name]
    left = [name for name, p in model.named_parameters() if p.dim() > 2 and not is_adapter(name)]
    assert held == ["model.layers.0.mlp.experts.held.down_proj.words"] and not left
    for each in (model, twin):
        each(torch.arange(2, 34).view(1, -1)).logits.square().mean().backward()
    assert torch.equal(logits(model), logits(twin))
    own = dict(twin.named_parameters())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {n for n in own if own[n].grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, own[name].grad), name
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if ".experts." in n and is_adapter(n))
    before, values = logits(model), {path: site.value() for path, site in weights(model).items()}
    with served(model):
        as_served = logits(model)
    for each in (model, twin):
        merge(each)
    assert torch.equal(logits(model), before) and not [name for name in model.state_dict() if ".held." in name]
    theirs = weights(twin)
    for path, site in weights(model).items():
        assert torch.equal(site.value(), values[path]) and torch.equal(site.parameter, theirs[path].parameter)
    with served(model):
        assert torch.equal(logits(model), as_served)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "weight", "input", "learn"), CASES)
def test_packed_experts_on_a_gpu_compute_what_a_cpu_does(
    kind: str, weight: str, input: str | None, learn: str, tmp_path: Path
) -> None:
    """Kernels see single matrices of a stack, whose scales begin somewhere in a tensor; the codes are the same."""
    from qat.kernels.load import load_for_training

    load_for_training()
    rules = [pair_rules(weight, input, "*.experts.*"), REST]
    model, twin = (packed_and_dense(tmp_path, kind, rules, learn)[0] for _ in range(2))
    model.cuda()
    for each, device in ((model, "cuda"), (twin, "cpu")):
        each(torch.arange(2, 34, device=device).view(1, -1)).logits.square().mean().backward()
    theirs = dict(twin.named_parameters())
    for path, site in weights(model).items():
        other = weights(twin)[path]
        assert (site.quantize().codes.cpu() != other.quantize().codes).float().mean() < 1e-3
        assert torch.equal(site.owner.held[site.slot].dequantize().cpu(), other.owner.held[site.slot].dequantize())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected = theirs[name].grad
            assert (parameter.grad.cpu() - expected).norm() <= 2e-2 * expected.norm() + 1e-8, name


def test_packed_experts_without_adapters_stay_where_they_are(tmp_path: Path) -> None:
    """Adapters go to linear layers by default, and experts are held all the same, frozen."""
    rules = [pair_rules("nvfp4", None, "*_proj"), REST]
    plain = LoraConfig(rank=4)
    model, twin = packed_and_dense(tmp_path, "qwen3_moe", rules, "none", plain)
    for each in (model, twin):
        each(torch.arange(2, 34).view(1, -1)).logits.square().mean().backward()
    for name, parameter in twin.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, model.get_parameter(name).grad), name
    assert torch.equal(logits(model), logits(twin)) and len(adapters(model)) == 4
    with torch.no_grad(), dense(model, inputs=True), dense(twin, inputs=True):
        assert torch.equal(logits(model), logits(twin))


@pytest.mark.parametrize("match", ["*.self_attn.*_proj", "*.experts.*"])
def test_served_keeps_the_scales_of_what_is_held(match: str, tmp_path: Path) -> None:
    """Global scales of other tools are no powers of two, and BF16 would change them."""
    source = tiny_model("qwen3_moe", tmp_path / "model", **{**KINDS["qwen3_moe"], "num_hidden_layers": 1})
    model = quantized(source, [pair_rules("nvfp4", None, match), REST])
    for site in weights(model).values():
        site.quantizer.global_scale.mul_(1.2345)
    attach(model, LoraConfig(rank=4, base="packed", targets=match))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(0, 0.1)
    with served(model):
        before = logits(model)
    merge(model)
    with served(model):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_made_again_when_activations_are_too(dtype: torch.dtype, tmp_path: Path) -> None:
    rules = [pair_rules("nvfp4", "nvfp4", "*.experts.*"), REST]
    config = LoraConfig(rank=4, targets="*.experts.*")
    found = []
    for again in (False, True):
        model = packed_and_dense(tmp_path, "qwen3_moe", rules, "lsq", config)[0].train()
        if again:
            model.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(torch.arange(2, 34).view(1, -1), use_cache=False).logits.float().square().mean()
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == 6 and found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) and found[0][name].any() for name in found[0])


def test_what_reads_sites_reads_packed_experts_one_by_one(tmp_path: Path) -> None:
    rules = [pair_rules("int4_g32_asym", None, "*.experts.*"), REST]
    config = LoraConfig(rank=4, targets="*.experts.*")
    model, twin = packed_and_dense(tmp_path, "gpt_oss", rules, "lsq", config)
    theirs = weights(twin)
    for path, site in weights(model).items():
        other = theirs[path]
        assert site.is_held and not other.is_held and site.shape == other.shape == tuple(other.weight.shape)
        assert len(list(other.parts())) == 1 and len(list(site.parts())) == site.shape[0]
        ours, dense_one = site.quantize(), other.quantizer.quantize(other.weight)
        assert torch.equal(ours.codes, dense_one.codes) and torch.equal(other.quantize().codes, ours.codes)
        assert torch.equal(ours.dequantize(), dense_one.dequantize())
        values = torch.stack([quantizer(weight) for weight, quantizer in site.parts()])
        assert torch.equal(values, other.value()) and torch.equal(site.value(), values)
        for index in range(site.shape[0]):
            assert torch.equal(site.owner.expert(site.slot, index), other.owner.expert(site.slot, index))
        rows = slice(site.shape[1] + 32, site.shape[1] + 64)
        assert torch.equal(Matrix(site, "x", rows).value(), Matrix(other, "x", rows).value())


@pytest.mark.parametrize("learn", ["none", "dual_lsq"])
def test_no_more_than_one_expert_is_dense_at_a_time(learn: str, tmp_path: Path) -> None:
    """A few copies of one matrix while it is made, however many experts there are, and nothing between the passes."""
    found = {}
    for experts in (3, 6):
        changes = {"num_experts": experts, "num_experts_per_tok": experts, "num_hidden_layers": 1}
        source = tiny_model("qwen3_moe", tmp_path / str(experts), **changes)
        model = quantized(source, [pair_rules("nvfp4", None, "*.experts.*"), REST], learn=learn)
        for parameter in (p for site in weights(model).values() for p in site.quantizer.parameters()):
            torch.nn.init.zeros_(parameter)
        attach(model, LoraConfig(rank=4, base="packed", targets="*.experts.*"))
        layer: Any = model.get_submodule("model.layers.0.mlp.experts")
        chosen = torch.arange(experts).expand(2, -1)
        with Alive(128 * 128) as alive:
            y = layer(torch.randn(2, 128), chosen, torch.ones(2, experts) / experts)
            between = len([storage for storage in alive.seen.values() if not storage.expired()])
            y.sum().backward()
        found[experts] = alive.most
        assert between == 0 and alive.largest == 256 * 128  # one matrix of gate and up
        assert all(bool(p.grad.abs().sum((1, 2)).all()) for n, p in layer.named_parameters() if n.endswith(".B"))
    assert found[3] == found[6] <= 4, found
