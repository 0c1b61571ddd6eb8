"""`qat::cached_attention`: the Triton kernel without a GPU, interpreted in a process of its own (FP16 and FP32; the
interpreter's BF16 is wrong) and compiled for every architecture."""

import pytest

from qat.kernels.cached_attention.choose import SHORTEST, choose
from tests.kernels.processes import in_a_process

pytest.importorskip("triton")


def test_the_interpreted_kernel_is_the_definition() -> None:
    assert "all equal" in in_a_process("interpret_cached_attention.py", TRITON_INTERPRET="1")


def test_the_kernel_compiles_for_every_architecture() -> None:
    assert "all compiled" in in_a_process("compile_cached_attention.py")


def test_pieces_follow_the_sequence_not_the_batch() -> None:
    for tokens, heads, programs in ((32768, 8, 512), (131072, 8, 512), (131072, 1, 512), (2048, 8, 64), (1, 8, 8)):
        tiles = choose(tokens, heads, 4, 132, exact=False)
        assert tiles.piece % tiles.block_t == 0 and tiles.piece >= SHORTEST
        assert programs * 0.9 <= -(-tokens // tiles.piece) * heads <= programs * 1.1
    assert [choose(100, 1, rows, 132, exact=False).block_r for rows in (1, 16, 17, 32)] == [16, 16, 32, 32]
