"""Scales and codes from float32 numbers, as functions that Triton kernels call.

Every operation that decides a code is exact: magnitudes are compared as integers (which also finds NaN and infinity),
quotients are rounded once (PTX's default division is not), and rounding to the grid is the half-to-even of a float32
addition. There is no cast to a small float, so codes are the same on every architecture, and interpreted.
"""

import struct

import triton
import triton.language as tl

from qat.numbers.element import EXPONENT_BIAS
from qat.numbers.scale import UE4M3
from qat.serving.inputs import nan_code


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
SCALE_MANTISSA = tl.constexpr(UE4M3.element.mantissa_bits)
SCALE_LOWEST = tl.constexpr(float_bits(UE4M3.element.min_normal))
SCALE_BITS = tl.constexpr(UE4M3.element.bits)
SCALE_MAX = tl.constexpr(float(UE4M3.element.max))
SCALE_NAN = tl.constexpr(nan_code(UE4M3.element))
SCALE_UNIT = tl.constexpr(UE4M3.element.min_normal * 2.0 ** (EXPONENT_BIAS - 1))


@triton.jit
def nan_where(condition, value):
    """float32."""
    return tl.where(condition, tl.full([], NAN, tl.int32).to(tl.float32, bitcast=True), value)


@triton.jit
def encode(
    q,
    valid,
    KIND: tl.constexpr,
    MANTISSA: tl.constexpr,
    LOWEST: tl.constexpr,
    BITS: tl.constexpr,
    MAX: tl.constexpr,
    NAN_CODE: tl.constexpr,
    SATURATES: tl.constexpr,
):
    """Codes (the last BITS of an int32) of float32 quotients: nearest, ties to even, saturating; a zero has the code of
    +0, and above the codes of positive numbers there are only zeros. LOWEST is the float32 bits of the smallest normal
    number. What is not valid gets NAN_CODE. SATURATES may be false where no quotient rounds to more than MAX."""
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
    return tl.where(valid, code, NAN_CODE)


@triton.jit
def float_of(BITS: tl.constexpr):
    """A float32 from its bits."""
    return tl.full([], BITS, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def divisor(b):
    """What `quotient` wants to know of b: a power of two that brings it to [1, 2), b there, and its reciprocal."""
    exponent = b.to(tl.int32, bitcast=True) & INFINITY
    power = tl.maximum(-exponent + 2 * ONE, HALF_NORMAL).to(tl.float32, bitcast=True)
    return power, b * power, tl.math.div_rn(1.0, b * power)


@triton.jit
def quotient(a, b, power, near, inverse, DTYPE: tl.constexpr):
    """a / b, rounded once unless it is infinite, or so tiny (2^-100) that its code is zero. For values of 16 bits one
    correction of the product with the reciprocal is enough: this was checked for every pair of an 8 or 11 bit and a 24
    bit significand."""
    if tl.float32 == DTYPE:
        return tl.math.div_rn(a, b)
    else:
        scaled = a * power
        first = scaled * inverse
        return tl.fma(tl.fma(-near, first, scaled), inverse, first)


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
        valid = relative == relative
        code = encode(
            relative, valid, "minifloat", SCALE_MANTISSA, SCALE_LOWEST, SCALE_BITS, SCALE_MAX, SCALE_NAN, True
        )
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
        inverse = tl.maximum((-exponent + 2 * BIAS) << 23, HALF_NORMAL).to(tl.float32, bitcast=True)
        factor = nan_where(bits >= INFINITY, inverse)
    return stored, factor
