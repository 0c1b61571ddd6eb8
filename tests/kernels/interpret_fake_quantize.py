"""Run by test_fake_quantize.py under TRITON_INTERPRET=1: the training kernels' source, executed on the CPU.

Values, codes and gradients of x must be the reference's, bit by bit (BF16 too: the kernels round to it by themselves
here, because the interpreter's own cast does not round). Sums are compared with float64.
"""

import sys
import warnings

import torch
from torch import Tensor

from qat.kernels.effective_scales import triton as scale_kernels
from qat.kernels.fake_quantize import triton as kernels
from qat.kernels.fake_quantize.choose import input_problem, plan, problem, scales_problem
from qat.kernels.fake_quantize_input import triton as dynamic
from qat.kernels.quantize_pack.triton import quantize_pack
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.format import Format
from qat.numbers.numerics import Scales, find_scales
from qat.serving.packed import problem as packing_problem
from qat.serving.quantize_pack import quantize_pack_reference
from qat.training.activations import fake_quantize_input_reference, static_part
from qat.training.gradients import backward
from qat.training.ops import (
    fake_quantize_backward_reference,
    fake_quantize_reference,
    quantized_linear_reference,
)
from qat.training.scales import effective_scales_backward_reference, effective_scales_reference
from tests.kernels.interpreted import mend

GENERATOR = torch.Generator().manual_seed(0)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SUMMED = ("int4_g32_asym", "int8_channel", "int3_tensor", "nvfp4", "nf4_g64", "fp8_b128")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def bits(x: Tensor) -> Tensor:
    """Equal where all bits are, signs of zeros too; one NaN is as good as another."""
    return torch.where(x.isnan(), torch.nan, x.to(torch.float32)).view(torch.int32)


