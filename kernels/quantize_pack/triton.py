"""Codes straight into words (see `qat.serving.words`): reads the weight once, writes 2 to 8 bits per value.

One program makes whole words: the columns that share a word are `PART` apart, so each part is a contiguous load, and
its codes are shifted into place and merged in registers. Rounding is that of fake quantization, by the same function.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.fake_quantize.rounding.triton import rounded
from qat.kernels.fake_quantize.triton import constants, takes
from qat.kernels.launch import Launch
from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.serving.packed import problem
from qat.serving.quantize_pack import quantize_pack_reference
from qat.serving.words import PART, tile

VALUES = 4096  # in the registers of one program


@triton.jit
def encoded(value, zero, KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, MIN_NORMAL: tl.constexpr):
    """int32 codes of what `rounded` returned; integers count from zero (sign bit flipped), NaN gets the code of 0."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    if KIND == "integer":
        value = value + zero
        return tl.where(value == value, value, 0.0).to(tl.int32) + HALF
    else:  # the smallest normal number becomes float32's: exponent and mantissa then stand as in the code
        magnitude = tl.abs(value) * (2.0**-126 / MIN_NORMAL)
        code = magnitude.to(tl.int32, bitcast=True) >> (23 - MANTISSA)
        return tl.where(value == value, code | tl.where(value < 0, HALF, 0), 0)


@triton.jit
def quantize_pack_kernel(
    weight,
    divisor,
    zeros,
    words,
    R,
    C,
    stride_words,
    scale_columns,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_NORMAL: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZEROS: tl.constexpr,
    PART: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """words (R, stride_words) of weight (R, C); GROUP columns share a scale, 0 means the row."""
    PARTS: tl.constexpr = 16 // BITS
    across = tl.cdiv(stride_words, TILES * PART)
    row = (tl.program_id(0) // across) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None, None]
    at_tile = (tl.program_id(0) % across) * TILES + tl.arange(0, TILES)[None, :, None]
    place = tl.arange(0, PART)[None, None, :]
    in_row = row < R
    word = tl.zeros((TILE_ROWS, TILES, PART), tl.int32)
    for part in tl.static_range(PARTS):
        column = at_tile * (PART * PARTS) + part * PART + place
        inside = in_row & (column < C)
        value = tl.load(weight + row.to(tl.int64) * C + column, mask=inside, other=0.0).to(tl.float32)
        if GROUP == 0:
            scale_at, there = row, in_row
        else:
            scale_at, there = row * scale_columns + column // GROUP, inside
        d = tl.load(divisor + scale_at, mask=there, other=1.0)
        zero = tl.load(zeros + scale_at, mask=there, other=0).to(tl.float32) if ZEROS else 0.0
        value = rounded(tl.div_rn(value, d), zero, KIND, MANTISSA, MIN_NORMAL, LOW, HIGH, ZEROS, (0.0,), ())
        value = tl.where(inside, value, 0.0)
        code = encoded(value, tl.where(inside, zero, 0.0), KIND, BITS, MANTISSA, MIN_NORMAL)
        word |= code << (part * BITS)
    word_at = words + row.to(tl.int64) * stride_words + at_tile * PART + place
    tl.store(word_at, word.to(tl.int16), mask=in_row & (at_tile * PART < stride_words))


def arguments(fmt: Format, rows: int, columns: int) -> dict[str, Any]:
    """Compile-time arguments, among them the tile of one program."""
    fixed = {name: value for name, value in constants(fmt).items() if name not in ("GRID", "BOUNDS")}
    width = tile(fmt.element.bits)
    tiles = min(8, 1 << max(-(-columns // width) - 1, 0).bit_length())
    tile_rows = min(max(VALUES // (width * tiles), 1), 1 << max(rows - 1, 0).bit_length())
    group = fmt.group or 0
    return {**fixed, "BITS": fmt.element.bits, "GROUP": group, "PART": PART, "TILE_ROWS": tile_rows, "TILES": tiles}


def quantize_pack(weight: Tensor, divisor: Tensor, zero_point: Tensor | None, format: str) -> Tensor:
    """The operator `qat::quantize_pack` on a device that runs Triton."""
    fmt = lookup(format)
    if weight.dim() != 2 or problem(fmt) is not None or takes(weight, divisor, None, zero_point, fmt) != 1:
        return quantize_pack_reference(weight, divisor, zero_point, format)
    rows, columns = weight.shape
    width = tile(fmt.element.bits)
    words = torch.empty(rows, -(-columns // width) * PART, dtype=torch.int16, device=weight.device)
    fixed = arguments(fmt, rows, columns)
    across = triton.cdiv(words.shape[1], fixed["TILES"] * PART)
    zeros = None if zero_point is None else zero_point.contiguous()
    call = Launch(quantize_pack_kernel, **fixed).at(
        (triton.cdiv(rows, fixed["TILE_ROWS"]) * across,), rows, columns, words.shape[1], divisor.shape[1]
    )
    call((weight.contiguous(), divisor.contiguous(), zeros, words))
    return words
