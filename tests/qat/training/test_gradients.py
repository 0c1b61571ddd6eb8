"""Gradients through rounding: finite differences of the part that can be differentiated, and LSQ's published rule.

Rounding is frozen by writing round(clip(v)) as clip(v) + constant, the constant being what rounding added at this
point. Everything else (clip, divide, multiply) is then smooth, and float64 differences measure what the estimators
promise.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.format import Format
from qat.numbers.numerics import Scales, find_scales, from_blocks, per_block, rounded, to_blocks
from qat.training.gradients import Estimator, backward
from qat.training.ops import fake_quantize

# symmetric integers and floats, a table, groups, channels, an overhanging 2-D block, zero points, two element types
NAMES = ["int4_g32", "int8_channel", "int3_tensor", "nvfp4", "mxfp4", "nf4_g64", "fp8_b128", "int4_g32_asym", "if4"]
NAMES += ["q4_0", "q6_k", "q4_k"]  # two element types with different ends; scales of two levels; minima


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def limits(fmt: Format, scales: Scales) -> tuple[Tensor, Tensor]:
    """Smallest and largest element value that rounding returns, per block."""
    if scales.choice is not None:
        ends = torch.tensor([[e.low, e.high] for e in fmt.elements])[scales.choice.long()]
        return per_block(ends[..., 0]), per_block(ends[..., 1])
    if scales.zero_point is None:
        return torch.tensor(fmt.element.low), torch.tensor(fmt.element.high)
    half = 2 ** (fmt.element.bits - 1)
    zero = scales.zero_point.double()
    return per_block(-half - zero), per_block(half - 1 - zero)


def above(x: Tensor, fmt: Format, scales: Scales) -> Tensor:
    """Blocks of x, above their minima where they have some."""
    return to_blocks(x, fmt) if scales.minimum is None else to_blocks(x, fmt) + per_block(scales.minimum.effective())


def frozen(fmt: Format, x: Tensor, divisor: Tensor, scales: Scales) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """y(x, divisor, multiplier) in float64 with the rounding of this x kept as a constant."""
    low, high = limits(fmt, scales)
    values = rounded(to_blocks(x, fmt), fmt, replace(scales, divisor=divisor))
    offset = values.double() - (above(x, fmt, scales).double() / per_block(divisor.double())).clamp(low, high)
    minimum = 0.0 if scales.minimum is None else per_block(scales.minimum.effective())

    def smooth(x: Tensor, divisor: Tensor, multiplier: Tensor) -> Tensor:
        v = (above(x, fmt, scales) / per_block(divisor)).clamp(low, high)
        return from_blocks((v + offset) * per_block(multiplier) - minimum, x.shape, fmt)

    return smooth


def case(name: str, shrink: float = 0.6) -> tuple[Format, Tensor, Tensor, Tensor, Scales]:
    """x with saturated values, and a divisor that differs from the multiplier."""
    fmt = lookup(name)
    x = normal(6, 192 if fmt.block[0] > 1 else fmt.super_block or 128)
    scales = find_scales(x, fmt)
    divisor = scales.effective() * (
        shrink + 0.2 * torch.rand(scales.stored.shape, generator=torch.Generator().manual_seed(0))
    )
    return fmt, x, divisor, scales.effective(), scales


def gradients(
    fmt: Format, x: Tensor, divisor: Tensor, multiplier: Tensor, scales: Scales, weight: Tensor, estimator: Estimator
) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, divisor, multiplier)]
    y = fake_quantize(leaves[0], fmt.name, scales, divisor=leaves[1], multiplier=leaves[2], estimator=estimator)
    return list(torch.autograd.grad((y * weight).sum(), leaves))


@pytest.mark.parametrize("name", NAMES)
def test_dual_lsq_equals_finite_differences(name: str) -> None:
    fmt, x, divisor, multiplier, scales = case(name)
    smooth = frozen(fmt, x, divisor, scales)
    point = [t.double().requires_grad_() for t in (x, divisor, multiplier)]
    weight = normal(*x.shape, seed=1)
    expected = torch.autograd.grad((smooth(*point) * weight).sum(), point)
    for found, exact in zip(gradients(fmt, x, divisor, multiplier, scales, weight, "clipped"), expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    step = 1e-7  # and the smooth function's own gradient equals differences, so autograd is not its own witness
    for index in (1, 2):
        high, low = ([t.detach() + (s * step if i == index else 0) for i, t in enumerate(point)] for s in (1, -1))
        difference = ((smooth(*high) - smooth(*low)) * weight).sum() / (2 * step)
        torch.testing.assert_close(difference, expected[index].sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_one_scale_gets_the_rule_of_lsq(name: str) -> None:
    """dL/ds = sum of dy (round(v) - v) inside, dy times the bound outside (arXiv 1902.08153, equation 3)."""
    fmt, x, scale, _, scales = case(name)
    weight = normal(*x.shape, seed=1)
    leaf = scale.clone().requires_grad_()
    y = fake_quantize(x, fmt.name, scales, multiplier=leaf)
    (found,) = torch.autograd.grad((y * weight).sum(), leaf)
    low, high = limits(fmt, scales)
    v = above(x, fmt, scales).double() / per_block(scale.double())
    inside = (v >= low) & (v <= high)
    steps = rounded(to_blocks(x, fmt), fmt, replace(scales, divisor=scale)).double()
    per_value = torch.where(inside, steps - v, v.clamp(low, high))
    expected = (to_blocks(weight, fmt) * per_value).sum(dim=(1, 3))
    assert not inside.all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_straight_through_passes_everything_and_clipped_what_is_inside(name: str) -> None:
    fmt, x, scale, _, scales = case(name)
    weight = normal(*x.shape, seed=1)
    low, high = limits(fmt, scales)
    v = above(x, fmt, scales) / per_block(scale)
    inside = from_blocks((v >= low) & (v <= high), x.shape, fmt)
    for estimator, expected in (("ste", weight), ("clipped", torch.where(inside, weight, 0.0))):
        leaf = x.clone().requires_grad_()
        y = fake_quantize(leaf, fmt.name, scales, multiplier=scale, estimator=estimator)
        (found,) = torch.autograd.grad((y * weight).sum(), leaf)
        assert torch.equal(found, expected)
    assert not inside.all() and inside.any()


@pytest.mark.parametrize("name", [name for name, fmt in CATALOG.items() if len(fmt.elements) == 1])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_blocks_of_zeros_or_of_extreme_numbers_have_finite_gradients(name: str, size: float) -> None:
    """An embedding's padding row is all zeros: its scale is the smallest float32, whose square is 0."""
    fmt = lookup(name)
    x = normal(4, 256)
    x[2] *= size
    scales = find_scales(x, fmt)
    one = scales.effective()
    for found in gradients(fmt, x, one * 0.9, one, scales, torch.full_like(x, 1e-3), "ste"):
        assert bool(found.isfinite().all())


