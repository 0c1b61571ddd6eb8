"""Dynamic fake quantization of a layer's input in Triton: maximum, scale and rounding in one pass over memory.

The arithmetic is `qat.training.activations`' rule "vllm", operation by operation: scales and values have the
reference's bits. A program holds whole blocks: many groups, or one token, whose row is read again (from cache) where
it is longer than fits into registers.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.fake_quantize.choose import input_problem
from qat.kernels.fake_quantize.rounding.triton import ALL, divided, rounded, to_bf16_grid
from qat.kernels.fake_quantize.triton import constants, size
from qat.kernels.launch import Call, Launch
from qat.numbers.catalog import lookup
from qat.numbers.element import EXPONENT_BIAS
from qat.numbers.format import Format
from qat.numbers.scale import TINY, UE4M3
from qat.training.activations import fake_quantize_input_reference, floors

WIDEST = 16384  # columns of a row that stays in registers, 32 per thread of 16 warps
VALUES = 4096  # of a program over groups
TINIEST = tl.constexpr(TINY)
BIAS = tl.constexpr(EXPONENT_BIAS)


@triton.jit
def largest(value):
    """Largest magnitude of each row; the bits of a NaN count as larger than infinity."""
    bits = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(amax, RULE: tl.constexpr, MAX: tl.constexpr, MAX_EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """The E8M0 scale for these maxima, decoded; see `scale.ExponentScale`."""
    if RULE == "ceil":
        bits = tl.div_rn(amax, MAX).to(tl.int32, bitcast=True)
        field = bits >> 23
        smallest = tl.where(bits > 0x00400000, 1, 0)  # of subnormals: 2^-127 or 2^-126
        field = tl.where(field == 0, smallest, field + tl.where((bits & 0x007FFFFF) != 0, 1, 0))
    else:
        bits = amax.to(tl.int32, bitcast=True)
        field = ((bits + (1 << (22 - MANTISSA)) if RULE == "even" else bits) >> 23) - MAX_EXPONENT
    field = tl.minimum(tl.maximum(tl.where(amax > 0, field, 0), 0), 2 * BIAS)
    scale = tl.where(field == 0, 0x00400000, field << 23).to(tl.float32, bitcast=True)
    return tl.where(amax < float("inf"), scale, float("nan"))


@triton.jit
def scale_for(
    amax,
    static,
    SCALE: tl.constexpr,
    RULE: tl.constexpr,
    MAX: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
    SCALE_FLOOR: tl.constexpr,
    SCALE_MANTISSA: tl.constexpr,
    SCALE_MIN_NORMAL: tl.constexpr,
    SCALE_MAX: tl.constexpr,
):
    """float32 scale as it would be stored, for the maximum of each block; see `activations.vllm_scales`."""
    if SCALE == "e8m0":
        return power_of_two(amax, RULE, MAX, MAX_EXPONENT, MANTISSA)
    elif SCALE == "e4m3":
        divisor = tl.load(static)
        stored = rounded(
            divisor * (amax * (1.0 / MAX)), 0.0, "minifloat", SCALE_MANTISSA, SCALE_MIN_NORMAL, -SCALE_MAX, SCALE_MAX,
            False, (0.0,), (),
        )  # fmt: skip
        return tl.where(stored == 0.0, SCALE_MAX, stored) * tl.div_rn(1.0, divisor)
    else:
        scale = tl.div_rn(tl.maximum(amax, AMAX_FLOOR, propagate_nan=ALL), MAX)
        scale = tl.maximum(scale, SCALE_FLOOR, propagate_nan=ALL)
        scale = tl.maximum(tl.where(scale < float("inf"), scale, float("nan")), TINIEST, propagate_nan=ALL)
        return to_bf16_grid(scale, "bits" if SCALE == "bf16" else "")


@triton.jit(do_not_specialize=["R"])
def fake_quantize_input_kernel(
    x,
    static,
    out,
    scales,
    R,
    C,
    SCALE: tl.constexpr,
    RULE: tl.constexpr,
    MAX: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
    SCALE_FLOOR: tl.constexpr,
    SCALE_MANTISSA: tl.constexpr,
    SCALE_MIN_NORMAL: tl.constexpr,
    SCALE_MAX: tl.constexpr,
    KIND: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_NORMAL: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GRID: tl.constexpr,
    BOUNDS: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    KEEP: tl.constexpr,
    LONG: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """out (R, C) = x on its grid, one scale per row; LONG where a row is longer than a tile; KEEP stores the scales."""
    first_row = tl.program_id(0) * TILE_ROWS
    row, column = tl.arange(0, TILE_ROWS), tl.arange(0, TILE_COLUMNS)
    in_row = row < R - first_row
    at = first_row.to(tl.int64) * C + row[:, None] * C + column[None, :]
    value = tl.load(x + at, mask=in_row[:, None] & (column < C)[None, :], other=0.0).to(tl.float32)
    amax = largest(value)
    if LONG:
        for first in range(TILE_COLUMNS, C, TILE_COLUMNS):
            inside = in_row[:, None] & (column < C - first)[None, :]
            more = largest(tl.load(x + at + first, mask=inside, other=0.0).to(tl.float32))
            amax = tl.maximum(amax.to(tl.int32, bitcast=True), more.to(tl.int32, bitcast=True))
            amax = amax.to(tl.float32, bitcast=True)
    scale = scale_for(
        amax, static, SCALE, RULE, MAX, MAX_EXPONENT, MANTISSA, AMAX_FLOOR, SCALE_FLOOR, SCALE_MANTISSA,
        SCALE_MIN_NORMAL, SCALE_MAX,
    )  # fmt: skip
    if KEEP:
        tl.store(scales + first_row + row, scale, mask=in_row)
    for first in range(0, C if LONG else TILE_COLUMNS, TILE_COLUMNS):
        inside = in_row[:, None] & (column < C - first)[None, :]
        if LONG:
            value = tl.load(x + at + first, mask=inside, other=0.0).to(tl.float32)
        y = divided(value, scale[:, None], 0.0, KIND, MANTISSA, MIN_NORMAL, LOW, HIGH, False, GRID, BOUNDS)
        y = to_bf16_grid(y * scale[:, None], ROUND_BF16)
        tl.store(out + at + first, y.to(out.dtype.element_ty), mask=inside)


def arguments(fmt: Format, rows: int, columns: int) -> dict[str, Any]:
    """Compile-time arguments and launch options for a matrix (rows, columns) with one scale per row."""
    amax_floor, scale_floor = floors(fmt)
    fixed = {name: value for name, value in constants(fmt).items() if name != "ZEROS"}
    tile_columns = min(1 << (columns - 1).bit_length(), WIDEST)
    tile_rows = min(max(VALUES // tile_columns, 1), 1 << (rows - 1).bit_length())
    return fixed | {
        "SCALE": fmt.scale.name,
        "RULE": fmt.scale_rule,
        "MAX": fmt.element.max,
        "MAX_EXPONENT": fmt.element.max_exponent,
        "AMAX_FLOOR": amax_floor,
        "SCALE_FLOOR": scale_floor,
        "SCALE_MANTISSA": UE4M3.element.mantissa_bits,
        "SCALE_MIN_NORMAL": UE4M3.element.min_normal,
        "SCALE_MAX": UE4M3.largest,
        "LONG": columns > tile_columns,
        "TILE_ROWS": tile_rows,
        "TILE_COLUMNS": tile_columns,
        "num_warps": min(max(tile_rows * tile_columns // 1024, 4), 16),
    }


def fake_quantize_input(x: Tensor, static: Tensor | None, format: str, estimator: str) -> tuple[Tensor, Tensor]:
    """The operator `qat::fake_quantize_input` on a device that runs Triton."""
    fmt = lookup(format)
    plain = x.dim() > 0 and x.numel() and x.dtype != torch.float64 and fmt.divides(x.shape[-1])
    static_fits = (static is not None and static.dtype == torch.float32) == (fmt.scale is UE4M3)
    if input_problem(fmt) is not None or not plain or not static_fits:
        return fake_quantize_input_reference(x, static, format, estimator)
    rows, columns = size(x)
    shape = fmt.grid_shape(rows, columns)
    rows, columns = shape[0] * shape[1], fmt.group or columns
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    keep = estimator == "clipped"
    scales = torch.empty(shape if keep else 0, dtype=torch.float32, device=x.device)
    rounding = "bits" if x.dtype == torch.bfloat16 and not x.is_cuda else ""  # the interpreter's cast does not round
    _call(format, rows, columns, keep, rounding)((x.contiguous(), static, out, scales))
    return out, scales


@lru_cache(maxsize=1024)
def _call(format: str, rows: int, columns: int, keep: bool, rounding: str) -> Call:
    fixed = arguments(lookup(format), rows, columns)
    launch = Launch(fake_quantize_input_kernel, **fixed, KEEP=keep, ROUND_BF16=rounding, enable_fp_fusion=False)
    return launch.at((triton.cdiv(rows, fixed["TILE_ROWS"]),), rows, columns)
