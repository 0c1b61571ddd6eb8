"""Input quantizers in Triton: scales and codes in one launch, alone or fused with the norm or the gated activation
before them.

One kernel for every format and source. A program holds whole rows where a row shares something (a scale per token, a
norm), and otherwise a tile of groups; rows too wide for registers are read once more per thing they share. The
arithmetic that decides codes is in `codes/triton.py`.

In: x (M, K). Out: codes (M, width) of a byte each, E2M1 in pairs with the even column in the low nibble, and scales (M,
groups): what `quantized_matmul` reads. x is read once where a row fits into registers (STEPS of 1), else once per thing
that the row shares (norm, maximum, codes), from the L2 cache if it is lucky. For short rows memory bounds the speed;
for FP8 and FP4 the instructions per value come close (11 to 26, see `kernels/README.md`), which is why a quotient is a
multiplication by a reciprocal and one correction.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.errors import UnsupportedError
from qat.kernels.device import device_of
from qat.kernels.launch import Call, Launch
from qat.kernels.quantize_input.choose import Tiles, choose
from qat.kernels.quantize_input.codes.triton import MAGNITUDE, block_scale, divisor, encode, float_bits, quotient
from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.serving.inputs import check, empty, nan_code
from qat.training.activations import floors


@triton.jit
def rounded_to(value, DTYPE: tl.constexpr):
    """float32, rounded to DTYPE."""
    return value.to(DTYPE).to(tl.float32)


@triton.jit
def source_tile(x_at, other_at, mask, SOURCE: tl.constexpr, DTYPE: tl.constexpr):
    """What is quantized or normalized, as float32: x, x + other, or silu(x) * other, rounded to DTYPE at every step."""
    value = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    if SOURCE == "sum":
        other = tl.load(other_at, mask=mask, other=0.0).to(tl.float32)
        value = rounded_to(value + other, DTYPE)
    elif SOURCE == "silu_mul":
        other = tl.load(other_at, mask=mask, other=0.0).to(tl.float32)
        value = rounded_to(rounded_to(value / (1.0 + tl.exp(-value)), DTYPE) * other, DTYPE)
    return value


@triton.jit
def normalized(value, inverse, weight_at, in_columns, DTYPE: tl.constexpr):
    """value (rows, columns) times inverse (rows), rounded, times the weight, rounded."""
    weight = tl.load(weight_at, mask=in_columns, other=0.0).to(tl.float32)
    return rounded_to(rounded_to(value * inverse[:, None], DTYPE) * weight[None, :], DTYPE)


@triton.jit(do_not_specialize=["M"])
def quantize_input_kernel(
    x,
    other,
    weight,
    static,
    codes,
    scales,
    sums,
    M,
    K,
    width,
    groups,
    stride_x,
    stride_other,
    eps,
    SOURCE: tl.constexpr,
    NORM: tl.constexpr,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    LOWEST: tl.constexpr,
    MAX: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    NAN_CODE: tl.constexpr,
    SCALE: tl.constexpr,
    RULE: tl.constexpr,
    GROUP: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
    SCALE_FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Codes and scales of (M, K), `width` and `groups` to a row. GROUP is the number of columns per scale, 0 for a row;
    SCALE "bf16" is static. STEPS of 0: nothing is shared by a row, and program_id(1) chooses the columns."""
    WALK: tl.constexpr = STEPS if STEPS > 0 else 1
    PER_TOKEN: tl.constexpr = GROUP == 0 and SCALE == "f32"
    PACKED: tl.constexpr = KIND == "minifloat" and BITS == 4
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK if STEPS == 0 else 0
    column = first + tl.arange(0, BLOCK)
    in_rows = (row < M)[:, None]
    x_at = x + row[:, None] * stride_x + column[None, :]
    other_at = other + row[:, None] * stride_other + column[None, :] if SOURCE != "plain" else x_at
    static_part = tl.load(static) if SCALE == "e4m3" or SCALE == "bf16" else tl.zeros([], tl.float32)

    # First walk, with a norm: the mean square of a row.
    if NORM:
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for step in tl.static_range(WALK):
            mask = in_rows & (step * BLOCK + column < K)[None, :]
            value = source_tile(x_at + step * BLOCK, other_at + step * BLOCK, mask, SOURCE, DTYPE)
            if SOURCE == "sum":
                tl.store(sums + row[:, None] * K + (step * BLOCK + column)[None, :], value.to(DTYPE), mask=mask)
            squares += value * value
        mean = tl.math.div_rn(tl.sum(squares, axis=1), K * 1.0)
        inverse = tl.math.div_rn(1.0, tl.math.sqrt_rn(mean + eps))
        if WALK == 1:
            value = normalized(value, inverse, weight + column, column < K, DTYPE)

    # Second walk, with a scale per token: the largest magnitude, whose bit pattern orders as an integer does.
    if PER_TOKEN:
        largest = tl.zeros((ROWS, BLOCK), tl.int32)
        for step in tl.static_range(WALK):
            if WALK > 1 or not NORM:
                mask = in_rows & (step * BLOCK + column < K)[None, :]
                value = source_tile(x_at + step * BLOCK, other_at + step * BLOCK, mask, SOURCE, DTYPE)
            if WALK > 1 and NORM:
                here = step * BLOCK + column
                value = normalized(value, inverse, weight + here, here < K, DTYPE)
            largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & MAGNITUDE)
        stored, factor = block_scale(
            tl.max(largest, axis=1), static_part, SCALE, RULE, MANTISSA, MAX, MAX_EXPONENT, AMAX_FLOOR, SCALE_FLOOR
        )
        tl.store(scales + row, stored, mask=row < M)

    # Last walk: codes, and the scales of groups.
    for step in tl.static_range(WALK):
        here = step * BLOCK + column
        mask = in_rows & (here < K)[None, :]
        if WALK > 1 or not (NORM or PER_TOKEN):
            value = source_tile(x_at + step * BLOCK, other_at + step * BLOCK, mask, SOURCE, DTYPE)
        if WALK > 1 and NORM:
            value = normalized(value, inverse, weight + here, here < K, DTYPE)
        if PER_TOKEN:
            factor_of = factor[:, None]
            valid = factor_of == factor_of
        elif GROUP == 0:
            factor_of = static_part
            if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
                tl.store(scales, factor_of)
            valid = value == value
        else:
            value = tl.reshape(value, (ROWS, BLOCK // GROUP, GROUP))
            largest = tl.max(value.to(tl.int32, bitcast=True) & MAGNITUDE, axis=2)
            stored, factor = block_scale(
                largest, static_part, SCALE, RULE, MANTISSA, MAX, MAX_EXPONENT, AMAX_FLOOR, SCALE_FLOOR
            )
            group = (first + step * BLOCK) // GROUP + tl.arange(0, BLOCK // GROUP)
            scale_at = scales + row[:, None] * groups + group[None, :]
            tl.store(scale_at, stored.to(scales.dtype.element_ty), mask=in_rows & (group < groups)[None, :])
            factor_of = factor[:, :, None]
            valid = factor_of == factor_of
        if SCALE == "e8m0":
            q = value * factor_of
        else:
            if SCALE != "f32":  # the scale need not follow the values: they saturate here, lest their quotient overflow
                value = tl.minimum(tl.maximum(value, -MAX * factor_of), MAX * factor_of)
            power, near, inverse_of = divisor(factor_of)
            q = quotient(value, factor_of, power, near, inverse_of, DTYPE)
        code = encode(q, valid, KIND, MANTISSA, LOWEST, BITS, MAX, NAN_CODE, SCALE == "e8m0")
        code = tl.reshape(code, (ROWS, BLOCK))
        if PACKED:
            even, odd = tl.split(tl.reshape(code, (ROWS, BLOCK // 2, 2)))
            pair = (first + step * BLOCK) // 2 + tl.arange(0, BLOCK // 2)
            code_at = codes + row[:, None] * width + pair[None, :]
            tl.store(
                code_at, ((even & (2**BITS - 1)) | (odd << BITS)).to(tl.uint8), mask=in_rows & (pair < width)[None, :]
            )
        else:
            code_at = codes + row[:, None] * width + here[None, :]
            tl.store(code_at, code.to(codes.dtype.element_ty), mask=mask)


def constants(fmt: Format, source: str, norm: bool, dtype: Any, tiles: Tiles) -> dict[str, Any]:
    """Compile-time arguments; whatever depends on the format is derived here."""
    element = fmt.element
    amax_floor, scale_floor = floors(fmt)
    return {
        "SOURCE": source,
        "NORM": norm,
        "DTYPE": dtype,
        "KIND": element.kind,
        "BITS": element.bits,
        "MANTISSA": element.mantissa_bits,
        "LOWEST": float_bits(element.min_normal),
        "MAX": float(element.max),
        "MAX_EXPONENT": element.max_exponent,
        "NAN_CODE": nan_code(element),
        "SCALE": fmt.scale.name,
        "RULE": fmt.scale_rule,
        "GROUP": fmt.group or 0,
        "AMAX_FLOOR": amax_floor,
        "SCALE_FLOOR": scale_floor,
        "ROWS": tiles.rows,
        "BLOCK": tiles.block,
        "STEPS": tiles.steps,
    }


COMPUTE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def shares_rows(fmt: Format, norm: bool) -> bool:
    """Whether a program needs whole rows."""
    return norm or (fmt.is_rowwise and not fmt.group)


@lru_cache(maxsize=4096)
def _call(format: str, sizes: tuple[int, ...], source: str, norm: bool, dtype: torch.dtype, processors: int) -> Call:
    """For x (rows, columns), `sizes` and what else is counted."""
    fmt, (rows, columns, *_) = lookup(format), sizes
    tiles = choose(rows, columns, shares_rows(fmt, norm), processors)
    grid = triton.cdiv(rows, tiles.rows), 1 if tiles.steps else triton.cdiv(columns, tiles.block)
    return _launch(format, source, norm, dtype, tiles).at(grid, *sizes)


@lru_cache(maxsize=1024)
def _launch(format: str, source: str, norm: bool, dtype: torch.dtype, tiles: Tiles) -> Launch:
    fixed = constants(lookup(format), source, norm, COMPUTE[dtype], tiles)
    # A fused multiplication and addition would round once where the meaning rounds twice.
    return Launch(quantize_input_kernel, **fixed, num_warps=tiles.warps, enable_fp_fusion=False)


def _flat(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _run(
    x: Tensor,
    other: Tensor | None,
    weight: Tensor | None,
    static: Tensor | None,
    eps: float,
    format: str,
    source: str,
) -> tuple[Tensor, Tensor, Tensor]:
    fmt = check(format, x.shape[-1], static)
    if x.dtype not in COMPUTE or (weight is not None and weight.dtype not in COMPUTE):
        raise UnsupportedError(f"the fused input quantizers take bfloat16, float16 and float32, not {x.dtype}")
    codes, scales = empty(x, fmt)
    sums = x.new_empty(x.shape if source == "sum" else 0)
    if x.numel() == 0:
        scales.zero_() if static is None or not fmt.is_static else scales.copy_(static)
        return codes, scales, sums
    flat = _flat(x)
    rest = None if other is None else _flat(other)
    strides = flat.stride(0), 0 if rest is None else rest.stride(0)
    sizes = *flat.shape, codes.shape[-1], scales.shape[-1], *strides
    call = _call(format, sizes, source, weight is not None, x.dtype, device_of(x).processors)
    target = codes.view(torch.uint8) if codes.dtype.is_floating_point else codes
    call((flat, rest, weight, static, target, scales, sums), eps)
    return codes, scales, sums


def quantize_input(x: Tensor, static: Tensor | None, format: str) -> tuple[Tensor, Tensor]:
    """The operator `qat::quantize_input` on a device that runs Triton."""
    x = x if x.dtype in COMPUTE else x.to(torch.float32)
    codes, scales, _ = _run(x, None, None, static, 0.0, format, "plain")
    return codes, scales


def rms_norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, static: Tensor | None, eps: float, format: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `qat::rms_norm_quantize` on a device that runs Triton."""
    return _run(x, residual, weight, static, eps, format, "plain" if residual is None else "sum")


def silu_mul_quantize(gate: Tensor, up: Tensor, static: Tensor | None, format: str) -> tuple[Tensor, Tensor]:
    """The operator `qat::silu_mul_quantize` on a device that runs Triton."""
    codes, scales, _ = _run(gate, up, None, static, 0.0, format, "silu_mul")
    return codes, scales
