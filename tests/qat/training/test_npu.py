"""How an NPU rounds inputs, against the documents' formulas in exact fractions: every BF16 number, and every tie."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from qat.errors import UnsupportedError
from qat.numbers.catalog import lookup
from qat.training import npu
from qat.training.activations import dynamic_fake_quantize, fake_quantize_input, static_part

E2M1 = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]


def away(value: Fraction) -> Fraction:
    """Nearest of E2M1, half away from zero, saturating."""
    size = abs(value)
    best = min(E2M1, key=lambda each: (abs(each - size), -each))
    return best if value >= 0 else -best


def even_code(value: Fraction) -> Fraction:
    """Nearest of E2M1, half to even codes, saturating."""
    best = min(E2M1, key=lambda each: (abs(each - abs(value)), E2M1.index(each) % 2))
    return best if value >= 0 else -best


def even(value: Fraction) -> Fraction:
    """Nearest of E4M3, half to even, saturating."""
    size = min(abs(value), Fraction(448))
    step = Fraction(2) ** (max(math.floor(math.log2(size)) if size else -6, -6) - 3)
    best = min(round(size / step) * step, Fraction(448))
    return best if value >= 0 else -best


@pytest.mark.parametrize(
    ("name", "top", "nearest", "experts"),
    [("mxfp4", 2, away, False), ("mxfp4", 2, even_code, True), ("mxfp8", 8, even, False), ("mxfp8", 8, even, True)],
)
def test_mx_inputs(name: str, top: int, nearest: object, experts: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=generator).exp2().mul(torch.randn(40, 64, generator=generator)).bfloat16()
    x[:8] = torch.randint(-31, 32, (8, 64), generator=generator) / 4  # ties, and maxima beyond the largest element
    x[9, :32] = 0
    y = fake_quantize_input(x.float(), lookup(name), "ascend", "ste", None, "experts" if experts else "layer")
    for block, found in zip(x.view(-1, 32).tolist(), y.view(-1, 32).tolist(), strict=True):
        amax = max(map(abs, block))
        scale = Fraction(2) ** ((math.frexp(amax)[1] - 1 - top) if amax else 0)
        assert [Fraction(value) for value in found] == [nearest(Fraction(v) / scale) * scale for v in block]  # type: ignore[operator]  # a function


@pytest.mark.parametrize("name", ["int8_tensor", "int8_tensor_asym"])
def test_static_inputs_are_multiplied_by_a_rounded_reciprocal(name: str) -> None:
    fmt = lookup(name)
    amax = torch.tensor([-1.3, 2.9]) if fmt.zero_point else torch.tensor(2.9)
    static = static_part(fmt, amax)
    assert static is not None
    scale, offset = static[:1].bfloat16(), int(npu.offset_of(static))
    assert float(scale) == float(static[0]) and (offset != 0) == fmt.zero_point
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = torch.where(torch.isfinite(patterns), patterns, 0)[None].float()
    codes = torch.round(x * (1 / scale).float() + offset).clamp(-128, 127)  # 1 / scale in BF16, as at loading
    expected = (codes - offset) * scale.float()
    assert torch.equal(fake_quantize_input(x, fmt, "ascend", "ste", static), expected)
    divided = (torch.round(x / static[0]) + offset).clamp(-128, 127)
    assert not torch.equal(codes, divided)  # so that the rounded reciprocal is seen


def test_integers_per_token_are_those_of_every_engine() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    for name in ("int8_token", "int4_token"):
        assert npu.is_dynamic_integer(lookup(name))
        args = (x, lookup(name), "ste", torch.tensor(1.0))
        ours, others = (dynamic_fake_quantize(args[0], args[1], rule, "ste", args[3]) for rule in ("ascend", "vllm"))
        assert torch.equal(ours, others)


@pytest.mark.parametrize("name", ["int8_token", "int8_tensor", "mxfp8", "mxfp4"])
def test_inputs_are_bf16_numbers_first(name: str) -> None:
    """As those of the operator are; but the one that gates and quantizes to integers never leaves float32."""
    fmt = lookup(name)
    static = static_part(fmt, torch.tensor(3.0))
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    held = x.bfloat16().float()
    rounded = fake_quantize_input(x, fmt, "ascend", "ste", static)
    assert torch.equal(rounded, fake_quantize_input(held, fmt, "ascend", "ste", static))
    pair = [fake_quantize_input(each, fmt, "ascend", "ste", static, "second") for each in (x, held)]
    assert torch.equal(*pair) is not npu.is_dynamic_integer(fmt)
    x.requires_grad_()
    fake_quantize_input(x, fmt, "ascend", "ste", static).backward(gradient := torch.randn(64, 256))
    assert x.grad is not None and torch.equal(x.grad, gradient)  # not rounded on its way


@pytest.mark.parametrize(("rule", "type"), npu.NPU_RULES.items())
def test_numbers_of_the_model(rule: str, type: torch.dtype) -> None:
    x = torch.tensor([1 + 2**-10, -3.0, 1e-3], requires_grad=True)
    held = npu.held(x, rule)
    assert torch.equal(held, x.detach().to(type).float()) and held.dtype == torch.float32
    held.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(3))
    own = x.detach().to(type)
    assert npu.held(own, rule) is own


def test_which_products_multiply_codes() -> None:
    integers = [("int8_channel", "int8_token"), ("int4_channel", "int4_token"), ("int8_channel", "int8_mix")]
    assert all(npu.multiplies_codes(*map(lookup, pair)) for pair in integers)
    assert not any(
        npu.multiplies_codes(*map(lookup, pair)) for pair in [("mxfp4", "mxfp8"), ("fp8_channel", "int8_token")]
    )


@pytest.mark.parametrize("estimator", ["ste", "clipped"])
def test_gradients(estimator: str) -> None:
    fmt = lookup("int8_tensor_asym")
    static = static_part(fmt, torch.tensor([-1.0, 1.0]))
    x = torch.tensor([[0.3, 5.0, -0.2, -7.0]], requires_grad=True)
    fake_quantize_input(x, fmt, "ascend", estimator, static).sum().backward()  # type: ignore[arg-type]  # one of the two
    inside = torch.tensor([[1.0, 0.0, 1.0, 0.0]]) if estimator == "clipped" else torch.ones(1, 4)
    assert x.grad is not None and torch.equal(x.grad, inside)


def test_a_spoilt_block_is_nan_and_no_other() -> None:
    x = torch.ones(1, 64)
    x[0, 3] = math.nan
    y: Tensor = dynamic_fake_quantize(x, lookup("mxfp4"), "ascend", "ste", torch.tensor(1.0))
    assert bool(y[0, :32].isnan().all()) and torch.equal(y[0, 32:], x[0, 32:])


def test_other_formats_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="no operator for nvfp4 inputs; it has int8_token"):
        fake_quantize_input(torch.ones(1, 16), lookup("nvfp4"), "ascend", "ste", torch.ones(1))


def test_channels_of_caches_are_rounded_in_bf16() -> None:
    """Every BF16 number under three scales, by torch's own BF16 operators, as vllm-ascend calls them."""
    fmt = lookup("int8_column")
    static = static_part(fmt, torch.tensor([0.7, 3.1, 19.0]))
    assert static is not None and torch.equal(static, (torch.tensor([0.7, 3.1, 19.0]) / 127).bfloat16().float())
    scale = static.bfloat16()
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = torch.where(torch.isfinite(patterns), patterns, 0)[:, None].expand(-1, 3)
    codes = torch.clamp(torch.round(x * (1.0 / scale) + torch.zeros(3, dtype=torch.bfloat16)), -128, 127)
    expected = (codes.to(torch.int8).to(torch.bfloat16) * scale).float()
    found, inside = npu.fake_quantized(x.float(), fmt, static)
    assert torch.equal(found, expected) and found.dtype == torch.float32
    assert torch.equal(
        inside, (x * (1.0 / scale)).float().round().clamp(-128, 127) == (x * (1.0 / scale)).float().round()
    )
    assert torch.equal(fake_quantize_input(x.float(), fmt, "ascend", "ste", static), expected)
    once = torch.round(x.float() * (1.0 / scale).float()).clamp(-128, 127)
    assert not torch.equal(once, codes.float())  # so that the product's rounding to BF16 is seen
    assert codes.min() == -128 and codes.max() == 127
    assert not inside.all() and torch.equal(inside[:, 0], inside[:, 0] & (found[:, 0].abs() <= 128 * static[0]))
    with pytest.raises(UnsupportedError, match="int8_column caches have activation_rule: ascend, not vllm"):
        fake_quantize_input(x.float(), fmt, "vllm", "ste", static)
