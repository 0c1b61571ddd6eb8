"""Fake quantization and its gradients in Triton: one pass over memory each, numbers equal to the reference's.

Rounding is float32 arithmetic that IEEE 754 fixes to the last bit (`rounding/triton.py`), so a GPU, the interpreter and
`qat.numbers.numerics` give the same bits. What the kernels do not take runs the reference;
`qat.kernels.load.explain_training` says so by name.

Values lie as the model has them; `choose.plan` sees every tensor as a matrix with one scale per row (a group is a row,
and so is each of the parts of a group that have divisors of their own: PARTS of these rows share a multiplier), so that
a tile of TILE_ROWS x TILE_COLUMNS values needs a handful of scales. Memory bounds the speed: each value is read once
and written once, 16 bytes per access and thread, and 16 to 20 instructions lie between, so nothing is worth tuning but
the width of a tile.

Sums over large blocks are made in two steps, each in a fixed order: no atomics, so a run repeats itself exactly.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from qat.kernels.fake_quantize.choose import Plan, parts_of, plan, problem
from qat.kernels.fake_quantize.rounding.triton import divided, to_bf16_grid
from qat.kernels.launch import Call, Launch
from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.training.ops import fake_quantize_backward_reference, fake_quantize_reference, quantized_linear_reference

PROGRAMS = 1024  # of a reduction, about 8 per processor of the largest devices


@triton.jit(do_not_specialize=["R"])
def fake_quantize_kernel(
    x,
    divisor,
    multiplier,
    zeros,
    out,
    R,
    C,
    scale_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_NORMAL: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZEROS: tl.constexpr,
    GRID: tl.constexpr,
    BOUNDS: tl.constexpr,
    PARTS: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    FULL: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """out (R, C) = x on its grid. BLOCK_COLUMNS 0: one divisor per row and one multiplier to PARTS rows; else one of
    both per block, which holds whole tiles. FULL: a row is exactly one tile wide."""
    row, column = tl.arange(0, TILE_ROWS), tl.arange(0, TILE_COLUMNS)
    if FULL:
        first_row = tl.program_id(0) * TILE_ROWS
        inside = (row < R - first_row)[:, None] & (column < TILE_COLUMNS)[None, :]
        at = first_row.to(tl.int64) * TILE_COLUMNS + (row[:, None] * TILE_COLUMNS + column[None, :])
    else:
        across = tl.cdiv(C, TILE_COLUMNS)
        first_row = (tl.program_id(0) // across) * TILE_ROWS
        first_column = (tl.program_id(0) % across).to(tl.int64) * TILE_COLUMNS
        inside = (row < R - first_row)[:, None] & (column < C - first_column)[None, :]
        at = first_row.to(tl.int64) * C + first_column + row[:, None] * C + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BLOCK_COLUMNS == 0:
        scale_at = first_row + row
        there = scale_at < R
        d = tl.load(divisor + scale_at, mask=there, other=1.0)[:, None]
        m = tl.load(multiplier + scale_at // PARTS, mask=there, other=1.0)[:, None]
        zero = tl.load(zeros + scale_at // PARTS, mask=there, other=0).to(tl.float32)[:, None] if ZEROS else 0.0
    else:
        scale_at = (first_row // BLOCK_ROWS) * scale_columns + first_column // BLOCK_COLUMNS
        d = tl.load(divisor + scale_at)
        m = tl.load(multiplier + scale_at)
        zero = tl.load(zeros + scale_at).to(tl.float32) if ZEROS else 0.0
    y = divided(value, d, zero, KIND, MANTISSA, MIN_NORMAL, LOW, HIGH, ZEROS, GRID, BOUNDS) * m
    tl.store(out + at, to_bf16_grid(y, ROUND_BF16).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R"])
def fake_quantize_backward_kernel(
    grad,
    x,
    y,
    divisor,
    multiplier,
    zeros,
    grad_x,
    of_divisor,
    of_multiplier,
    R,
    C,
    SEGMENT,
    scale_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZEROS: tl.constexpr,
    CLIPPED: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_DIVISOR: tl.constexpr,
    NEEDS_MULTIPLIER: tl.constexpr,
    WHOLE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Gradients as `qat.training.gradients.backward` defines them.

    grad_x (R, C). The two others are finished, (R,) and (R / PARTS,), where a program sees WHOLE rows of one scale
    each, else the sums per row and segment, (R, segments), which the host adds up. ONE_TILE: a segment is no longer
    than a tile.
    """
    segments = tl.cdiv(C, SEGMENT)
    first_row = (tl.program_id(0) // segments) * TILE_ROWS
    segment = tl.program_id(0) % segments
    row, column = tl.arange(0, TILE_ROWS), tl.arange(0, TILE_COLUMNS)
    in_row = row < R - first_row
    of_block = (first_row // BLOCK_ROWS) * scale_columns + segment
    scale_at = first_row + row if BLOCK_COLUMNS == 0 else of_block + row * 0
    m = tl.load(multiplier + scale_at // PARTS, mask=in_row, other=1.0)
    d = m if ONE_SCALE else tl.load(divisor + scale_at, mask=in_row, other=1.0)
    zero = tl.load(zeros + scale_at // PARTS, mask=in_row, other=0).to(tl.float32) if ZEROS else 0.0
    lowest, highest = ((LOW - zero) * d)[:, None], ((HIGH - zero) * d)[:, None]
    # y = round(x / d) * m: inside the bounds dy/dx is m / d, which is 1 where both are one scale.
    passing = 1.0 if ONE_SCALE else tl.div_rn(m, d)[:, None]
    divisor_sum = tl.zeros((TILE_ROWS,) if ONE_TILE else (TILE_ROWS, TILE_COLUMNS), tl.float32)
    multiplier_sum = divisor_sum
    start = segment.to(tl.int64) * SEGMENT
    rows_at = first_row.to(tl.int64) * C + row[:, None] * C + column[None, :]
    for first in range(start, tl.minimum(start + SEGMENT, C), TILE_COLUMNS):
        at = rows_at + first
        inside = in_row[:, None] & (column < C - first)[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if NEEDS_DIVISOR or (NEEDS_X and CLIPPED):
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            beyond = (value < lowest) | (value > highest)
        if NEEDS_MULTIPLIER:
            product = g * tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
            multiplier_sum += tl.sum(product, axis=1) if ONE_TILE else product
        if NEEDS_DIVISOR:
            product = tl.where(beyond, 0.0, g * value)
            divisor_sum += tl.sum(product, axis=1) if ONE_TILE else product
        if NEEDS_X:
            passed = g if ONE_SCALE else g * passing
            if CLIPPED:
                passed = tl.where(beyond, 0.0, passed)
            tl.store(grad_x + at, passed.to(grad_x.dtype.element_ty), mask=inside)
    result_at = (first_row + row).to(tl.int64) * segments + segment
    if NEEDS_DIVISOR:
        total = divisor_sum if ONE_TILE else tl.sum(divisor_sum, axis=1)
        total = tl.div_rn(-total, d) * tl.div_rn(m, d) if WHOLE else total
        tl.store(of_divisor + result_at, total, mask=in_row)
    if NEEDS_MULTIPLIER:
        total = multiplier_sum if ONE_TILE else tl.sum(multiplier_sum, axis=1)
        if PARTS > 1:  # of groups, which are whole; a tile holds all parts of each
            total = tl.sum(tl.reshape(total, (TILE_ROWS // PARTS, PARTS)), axis=1)
            result_at = first_row // PARTS + tl.arange(0, TILE_ROWS // PARTS)
            in_row = result_at < R // PARTS
            m = tl.load(multiplier + result_at, mask=in_row, other=1.0)
        total = tl.div_rn(total, m) if WHOLE else total
        tl.store(of_multiplier + result_at, total, mask=in_row)


def limits(fmt: Format) -> dict[str, float]:
    """Bounds of the values, or of the codes where zero points shift them."""
    half = 2 ** (fmt.element.bits - 1)
    low, high = (-half, half - 1) if fmt.zero_point else (fmt.element.low, fmt.element.high)
    return {"LOW": float(low), "HIGH": float(high)}


def constants(fmt: Format) -> dict[str, Any]:
    """Compile-time arguments of `rounded`; whatever depends on the format is derived here."""
    element, grid = fmt.element, torch.tensor(fmt.element.grid if fmt.element.kind == "table" else (0.0,))
    return {
        "KIND": element.kind,
        "MANTISSA": element.mantissa_bits,
        "MIN_NORMAL": element.min_normal,
        **limits(fmt),
        "ZEROS": fmt.zero_point,
        "GRID": tuple(grid.tolist()),
        "BOUNDS": tuple(((grid[1:] + grid[:-1]) / 2).tolist()),
    }


def size(x: Tensor) -> tuple[int, int]:
    """(rows, columns) of x (..., columns)."""
    return math.prod(x.shape[:-1]), x.shape[-1]


def takes(x: Tensor, divisor: Tensor | None, multiplier: Tensor | None, zero_point: Tensor | None, fmt: Format) -> int:
    """In how many parts of a block the kernels take x (..., columns) with these scales, 1 where blocks are whole; 0
    where they do not: the reference computes (or refuses) all others."""
    if problem(fmt) is not None or x.dtype == torch.float64 or not x.numel() or not x.dim():
        return 0
    rows, columns = size(x)
    shape = fmt.grid_shape(rows, columns)
    if any(t is not None and t.dtype != torch.float32 for t in (divisor, multiplier)) or not fmt.divides(columns):
        return 0
    if (multiplier is not None and multiplier.shape != shape) or fmt.zero_point != (zero_point is not None):
        return 0
    if zero_point is not None and zero_point.shape != shape:
        return 0
    return 1 if divisor is None else parts_of(fmt, tuple(divisor.shape), shape)


def _forward(
    x: Tensor, scales: Sequence[Tensor | None], parts: int, fmt: Format, round_bf16: bool, dtype: torch.dtype
) -> Tensor:
    """x (..., columns) on its grid, in `dtype`; scales are (divisor or None, multiplier, zero points)."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    divisor, multiplier, zeros = (None if t is None else t.contiguous() for t in scales)
    divisor = multiplier if divisor is None else divisor
    to_bf16, once = dtype == torch.bfloat16, round_bf16 and fmt.rounds_in_bf16
    how = "cast" if x.is_cuda else "bits"  # what becomes BF16 is rounded there, but not in Triton's interpreter
    rounding = how if (once and not to_bf16) or (to_bf16 and not x.is_cuda) else ""
    _call(fmt.name, *size(x), parts, rounding)((x.contiguous(), divisor, multiplier, zeros, out))
    return out


@lru_cache(maxsize=1024)
def _call(format: str, rows: int, columns: int, parts: int, rounding: str) -> Call:
    fmt = lookup(format)
    cut = plan(fmt, rows, columns, 4096, parts=parts)
    fixed = {**geometry(cut), **constants(fmt), "PARTS": parts, "ROUND_BF16": rounding, "FULL": is_full(cut)}
    launch = Launch(fake_quantize_kernel, **fixed, num_warps=cut.warps, enable_fp_fusion=False)
    return launch.at((cut.tiles,), cut.rows, cut.columns, cut.scale_columns)


@lru_cache(maxsize=1024)
def _call_backward(
    format: str, rows: int, columns: int, parts: int, clipped: bool, one_scale: bool, needs: tuple[bool, ...]
) -> tuple[Call, Plan]:
    fmt = lookup(format)
    cut = plan(fmt, rows, columns, 2048, PROGRAMS, parts)
    launch = Launch(
        fake_quantize_backward_kernel, **geometry(cut), PARTS=parts, **limits(fmt), ZEROS=fmt.zero_point,
        CLIPPED=clipped, ONE_SCALE=one_scale, NEEDS_X=needs[0], NEEDS_DIVISOR=needs[1], NEEDS_MULTIPLIER=needs[2],
        WHOLE=_is_whole(cut), ONE_TILE=cut.segment <= cut.tile_columns, num_warps=cut.warps,
    )  # fmt: skip
    grid = (-(-cut.rows // cut.tile_rows) * cut.segments,)
    return launch.at(grid, cut.rows, cut.columns, cut.segment, cut.scale_columns), cut


def _is_whole(cut: Plan) -> bool:
    """Whether a program of a reduction sees whole rows of one scale each."""
    return cut.block_columns == 0 and cut.segments == 1


def is_full(cut: Plan) -> bool:
    """Whether each row, with one scale, is exactly one tile wide, as groups are."""
    return cut.block_columns == 0 and cut.columns == cut.tile_columns


def geometry(cut: Plan) -> dict[str, int]:
    """Compile-time arguments that say how the tensor is cut."""
    return {
        "BLOCK_ROWS": cut.block_rows,
        "BLOCK_COLUMNS": cut.block_columns,
        "TILE_ROWS": cut.tile_rows,
        "TILE_COLUMNS": cut.tile_columns,
    }


def fake_quantize(
    x: Tensor,
    divisor: Tensor | None,
    multiplier: Tensor,
    zero_point: Tensor | None,
    choice: Tensor | None,
    format: str,
    estimator: str,
    round_bf16: bool,
) -> Tensor:
    """The operator `qat::fake_quantize` on a device that runs Triton."""
    fmt = lookup(format)
    parts = 0 if choice is not None else takes(x, divisor, multiplier, zero_point, fmt)
    if not parts:
        return fake_quantize_reference(x, divisor, multiplier, zero_point, choice, format, estimator, round_bf16)
    return _forward(x, (divisor, multiplier, zero_point), parts, fmt, round_bf16, x.dtype)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    divisor: Tensor | None,
    multiplier: Tensor,
    zero_point: Tensor | None,
    choice: Tensor | None,
    format: str,
    round_bf16: bool,
) -> tuple[Tensor, Tensor]:
    """The operator `qat::quantized_linear` on a device that runs Triton: one kernel for the weight, then the library's
    matrix product."""
    fmt = lookup(format)
    parts = 0 if choice is not None else takes(weight, divisor, multiplier, zero_point, fmt)
    if not parts:
        return quantized_linear_reference(x, weight, bias, divisor, multiplier, zero_point, choice, format, round_bf16)
    dtype = torch.bfloat16 if round_bf16 else weight.dtype
    quantized = _forward(weight, (divisor, multiplier, zero_point), parts, fmt, round_bf16, dtype)
    operand = quantized if quantized.dtype == x.dtype else quantized.to(weight.dtype).to(x.dtype)
    return functional.linear(x, operand, None if bias is None else bias.to(x.dtype)), quantized


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    divisor: Tensor | None,
    multiplier: Tensor,
    zero_point: Tensor | None,
    format: str,
    estimator: str,
    needs: Sequence[bool],
    choice: Tensor | None = None,
) -> list[Tensor]:
    """The operator `qat::fake_quantize_backward` on a device that runs Triton."""
    fmt = lookup(format)
    parts = 0 if grad.dtype == torch.float64 else takes(x, divisor, multiplier, zero_point, fmt)
    if not parts:
        given = grad, x, y, divisor, multiplier, zero_point, format, estimator, needs, choice
        return fake_quantize_backward_reference(*given)
    call, cut = _call_backward(format, *size(x), parts, estimator == "clipped", divisor is None, tuple(needs))
    one = multiplier.contiguous()
    two = one if divisor is None else divisor.contiguous()
    grad_x = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) if needs[0] else None
    rows = cut.rows, cut.rows // parts
    sums = [one.new_empty(n, cut.segments) if need else None for n, need in zip(rows, needs[1:], strict=True)]
    y, zeros = (None if t is None else t.contiguous() for t in (y, zero_point))
    call((grad.contiguous(), x.contiguous(), y, two, one, zeros, grad_x, *sums))
    shapes = two.shape, one.shape
    divisor_sum, multiplier_sum = (
        None if t is None else _added(t, cut, shape) for t, shape in zip(sums, shapes, strict=True)
    )
    if not _is_whole(cut):
        divisor_sum = None if divisor_sum is None else -(divisor_sum / two) * (one / two)
        multiplier_sum = None if multiplier_sum is None else multiplier_sum / one
    return [t for t in (grad_x, divisor_sum, multiplier_sum) if t is not None]


def _added(sums: Tensor, cut: Plan, shape: torch.Size) -> Tensor:
    """Sums per row and segment (rows, segments) added up per scale, in `shape`."""
    if cut.block_columns == 0:
        return (sums if cut.segments == 1 else sums.sum(dim=1)).view(shape)
    padded = functional.pad(sums, (0, 0, 0, -cut.rows % cut.block_rows))
    return padded.view(shape[0], cut.block_rows, shape[1]).sum(dim=1)
