"""Input quantizers in Triton: scales and codes in one launch, alone or fused with the norm or the gated activation
before them.

One kernel for every format and source. A program holds whole rows where a row shares something (a scale per token, a
norm), and otherwise a tile of groups; rows too wide for registers are read once more per thing they share. Every
operation that decides a code is exact: magnitudes are compared as integers (which also finds NaN and infinity),
quotients are IEEE divisions (PTX's default is not), and rounding is the half-to-even of a float32 addition. There is no
cast to a small float, so codes are the same on every architecture, and interpreted.
"""

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.activations import vllm_floors
from qat.catalog import SCALE_ELEMENT
from qat.element import EXPONENT_BIAS
from qat.errors import UnsupportedError
from qat.format import Format
from qat.inputs import check, empty, nan_code
from qat.kernels.quantize_input.choose import Tiles, choose


def float_bits(value: float) -> int:
    """The bits of a positive float32."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


BIAS = tl.constexpr(EXPONENT_BIAS)
INFINITY = tl.constexpr(float_bits(float("inf")))  # above it lie the NaNs
NAN = tl.constexpr(float_bits(float("nan")))
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
ONE = tl.constexpr(float_bits(1.0))
FIRST_NORMAL = tl.constexpr(float_bits(2.0 ** (1 - EXPONENT_BIAS)))
HALF_NORMAL = tl.constexpr(float_bits(2.0**-EXPONENT_BIAS))
MAGIC = tl.constexpr(1.5 * 2.0**23)  # float32 numbers of this size have no fraction
MAGIC_BITS = tl.constexpr(float_bits(1.5 * 2.0**23))
SCALE_MANTISSA = tl.constexpr(SCALE_ELEMENT.mantissa_bits)
SCALE_LOWEST = tl.constexpr(float_bits(SCALE_ELEMENT.min_normal))
SCALE_BITS = tl.constexpr(SCALE_ELEMENT.bits)
SCALE_MAX = tl.constexpr(float(SCALE_ELEMENT.max))
SCALE_NAN = tl.constexpr(nan_code(SCALE_ELEMENT))
SCALE_UNIT = tl.constexpr(SCALE_ELEMENT.min_normal * 2.0 ** (EXPONENT_BIAS - 1))


@triton.jit
def nan_where(condition, value):
    """float32."""
    return tl.where(condition, tl.full([], NAN, tl.int32).to(tl.float32, bitcast=True), value)


@triton.jit
def encode(
    q,
    KIND: tl.constexpr,
    MANTISSA: tl.constexpr,
    LOWEST: tl.constexpr,
    BITS: tl.constexpr,
    MAX: tl.constexpr,
    NAN_CODE: tl.constexpr,
    SATURATES: tl.constexpr,
):
    """Codes (the last BITS of an int32) of float32 quotients: nearest, ties to even, saturating; a zero has the code of
    +0, and above the codes of positive numbers there are only zeros. LOWEST is the float32 bits of the smallest normal number. SATURATES may be false where no quotient
    rounds to more than MAX."""
    near = tl.minimum(tl.maximum(q, -MAX), MAX) if SATURATES else q
    if KIND == "integer":
        code = (near + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    else:
        # 1.5 times a power of two so large that MANTISSA bits are left below the binade of what is added to it.
        shift: tl.constexpr = ((23 - MANTISSA) << 23) + (1 << 22)
        power = tl.maximum(near.to(tl.int32, bitcast=True) & INFINITY, LOWEST) + shift
        power = power.to(tl.float32, bitcast=True)
        rounded = (near + power) - power
        # Moved down to where the exponent field is the code's; float32's subnormals are then the code's.
        bits = (rounded * float_of(FIRST_NORMAL - LOWEST + ONE)).to(tl.int32, bitcast=True)
        code = (bits | ((bits >> 31) & 2 ** (22 - MANTISSA + BITS))) >> (23 - MANTISSA)  # the sign, now beside them
    return tl.where(q == q, code, NAN_CODE)


@triton.jit
def float_of(BITS: tl.constexpr):
    """A float32 from its bits."""
    return tl.full([], BITS, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def divisor(b):
    """What `quotient` wants to know of b: a power of two that brings it to [1, 2), b there, and its reciprocal."""
    power = tl.maximum(2 * ONE - (b.to(tl.int32, bitcast=True) & INFINITY), HALF_NORMAL).to(tl.float32, bitcast=True)
    return power, b * power, tl.math.div_rn(1.0, b * power)


@triton.jit
def quotient(a, b, power, near, inverse, DTYPE: tl.constexpr, OVERFLOWS: tl.constexpr):
    """a / b, rounded once. For values of 16 bits one correction of the product with the reciprocal is enough: this was
    checked for every pair of an 8 or 11 bit and a 24 bit significand. OVERFLOWS: a may be infinite while b is not."""
    if tl.float32 == DTYPE:
        return tl.math.div_rn(a, b)
    else:
        scaled = a * power
        first = scaled * inverse
        result = tl.fma(tl.fma(-near, first, scaled), inverse, first)
        return tl.where(result == result, result, first) if OVERFLOWS else result


@triton.jit
def block_scale(
    bits,
    static,
    SCALE: tl.constexpr,
    RULE: tl.constexpr,
    MANTISSA: tl.constexpr,
    MAX: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
    SCALE_FLOOR: tl.constexpr,
):
    """(what is stored, what divides) for blocks whose largest magnitude has these bits; under E8M0 scales the second
    is the reciprocal, which is exact."""
    amax = bits.to(tl.float32, bitcast=True)
    if SCALE == "f32":
        scale = tl.maximum(tl.math.div_rn(tl.maximum(amax, AMAX_FLOOR), MAX), SCALE_FLOOR)
        stored = nan_where(bits >= INFINITY, scale)
        factor = stored
    elif SCALE == "e4m3":
        relative = static * (amax * (1 / MAX))
        code = encode(relative, "minifloat", SCALE_MANTISSA, SCALE_LOWEST, SCALE_BITS, SCALE_MAX, SCALE_NAN, True)
        stored = tl.where(code == 0, SCALE_NAN - 1, code)  # the largest number
        value = (stored << (23 - SCALE_MANTISSA)).to(tl.float32, bitcast=True) * SCALE_UNIT
        factor = nan_where(stored == SCALE_NAN, value * tl.math.div_rn(1.0, static))
    else:
        if RULE == "ceil":
            ratio = tl.math.div_rn(amax, MAX)
            ratio_bits = ratio.to(tl.int32, bitcast=True)
            exponent = (ratio_bits + 0x7FFFFF) >> 23
            exponent = tl.where(ratio_bits <= HALF_NORMAL, 0, exponent)  # the smallest scale
            exponent = tl.where((ratio_bits == 0) & (bits > 0), BIAS, exponent)  # as the reference has it
        elif RULE == "even":
            exponent = ((bits + (1 << (22 - MANTISSA))) >> 23) - MAX_EXPONENT
        else:
            exponent = (bits >> 23) - MAX_EXPONENT
        exponent = tl.minimum(tl.maximum(exponent, 0), 2 * BIAS)
        stored = tl.where(bits < INFINITY, exponent, 2 * BIAS + 1)
        inverse = tl.maximum((2 * BIAS - exponent) << 23, HALF_NORMAL).to(tl.float32, bitcast=True)
        factor = nan_where(bits >= INFINITY, inverse)
    return stored, factor


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
    """Codes and scales of (M, K), stored `width` and `groups` to a row. GROUP is the number of columns per scale, 0 for a
    row; SCALE "bf16" is static. STEPS of 0: nothing is shared by a row, and program_id(1) chooses the columns."""
    WALK: tl.constexpr = STEPS if STEPS > 0 else 1
    PER_TOKEN: tl.constexpr = GROUP == 0 and SCALE == "f32"
    PACKED: tl.constexpr = KIND == "minifloat" and BITS == 4
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK if STEPS == 0 else 0
    column = first + tl.arange(0, BLOCK)
    in_rows = (row < M)[:, None]
    x_at = x + row[:, None] * stride_x + column[None, :]
    other_at = other + row[:, None] * stride_other + column[None, :] if SOURCE != "plain" else x_at
    static_part = tl.load(static) if SCALE == "e4m3" or SCALE == "bf16" else 0.0

    if NORM:
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for step in tl.static_range(WALK):
            mask = in_rows & (step * BLOCK + column < K)[None, :]
            value = source_tile(x_at + step * BLOCK, other_at + step * BLOCK, mask, SOURCE, DTYPE)
            if SOURCE == "sum":
                tl.store(sums + row[:, None] * K + (step * BLOCK + column)[None, :], value.to(DTYPE), mask=mask)
            squares += value * value
        mean = tl.math.div_rn(tl.sum(squares, axis=1), K.to(tl.float32))
        inverse = tl.math.div_rn(1.0, tl.math.sqrt_rn(mean + eps))
        if WALK == 1:
            value = normalized(value, inverse, weight + column, column < K, DTYPE)

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
            tl.max(largest, axis=1), 0.0, SCALE, RULE, MANTISSA, MAX, MAX_EXPONENT, AMAX_FLOOR, SCALE_FLOOR
        )
        tl.store(scales + row, stored, mask=row < M)

    for step in tl.static_range(WALK):
        here = step * BLOCK + column
        mask = in_rows & (here < K)[None, :]
        if WALK > 1 or not (NORM or PER_TOKEN):
            value = source_tile(x_at + step * BLOCK, other_at + step * BLOCK, mask, SOURCE, DTYPE)
        if WALK > 1 and NORM:
            value = normalized(value, inverse, weight + here, here < K, DTYPE)
        if PER_TOKEN:
            power, near, inverse_of = divisor(factor)
            q = quotient(value, factor[:, None], power[:, None], near[:, None], inverse_of[:, None], DTYPE, False)
        elif GROUP == 0:
            scale = static_part.to(tl.bfloat16).to(tl.float32)
            if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
                tl.store(scales, scale)
            power, near, inverse_of = divisor(scale)
            q = quotient(value, scale, power, near, inverse_of, DTYPE, True)
        else:
            grouped = tl.reshape(value, (ROWS, BLOCK // GROUP, GROUP))
            largest = tl.max(grouped.to(tl.int32, bitcast=True) & MAGNITUDE, axis=2)
            stored, factor = block_scale(
                largest, static_part, SCALE, RULE, MANTISSA, MAX, MAX_EXPONENT, AMAX_FLOOR, SCALE_FLOOR
            )
            group = (first + step * BLOCK) // GROUP + tl.arange(0, BLOCK // GROUP)
            scale_at = scales + row[:, None] * groups + group[None, :]
            tl.store(scale_at, stored.to(scales.dtype.element_ty), mask=in_rows & (group < groups)[None, :])
            factor = factor[:, :, None]
            if SCALE == "e8m0":
                q = grouped * factor
            else:
                power, near, inverse_of = divisor(factor)
                q = quotient(grouped, factor, power, near, inverse_of, DTYPE, SCALE == "e4m3")
            q = tl.reshape(q, (ROWS, BLOCK))
        code = encode(q, KIND, MANTISSA, LOWEST, BITS, MAX, NAN_CODE, SCALE != "f32")
        if PACKED:
            even, odd = tl.split(tl.reshape(code, (ROWS, BLOCK // 2, 2)))
            pair = (first + step * BLOCK) // 2 + tl.arange(0, BLOCK // 2)
            code_at = codes + row[:, None] * width + pair[None, :]
            tl.store(code_at, ((even & (2**BITS - 1)) | (odd << BITS)).to(tl.uint8), mask=in_rows & (pair < width)[None, :])
        else:
            code_at = codes + row[:, None] * width + here[None, :]
            tl.store(code_at, code.to(codes.dtype.element_ty), mask=mask)


def constants(fmt: Format, source: str, norm: bool, dtype: Any, tiles: Tiles) -> dict[str, Any]:
    """Compile-time arguments; whatever depends on the format is derived here."""
    element = fmt.element
    amax_floor, scale_floor = vllm_floors(fmt)
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
        "SCALE": fmt.scale,
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
    return norm or (fmt.scale == "f32" and not fmt.group)


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
        scales.zero_() if static is None or fmt.block != (0, 0) else scales.copy_(static.to(fmt.scale_storage))
        return codes, scales, sums
    norm = weight is not None
    flat = _flat(x)
    rest = None if other is None else _flat(other)
    rows, columns = flat.shape
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    tiles = choose(rows, columns, shares_rows(fmt, norm), processors)
    grid = (triton.cdiv(rows, tiles.rows), 1 if tiles.steps else triton.cdiv(columns, tiles.block))
    quantize_input_kernel[grid](
        flat,
        rest,
        weight,
        static,
        codes.view(torch.uint8) if codes.dtype.is_floating_point else codes,
        scales,
        sums,
        rows,
        columns,
        codes.shape[-1],
        scales.shape[-1],
        flat.stride(0),
        0 if rest is None else rest.stride(0),
        eps,
        **constants(fmt, source, norm, COMPUTE[x.dtype], tiles),
        num_warps=tiles.warps,
        enable_fp_fusion=False,  # a fused multiplication and addition would round once where the meaning rounds twice
    )
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
