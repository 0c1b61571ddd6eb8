"""4-bit codes in bytes and 32-bit integers: by hand, and against the packer of compressed-tensors."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from qat.serving.nibbles import eights, pair_columns, pair_rows, uneights, unpair_columns, unpair_rows


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def test_by_hand() -> None:
    given = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8)
    assert pair_columns(given).tolist() == [[0x21, 0x03], [0x54, 0x06], [0x87, 0x09]]
    assert pair_rows(given).tolist() == [[0x41, 0x52, 0x63], [0x07, 0x08, 0x09]]
    row = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]], dtype=torch.uint8)
    assert [word & 0xFFFFFFFF for word in eights(row).tolist()[0]] == [0x87654321, 0x9]


def test_another_packer_agrees() -> None:
    """compressed-tensors counts from the lowest value, devices in two's complement: the sign bit of each differs."""
    signed = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    theirs = pack_to_int32(signed, num_bits=4)
    ours = eights((signed & 15).to(torch.uint8))
    flipped = ours ^ torch.tensor(0x88888888 - (1 << 32), dtype=torch.int32)
    assert torch.equal(flipped, theirs)


@pytest.mark.parametrize("shape", [(2, 8), (3, 5), (1, 1), (2, 7, 9)])
def test_and_back(shape: tuple[int, ...]) -> None:
    given = codes(*shape)
    assert torch.equal(unpair_columns(pair_columns(given), shape[-1]), given)
    assert torch.equal(unpair_rows(pair_rows(given), shape[-2]), given)
    assert torch.equal(uneights(eights(given), shape[-1]), given)
