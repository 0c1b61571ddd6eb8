"""The order in which a GPU reads 4-bit weights: panels of 64 rows, cut into tiles that lie contiguously, in words that
are decoded in pairs. A permutation of codes, made when a weight comes to a GPU, undone when it leaves, never on disk.

    words    int16 (rows / 64, columns / tile, 64, part): tile (r, t) holds rows 64 r on and columns t * tile on, where
             tile = 4 * part. Word j of a row holds the columns j, part + j, 2 part + j and 3 part + j of the tile: a
             part is that many neighbouring columns, which meet neighbouring columns of the input.
    scales   (groups, rows), but those of 16 columns lie beside their words, (rows / 64, columns / tile, 64, tile / 16),
             as bytes with five bits of exponent: every positive E4M3 is a normal one of them (`WIDE_BIAS`), and a
             kernel makes BF16 of it by one shift and one addition.

Codes of integers count from the lowest value, 4 bits each, the first column in the lowest. Those of E2M1 lie so that a
shift and a mask leave BF16 but for the bias of its exponent: the first at bits 15 and 8 to 6, the second three bits
lower, the third six; the fourth takes what is left, bits 14, 13, 11 and 10.
"""

import torch
from torch import Tensor

from qat.numbers.element import EXPONENT_BIAS
from qat.numbers.format import Format
from qat.numbers.scale import UE4M3

ROWS = 64  # of a panel: the rows of one product of Hopper's tensor cores
PARTS = 4  # codes of a word
WORD = 16  # bits
BESIDE = 16  # columns per scale where scales lie beside their words
WIDE_BIAS = 9  # the smallest E4M3 is 2^-9: its exponent is 0 in a byte with five bits of it
BF16_MANTISSA = 7
CHUNK = 1 << 24  # codes that are moved at a time


def part(fmt: Format) -> int:
    """Words of a tile's row, and columns of a part: a part holds groups of 16, or lies within a longer one."""
    return min(fmt.group or ROWS, ROWS) if fmt.group != BESIDE else ROWS


def tile(fmt: Format) -> int:
    """Columns of a tile."""
    return PARTS * part(fmt)


def scales_weights(fmt: Format) -> bool:
    """Whether scales lie beside words and act on weights, rather than on sums of a group's products."""
    return fmt.group == BESIDE


def problem(fmt: Format, rows: int, columns: int) -> str | None:
    """Why a weight that can be packed does not lie in panels, or None."""
    if fmt.element.bits != WORD // PARTS or fmt.zero_point:
        return "only 4-bit codes without zero points lie in panels"
    if scales_weights(fmt) and fmt.scale is not UE4M3:
        return f"scales of {fmt.group} columns lie in panels as E4M3, not {fmt.scale}"
    if rows % ROWS or columns % tile(fmt) or not rows or not columns:
        return f"{rows} x {columns} is no whole number of panels of {ROWS} rows and tiles of {tile(fmt)} columns"
    return None


def in_panels(words: Tensor) -> bool:
    """Whether words lie in panels; those of `qat.serving.words` have two dimensions."""
    return words.dim() == PARTS


def rows_of(words: Tensor) -> int:
    """Rows of the weight, in either order."""
    return words.shape[0] * (ROWS if in_panels(words) else 1)


def to_panels(codes: Tensor, fmt: Format) -> Tensor:
    """codes uint8 (rows, columns), one each -> int16 words in panels."""
    rows, step = codes.shape[0], max(CHUNK // codes.shape[1] // ROWS, 1) * ROWS
    return torch.cat([_to_panels(codes[first : first + step], fmt) for first in range(0, rows, step)])


def _to_panels(codes: Tensor, fmt: Format) -> Tensor:
    at = codes.to(torch.int32).view(-1, ROWS, codes.shape[1] // tile(fmt), PARTS, part(fmt))
    first, second, third, fourth = at.permute(3, 0, 2, 1, 4).unbind()
    if fmt.element.is_integer:
        flip = 1 << (fmt.element.bits - 1)
        word = (first ^ flip) | (second ^ flip) << 4 | (third ^ flip) << 8 | (fourth ^ flip) << 12
    else:
        word = _spread(first) | _spread(second) >> 3 | _spread(third) >> 6 | _last(fourth)
    return word.to(torch.int16)


def _spread(code: Tensor) -> Tensor:
    return (code & 8) << 12 | (code & 7) << 6


def _last(code: Tensor) -> Tensor:
    return (code & 8) << 11 | (code & 4) << 11 | (code & 3) << 10


def from_panels(words: Tensor, fmt: Format) -> Tensor:
    """Undo `to_panels`."""
    step = max(CHUNK // (words.shape[1] * tile(fmt)) // ROWS, 1)
    return torch.cat([_from_panels(words[first : first + step], fmt) for first in range(0, words.shape[0], step)])


def _from_panels(words: Tensor, fmt: Format) -> Tensor:
    word = words.to(torch.int32)
    if fmt.element.is_integer:
        flip = 1 << (fmt.element.bits - 1)
        columns = [(word >> shift & 15) ^ flip for shift in (0, 4, 8, 12)]
    else:
        columns = [word << shift >> 12 & 8 | word << shift >> 6 & 7 for shift in (0, 3, 6)]
        columns.append(word >> 11 & 8 | word >> 11 & 4 | word >> 10 & 3)
    return torch.stack(columns).permute(1, 3, 2, 0, 4).flatten(0, 1).flatten(1).to(torch.uint8)


def scales_to_panels(scales: Tensor, fmt: Format) -> Tensor:
    """Scales (groups, rows) as `PackedWeight` has them -> beside their words, where those of `fmt` lie there."""
    if not scales_weights(fmt):
        return scales.contiguous()
    mantissa, exponent = torch.frexp(fmt.scale.decode(fmt.scale.from_bytes(scales)))  # mantissa from one half to one
    step = 2**UE4M3.element.mantissa_bits
    wide = (exponent - 1 + WIDE_BIAS) * step + (mantissa * (2 * step) - step).to(torch.int32)
    rows = wide.to(torch.uint8).t().reshape(-1, ROWS, scales.shape[0] * BESIDE // tile(fmt), tile(fmt) // BESIDE)
    return rows.transpose(1, 2).contiguous()


def scales_from_panels(scales: Tensor, fmt: Format) -> Tensor:
    """Undo `scales_to_panels`."""
    if not scales_weights(fmt):
        return scales
    wide = scales.transpose(1, 2).flatten(0, 1).flatten(1).t().to(torch.int32)
    step = 2**UE4M3.element.mantissa_bits
    value = torch.ldexp(wide % step / step + 1, wide // step - WIDE_BIAS)
    return fmt.scale.to_bytes(fmt.scale.encode(value)).contiguous()


def wide_offset(exponent: int) -> int:
    """What is added to a scale's byte, shifted to BF16's mantissa, to make it 2^exponent times the scale in BF16."""
    return (EXPONENT_BIAS - WIDE_BIAS + exponent) << BF16_MANTISSA
