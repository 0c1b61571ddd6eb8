"""The orders in which matrix units read block scales of a byte, and the way back; filled with zero bytes.

pairs      Ascend's MX products: (groups / 2, rows, 2), so that the scales of 64 columns lie beside each other
swizzled   NVIDIA's block-scaled products: tiles of 128 rows by 4 groups, (rows / 128, groups / 4, 32, 4, 4); in a tile,
           row r lies at line r mod 32, place r / 32 (cuBLAS: "1D block scaling factors layout")
"""

import torch
from torch import Tensor

PAIR = 2
TILE_ROWS, TILE_GROUPS, LINES = 128, 4, 32


def to_pairs(scales: Tensor) -> Tensor:
    """(..., rows, groups) -> (..., groups / 2, rows, 2)."""
    filled = torch.nn.functional.pad(scales, (0, scales.shape[-1] % PAIR))
    return filled.unflatten(-1, (-1, PAIR)).transpose(-3, -2).contiguous()


def from_pairs(pairs: Tensor, rows: int, groups: int) -> Tensor:
    """Undo `to_pairs`."""
    return pairs.transpose(-3, -2).flatten(-2)[..., :rows, :groups].contiguous()


def to_swizzled(scales: Tensor) -> Tensor:
    """(..., rows, groups) -> (..., rows / 128, groups / 4, 32, 4, 4)."""
    rows, groups = scales.shape[-2:]
    filled = torch.nn.functional.pad(scales, (0, -groups % TILE_GROUPS, 0, -rows % TILE_ROWS))
    tiles = filled.unflatten(-1, (-1, TILE_GROUPS)).unflatten(-3, (-1, TILE_ROWS // LINES, LINES))
    return _turned(tiles)


def _turned(tiles: Tensor) -> Tensor:
    """(..., tiles of rows, places, lines, tiles of groups, 4) with places and tiles of groups exchanged, and back."""
    return tiles.transpose(-4, -2).contiguous()


def from_swizzled(tiles: Tensor, rows: int, groups: int) -> Tensor:
    """Undo `to_swizzled`."""
    return _turned(tiles).flatten(-2).flatten(-4, -2)[..., :rows, :groups].contiguous()
