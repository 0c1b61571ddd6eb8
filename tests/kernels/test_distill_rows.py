"""`qat::distill_rows`: the reference against float64 definitions, and the Triton kernel without a GPU, interpreted in a
process of its own (FP16 and FP32; the interpreter's BF16 is wrong) and compiled for every architecture."""

import pytest
import torch
from torch import Tensor

from qat.training.rows import IGNORE, KINDS, distill_rows
from tests.kernels.processes import in_a_process

pytest.importorskip("triton")
every_kind = pytest.mark.parametrize("kind", KINDS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def given(kind: str, teacher: Tensor, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return (None, targets) if kind == "cross_entropy" else (teacher, None)


# --- the kernel itself --------------------------------------------------------------------------------------------


def test_the_interpreted_kernel_is_the_definition() -> None:
    assert "all equal" in in_a_process("interpret_distill_rows.py", TRITON_INTERPRET="1")


def test_the_kernel_compiles_for_every_architecture() -> None:
    assert "all compiled" in in_a_process("compile_distill_rows.py")


@pytest.mark.gpu
@every_kind
def test_on_a_gpu(kind: str) -> None:
    """BF16, which the interpreter cannot, against the reference on the CPU."""
    from qat.kernels.load import load

    assert load()
    student, teacher, targets = normal(64, 32001).bfloat16(), normal(64, 32001, seed=1).bfloat16(), torch.arange(64)
    targets[5] = IGNORE
    there = student.cuda()
    on_gpu = [None if t is None else t.cuda() for t in given(kind, teacher, targets)]
    found = distill_rows(there, *on_gpu, kind, temperature=2.0, beta=0.3)
    expected = distill_rows(student, *given(kind, teacher, targets), kind, temperature=2.0, beta=0.3)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(there.cpu(), student, rtol=2.0**-7, atol=1e-7)
