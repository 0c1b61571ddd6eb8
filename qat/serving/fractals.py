"""Fractals: the blocks of 16 rows by 32 bytes in which Ascend's matrix units read, and the way back.

Two orders, named as CANN names them, the capital letter for how blocks follow each other and the small one for what
lies inside. `c0` is how many numbers 32 bytes hold: 16 of 16 bits, 32 of 8, 64 of 4.

    zN of (R, C)   (C / c0, R / 16, 16, c0)   columns of blocks outermost, rows inside: CANN's FRACTAL_NZ of that matrix
    nZ of (R, C)   (R / c0, C / 16, 16, c0)   zN of the transpose

Both are permutations of the numbers, filled with zeros to whole blocks; leading dimensions (experts) stay in front.
"""

import torch
from torch import Tensor

ROWS = 16
BYTES = 32


def row_of(bits: int, width: int = BYTES) -> int:
    """c0: numbers of `bits` bits in the `width` bytes of a block's row."""
    return width * 8 // bits


def to_zn(matrix: Tensor, c0: int) -> Tensor:
    """(..., R, C) -> (..., C / c0, R / 16, 16, c0), one copy (two where it has to be filled)."""
    rows, columns = matrix.shape[-2:]
    fill = (0, -columns % c0, 0, -rows % ROWS)
    filled = torch.nn.functional.pad(matrix, fill) if any(fill) else matrix
    blocks = filled.unflatten(-1, (-1, c0)).unflatten(-3, (-1, ROWS))  # (..., R1, 16, C1, c0)
    return blocks.movedim(-2, -4).contiguous()


def from_zn(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `to_zn`: (..., rows, columns), without what it was filled with."""
    filled = blocks.movedim(-4, -2).flatten(-2).flatten(-3, -2)
    return filled[..., :rows, :columns].contiguous()


def to_nz(matrix: Tensor, c0: int) -> Tensor:
    """(..., R, C) -> (..., R / c0, C / 16, 16, c0)."""
    return to_zn(matrix.transpose(-1, -2), c0)


def from_nz(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `to_nz`: (..., rows, columns)."""
    return from_zn(blocks, columns, rows).transpose(-1, -2).contiguous()
