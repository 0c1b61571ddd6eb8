"""`qat::prompt_attention`: the Triton kernel without a GPU, interpreted in a process of its own and compiled for every
architecture; on a GPU where there is one."""

import pytest
import torch

from qat.serving.prompt_attention import by_blocks
from tests.kernels.processes import in_a_process

pytest.importorskip("triton")


def test_the_interpreted_kernel_is_the_definition() -> None:
    assert "all equal" in in_a_process("interpret_prompt_attention.py", TRITON_INTERPRET="1")


def test_the_kernel_compiles_for_every_architecture() -> None:
    assert "all compiled" in in_a_process("compile_prompt_attention.py")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_on_a_gpu_is_the_definition(causal: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from qat.kernels.load import load

    load(["prompt_attention"])
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(2, heads, tokens, 128, generator=generator) for heads, tokens in ((8, 300), (2, 500), (2, 500))]
    codes = by_blocks(*x)
    expected = codes.attend(128**-0.5, causal=causal, dtype=torch.float32)
    found = by_blocks(*(each.cuda() for each in x)).attend(128**-0.5, causal=causal, dtype=torch.float32).cpu()
    assert float((found - expected).norm() / expected.norm()) < 1e-3
