"""The training kernels without a GPU: interpreted in a process of their own, where values and codes must be the
reference's to the bit, trained with, and compiled for every architecture. And their operators as PyTorch sees them."""

import pytest
import torch
from torch import Tensor

from qat.kernels.fake_quantize.choose import parts_of, plan, problem
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import find_scales
from qat.training.activations import fake_quantize_input, static_part, vllm_scales
from qat.training.gradients import Estimator
from tests.kernels.processes import in_a_process

triton = pytest.importorskip("triton")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "estimator"), [("int4_g32_asym", "clipped"), ("nvfp4", "ste"), ("fp8_b128", "ste")])
@pytest.mark.parametrize("one_scale", [True, False])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)])
def test_opcheck_of_the_backward(
    name: str, estimator: Estimator, one_scale: bool, needs: tuple[bool, bool, bool]
) -> None:
    fmt = lookup(name)
    x = normal(3, 200 if fmt.block[0] > 1 else 64)
    scales = find_scales(x, fmt)
    divisor = None if one_scale else scales.effective() * 0.8
    arguments = (normal(*x.shape, seed=1), x, x + 0.1, divisor, scales.effective(), scales.zero_point, name, estimator)
    torch.library.opcheck(torch.ops.qat.fake_quantize_backward.default, (*arguments, list(needs)))


@pytest.mark.parametrize(("name", "estimator"), [("nvfp4", "clipped"), ("fp8_token", "ste"), ("mxfp4", "clipped")])
def test_opcheck_of_the_input(name: str, estimator: Estimator) -> None:
    x, fmt = normal(2, 3, 64), lookup(name)
    static = static_part(fmt, torch.tensor(1.0))
    torch.library.opcheck(torch.ops.qat.fake_quantize_input.default, (x, static, name, estimator))
    given = x.requires_grad_()
    fake_quantize_input(given, fmt, "vllm", estimator, static).backward(2 * torch.ones_like(x))
    limit = vllm_scales(x.detach(), fmt, static).effective().repeat_interleave(fmt.group or 64, dim=1).view_as(x)
    inside = (x.detach().abs() <= limit * fmt.element.max) if estimator == "clipped" else torch.ones_like(x)
    assert given.grad is not None and torch.equal(given.grad, 2.0 * inside)
    if estimator == "clipped":
        assert not inside.all()


def test_inputs_of_no_tokens_stay_empty() -> None:
    for name in ("fp8_token", "mxfp4"):
        x = normal(0, 64).requires_grad_()
        y = fake_quantize_input(x, lookup(name), "vllm", "clipped", None)
        y.sum().backward()
        assert y.shape == x.shape and x.grad is not None


# --- what runs where ----------------------------------------------------------------------------------------------


def test_tiles_cover_the_matrix_and_stay_inside_blocks() -> None:
    for name, fmt in CATALOG.items():
        for rows, columns in ((1, 128), (5, 576 if fmt.group != 128 else 640), (4096, 4096), (300, 14336)):
            if problem(fmt) is not None or not fmt.divides(columns):
                continue
            cut = plan(fmt, rows, columns, 4096)
            assert cut.rows * cut.columns == rows * columns, name
            parts = (fmt.group or 8) // 8  # as FOCUS has them
            if parts > 1:
                assert cut.rows * parts == plan(fmt, rows, columns, 4096, parts=parts).rows, name
                assert plan(fmt, rows, columns, 2048, 1024, parts).tile_rows % parts == 0, name
            assert cut.tile_rows * cut.tile_columns <= 4096 and cut.tiles * 4096 >= rows * columns, name
            assert cut.block_rows % cut.tile_rows == 0 or cut.block_rows == 1, name
            assert cut.block_columns in (0, cut.tile_columns), name
            assert cut.segments * cut.segment >= cut.columns > (cut.segments - 1) * cut.segment, name


def test_parts_of_blocks() -> None:
    """By the shapes of divisor and multiplier; what is no equal part of a group runs the reference."""
    nvfp4, channel = lookup("nvfp4"), lookup("int8_channel")
    assert parts_of(nvfp4, (4, 8), (4, 8)) == 1 and parts_of(nvfp4, (4, 16), (4, 8)) == 2
    assert parts_of(lookup("int4_g128"), (3, 32), (3, 2)) == 16
    assert parts_of(channel, (4, 1), (4, 1)) == 1
    for fmt, divisors, scales in ((nvfp4, (4, 24), (4, 8)), (nvfp4, (4, 12), (4, 8)), (nvfp4, (2, 16), (4, 8)),
                                  (nvfp4, (4, 128), (4, 8)), (channel, (4, 2), (4, 1)),
                                  (lookup("fp8_b128"), (1, 2), (1, 1))):  # fmt: skip
        assert parts_of(fmt, divisors, scales) == 0, (fmt.name, divisors)


# --- the kernels themselves ---------------------------------------------------------------------------------------


def test_the_interpreted_kernels_are_the_reference() -> None:
    assert "all equal" in in_a_process("interpret_fake_quantize.py", TRITON_INTERPRET="1")


def test_training_with_interpreted_kernels_is_training_without() -> None:
    assert "all trained" in in_a_process("train_fake_quantize.py", "cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_training_with_kernels_on_a_gpu_is_training_without() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert "all trained" in in_a_process("train_fake_quantize.py", "cuda")


def test_the_kernels_compile_for_every_architecture() -> None:
    assert "all compiled" in in_a_process("compile_fake_quantize.py")
