"""The bytes of llama.cpp's K types: super-blocks of 256 weights, whose block scales and minima are a few bits each
under FP16 numbers, d and dmin.

Q4_K and Q5_K are d, dmin, twelve bytes with eight scales and eight minima of six bits, for Q5_K the fifth bits (bit i
of byte j is weight 32 i + j's), then nibbles: of each two blocks of 32 the first is low, the second high. Q6_K is the
low nibbles of two times four rows of 32 (rows 0 and 1 low, 2 and 3 high), their upper two bits (row i at bit 2 i),
sixteen signed bytes of scales, and d last.
"""

import torch
from torch import Tensor

from qat.numbers.numerics import QTensor

WEIGHTS = 256


def super_block_bytes(q: QTensor) -> Tensor:
    """uint8 (rows, bytes) of a matrix in a format with super-blocks, on CPU."""
    count = q.shape[-1] // WEIGHTS
    codes = q.codes.to("cpu").reshape(-1, count, WEIGHTS)
    scales = q.scales.stored.to("cpu").reshape(len(codes), count, -1)
    d = _above(q.scales.global_scale, count)
    if q.scales.minimum is None:
        assert q.scales.choice is not None
        signs = torch.where(q.scales.choice.to("cpu").reshape(scales.shape) == 1, -1, 1).to(torch.int8)
        low, high = _six_bits(codes ^ 32)  # two's complement of six bits, plus 32
        parts = [low, high, (scales.view(torch.int8) * signs).view(torch.uint8), d]
    else:
        minima = q.scales.minimum.stored.to("cpu").reshape(scales.shape)
        packed = [d, _above(q.scales.minimum.global_scale, count), _six_bit_pairs(scales, minima)]
        blocks = codes.unflatten(-1, (-1, 32))
        fifth = [_joined(blocks >> 4, 1)] if q.format.element.bits == 5 else []
        pairs = (blocks & 15).unflatten(-2, (-1, 2))
        parts = [*packed, *fifth, (pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(-2)]
    return torch.cat(parts, dim=-1).flatten(1)


def _above(number: Tensor | None, count: int) -> Tensor:
    """The bytes of one FP16 number of each super-block."""
    assert number is not None
    every = number.to("cpu").reshape(len(number), count, -1)[:, :, :1]
    return every.to(torch.float16).contiguous().view(torch.uint8)


def _joined(rows: Tensor, bits: int) -> Tensor:
    """Rows of numbers of so few bits (..., rows, n), put side by side in n bytes, the first row lowest."""
    shifts = bits * torch.arange(rows.shape[-2], dtype=torch.uint8)[:, None]
    return (rows << shifts).sum(dim=-2, dtype=torch.uint8)


def _six_bit_pairs(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima (..., 8) in twelve bytes."""
    (first, last), (below, beneath) = scales.split(4, dim=-1), minima.split(4, dim=-1)
    return torch.cat([first | last >> 4 << 6, below | beneath >> 4 << 6, last & 15 | (beneath & 15) << 4], dim=-1)


def _six_bits(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Low nibbles and upper two bits of codes (..., 256)."""
    rows = codes.unflatten(-1, (2, 4, 32))
    nibbles = (rows & 15)[..., :2, :] | (rows & 15)[..., 2:, :] << 4
    return nibbles.flatten(-3), _joined(rows >> 4, 2).flatten(-2)
