"""Fractals by the offset of every number, worked out one by one, and back."""

import pytest
import torch

from qat.serving.fractals import from_nz, from_zn, row_of, to_nz, to_zn

SIZES = [(16, 32), (32, 64), (1, 1), (17, 33), (100, 30), (48, 20)]
C0 = (16, 32, 64)


def numbered(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(1, rows * columns + 1, dtype=torch.int32).view(rows, columns)


def zn_offset(r: int, c: int, rows: int, c0: int) -> int:
    """CANN's formula: columns of blocks outermost, rows of numbers inside."""
    high = -(-rows // 16) * 16
    return c // c0 * high * c0 + r // 16 * 16 * c0 + r % 16 * c0 + c % c0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("c0", C0)
def test_every_number_lies_where_the_formula_says(size: tuple[int, int], c0: int) -> None:
    rows, columns = size
    matrix = numbered(rows, columns)
    zn, nz = to_zn(matrix, c0).flatten(), to_nz(matrix, c0).flatten()
    for r in range(rows):
        for c in range(columns):
            assert zn[zn_offset(r, c, rows, c0)] == matrix[r, c]
            assert nz[zn_offset(c, r, columns, c0)] == matrix[r, c]
    assert int((zn != 0).sum()) == int((nz != 0).sum()) == rows * columns, "what fills up is zero"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("c0", C0)
def test_and_back(size: tuple[int, int], c0: int) -> None:
    stack = torch.stack((numbered(*size), -numbered(*size)))
    assert torch.equal(from_zn(to_zn(stack, c0), *size), stack)
    assert torch.equal(from_nz(to_nz(stack, c0), *size), stack)


def test_shapes_of_the_manual() -> None:
    """CANN's example: FP16 of (8, 100, 30) is (8, 2, 7, 16, 16) in FRACTAL_NZ; a row of a block has 32 bytes."""
    assert [row_of(bits) for bits in (16, 8, 4)] == [16, 32, 64] and row_of(4, width=16) == 32
    assert to_zn(torch.zeros(8, 100, 30, dtype=torch.float16), row_of(16)).shape == (8, 2, 7, 16, 16)
