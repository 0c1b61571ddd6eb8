"""The words of a cached row as numbers: the codes of each part, and E4M3 scales of 16 columns for each word."""

import triton
import triton.language as tl

from qat.kernels.packed_linear.decode.triton import E4M3_NAN, decode, decode_scale
from qat.numbers.scale import UE4M3

PER_SCALE = tl.constexpr(16)  # columns
SCALE_MANTISSA, SCALE_BIAS = (
    tl.constexpr(value) for value in (UE4M3.element.mantissa_bits, UE4M3.element.exponent_bias)
)

# Two words, $2 or $4, as pairs of FP16, a pair for each part. lop3 0x6A is (a & b) ^ c, which flips the sign bit and
# makes the code the mantissa of 1024; 0xEA is (a & b) | c.
FLOAT8 = tl.constexpr("""{
.reg .b32 both; .reg .b16 first, second;
prmt.b32 both, $2, $2, 0x3120; mov.b32 {first, second}, both;
cvt.rn.f16x2.e4m3x2 $0, first; cvt.rn.f16x2.e4m3x2 $1, second;
}""")
INTEGER8 = tl.constexpr("""{
.reg .b32 word, less;
mov.b32 less, 0xE480E480; shr.u32 word, $2, 8;
lop3.b32 $0, $2, 0x00FF00FF, 0x64806480, 0x6A; add.rn.f16x2 $0, $0, less;
lop3.b32 $1, word, 0x00FF00FF, 0x64806480, 0x6A; add.rn.f16x2 $1, $1, less;
}""")
INTEGER4 = tl.constexpr("""{
.reg .b32 word, less, part, rest;
mov.b32 less, 0xE408E408; mov.b32 part, 0x2C002C00; mov.b32 rest, 0xD480D480; shr.u32 word, $4, 8;
lop3.b32 $0, $4, 0x000F000F, 0x64086408, 0x6A; add.rn.f16x2 $0, $0, less;
lop3.b32 $1, $4, 0x00F000F0, 0x64806480, 0x6A; fma.rn.f16x2 $1, $1, part, rest;
lop3.b32 $2, word, 0x000F000F, 0x64086408, 0x6A; add.rn.f16x2 $2, $2, less;
lop3.b32 $3, word, 0x00F000F0, 0x64806480, 0x6A; fma.rn.f16x2 $3, $3, part, rest;
}""")
# E2M1 where FP16 has exponent and mantissa is 2^-14 times itself.
FLOAT4 = tl.constexpr("""{
.reg .b32 sign, rest;
shl.b32 sign, $4, 12; shl.b32 rest, $4, 9; and.b32 rest, rest, 0x0E000E00; lop3.b32 $0, sign, 0x80008000, rest, 0xEA;
shl.b32 sign, $4, 8; shl.b32 rest, $4, 5; and.b32 rest, rest, 0x0E000E00; lop3.b32 $1, sign, 0x80008000, rest, 0xEA;
shl.b32 sign, $4, 4; shl.b32 rest, $4, 1; and.b32 rest, rest, 0x0E000E00; lop3.b32 $2, sign, 0x80008000, rest, 0xEA;
shr.u32 rest, $4, 3; and.b32 rest, rest, 0x0E000E00; lop3.b32 $3, $4, 0x80008000, rest, 0xEA;
}""")


@triton.jit
def part(
    word, PART: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The values of one code of each word."""
    code = (word >> (PART * BITS)) & ((1 << BITS) - 1)
    if KIND == "integer":
        return decode(code ^ (1 << (BITS - 1)), KIND, BITS, MANTISSA, BIAS, DTYPE)
    else:
        value = decode(code, KIND, BITS, MANTISSA, BIAS, DTYPE)
        return (
            tl.where((code & ((1 << (BITS - 1)) - 1)) == E4M3_NAN, float("nan"), value).to(DTYPE)
            if BITS == 8
            else value
        )


@triton.jit
def parts(
    word, KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """The values of the codes of words, by part; E2M1 in assembly is 2^-14 times itself."""
    if not ASSEMBLY:
        if BITS == 8:
            return (part(word, 0, KIND, BITS, MANTISSA, BIAS, DTYPE), part(word, 1, KIND, BITS, MANTISSA, BIAS, DTYPE))
        else:
            return (
                part(word, 0, KIND, BITS, MANTISSA, BIAS, DTYPE),
                part(word, 1, KIND, BITS, MANTISSA, BIAS, DTYPE),
                part(word, 2, KIND, BITS, MANTISSA, BIAS, DTYPE),
                part(word, 3, KIND, BITS, MANTISSA, BIAS, DTYPE),
            )
    elif BITS == 8:
        return tl.inline_asm_elementwise(
            INTEGER8 if KIND == "integer" else FLOAT8, "=&r,=&r,r", [word], dtype=(tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            INTEGER4 if KIND == "integer" else FLOAT4, "=&r,=&r,=&r,=&r,r", [word],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def factors(at, token, inside, ROW: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr,
            DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):  # fmt: skip
    """E4M3 scales of 16 columns, for each word (tokens, WORDS)."""
    PER: tl.constexpr = PER_SCALE * BITS // 16  # words of a scale
    GROUPS: tl.constexpr = WORDS // PER
    group = tl.arange(0, GROUPS)
    stored = tl.load(
        at + token[:, None] * (2 * ROW) + WIDTH * BITS // 8 + group[None, :],
        mask=inside[:, None] & (group < WIDTH // PER_SCALE)[None, :], other=0,
    )  # fmt: skip
    if ASSEMBLY:
        value = stored.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    else:
        value = decode_scale(stored, "e4m3", SCALE_MANTISSA, SCALE_BIAS, NAN=True).to(DTYPE)
    wide = tl.broadcast_to(value[:, :, None], (value.shape[0], GROUPS, PER))
    return tl.reshape(wide, (value.shape[0], WORDS))
