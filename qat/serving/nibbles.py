"""4-bit codes that share bytes or 32-bit integers, the first in the lowest bits; pure, invertible, filled up with zero.
What files and devices differ in is the direction in which neighbours share: along a row (K), or down a column."""

import torch
from torch import Tensor

BITS = 4
EIGHT = 32 // BITS  # codes of an int32


def pair_columns(codes: Tensor) -> Tensor:
    """uint8 (..., rows, columns), a code each -> uint8 (..., rows, columns / 2), the even column in the low nibble."""
    filled = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return filled[..., ::2] | filled[..., 1::2] << BITS


def unpair_columns(pairs: Tensor, columns: int) -> Tensor:
    """Undo `pair_columns`."""
    return torch.stack((pairs & 15, pairs >> BITS), dim=-1).flatten(-2)[..., :columns].contiguous()


def pair_rows(codes: Tensor) -> Tensor:
    """uint8 (..., rows, columns), a code each -> uint8 (..., rows / 2, columns), the even row in the low nibble."""
    return pair_columns(codes.transpose(-1, -2)).transpose(-1, -2).contiguous()


def unpair_rows(pairs: Tensor, rows: int) -> Tensor:
    """Undo `pair_rows`."""
    return unpair_columns(pairs.transpose(-1, -2), rows).transpose(-1, -2).contiguous()


def eights(codes: Tensor) -> Tensor:
    """uint8 (..., rows, columns), a code each -> int32 (..., rows, columns / 8), column j of eight at bit 4 j."""
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % EIGHT)).unflatten(-1, (-1, EIGHT))
    shifts = torch.arange(EIGHT, device=codes.device, dtype=torch.int64) * BITS
    return (filled.to(torch.int64) << shifts).sum(-1).to(torch.int32)  # bit 31 becomes the sign


def uneights(words: Tensor, columns: int) -> Tensor:
    """Undo `eights`."""
    shifts = torch.arange(EIGHT, device=words.device, dtype=torch.int32) * BITS
    return (words[..., None] >> shifts & 15).to(torch.uint8).flatten(-2)[..., :columns].contiguous()
