"""The modes of a whole model: unquantized, as served, and what remains afterwards."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qat.adapters.linear import QatLinear
from qat.lora import LoraConfig, attach
from qat.modes import dense, held, served
from qat.numbers.catalog import lookup
from qat.numbers.numerics import find_scales
from qat.quantizer import Learn, WeightQuantizer
from qat.surgery import apply
from tests.qat.test_surgery import build, logits, usual


def test_dense_is_the_original_model_and_ends_cleanly() -> None:
    original = logits(build())
    model = apply(build(), usual("int3_g64"))
    quantized = logits(model)
    with dense(model):
        assert torch.equal(logits(model), original)
        with dense(model):  # calibration inside a measurement
            assert torch.equal(logits(model), original)
        assert torch.equal(logits(model), original)
    assert torch.equal(logits(model), quantized)
    with pytest.raises(RuntimeError, match="inside"), dense(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), quantized) and not torch.equal(quantized, original)
    assert all(m.mode == "quantized" for m in model.modules() if isinstance(m, WeightQuantizer))


def test_one_half_is_dense_and_stays_so_when_served() -> None:
    """On a CPU `served` rounds weights once: not those that are dense."""
    original, both = build(), apply(build(), usual("int3_g64", "int4_token"))
    plain = logits(original)
    with dense(both, inputs=True), served(both):
        dense_as_served = logits(both)
    with served(original):
        assert not torch.equal(logits(original), plain)  # it rounds to BF16
    for parameter, other in zip(original.parameters(), build().parameters(), strict=True):
        assert torch.equal(parameter, other)
    only_weights = logits(apply(build(), usual("int3_g64")))
    with dense(both, inputs=True, weights=False):
        assert torch.equal(logits(both), only_weights)
    with dense(both):
        assert not torch.equal(logits(both), plain) and not torch.equal(logits(both), only_weights)
    with torch.no_grad():
        assert (dense_as_served - plain).abs().max() < 0.1 * (only_weights - plain).abs().max()


def test_served_rounds_what_is_stored_in_bf16_and_restores_it() -> None:
    model = apply(build(), usual("nvfp4"))
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    plain = logits(model)
    with served(model):
        for name, parameter in model.named_parameters():
            quantized = ".weight_quantizer." in name or "_proj" in name
            expected = before[name][1] if quantized else before[name][1].bfloat16().float()
            assert torch.equal(parameter, expected), name
        assert not torch.equal(logits(model), plain)
    with pytest.raises(RuntimeError, match="inside"), served(model):
        raise RuntimeError("inside")
    for name, parameter in model.named_parameters():
        assert (parameter.data_ptr(), True) == (before[name][0], torch.equal(parameter, before[name][1]))
    assert torch.equal(logits(model), plain)


def test_served_rounds_a_weight_once_and_nested_modes_return() -> None:
    model = apply(build(), usual("int3_g64"))
    with served(model):
        first = logits(model)
        with dense(model):
            assert not torch.equal(logits(model), first)
        assert torch.equal(logits(model), first)
        assert any(m._value is not None for m in model.modules() if isinstance(m, WeightQuantizer))
    assert all(m._value is None for m in model.modules() if isinstance(m, WeightQuantizer))


# --- weights that are quantized once per step ---------------------------------------------------------------------


def layers(learn: Learn = "dual_lsq", name: str = "nvfp4") -> nn.Sequential:
    torch.manual_seed(3)
    made = []
    for _ in range(2):
        linear, fmt = nn.Linear(64, 64), lookup(name)
        quantizer = WeightQuantizer(fmt, find_scales(linear.weight.detach(), fmt), learn)
        for parameter in quantizer.parameters():
            nn.init.normal_(parameter, std=0.1)
        made.append(QatLinear.wrap(linear, quantizer, None))
    return nn.Sequential(*made)


def passes(model: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Results of three micro-batches, and the gradients they add up to."""
    model.zero_grad()
    found = []
    for seed in range(3):
        y = (call or model)(torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)).requires_grad_())
        y.square().sum().backward()
        found.append(y.detach())
    return found + [p.grad.clone() for p in model.parameters() if p.grad is not None]


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """How often weights were rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded = self.derived = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # PyTorch's signature
        self.rounded += func is torch.ops.qat.quantized_linear.default
        self.derived += func is torch.ops.qat.effective_scales.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("learn", ["none", "lsq", "dual_lsq", "focus"])
@pytest.mark.parametrize("autocast", [False, True])
def test_micro_batches_share_the_weights_of_a_step(learn: Learn, autocast: bool) -> None:
    """To the bit the results and gradients of each by itself."""
    model = layers(learn)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = passes(model)
        with held(model), Counted() as counted:
            after = passes(model)
        assert (counted.rounded, counted.derived) == (2, 2)
        with Counted() as counted:
            passes(model)
        assert (counted.rounded, counted.derived) == (6, 6)
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(m._held is None and not m.holds for m in model.modules() if isinstance(m, WeightQuantizer))


def test_recomputed_activations_share_the_weights_too() -> None:
    model = layers()

    def recomputed(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(model, x, use_reentrant=False)
        return y

    before = passes(model)
    with Counted() as counted:
        passes(model, recomputed)
    assert counted.rounded == 12
    with held(model), Counted() as counted:
        after = passes(model, recomputed)
    assert counted.rounded == 2 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_transposed_parameters_are_held_too() -> None:
    """They multiply as another view of the parameter at every call."""
    quantizer = layers()[0].weight_quantizer
    parameter, x = nn.Parameter(torch.randn(64, 64)), torch.randn(3, 64)
    expected = quantizer.linear(x, parameter.transpose(0, 1), None)
    with held(quantizer), Counted() as counted:
        found = [quantizer.linear(x, parameter.transpose(0, 1), None) for _ in range(3)]
    assert counted.rounded == 1 and all(torch.equal(each, expected) for each in found)


def test_a_weight_that_is_held_ahead_is_the_one_of_its_first_use() -> None:
    model = layers()
    expected = passes(model)
    with held(model), Counted() as counted:
        for layer in model:
            layer.weight_quantizer.hold(layer.weight)
        found = passes(model)
    assert counted.rounded == 2 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_held_weight_is_never_that_of_other_numbers() -> None:
    """A weight changed inside after all, evaluation in between, and updates that are made anew at every call."""
    model = layers()
    with held(model):
        passes(model)
        with torch.no_grad():
            model[0].weight.add_(1.0)
        changed = passes(model)
        with torch.no_grad(), dense(model):
            assert not torch.equal(model(torch.ones(1, 64)), changed[0])
    assert all(torch.equal(a, b) for a, b in zip(changed, passes(model), strict=True))
    adapted = nn.ModuleDict({"net": layers("none")})
    attach(adapted, LoraConfig(rank=4, dropout=0.5))
    for layer in adapted["net"]:
        nn.init.normal_(layer.lora.B)
    torch.manual_seed(0)
    before = passes(adapted["net"])
    torch.manual_seed(0)
    with held(adapted):
        after = passes(adapted["net"])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
