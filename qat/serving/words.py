"""Byte orders that kernels read: pure, invertible permutations of codes, applied once after load and never on disk.

`words`: 16-bit words along K in which *distant* columns share a word. A tile of K is cut into 16 / bits parts of PART
columns; word j of the tile holds column j of every part, the first part in the lowest bits. A kernel then unpacks a
part with one shift and one mask, and multiplies it with a contiguous piece of the activations: nothing has to be
interleaved in registers. Signed codes are stored with their sign bit flipped ("offset"), so that they count from zero.
"""

import torch
from torch import Tensor

from qat.errors import FormatError

PART = 32  # columns of a part; no group of the catalogue but 16 ends inside one
WORD = 16  # bits


def parts(bits: int) -> int:
    """Codes per word.

    Raises:
        FormatError: codes of this size do not fill a word.
    """
    if WORD % bits:
        raise FormatError(f"codes of {bits} bits do not fill words of {WORD} bits; 2, 4 and 8 do")
    return WORD // bits


def tile(bits: int) -> int:
    """Columns per tile; the tail of a row is filled with the code of zero."""
    return PART * parts(bits)


def to_words(codes: Tensor, bits: int, *, offset: bool) -> Tensor:
    """codes uint8 (rows, columns), one each -> int16 (rows, words of whole tiles).

    Args:
        codes: bit patterns of `bits` bits.
        bits: 2, 4 or 8.
        offset: flip the sign bit, for two's-complement integers.
    """
    rows, columns = codes.shape
    filled = torch.nn.functional.pad(codes, (0, -columns % tile(bits))).to(torch.int32)
    if offset:
        filled = filled ^ (1 << (bits - 1))
    tiles = filled.view(rows, -1, parts(bits), PART)
    shifts = torch.arange(parts(bits), device=codes.device, dtype=torch.int32) * bits
    return (tiles << shifts[:, None]).sum(dim=2, dtype=torch.int32).to(torch.int16).view(rows, -1)


def from_words(words: Tensor, bits: int, columns: int, *, offset: bool) -> Tensor:
    """Undo `to_words`: uint8 (rows, columns)."""
    rows = words.shape[0]
    tiles = words.view(rows, -1, 1, PART).to(torch.int32)
    shifts = torch.arange(parts(bits), device=words.device, dtype=torch.int32) * bits
    codes = (tiles >> shifts[:, None]) & (2**bits - 1)
    if offset:
        codes = codes ^ (1 << (bits - 1))
    return codes.to(torch.uint8).reshape(rows, -1)[:, :columns].contiguous()
