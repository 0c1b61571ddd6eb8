"""Many tokens times packed weights: rows of the weight are decoded to dense BF16 or FP16 numbers once, at the speed of
memory, and the library multiplies them.

The packed kernels decode a weight again for every 64 tokens, which from some 200 tokens on costs more than writing it
down (`choose.pays`). A program decodes one tile of 64 or 128 rows as it lies in memory, in panels or in words, and
writes runs of 32 or 64 neighbouring columns. Slices of rows share one piece of memory, which goes back to the allocator
afterwards.

**Rounding.** A number is code (less the zero point) times scale in float32, rounded once to the dtype of x, as every
engine that dequantizes rounds it; the global scale multiplies the sums. So 4-bit codes under scales of E4M3 or E8M0 are
exact in BF16; under scales in BF16 or float32, weights are rounded, which they are not for few tokens. Sums are the
library's, whose order may change with the number of tokens.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.launch import Call, Launch
from qat.kernels.packed_linear.choose import problem
from qat.kernels.packed_linear.decode.triton import FLOAT32_BIAS, decode, decode_scale
from qat.kernels.packed_linear.dense.choose import NUMBER, pays, slices
from qat.kernels.packed_linear.panels.triton import code_of
from qat.numbers.catalog import lookup
from qat.numbers.scale import UE4M3
from qat.serving import panels, words
from qat.serving.panels import BESIDE, ROWS, WIDE_BIAS, in_panels, rows_of

PANEL = tl.constexpr(ROWS)
SCALE_COLUMNS = tl.constexpr(BESIDE)
WIDE = tl.constexpr(WIDE_BIAS)
HIGH = 128  # rows of a program where weights lie in words, whose tiles are 32 words


@triton.jit
def number(code, KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """float32 of codes, by way of FP16, which holds those of 8 bits and less."""
    return decode(code, KIND, BITS, MANTISSA, BIAS, tl.float16).to(tl.float32)


@triton.jit
def dense_panels_kernel(
    packed,
    scales,
    dense,
    N,
    K,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_MANTISSA: tl.constexpr,
    SCALE_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    PART: tl.constexpr,
):
    """dense (rows, K) of panels; scales are those of the first of these rows on, N of a group, or beside their words
    (SCALED). GROUP is the number of columns per scale, 0 for a row."""
    SCALES: tl.constexpr = PART // SCALE_COLUMNS  # of a part's row, where they lie beside words
    step, panel = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, j = tl.arange(0, PANEL), tl.arange(0, PART)
    at = panel * tl.num_programs(0) + step
    word = tl.load(packed + at * (PANEL * PART) + (row[:, None] * PART + j[None, :]))
    target = dense + panel * PANEL * K + row.to(tl.int64)[:, None] * K + (step * 4 * PART + j)[None, :]
    for part in tl.static_range(4):
        if SCALED:
            k = tl.arange(0, SCALES)
            stored = tl.load(scales + at * (PANEL * 4 * SCALES) + (row[:, None] * 4 + part) * SCALES + k[None, :])
            bits = (stored.to(tl.int32) << (23 - SCALE_MANTISSA)) + ((FLOAT32_BIAS - WIDE) << 23)
            wide = bits.to(tl.float32, bitcast=True)[:, :, None]
            factor = tl.reshape(tl.broadcast_to(wide, (PANEL, SCALES, SCALE_COLUMNS)), (PANEL, PART))
        else:
            group = (step * 4 + part) * PART // GROUP if GROUP > 0 else 0
            stored = tl.load(scales + group * N + panel * PANEL + row)
            factor = decode_scale(stored, SCALE, SCALE_MANTISSA, SCALE_BIAS)[:, None]
        value = number(code_of(word, part, KIND), KIND, BITS, MANTISSA, BIAS) * factor
        tl.store(target + part * PART, value.to(dense.dtype.element_ty))


@triton.jit
def dense_words_kernel(
    packed,
    scales,
    zeros,
    dense,
    rows,
    N,
    K,
    width,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_MANTISSA: tl.constexpr,
    SCALE_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dense (rows, K) of words (rows, width); scales and zero points as above."""
    PARTS: tl.constexpr = 16 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    PER: tl.constexpr = PART // GROUP if GROUP > 0 and GROUP < PART else 1  # scales of a part
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j, k = tl.arange(0, PART), tl.arange(0, PER)
    in_n = (n < rows)[:, None]
    step = tl.program_id(0)
    word = tl.load(packed + n.to(tl.int64)[:, None] * width + (step * PART + j)[None, :], mask=in_n, other=0)
    for part in tl.static_range(PARTS):
        first = (step * PARTS + part) * PART
        group = first // GROUP + k if GROUP > 0 else 0 * k
        place = group.to(tl.int64)[None, :] * N + n[:, None]
        in_k = in_n & (first + k * (PART // PER) < K)[None, :]
        factor = decode_scale(tl.load(scales + place, mask=in_k, other=0), SCALE, SCALE_MANTISSA, SCALE_BIAS)
        value = number((word >> (part * BITS)) & MASK, KIND, BITS, MANTISSA, BIAS)
        value = tl.reshape(value, (BLOCK, PER, PART // PER))
        if zeros is not None:
            value -= tl.load(zeros + place, mask=in_k, other=0).to(tl.float32)[:, :, None]
        value = tl.reshape(value * factor[:, :, None], (BLOCK, PART)).to(dense.dtype.element_ty)
        target = dense + n.to(tl.int64)[:, None] * K + (first + j)[None, :]
        tl.store(target, value, mask=in_n & (first + j < K)[None, :])


@lru_cache(maxsize=4096)
def takes(format: str, tokens: int, dtype: torch.dtype) -> bool:
    """Whether so many tokens of this dtype go this way; float32 would be multiplied by the library as it likes."""
    fmt = lookup(format)
    return dtype.itemsize == NUMBER and problem(fmt) is None and pays(tokens, fmt.element.bits)


@lru_cache(maxsize=1024)
def _launch(format: str, columns: int, panelled: bool) -> Launch:
    fmt = lookup(format)
    fixed = {
        "KIND": fmt.element.kind,
        "BITS": fmt.element.bits,
        "MANTISSA": fmt.element.mantissa_bits,
        "BIAS": fmt.element.exponent_bias,
        "SCALE": fmt.scale.name,
        "SCALE_MANTISSA": UE4M3.element.mantissa_bits,
        "SCALE_BIAS": UE4M3.element.exponent_bias,
        "GROUP": fmt.group if fmt.group and fmt.group < columns else 0,
    }
    if panelled:
        scaled = panels.scales_weights(fmt)
        return Launch(dense_panels_kernel, **fixed, SCALED=scaled, PART=panels.part(fmt), num_warps=4)
    return Launch(dense_words_kernel, **fixed, PART=words.PART, BLOCK=HIGH, num_warps=4)


@lru_cache(maxsize=4096)
def _call(format: str, count: int, rows: int, columns: int, width: int) -> Call:
    """The launch that decodes `count` rows; `width` is that of words, 0 for panels."""
    if width == 0:
        grid = columns // panels.tile(lookup(format)), count // ROWS
        return _launch(format, columns, True).at(grid, rows, columns)
    grid = width // words.PART, triton.cdiv(count, HIGH)
    return _launch(format, columns, False).at(grid, count, rows, columns, width)


def decode_rows(
    dense: Tensor, first: int, packed: Tensor, scales: Tensor, zeros: Tensor | None, format: str, rows: int
) -> None:
    """Fill dense (some rows, columns) with those of the weight from `first` on, without its global scale; in panels
    `first` and their number are whole panels."""
    count, columns = dense.shape
    own = packed[first // ROWS :] if in_panels(packed) else packed[first:]
    if in_panels(packed):
        beside = panels.scales_weights(lookup(format))
        _call(format, count, rows, columns, 0)((own, scales[first // ROWS :] if beside else scales[:, first:], dense))
        return
    zeros = None if zeros is None else zeros[:, first:]
    _call(format, count, rows, columns, packed.stride(0))((own, scales[:, first:], zeros, dense))


def multiply(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    global_scale: float,
    format: str,
) -> None:
    """Fill out (tokens, rows) from x (tokens, columns), both BF16 or FP16."""
    columns, rows = x.shape[-1], rows_of(packed)
    scales, zeros = scales.contiguous(), None if zeros is None else zeros.contiguous()
    some = slices(rows, columns, ROWS if in_panels(packed) else HIGH)
    memory = x.new_empty(len(some[0]), columns)
    bias = None if bias is None else bias.to(x.dtype)
    for one in some:
        dense, target = memory[: len(one)], out[:, one.start : one.stop]
        decode_rows(dense, one.start, packed, scales, zeros, format, rows)
        if bias is not None:
            torch.addmm(bias[one.start : one.stop], x, dense.t(), alpha=global_scale, out=target)
        elif global_scale != 1:
            torch.addmm(target, x, dense.t(), beta=0, alpha=global_scale, out=target)
        else:
            torch.mm(x, dense.t(), out=target)