def same(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    assert found.is_contiguous() and torch.equal(bits(found), bits(expected)), f"{what}: {found} is not {expected}"


def sample(fmt: Format, rows: int = 5) -> Tensor:
    """Sizes that end inside tiles and, where it may overhang, inside a block; an outlier, and a block of zeros."""
    x = normal(rows + 130, 200) if fmt.block[0] > 1 else normal(rows, 3 * (fmt.group or 67))
    x[0, 3] = 1e4
    x[1, : fmt.group or 32] = 0
    return x


def broken(x: Tensor) -> Tensor:
    x = x.clone()
    x[2, 5], x[3, 7], x[3, 40] = torch.nan, torch.inf, -torch.inf
    return x


def forward(name: str, fmt: Format) -> None:
    x = sample(fmt)
    scales = find_scales(x, fmt)
    multiplier = scales.effective()
    divisor = multiplier * (0.7 + 0.2 * torch.rand(multiplier.shape, generator=GENERATOR))
    divisor[-1, -1] = torch.nan  # a block whose scale is broken
    kinds = ((torch.float32, multiplier, False), (torch.float32, divisor, True), (torch.float16, divisor, True),
             (torch.bfloat16, divisor, False))  # fmt: skip
    for dtype, rounding, round_bf16 in kinds:
        given = (broken(x).to(dtype), rounding, multiplier, scales.zero_point, None, name, "ste", round_bf16)
        same(kernels.fake_quantize(*given), fake_quantize_reference(*given), f"{name} {dtype} {round_bf16}")


def parted(name: str, fmt: Format, of: int) -> None:
    """A divisor to each part of a group."""
    x = sample(fmt, 70)
    scales = find_scales(x, fmt)
    multiplier = scales.effective()
    divisor = multiplier.repeat_interleave(of, dim=1)
    divisor *= 0.6 + 0.3 * torch.rand(divisor.shape, generator=GENERATOR)
    divisor[0, 1] = torch.nan
    for dtype in FLOATS:
        given = (broken(x).to(dtype), divisor, multiplier, scales.zero_point, None, name, "ste", dtype == torch.float32)
        same(kernels.fake_quantize(*given), fake_quantize_reference(*given), f"{name} in {of} parts, {dtype}")


def divisors(name: str) -> None:
    """Every kind of float32 number divides every kind: zeros, subnormal and largest ones, infinities, NaN, signs."""
    fmt = lookup(name)
    odd = [0.0, 1e-45, 7e-45, 3e-39, 2.0**-126, 1e-38, 1e-20, 0.7, 1.0, 1 / 3, 2.0**126, 2.0**127, 3.4e38, torch.inf]
    divisor = torch.tensor([*odd, *(-number for number in odd), torch.nan])[:, None]
    near = torch.tensor([0.5, 1.5, 2.5, 6.99, 7.01, 100.0, 1e-3, *odd, torch.nan])
    x = torch.cat([near, -near, divisor[:13, 0] * 3.5, divisor[:13, 0] * 0.5])
    x = torch.cat([x, normal(-len(x) % (fmt.group or 1))]).repeat(len(divisor), 1)
    divisor = divisor.expand(fmt.grid_shape(*x.shape)).contiguous()
    zeros = (torch.arange(divisor.numel()) % 15 - 8).view_as(divisor).to(torch.int8) if fmt.zero_point else None
    for dtype in FLOATS[:2]:
        given = (x.to(dtype), divisor, torch.full_like(divisor, 0.75), zeros, None, name, "ste", False)
        same(kernels.fake_quantize(*given), fake_quantize_reference(*given), f"{name} odd divisors {dtype}")


def ties(name: str) -> None:
    """Halfway between neighbours, where only the rule of the element decides."""
    fmt = lookup(name)
    grid = torch.tensor(fmt.element.grid)
    halves = ((grid[1:] + grid[:-1]) / 2).repeat(2, 1 + 2 * (fmt.group or 64) // len(grid))[:, : 2 * (fmt.group or 64)]
    scale = torch.full(fmt.grid_shape(*halves.shape), 0.5)
    given = (halves * 0.5, scale, scale, None, None, name, "ste", False)
    same(kernels.fake_quantize(*given), fake_quantize_reference(*given), f"{name} ties")


def all_shapes() -> None:
    for name in ("int4_g32", "nvfp4", "mxfp6", "mxfp8", "nf4_g64"):
        ties(name)
        divisors(name)
    divisors("int4_g32_asym")
    for name, of in (("nvfp4", 2), ("int4_g32_asym", 4), ("int4_g128", 16), ("nf4_g64", 8)):
        parted(name, lookup(name), of)
    for name in ("int4_g32_asym", "int8_token", "int8_tensor", "fp8_b128", "if4"):
        fmt = lookup(name)
        wide = normal(70, 2 * 64)
        for x in (
            wide[:, ::2],
            wide[:64].t()[:5],
            wide[:0, :64],
            wide[:1, :64],
            wide[:6, :64].view(2, 3, 64),
            wide[0, :64],
        ):
            scales = find_scales(x, fmt)
            given = (x, scales.effective(), scales.effective(), scales.zero_point, scales.choice, name, "ste", False)
            same(kernels.fake_quantize(*given), fake_quantize_reference(*given), f"{name} {tuple(x.shape)}")
    x, weight, bias = normal(3, 96), normal(40, 96), normal(40)
    scale = find_scales(weight, lookup("int4_g32")).effective()
    parts = scale.repeat_interleave(4, dim=1) * (0.9 + 0.2 * torch.rand(40, 12, generator=GENERATOR))
    for dtype, rounding in ((FLOATS[0], scale), (FLOATS[1], scale), (FLOATS[0], parts)):
        given = (x.to(dtype), weight, bias, rounding, scale, None, None, "int4_g32", True)
        pairs = zip(kernels.quantized_linear(*given), quantized_linear_reference(*given), strict=True)
        for found, expected in pairs:
            same(found, expected, "quantized_linear")


def gradients(name: str, columns: int) -> None:
    fmt = lookup(name)
    x = normal(150, 200) if fmt.block[0] > 1 else normal(5, columns)
    scales = find_scales(x, fmt)
    multiplier = scales.effective()
    divisor = multiplier * (0.6 + 0.2 * torch.rand(multiplier.shape, generator=GENERATOR))
    y = fake_quantize_reference(x, divisor, multiplier, scales.zero_point, None, name, "ste", False)
    grad = normal(*x.shape)
    every = (True, True, True)
    of = 2 if name == "nvfp4" else 4 if fmt.group else 1  # parts of a block with divisors of their own
    parts = divisor.repeat_interleave(of, dim=1) * (0.9 + 0.2 * torch.rand(len(divisor), 1, generator=GENERATOR))
    kinds = ((torch.float32, "clipped", divisor, every), (torch.float16, "ste", divisor, every),
             (torch.float32, "ste", None, (False, True, True)), (torch.bfloat16, "clipped", None, (True, False, False)),
             (torch.float16, "ste", divisor, (True, False, True)), (torch.float16, "clipped", parts, every),
             (torch.float32, "ste", parts, (False, True, False)))  # fmt: skip
    for dtype, estimator, rounding, needs in kinds:
        values = (grad.to(dtype), x.to(dtype), y.to(dtype))
        rest = (multiplier, scales.zero_point, name, estimator, needs)
        found = kernels.fake_quantize_backward(*values, rounding, *rest)
        expected = fake_quantize_backward_reference(*values, rounding, *rest)
        what = f"{name} {columns} {dtype} {estimator} {needs}"
        assert [t.dtype for t in found] == [t.dtype for t in expected], what
        if needs[0]:
            same(found[0], expected[0], what)
        one = multiplier.double() if rounding is None else rounding.double()
        wide = (*(t.double() for t in values), one, multiplier.double(), scales.zero_point, fmt, estimator)
        sums = [t for t in backward(*wide, (False, *needs[1:])) if t is not None]
        for got, exact in zip(found[needs[0] :], sums, strict=True):
            assert got.shape == exact.shape, what
            size = (grad.abs() @ x.abs().t()).max() / multiplier.min()
            assert bool(((got - exact).abs() <= 1e-6 * size).all()), what
            torch.testing.assert_close(got.double(), exact, rtol=2e-4, atol=float(2e-6 * size))


def inputs(name: str, fmt: Format) -> None:
    """Scale and values in one kernel; the second width is read twice."""
    static, wide = static_part(fmt, torch.tensor(5.0)), 640 if fmt.divides(640) else 768
    for columns, widest in ((3 * (fmt.group or 67), 16384), (wide, 256)):
        dynamic.WIDEST = widest
        x = (
            broken(torch.cat([sample(fmt), normal(4, 3 * (fmt.group or 67))]))
            if widest > 256
            else broken(normal(6, wide))
        )
        for dtype, estimator in zip(FLOATS, ("clipped", "ste", "clipped"), strict=True):
            if dtype == torch.float32:  # near both ends of float32; the interpreter's BF16 has no subnormals
                x[-1], x[-2], x[-3] = x[-1] * 1e-37, x[-2] * 1e-42, x[-3].clamp(-1, 1) * 3e38
            found = dynamic.fake_quantize_input(x.to(dtype), static, name, estimator)
            expected = fake_quantize_input_reference(x.to(dtype), static, name, estimator)
            for got, right in zip(found, expected, strict=True):
                same(got, right, f"{name} input {columns} {dtype}")
            x[-3:] = normal(3, x.shape[1])
            x[-2] = torch.where(x[-2].abs() > 1, fmt.element.max / 8, x[-2])  # an exact power of two for a scale
            x[-1, -1] = 50.0  # the maximum stands in the last tile
    dynamic.WIDEST = 16384


def words(name: str, fmt: Format) -> None:
    short = next(size for size in (96, 160, 192, 384, 256) if fmt.divides(size))
    for columns, dtype in ((short, torch.float32), (640 if fmt.divides(640) else 768, torch.bfloat16)):
        x = broken(normal(5, columns))
        scales = find_scales(normal(5, columns), fmt)
        divisor = scales.effective() * 0.8
        divisor[0, 0] = torch.nan
        given = (x.to(dtype), divisor, scales.zero_point, name)
        found, expected = quantize_pack(*given), quantize_pack_reference(*given)
        assert torch.equal(found, expected), f"{name}: other words for {columns} columns"


def scales_in_force(name: str, fmt: Format) -> None:
    """More than one program; corrections far beyond what is stored, a broken scale; a stack under its own scales."""
    start = find_scales(normal(70, 24 * (fmt.group or 64)), fmt).effective()
    above = torch.tensor(2.0**-7) if fmt.global_scale else None
    stack = torch.rand(len(start), 1, generator=GENERATOR) + 0.5 if fmt.global_scale else None
    start[0, 0] = torch.inf
    log_scale, log_divisor, parts = (2 * normal(len(start), n * start.shape[1]) for n in (1, 1, 2))
    log_scale.flatten()[1:6] = torch.tensor([-90.0, -12.0, 12.0, 80.0, torch.nan])
    kinds = ((log_scale, log_divisor, above), (log_scale, None, stack), (None, parts, above), (None, None, None))
    for learned, dividing, over in kinds:
        given = (start, learned, dividing, over, name)
        pairs = zip(scale_kernels.effective_scales(*given), effective_scales_reference(*given), strict=True)
        for found, expected in pairs:
            same(found, expected, f"{name} scales")
        grads = normal(*start.shape), None if dividing is None else normal(*dividing.shape)
        for asked in (grads, (None, grads[1])):
            rest = (*asked, *given[:3])
            found, expected = (make(*rest) for make in (scale_kernels.effective_scales_backward,
                                                        effective_scales_backward_reference))  # fmt: skip
            assert len(found) == len(expected)
            for each, right in zip(found, expected, strict=True):
                same(each, right, f"{name} gradients of scales")


def main() -> None:
    mend()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, fmt in CATALOG.items():
        if problem(fmt) is None and not name.startswith(("int3", "int8_g", "int2_g")):  # as int4
            forward(name, fmt)
        if input_problem(fmt) is None and not name.endswith("channel"):  # as token
            inputs(name, fmt)
        if packing_problem(fmt) is None:
            words(name, fmt)
        if scales_problem(fmt.scale) is None and name in ("nvfp4", "int4_g32", "fp8_token", "fp8_b128"):
            scales_in_force(name, fmt)
    all_shapes()
    for name in SUMMED:
        gradients(name, 192)
    gradients("int8_channel", 5000)  # a row of several pieces
    assert plan(lookup("int8_channel"), 5, 5000, 2048, kernels.PROGRAMS).segments > 1
    scale = Scales(torch.ones(1, 1))
    given = (normal(2, 64), scale.stored, scale.stored, None, None, "int4_g32", "ste", False)  # not the scales' shape
    same(kernels.fake_quantize(*given), fake_quantize_reference(*given), "a scale that is broadcast")
    print("all equal")


if __name__ == "__main__":
    sys.exit(main())
