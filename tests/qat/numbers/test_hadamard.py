"""Block Hadamard rotations: orthonormal, their own inverse, block by block, as compressed-tensors computes them."""

import math

import pytest
import torch
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix

from qat.errors import FormatError, UnsupportedError
from qat.numbers.hadamard import LARGEST, BlockHadamard, rotation, size_problem

SIZES = [2**power for power in range(1, LARGEST.bit_length())]


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_matrix_of_compressed_tensors_block_by_block(size: int) -> None:
    matrix = deterministic_hadamard_matrix(size, torch.float64) / math.sqrt(size)
    rotated = BlockHadamard(size)(torch.eye(2 * size, dtype=torch.float64), torch.float64)
    torch.testing.assert_close(rotated, torch.block_diag(matrix, matrix), rtol=0, atol=1e-15)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(BlockHadamard(size)(rotated, torch.float64), torch.eye(2 * size, dtype=torch.float64))


def test_products_stay_when_both_sides_are_rotated() -> None:
    x, weight, rotate = values(3, 5, 96), values(7, 96), BlockHadamard(32)
    torch.testing.assert_close(rotate(x) @ rotate(weight).t(), x @ weight.t(), rtol=1e-5, atol=1e-5)


def test_an_outlier_is_shared_by_its_block_only() -> None:
    x = torch.zeros(1, 128)
    x[0, 70] = 32.0
    rotated = BlockHadamard(64)(x)
    assert rotated[0, :64].eq(0).all() and rotated[0, 64:].abs().eq(4.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_computed_in_float32_and_rounded_once_whatever_autocast_says(dtype: torch.dtype) -> None:
    x, rotate = values(4, 6, 64).to(dtype), BlockHadamard(32)
    matrix = deterministic_hadamard_matrix(32, torch.float32)
    expected = (x.float().unflatten(-1, (-1, 32)) @ matrix / math.sqrt(32)).flatten(-2).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotate(x), expected)
    assert rotate(x).dtype is dtype


def test_rows_do_not_depend_on_their_company() -> None:
    """A server reads one token where training read a thousand."""
    x, rotate = values(1000, 576).to(torch.bfloat16), BlockHadamard(32)
    whole = rotate(x)
    assert all(torch.equal(rotate(x[row : row + 1])[0], whole[row]) for row in range(0, 1000, 101))


def test_the_gradient_is_rotated_back() -> None:
    x, rotate = values(3, 64).requires_grad_(), BlockHadamard(16)
    grad = values(3, 64)
    rotate(x).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, rotate(grad))


def test_what_was_made_without_gradients_serves_training() -> None:
    with torch.inference_mode():
        BlockHadamard(8)(torch.ones(1, 8))
    BlockHadamard(8)(torch.ones(1, 8, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("size", [-8, 0, 1, 3, 48, 2 * LARGEST])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(FormatError, match=f"up to 1024, not {size}"):
        BlockHadamard(size)


def test_widths_are_checked() -> None:
    assert size_problem(64, 576) == ""
    assert "the largest that do have 64" in size_problem(128, 576)


def test_a_chain_is_one_rotation_or_named() -> None:
    assert rotation(()) == 0 and rotation((BlockHadamard(32),)) == 32
    with pytest.raises(UnsupportedError, match="not one block Hadamard"):
        rotation((torch.nn.Identity(),))
