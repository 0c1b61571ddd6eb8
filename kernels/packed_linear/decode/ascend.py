"""Codes and stored scales as numbers, in integers that Ascend's vector units have and without a subnormal operand."""

import triton
import triton.language as tl

from qat.numbers.catalog import E2M1
from qat.numbers.element import EXPONENT_BIAS
from qat.numbers.scale import UE4M3

E2M1_MOVED = tl.constexpr(23 - E2M1.mantissa_bits)
E2M1_CORRECTION = tl.constexpr(2.0 ** (EXPONENT_BIAS - E2M1.exponent_bias))
E2M1_HALF = tl.constexpr((EXPONENT_BIAS - 1) << 23)  # bits of 0.5, which a magnitude from 1 on lacks as well
E4M3_MOVED = tl.constexpr(23 - UE4M3.element.mantissa_bits)
E4M3_LACKS = tl.constexpr((EXPONENT_BIAS - UE4M3.element.exponent_bias) << 23)  # in bits of the exponent
E4M3_NORMAL = tl.constexpr(1 << UE4M3.element.mantissa_bits)  # the first code that is one
E4M3_STEP = tl.constexpr(UE4M3.smallest)


@triton.jit
def e2m1(code, SUBNORMALS: tl.constexpr):
    """float32 values of 4-bit codes (int32). SUBNORMALS: the unit keeps them, so one product with a power of two
    corrects the exponent; otherwise integers do it, and 0.5 is a case of its own."""
    sign, magnitude = (code & 8) << 28, code & 7
    if SUBNORMALS:
        return (sign | (magnitude << E2M1_MOVED)).to(tl.float32, bitcast=True) * E2M1_CORRECTION
    else:
        bits = tl.where(magnitude > 1, (magnitude << E2M1_MOVED) + E2M1_HALF, magnitude * E2M1_HALF)
        return (sign | bits).to(tl.float32, bitcast=True)


@triton.jit
def value(code, KIND: tl.constexpr, BITS: tl.constexpr, SUBNORMALS: tl.constexpr):
    """float32 values of codes (int32); integers are stored with their sign bit flipped."""
    if KIND == "integer":
        return (code - (1 << (BITS - 1))).to(tl.float32)
    else:
        return e2m1(code, SUBNORMALS)


@triton.jit
def times_scale(number, stored, SCALE: tl.constexpr):
    """float32 numbers times stored scales, of one shape; E4M3 and E8M0 come as int8 and are positive bytes."""
    if SCALE == "e8m0":
        byte = stored.to(tl.int32) & 0xFF
        # Byte 0 is 2^-127, a subnormal: half of the smallest normal number, so it is multiplied in two steps.
        power = (tl.maximum(byte, 1) << 23).to(tl.float32, bitcast=True)
        return number * tl.where(byte == 0, 0.5, 1.0) * power
    elif SCALE == "e4m3":
        byte = stored.to(tl.int32)
        normal = ((byte << E4M3_MOVED) + E4M3_LACKS).to(tl.float32, bitcast=True)
        return number * tl.where(byte >= E4M3_NORMAL, normal, byte.to(tl.float32) * E4M3_STEP)
    else:
        return number * stored.to(tl.float32)