def test_values_rounded_to_the_end_are_not_clipped() -> None:
    fmt = lookup("int4_tensor")
    x = torch.tensor([[6.6, 7.0, 7.01, -7.0, -7.4, 0.0]], requires_grad=True)
    y = fake_quantize(x, fmt.name, Scales(torch.ones(1, 1, dtype=torch.bfloat16)), estimator="clipped")
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1, 1, 0, 1, 0, 1]]


@pytest.mark.parametrize("learned", [True, False])
def test_a_frozen_divisor_still_scales_the_gradient(learned: bool) -> None:
    """dy/dx is multiplier / divisor whether or not the divisor is being learned."""
    fmt, x, divisor, multiplier, scales = case("int4_g32")
    leaf = x.clone().requires_grad_()
    y = fake_quantize(leaf, fmt.name, scales, multiplier=multiplier, divisor=divisor.clone().requires_grad_(learned))
    y.sum().backward()
    expected = per_block(multiplier / divisor).expand_as(to_blocks(x, fmt)).reshape(x.shape)
    assert torch.equal(leaf.grad, expected)


def test_scale_gradients_are_not_summed_in_bf16() -> None:
    """round(v) - v is a small difference of two large sums: BF16 products would drown it."""
    fmt = lookup("int8_g128")
    x, weight = normal(8, 1024).bfloat16(), normal(8, 1024, seed=1).bfloat16()
    scale = find_scales(x, fmt).effective() * 1.1  # nothing is clipped
    y = from_blocks(rounded(to_blocks(x.float(), fmt), fmt, Scales(scale)) * per_block(scale), x.shape, fmt)
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        tensors = (weight.to(dtype), x.to(dtype), y)
        _, divisor, multiplier = backward(*tensors, None, scale, None, fmt, "ste", (True, True, True))
        assert divisor is not None and multiplier is not None
        found.append((divisor + multiplier).double())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_gradients_have_the_shape_and_dtype_of_what_they_belong_to() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        fmt = lookup("fp8_b128")
        x = normal(2, 65, 200).to(dtype).requires_grad_()
        scales = find_scales(x, fmt)
        multiplier, divisor = (scales.effective().clone().requires_grad_() for _ in range(2))
        y = fake_quantize(x, fmt.name, scales, multiplier=multiplier, divisor=divisor)
        grads = torch.autograd.grad(y.sum(), [x, multiplier, divisor])
        assert [g.shape for g in grads] == [x.shape, multiplier.shape, divisor.shape]
        assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]


def test_a_transposed_gradient_is_read_by_index_not_by_memory() -> None:
    fmt, x, scale, _, scales = case("int4_g32")
    weight = normal(128, 6, seed=1).T  # strided
    found = []
    for w in (weight, weight.contiguous()):
        leaf = scale.clone().requires_grad_()
        y = fake_quantize(x, fmt.name, scales, multiplier=leaf)
        found.append(torch.autograd.grad(y, leaf, w)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int4_g32", "int4_g32_asym", "if4"])
@pytest.mark.parametrize("estimator", ["ste", "clipped"])
def test_parts_of_a_block_are_blocks_of_their_own_under_one_multiplier(name: str, estimator: Estimator) -> None:
    """Divisors of eight values each: value and gradients are those of a format whose blocks have eight values, where
    both share the stored scale; a gradient of the shared multiplier is the sum of its parts'."""
    fmt, x, _, multiplier, scales = case(name)
    parts = (fmt.group or 0) // 8
    small = replace(fmt, name="small", block=(1, 8))
    divisor = (multiplier * 0.8).repeat_interleave(parts, dim=1) * (0.9 + 0.2 * torch.rand(6, 128 // 8))
    apart = {
        field: None if (value := getattr(scales, field)) is None else value.repeat_interleave(parts, dim=1)
        for field in ("zero_point", "choice")
    }
    wide = multiplier.repeat_interleave(parts, dim=1)
    y = from_blocks(rounded(to_blocks(x, fmt), fmt, replace(scales, divisor=divisor)), x.shape, fmt)
    assert torch.equal(
        y, from_blocks(rounded(to_blocks(x, small), small, Scales(wide, divisor=divisor, **apart)), x.shape, small)
    )
    grad = normal(*x.shape, seed=9)
    every = (True, True, True)
    found = backward(grad, x, y, divisor, multiplier, scales.zero_point, fmt, estimator, every)
    expected = backward(grad, x, y, divisor, wide, apart["zero_point"], small, estimator, every)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2].unflatten(1, (-1, parts)).sum(-1))
