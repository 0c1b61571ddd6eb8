"""The order in which a GPU reads 4-bit weights: panels of 64 rows, cut into tiles that lie contiguously, in words whose
four columns are decoded by one scale or meet in one product. A pure permutation of codes, made when a weight comes to
a GPU and undone when it leaves; never on disk.

    words    int16 (rows / 64, columns / tile, 64, part): tile (r, t) holds rows 64 r on and columns t * tile on, where
             tile = 4 * part. Word j of a row holds the columns j, part + j, 2 part + j and 3 part + j of the tile.
    groups of 16
             Four neighbouring words are a group: the words of columns 16 g on hold the columns 0, 4, 8, 12 of it; 1, 5,
             9, 13; and so on. So every word has one scale. Scales are (rows / 64, columns / tile, 64, part / 4), a tile
             of theirs beside each of words.
    E4M3     as bytes with five bits of exponent: every positive number is a normal one of them (`WIDE_BIAS`), and a
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
WIDE_BIAS = 9  # the exponent of the smallest E4M3, 2^-9, is 0 in a byte with five bits of exponent
CHUNK = 1 << 24  # codes that are moved at a time
_SCALED_WORDS = 16  # columns of a group whose words have one scale each


def part(fmt: Format) -> int:
    """Words of a tile's row: no group of more than 16 columns ends inside a part of so many columns."""
    return min(fmt.group or ROWS, ROWS) if fmt.group != _SCALED_WORDS else ROWS


def tile(fmt: Format) -> int:
    """Columns of a tile."""
    return PARTS * part(fmt)


def piece(fmt: Format) -> int:
    """Neighbouring words that hold neighbouring columns."""
    return _SCALED_WORDS // PARTS if scales_words(fmt) else part(fmt)


def scales_words(fmt: Format) -> bool:
    """Whether scales act on words, rather than on sums of a group's products."""
    return fmt.group == _SCALED_WORDS


def problem(fmt: Format, rows: int, columns: int) -> str | None:
    """Why a weight that can be packed does not lie in panels, or None."""
    if fmt.element.bits != WORD_BITS // PARTS or fmt.zero_point:
        return "only 4-bit codes without zero points lie in panels"
    if scales_words(fmt) and fmt.scale is not UE4M3:
        return f"scales of {fmt.group} columns lie in panels as E4M3, not {fmt.scale}"
    if rows % ROWS or columns % tile(fmt) or not rows or not columns:
        return f"{rows} x {columns} is no whole number of panels of {ROWS} rows and tiles of {tile(fmt)} columns"
    return None


WORD_BITS = 16


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
    panels, run = codes.shape[0] // ROWS, piece(fmt)
    at = codes.to(torch.int32).view(panels, ROWS, -1, part(fmt) // run, PARTS, run)
    first, second, third, fourth = at.permute(4, 0, 2, 1, 3, 5).reshape(PARTS, panels, -1, ROWS, part(fmt)).unbind()
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
    panels, tiles, _, width = words.shape
    word = words.to(torch.int32)
    if fmt.element.is_integer:
        flip = 1 << (fmt.element.bits - 1)
        columns = [(word >> shift & 15) ^ flip for shift in (0, 4, 8, 12)]
    else:
        columns = [word << shift >> 12 & 8 | word << shift >> 6 & 7 for shift in (0, 3, 6)]
        columns.append(word >> 11 & 8 | word >> 11 & 4 | word >> 10 & 3)
    at = torch.stack(columns).view(PARTS, panels, tiles, ROWS, width // piece(fmt), piece(fmt))
    return at.permute(1, 3, 2, 4, 0, 5).reshape(panels * ROWS, -1).to(torch.uint8)


def scales_to_panels(scales: Tensor, fmt: Format) -> Tensor:
    """Scales (groups, rows) as `PackedWeight` has them -> beside their words, where those are scaled; else in order."""
    if not scales_words(fmt):
        return scales.contiguous()
    mantissa, exponent = torch.frexp(fmt.scale.decode(fmt.scale.from_bytes(scales)))  # mantissa from one half to one
    wide = (exponent - 1 + WIDE_BIAS) * 8 + (mantissa * 16 - 8).to(torch.int32)
    beside = wide.to(torch.uint8).t().reshape(-1, ROWS, scales.shape[0] * _SCALED_WORDS // tile(fmt), part(fmt) // PARTS)
    return beside.transpose(1, 2).contiguous()


def scales_from_panels(scales: Tensor, fmt: Format) -> Tensor:
    """Undo `scales_to_panels`."""
    if not scales_words(fmt):
        return scales
    wide = scales.transpose(1, 2).reshape(scales.shape[0] * ROWS, -1).t().to(torch.int32)
    value = torch.ldexp((wide & 7) / 8 + 1, (wide >> 3) - WIDE_BIAS)
    return fmt.scale.to_bytes(fmt.scale.encode(value)).contiguous()


BF16_MANTISSA = 7


def wide_offset(exponent: int) -> int:
    """What is added to a scale's byte, shifted to BF16's mantissa, to make it 2^exponent times the scale in BF16."""
    return (EXPONENT_BIAS - WIDE_BIAS + exponent) << BF16_MANTISSA
