"""Codes and stored scales as numbers, by arithmetic on their bits, for every kernel that multiplies packed weights."""

import triton
import triton.language as tl

from qat.numbers.catalog import E4M3
from qat.numbers.element import EXPONENT_BIAS

FLOAT32_BIAS = tl.constexpr(EXPONENT_BIAS)  # and BF16's
FLOAT16_BIAS = tl.constexpr(15)
E4M3_NAN = tl.constexpr(E4M3.nan_codes[0])


@triton.jit
def decode(
    code, KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr
):
    """Values (DTYPE) of non-negative int16 codes; integers are stored with their sign bit flipped."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    if KIND == "integer":
        if tl.float16 == DTYPE:  # 0x6400 is 1024, whose last mantissa bit is worth 1: 1024 + code, exactly
            return (code | 0x6400).to(tl.float16, bitcast=True) - (1024 + HALF)
        elif tl.bfloat16 == DTYPE and BITS < 8:  # 0x4300 is 128, likewise; 7 bits of mantissa hold no 8-bit code
            return (code | 0x4300).to(tl.bfloat16, bitcast=True) - (128 + HALF)
        else:
            return (code.to(tl.int32) - HALF).to(tl.float32).to(DTYPE)
    else:
        # A code is a small float: moved to the top of a larger one it has the right value but for the exponent's bias,
        # also as a subnormal.
        sign = code & HALF
        magnitude = code & (HALF - 1)
        if tl.float16 == DTYPE:
            fields = (sign << (16 - BITS)) | (magnitude << (10 - MANTISSA))
            return fields.to(tl.float16, bitcast=True) * exp2_const(FLOAT16_BIAS - BIAS, tl.float16)
        elif tl.bfloat16 == DTYPE:
            fields = (sign << (16 - BITS)) | (magnitude << (7 - MANTISSA))
            return fields.to(tl.bfloat16, bitcast=True) * exp2_const(FLOAT32_BIAS - BIAS, tl.bfloat16)
        else:
            wide = (sign.to(tl.int32) << (32 - BITS)) | (magnitude.to(tl.int32) << (23 - MANTISSA))
            return wide.to(tl.float32, bitcast=True) * exp2_const(FLOAT32_BIAS - BIAS, tl.float32)


@triton.jit
def exp2_const(EXPONENT: tl.constexpr, DTYPE: tl.constexpr):
    """2^EXPONENT."""
    return tl.full([], 2.0**EXPONENT, tl.float32).to(DTYPE)


@triton.jit
def decode_scale(stored, SCALE: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, NAN: tl.constexpr = False):
    """float32 values of stored scales; E4M3 and E8M0 come as bytes without a sign. NAN: some may be NaN (those of
    inputs, never those of weights), and stay so."""
    if SCALE == "e8m0":
        bits = stored.to(tl.int32) << 23
        value = tl.maximum(bits, 0x00400000).to(tl.float32, bitcast=True)  # byte 0 is a subnormal
        return tl.where(stored == 0xFF, float("nan"), value) if NAN else value
    elif SCALE == "e4m3":
        value = (stored.to(tl.int32) << (23 - MANTISSA)).to(tl.float32, bitcast=True)
        value *= exp2_const(FLOAT32_BIAS - BIAS, tl.float32)
        return tl.where(stored == E4M3_NAN, float("nan"), value) if NAN else value
    else:
        return stored.to(tl.float32)
