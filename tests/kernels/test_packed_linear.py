"""The packed linear kernel without a GPU: interpreted in a process of its own (FP16 and FP32; the interpreter's BF16 is
wrong) against float64, and compiled for every architecture, looking at what the compiler made of it."""

import pytest
import torch
from torch import Tensor

from qat.numbers.catalog import CATALOG
from qat.serving.packed import problem
from tests.kernels.processes import in_a_process

triton = pytest.importorskip("triton")
PACKED = [name for name, fmt in CATALOG.items() if problem(fmt) is None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the kernel itself --------------------------------------------------------------------------------------------


def test_the_interpreted_kernel_is_the_reference() -> None:
    assert "all equal" in in_a_process("interpret_packed_linear.py", TRITON_INTERPRET="1")


def test_the_kernel_compiles_for_every_architecture() -> None:
    assert "all compiled" in in_a_process("compile_packed_linear.py")
