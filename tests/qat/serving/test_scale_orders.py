"""Orders of block scales by the offset of every byte, worked out one by one, and back."""

import pytest
import torch

from qat.serving.scale_orders import from_pairs, from_swizzled, to_pairs, to_swizzled

SIZES = [(128, 4), (256, 8), (1, 1), (130, 5), (33, 3), (96, 20)]


def scales(rows: int, groups: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(1, 256, (rows, groups), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_every_scale_lies_where_the_formulas_say(size: tuple[int, int]) -> None:
    rows, groups = size
    given = scales(rows, groups)
    pairs, swizzled = to_pairs(given), to_swizzled(given)
    assert pairs.shape == (-(-groups // 2), rows, 2)
    flat, across = swizzled.flatten(), -(-groups // 4)
    for r in range(rows):
        for g in range(groups):
            assert pairs[g // 2, r, g % 2] == given[r, g]
            inside = r % 32 * 16 + r % 128 // 32 * 4 + g % 4  # cuBLAS, "1D block scaling factors layout"
            assert flat[(r // 128 * across + g // 4) * 512 + inside] == given[r, g]
    assert int((pairs != 0).sum()) == int((flat != 0).sum()) == rows * groups, "what fills up is zero"


@pytest.mark.parametrize("size", SIZES)
def test_and_back(size: tuple[int, int]) -> None:
    stack = torch.stack((scales(*size), scales(*size).flip(0)))
    assert torch.equal(from_pairs(to_pairs(stack), *size), stack)
    assert torch.equal(from_swizzled(to_swizzled(stack), *size), stack)
