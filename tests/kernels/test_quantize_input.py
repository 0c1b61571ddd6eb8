"""The input quantizers without a GPU: interpreted in a process of its own (FP16 and FP32) against the reference, and
compiled for every architecture, looking at what the compiler made of them."""

import inspect

import pytest
import torch

from qat.kernels.quantize_input.choose import PER_THREAD, WIDEST, choose
from qat.numbers.catalog import CATALOG
from qat.serving.inputs import problem
from tests.kernels.processes import in_a_process

pytest.importorskip("triton")


@pytest.mark.parametrize("columns", [1, 32, 576, 4096, 14336, 16384, 16385, 32768, 53248])
@pytest.mark.parametrize("rows", [1, 7, 64, 8192])
@pytest.mark.parametrize("whole_rows", [True, False])
def test_tiles_cover_the_input(rows: int, columns: int, whole_rows: bool) -> None:
    tiles = choose(rows, columns, whole_rows, 132)
    assert tiles.block & (tiles.block - 1) == 0 and tiles.rows * tiles.block <= WIDEST
    assert (tiles.steps - 1) * tiles.block < columns <= tiles.steps * tiles.block if whole_rows else tiles.steps == 0
    assert all(tiles.block >= min(fmt.group or 1, columns) for fmt in CATALOG.values() if problem(fmt) is None)
    assert tiles.rows == 1 or rows >= tiles.rows * 132  # every processor has work first
    assert tiles.rows * tiles.block <= tiles.warps * 32 * PER_THREAD * 2


def test_kernels_take_what_their_operators_give() -> None:
    from qat.kernels.quantize_input import triton as kernel

    for name in ("quantize_input", "rms_norm_quantize", "silu_mul_quantize"):
        schema = getattr(torch.ops.qat, name).default._schema
        assert list(inspect.signature(getattr(kernel, name)).parameters) == [given.name for given in schema.arguments]


def test_the_interpreted_kernel_is_the_reference() -> None:
    assert "all equal" in in_a_process("interpret_quantize_input.py", TRITON_INTERPRET="1")


def test_the_kernel_compiles_for_every_architecture() -> None:
    assert "all compiled" in in_a_process("compile_quantize_input.py")
