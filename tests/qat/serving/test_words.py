"""Codes in words: a permutation, and the one that was meant."""

import pytest
import torch

from qat.serving.words import from_words, tile, to_words


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("columns", [32, 128, 576, 1000])
def test_words_are_a_permutation(bits: int, offset: bool, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (5, columns), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = to_words(codes, bits, offset=offset)
    assert words.shape == (5, -(-columns // tile(bits)) * 32) and words.dtype == torch.int16
    assert torch.equal(from_words(words, bits, columns, offset=offset), codes)


def test_distant_columns_share_a_word() -> None:
    """By hand: word 1 of the second tile holds columns 129, 161, 193 and 225, the first in the lowest bits."""
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    for column, code in ((129, 1), (161, 2), (193, 3), (225, 4)):
        codes[0, column] = code
    words = to_words(codes, 4, offset=False)
    assert words[0, 33] == 0x4321 and int((words != 0).sum()) == 1
    assert int(to_words(codes, 4, offset=True)[0, 33]) & 0xFFFF == 0x4321 ^ 0x8888
