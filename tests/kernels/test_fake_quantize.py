"""The training kernels without a GPU: interpreted in a process of their own, where values and codes must be the
reference's to the bit, trained with, and compiled for every architecture. And their operators as PyTorch sees them."""

import dataclasses

import pytest
import torch
from torch import Tensor

from qat.errors import FormatError, UnsupportedError
from qat.kernels.explain import explain_training
from qat.kernels.fake_quantize.choose import plan, problem
from qat.kernels.load import cpu_problem, load, load_for_training
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import find_scales, quantize
from qat.serving.packed import pack
from qat.serving.packed import problem as packing_problem
from qat.serving.words import from_words
from qat.training.activations import fake_quantize_input, static_part, vllm_scales
from qat.training.gradients import Estimator
from qat.training.ops import quantize_pack
from tests.kernels.processes import in_a_process

triton = pytest.importorskip("triton")
PACKED = [name for name, fmt in CATALOG.items() if packing_problem(fmt) is None]


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


@pytest.mark.parametrize("name", PACKED)
def test_packed_words_are_the_codes_of_the_packer(name: str) -> None:
    fmt = lookup(name)
    weight = quantize(normal(6, 384), fmt)
    assert torch.equal(quantize_pack(normal(6, 384), name, weight.scales), pack(weight).words)


def test_packing_rounds_by_the_divisor_and_keeps_nan_apart() -> None:
    fmt, x = lookup("int4_g32"), normal(2, 128)
    scales = find_scales(x, fmt)
    x[0, 3] = torch.nan
    divided = dataclasses.replace(scales, divisor=scales.effective() * 0.5)
    expected = quantize(x, fmt, divided).codes
    codes = from_words(quantize_pack(x, fmt.name, divided), 4, 128, offset=True)
    assert torch.equal(codes, expected) and codes[0, 3] == 0 and bool((expected != quantize(x, fmt).codes).any())
    with pytest.raises(UnsupportedError, match="nf4_g64 weights cannot be packed"):
        quantize_pack(x, "nf4_g64", find_scales(normal(2, 128), lookup("nf4_g64")))


def test_opcheck_of_the_packing() -> None:
    x, fmt = normal(3, 96), lookup("int4_g32_asym")
    scales = find_scales(x, fmt)
    given = (x, scales.effective(), scales.zero_point, fmt.name)
    torch.library.opcheck(torch.ops.qat.quantize_pack.default, given)


# --- what runs where ----------------------------------------------------------------------------------------------


def test_only_two_element_types_per_block_keep_the_reference() -> None:
    assert [name for name, fmt in CATALOG.items() if problem(fmt)] == ["if4"]
    told = explain_training("if4")["qat::fake_quantize"]
    assert told == {"kernel": "reference", "why": "its element type is chosen per block"}
    assert "static" in explain_training("fp8_tensor")["qat::fake_quantize_input"]["why"]
    with pytest.raises(FormatError, match="nearest: nvfp4"):
        explain_training("nvpf4")


def test_tiles_cover_the_matrix_and_stay_inside_blocks() -> None:
    for name, fmt in CATALOG.items():
        for rows, columns in ((1, 128), (5, 576 if fmt.group != 128 else 640), (4096, 4096), (300, 14336)):
            if problem(fmt) is not None or not fmt.divides(columns):
                continue
            cut = plan(fmt, rows, columns, 4096)
            assert cut.rows * cut.columns == rows * columns, name
            assert cut.tile_rows * cut.tile_columns <= 4096 and cut.tiles * 4096 >= rows * columns, name
            assert cut.block_rows % cut.tile_rows == 0 or cut.block_rows == 1, name
            assert cut.block_columns in (0, cut.tile_columns), name
            assert cut.segments * cut.segment >= cut.columns > (cut.segments - 1) * cut.segment, name


def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    load_for_training()
    here = "Triton kernels for fake_quantize," if torch.cuda.is_available() else "C kernels for fake_quantize_input"
    assert here in capsys.readouterr().err or cpu_problem()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("QAT_KERNELS", "0")
    assert load() == []
    load_for_training()
    assert "no kernels (QAT_KERNELS=0): fake quantization runs its reference" in capsys.readouterr().err


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
