"""Linear layers with packed weights (W2, W4, W8 x A16) in Triton, for GPUs with or without low-precision units.

**What lies where.** x (M tokens, K columns), the weight (N rows, K columns) in int16 words, scales and zero points
(groups, N). A row of the weight is cut into tiles of 16 / BITS parts of PART = 32 columns. A tile is 32 words, 64 bytes
whatever BITS is, and word j holds column j of *every* part, the first part in the lowest bits. With 4 bits:

    bits of word j           0-3      4-7      8-11     12-15
    column of the tile        j      32 + j   64 + j   96 + j

**Why in this order.** `(word >> part * BITS) & MASK` on all words of a tile gives 32 neighbouring columns, (BLOCK_N,
32), which meet 32 neighbouring columns of x in one `tl.dot`. Were neighbours in one word, as files have them, codes
would have to change threads before every product. Words have the 16 bits of BF16 and FP16, so that a code becomes a
number where it lies: integers as the mantissa of a power of two, minifloats shifted into the exponent and mantissa,
then one multiplication that corrects the bias. Both are exact. The signs of integers are flipped in memory (codes count
from the lowest value), which the subtraction of that power of two undoes for nothing. Scales lie with the rows
together, because a program needs those of BLOCK_N rows and one group at a time: one contiguous load.

**Why the operands are swapped.** The weight is the left operand of the product, the tokens the right one. Tensor cores
of sm_90 (`wgmma`) take the left operand from registers, where decoding leaves it, and its 64 rows are always full of
weight; the other side goes down to a handful of tokens.

**Where scales act.** Those of 32 columns and more on float32 sums, once per group instead of once per code. Those of 16
multiply the weight, where E4M3 times a 4-bit code stays exact. A scale per row acts once, at the end. float32
activations are multiplied as such ("ieee"): tensor cores would drop 13 of their bits.

**What bounds the speed** (reckoned; docs/measurements.md has times). The weight's bytes are read once per BLOCK_M
tokens, so M tokens cost 16 * M / BITS operations per byte: up to about 70 tokens at 4 bits, an H100 (300 BF16
operations per byte) waits for memory, and only two things matter: enough programs to keep all of it busy, hence
SPLITS pieces of K where N alone gives too few, and loads under way while the last tile is decoded, hence `num_stages`.
Beyond, decoding counts (a shift, a mask, an "or" and a subtraction per code and BLOCK_M tokens), and the tensor
cores wait for it. Sums of splits are added in a fixed order by the host, without atomics. Prompts of some 200 tokens
and more are decoded to dense rows for the library (`dense`).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.device import device_of
from qat.kernels.launch import Call, Launch
from qat.kernels.packed_linear.choose import Tiles, choose, problem
from qat.kernels.packed_linear.decode.triton import decode, decode_scale
from qat.kernels.packed_linear.dense import triton as dense
from qat.kernels.packed_linear.dense.choose import FEW
from qat.kernels.packed_linear.panels import triton as panels
from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.numbers.scale import UE4M3
from qat.serving.packed import reference
from qat.serving.panels import in_panels, rows_of
from qat.serving.words import PART, tile


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
    for step in range(split * share, tl.minimum(split * share + share, steps)):  # one tile of K each
        # The last tile is whole in memory (filled with the code of zero), so only rows are masked.
        word = tl.load(word_at + step * PART, mask=in_n[:, None], other=0)
        partial = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for part in tl.static_range(PARTS):
            first = step * TILE + part * PART
            tokens = tl.load(x_at + first, mask=in_m[None, :] & (first + column < K)[:, None], other=0.0).to(DTYPE)
            code = (word >> (part * BITS)) & MASK
            weight = decode(code, KIND, BITS, MANTISSA, BIAS, DTYPE)
            if INSIDE:  # scales of 16: into the weight
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
                if ZEROS:  # codes minus zero points are small integers, exact in DTYPE
                    zero = tl.load(zeros + group * N + n, mask=in_k, other=0)
                    weight = weight - zero.to(DTYPE)[:, None]
                if GROUP == 0:
                    total = tl.dot(weight, tokens, total, input_precision="ieee")
                else:
                    partial = tl.dot(weight, tokens, partial, input_precision="ieee")
                    # A group may be several parts, or longer than a tile: sums are scaled where either ends.
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


@dataclass(frozen=True)
class Product:
    """What the shape of a product decides, worked out once."""

    call: Call
    splits: int


@lru_cache(maxsize=4096)
def product(
    format: str, sizes: tuple[int, ...], dtype: torch.dtype, zeros: bool, bias: bool, processors: int
) -> Product | None:
    """Of x (tokens, columns) and a weight (rows, columns), `sizes` and both strides; None where the reference
    multiplies."""
    tokens, rows, columns, *_ = sizes
    fmt = lookup(format)
    if problem(fmt) is not None:
        return None
    tiles = choose(tokens, rows, columns, tile(fmt.element.bits), processors)
    grid = triton.cdiv(rows, tiles.block_n), triton.cdiv(tokens, tiles.block_m), tiles.splits
    return Product(_launch(format, columns, dtype, zeros, bias, tiles).at(grid, *sizes), tiles.splits)


@lru_cache(maxsize=1024)
def _launch(format: str, columns: int, dtype: torch.dtype, zeros: bool, bias: bool, tiles: Tiles) -> Launch:
    fixed = constants(lookup(format), columns, zeros=zeros, bias=bias, dtype=COMPUTE[dtype], tiles=tiles)
    return Launch(packed_linear_kernel, **fixed, num_warps=tiles.warps, num_stages=tiles.stages)


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
    columns, rows, device = x.shape[-1], rows_of(words), device_of(x)
    out = x.new_empty((*x.shape[:-1], rows))
    tokens = x.numel() // columns
    if tokens == 0 or rows == 0:
        return out
    flat = x if x.is_contiguous() else _flat(x, columns)
    if tokens > FEW and dense.takes(format, tokens, x.dtype):
        dense.multiply(
            flat.view(tokens, columns), words, scales, zeros, bias, out.view(tokens, rows), global_scale, format
        )
        return out
    stride = columns if flat is x else flat.stride(0)
    if in_panels(words):
        assembly = panels.multiplies_pairs(x, device)
        shape = tokens, rows, columns, stride
        panels.multiply(format, shape, flat, words, scales, bias, out, global_scale, assembly, device.processors)
        return out
    sizes = tokens, rows, columns, stride, words.stride(0)
    own = product(format, sizes, x.dtype, zeros is not None, bias is not None, device.processors)
    if own is None:
        return reference(x, words, scales, zeros, bias, global_scale, format)
    target = out if own.splits == 1 else x.new_empty((own.splits, tokens, rows), dtype=torch.float32)
    zeros = None if zeros is None else zeros.contiguous()
    own.call((flat, words, scales.contiguous(), zeros, bias, target), global_scale)
    if own.splits > 1:
        summed = target.sum(dim=0)
        out.view(tokens, rows).copy_(summed if bias is None else summed + bias)
    return out


def _flat(x: Tensor, columns: int) -> Tensor:
    flat = x.reshape(-1, columns)
    return flat if flat.stride(-1) == 1 else flat.contiguous()
