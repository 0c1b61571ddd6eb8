"""Which type of GGUF holds which format of the catalogue, and the bytes of its blocks.

A row is a run of blocks of 32 weights: an FP16 number d (for MXFP4 an E8M0 byte), then the codes. Q4_0 stores code + 8
of each weight, Q5_0 code + 16, MXFP4 the bits of E2M1; all put weight j of a block into the low nibble of byte j and
weight j + 16 into the high one. The fifth bits of Q5_0 stand before those nibbles, as the bits of one little-endian
word. Q8_0 stores signed bytes. NVFP4 has four E4M3 bytes, then four groups of 16 codes, each paired like a block; what
multiplies a whole matrix is a tensor of its own. The K types have super-blocks of 256, see `super_blocks.py`.
"""

from collections.abc import Callable

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from qat.checkpoints.layouts.gguf.super_blocks import WEIGHTS, super_block_bytes
from qat.checkpoints.layouts.kinds import mx, nvfp4
from qat.numbers.catalog import (
    CATALOG,
    E2M1,
    INT4_DOWN,
    INT4_UP,
    INT5_DOWN,
    INT5_UP,
    INT6_DOWN,
    INT6_UP,
    INT8,
    UINT4,
    UINT5,
)
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor
from qat.numbers.scale import F16, S8, U6, U6_MINIMUM, ScaleType

BLOCK = 32  # weights


def _blocks(fmt: Format) -> bool:
    return fmt.scale is F16 and fmt.block == (1, BLOCK) and not fmt.zero_point and not fmt.global_scale


def _super_blocks(fmt: Format, block: int, scale: ScaleType) -> bool:
    return fmt.super_block == WEIGHTS and fmt.block == (1, block) and fmt.scale is scale


def _minima(fmt: Format) -> bool:
    return _super_blocks(fmt, BLOCK, U6) and fmt.minimum is U6_MINIMUM


_HOLDS: tuple[tuple[GGMLQuantizationType, Callable[[Format], bool]], ...] = (
    (GGMLQuantizationType.Q4_0, lambda fmt: _blocks(fmt) and fmt.elements == (INT4_DOWN, INT4_UP)),
    (GGMLQuantizationType.Q5_0, lambda fmt: _blocks(fmt) and fmt.elements == (INT5_DOWN, INT5_UP)),
    (GGMLQuantizationType.Q8_0, lambda fmt: _blocks(fmt) and fmt.elements == (INT8,)),
    (GGMLQuantizationType.Q4_K, lambda fmt: _minima(fmt) and fmt.elements == (UINT4,)),
    (GGMLQuantizationType.Q5_K, lambda fmt: _minima(fmt) and fmt.elements == (UINT5,)),
    (GGMLQuantizationType.Q6_K, lambda fmt: _super_blocks(fmt, 16, S8) and fmt.elements == (INT6_DOWN, INT6_UP)),
    (GGMLQuantizationType.MXFP4, lambda fmt: mx(fmt, E2M1)),
    (GGMLQuantizationType.NVFP4, nvfp4),
)


def type_of(fmt: Format) -> GGMLQuantizationType | None:
    """GGUF's type that holds the format, or None."""
    return next((kind for kind, holds in _HOLDS if holds(fmt)), None)


FORMATS: dict[GGMLQuantizationType, Format] = {kind: fmt for fmt in CATALOG.values() if (kind := type_of(fmt))}
"""The format of the catalogue that a type of GGUF holds."""


def unit(kind: GGMLQuantizationType) -> int:
    """What the width of a row must be a multiple of."""
    return int(GGML_QUANT_SIZES[kind][0])


def bytes_per_row(kind: GGMLQuantizationType, columns: int) -> int:
    """Of a row of so many numbers, which blocks divide."""
    weights, size = GGML_QUANT_SIZES[kind]
    return columns // weights * size


def row_bytes(q: QTensor) -> Tensor:
    """uint8 (rows, bytes) of a matrix in one of `FORMATS`, on CPU."""
    if q.format.super_block:
        return super_block_bytes(q)
    kind, columns = type_of(q.format), q.shape[-1]
    if kind is GGMLQuantizationType.NVFP4:
        return _groups(q)
    blocks = columns // BLOCK
    codes = q.codes.to("cpu").reshape(-1, blocks, BLOCK)
    scales = q.scales.stored.to("cpu").reshape(-1, blocks, 1)
    if q.scales.choice is not None:
        mirrored = q.scales.choice.to("cpu").reshape(scales.shape) == 1
        scales = torch.where(mirrored, -scales, scales)
        codes = codes ^ 1 << q.format.element.bits - 1  # two's complement, plus half of all codes
    fifth = [_bits(codes >> 4)] if kind is GGMLQuantizationType.Q5_0 else []
    if kind is not GGMLQuantizationType.Q8_0:
        low, high = (codes & 15).split(BLOCK // 2, dim=-1)
        codes = low | high << 4
    return torch.cat([scales.view(torch.uint8), *fifth, codes], dim=-1).flatten(1)


def _groups(q: QTensor) -> Tensor:
    """Of NVFP4: groups of 16, four to a block."""
    count = q.shape[-1] // unit(GGMLQuantizationType.NVFP4)
    scales = q.scales.stored.to("cpu").view(torch.uint8).reshape(-1, count, 4)
    low, high = (q.codes.to("cpu").reshape(-1, count, 4, 16) & 15).split(8, dim=-1)
    return torch.cat([scales, (low | high << 4).flatten(2)], dim=-1).flatten(1)


def _bits(flags: Tensor) -> Tensor:
    """Numbers 0 and 1 (..., n) as the bits of n / 8 bytes, the first one lowest."""
    octets = flags.unflatten(-1, (-1, 8)) << torch.arange(8, dtype=torch.uint8)
    return octets.sum(dim=-1, dtype=torch.uint8)
