"""Block Hadamard rotations: groups of n neighbours become n sums with signs, so that an outlier is shared by its group.

The matrix is Sylvester's, H / sqrt(n): orthonormal, symmetric and its own inverse, so x H (W H)^T = x W^T. Products are
summed in float32 whatever the tensor's dtype, and with autocast off, then rounded once to that dtype: what
compressed-tensors computes for a `transform_config` of type hadamard, and what training and serving both do here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qat.errors import FormatError, UnsupportedError

LARGEST = 1024  # beyond, the product costs more than the layer's own


@cache
def _signs(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sylvester's matrix of ones and minus ones (size, size)."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, device=device, dtype=dtype)
        while len(matrix) < size:
            matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
        return matrix


def size_problem(size: int, columns: int | None = None) -> str:
    """Why there is no block Hadamard of `size` (for rows of `columns`), or ""."""
    if size < 2 or size & (size - 1) or size > LARGEST:
        return f"a block Hadamard has a size of 2, 4, 8 up to {LARGEST}, not {size}"
    if columns is None or columns % size == 0:
        return ""
    return f"blocks of {size} do not divide a width of {columns}; the largest that do have {columns & -columns}"


@dataclass(frozen=True)
class BlockHadamard:
    """Rotates every `size` neighbours along the last dimension.

    Raises:
        FormatError: `size` is not a power of two, or too large.
    """

    size: int

    def __post_init__(self) -> None:
        if problem := size_problem(self.size):
            raise FormatError(problem)

    def __call__(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x (..., columns) rotated, in x's dtype, computed in `dtype`."""
        with torch.autocast(x.device.type, enabled=False):
            blocks = x.to(dtype).unflatten(-1, (-1, self.size))
            rotated = (blocks @ _signs(self.size, x.device, dtype)).div_(math.sqrt(self.size))
            return rotated.flatten(-2).to(x.dtype)


def rotation(transforms: Sequence[Any]) -> int:
    """Size of the block Hadamard that a chain of transforms consists of, 0 where the chain is empty.

    Raises:
        UnsupportedError: it does something else.
    """
    if not transforms:
        return 0
    if len(transforms) == 1 and isinstance(transforms[0], BlockHadamard):
        return transforms[0].size
    raise UnsupportedError(f"these transforms are not one block Hadamard: {', '.join(map(repr, transforms))}")
