"""Linear layers with packed weights (W2, W4, W8 x A16) in Triton, for GPUs with or without low-precision units.

Operands are swapped: the weight is the left operand of the matrix product, the tokens the right one. On sm_90 the
decoded weight then goes to the tensor cores from registers, also for a handful of tokens. A tile of K is unpacked part
by part (see `qat.serving.words`), each part multiplying its own contiguous piece of the activations.

Decoding is exact: integers by placing the code in the mantissa of a power of two, minifloats by shifting the code into
the fields of the compute dtype and one multiplication that corrects the exponent's bias. Scales of 32 values and more
act in float32 on the partial sums; scales of 16 multiply the weight, where E4M3 times a 4-bit element stays exact.
float32 activations are multiplied as such ("ieee"): tensor cores would drop 13 of their bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.device import device_of
from qat.kernels.packed_linear.choose import Tiles, choose, problem
from qat.numbers.catalog import lookup
from qat.numbers.element import EXPONENT_BIAS
from qat.numbers.format import Format
from qat.numbers.scale import UE4M3
from qat.serving.packed import reference
from qat.serving.words import PART, tile

FLOAT32_BIAS = tl.constexpr(EXPONENT_BIAS)  # and BF16's
FLOAT16_BIAS = tl.constexpr(15)


@triton.jit
def decode(
    code, KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr
):
    """Values (DTYPE) of non-negative int16 codes; integers are stored with their sign bit flipped."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    if KIND == "integer":
        if tl.float16 == DTYPE:  # 1024 + code, exactly
            return (code | 0x6400).to(tl.float16, bitcast=True) - (1024 + HALF)
        elif tl.bfloat16 == DTYPE and BITS < 8:  # 128 + code, exactly
            return (code | 0x4300).to(tl.bfloat16, bitcast=True) - (128 + HALF)
        else:
            return (code.to(tl.int32) - HALF).to(tl.float32).to(DTYPE)
    else:
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
def decode_scale(stored, SCALE: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """float32 values of stored scales; E4M3 and E8M0 come as bytes, all of them positive and finite."""
    if SCALE == "e8m0":
        bits = stored.to(tl.int32) << 23
        return tl.maximum(bits, 0x00400000).to(tl.float32, bitcast=True)  # byte 0 is a subnormal
    elif SCALE == "e4m3":
        return (stored.to(tl.int32) << (23 - MANTISSA)).to(tl.float32, bitcast=True) * exp2_const(
            FLOAT32_BIAS - BIAS, tl.float32
        )
    else:
        return stored.to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def packed_linear_kernel(
    x,
    words,
    scales,
    zeros,
    bias,
    out,
    M,
    N,
    K,
    stride_x,
    stride_words,
    global_scale,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_MANTISSA: tl.constexpr,
    SCALE_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """out (M, N), or float32 (SPLITS, M, N) partial sums. GROUP is the number of columns per scale, 0 for a row."""
    PARTS: tl.constexpr = 16 // BITS
    TILE: tl.constexpr = PART * PARTS
    MASK: tl.constexpr = (1 << BITS) - 1
    INSIDE: tl.constexpr = GROUP > 0 and GROUP < PART  # several scales per part
    PER: tl.constexpr = 1 if GROUP < PART else GROUP // PART  # parts per scale
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    column = tl.arange(0, PART)
    in_n, in_m = n < N, m < M
    word_at = words + n.to(tl.int64)[:, None] * stride_words + column[None, :]
    x_at = x + m.to(tl.int64)[None, :] * stride_x + column[:, None]
    steps = tl.cdiv(K, TILE)
    share = tl.cdiv(steps, SPLITS)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(split * share, tl.minimum(split * share + share, steps)):
        word = tl.load(word_at + step * PART, mask=in_n[:, None], other=0)
        partial = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for part in tl.static_range(PARTS):
            first = step * TILE + part * PART
            tokens = tl.load(x_at + first, mask=in_m[None, :] & (first + column < K)[:, None], other=0.0).to(DTYPE)
            code = (word >> (part * BITS)) & MASK
            weight = decode(code, KIND, BITS, MANTISSA, BIAS, DTYPE)
            if INSIDE:
                group = first // GROUP + tl.arange(0, PART // GROUP)
                in_k = (group * GROUP < K)[None, :] & in_n[:, None]
                stored = tl.load(scales + group[None, :] * N + n[:, None], mask=in_k, other=0)
                factor = decode_scale(stored, SCALE, SCALE_MANTISSA, SCALE_BIAS).to(DTYPE)
                grouped = tl.reshape(weight, (BLOCK_N, PART // GROUP, GROUP))
                weight = tl.reshape(grouped * factor[:, :, None], (BLOCK_N, PART))
                total = tl.dot(weight, tokens, total, input_precision="ieee")
            else:
                group = first // GROUP if GROUP > 0 else 0
                in_k = in_n & (first + 0 * n < K)
                if ZEROS:
                    zero = tl.load(zeros + group * N + n, mask=in_k, other=0)
                    weight = weight - zero.to(DTYPE)[:, None]
                if GROUP == 0:
                    total = tl.dot(weight, tokens, total, input_precision="ieee")
                else:
                    partial = tl.dot(weight, tokens, partial, input_precision="ieee")
                    if part % PER == PER - 1 or part == PARTS - 1:
                        stored = tl.load(scales + group * N + n, mask=in_k, other=0)
                        total += partial * decode_scale(stored, SCALE, SCALE_MANTISSA, SCALE_BIAS)[:, None]
                        partial = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if GROUP == 0:
        stored = tl.load(scales + n, mask=in_n, other=0)
        total *= decode_scale(stored, SCALE, SCALE_MANTISSA, SCALE_BIAS)[:, None]
    total *= global_scale
    if HAS_BIAS and SPLITS == 1:
        total += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out_at = out + (split.to(tl.int64) * M + m[None, :]) * N + n[:, None]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=in_n[:, None] & in_m[None, :])


def constants(fmt: Format, columns: int, *, zeros: bool, bias: bool, dtype: Any, tiles: Tiles) -> dict[str, Any]:
    """Compile-time arguments for weights of `fmt`; whatever depends on the format is derived here."""
    return {
        "KIND": fmt.element.kind,
        "BITS": fmt.element.bits,
        "MANTISSA": fmt.element.mantissa_bits,
        "BIAS": fmt.element.exponent_bias,
        "SCALE": fmt.scale.name,
        "SCALE_MANTISSA": UE4M3.element.mantissa_bits,
        "SCALE_BIAS": UE4M3.element.exponent_bias,
        "GROUP": fmt.group if fmt.group and fmt.group < columns else 0,
        "ZEROS": zeros,
        "HAS_BIAS": bias,
        "DTYPE": dtype,
        "PART": PART,
        "BLOCK_N": tiles.block_n,
        "BLOCK_M": tiles.block_m,
        "SPLITS": tiles.splits,
    }


COMPUTE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def packed_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    global_scale: float,
    format: str,
    prepared: Tensor | None = None,
) -> Tensor:
    """The operator `qat::packed_linear` on a device that runs Triton; computes in the dtype of x, sums in float32."""
    fmt, columns, rows = lookup(format), x.shape[-1], words.shape[0]
    if problem(fmt) is not None:
        return reference(x, words, scales, zeros, bias, global_scale, format)
    flat = x.reshape(-1, columns)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    tokens = flat.shape[0]
    out = x.new_empty(*x.shape[:-1], rows)
    if tokens == 0 or rows == 0:
        return out
    processors = device_of(x).processors
    tiles = choose(tokens, rows, columns, tile(fmt.element.bits), processors)
    target = out if tiles.splits == 1 else x.new_empty(tiles.splits, tokens, rows, dtype=torch.float32)
    grid = (triton.cdiv(rows, tiles.block_n), triton.cdiv(tokens, tiles.block_m), tiles.splits)
    packed_linear_kernel[grid](
        flat,
        words,
        scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
        bias,
        target,
        tokens,
        rows,
        columns,
        flat.stride(0),
        words.stride(0),
        global_scale,
        **constants(fmt, columns, zeros=zeros is not None, bias=bias is not None, dtype=COMPUTE[x.dtype], tiles=tiles),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if tiles.splits > 1:
        summed = target.sum(dim=0)
        out.view(tokens, rows).copy_(summed if bias is None else summed + bias)
    return out
