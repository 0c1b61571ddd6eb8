"""The product of quantized inputs and weights: the operator's reference against integer and float64 arithmetic, and its
kernels without a GPU: interpreted in a process of its own, and compiled for every architecture."""

import pytest
import torch
from torch import Tensor

from qat.kernels.quantized_matmul import library
from qat.kernels.quantized_matmul.choose import (
    Device,
    block_scaled_problem,
    choose,
    operand,
    rounded_reason,
)
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import quantize
from qat.serving.inputs import dequantize_input, quantize_input
from qat.serving.matmul import hold, problem, quantized_matmul
from qat.serving.packed import pack, packed_linear
from qat.training.activations import fake_quantize_input, static_part
from tests.kernels.processes import in_a_process

pytest.importorskip("triton")
WIDE = lookup("int8_channel"), lookup("int8_token")
WEIGHTS = [name for name, fmt in CATALOG.items() if problem(WIDE[1], fmt) is None]
INPUTS = [name for name, fmt in CATALOG.items() if problem(fmt, WIDE[0]) is None]
HOPPER = Device(90, processors=132, shared=227 * 1024)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- what runs, and why -------------------------------------------------------------------------------------------


def test_operands_hold_the_codes_exactly() -> None:
    """Every code of the catalogue, times the power of two that is folded away, is a number of the operand's type."""
    from qat.kernels.quantized_matmul.triton import operand_exponent

    largest = {"int8": 2.0**31, "float8": torch.finfo(torch.float8_e4m3fn).max, "float16": 65504.0}
    types = {"int8": torch.int8, "float8": torch.float8_e4m3fn, "float16": torch.float16}
    for w_name in WEIGHTS:
        for x_name in INPUTS:
            for capability in (80, 90):
                x, w = lookup(x_name), lookup(w_name)
                kind = operand(x, w, capability)
                for fmt, words in ((x, False), (w, w.element.bits < 8)):
                    values = torch.tensor(fmt.element.grid) / 2.0 ** operand_exponent(fmt, kind, words=words)
                    assert values.abs().max() <= largest[kind]
                    assert torch.equal(values.to(types[kind]).float(), values), f"{fmt.name} as {kind}"


def test_tiles_are_a_closed_form() -> None:
    x, w = lookup("int8_token"), lookup("int4_g128")
    few, many = choose(1, 4096, 4096, x, w, HOPPER), choose(8192, 4096, 4096, x, w, HOPPER)
    assert (few.operand, few.part, few.parts, few.flush, few.block_m, few.parallel) == ("int8", 32, 4, 128, 16, True)
    assert few.segments == many.segments and not many.parallel, "segments follow the weight, not the tokens"
    wide = choose(8192, 16384, 4096, x, lookup("int8_channel"), HOPPER)
    assert (wide.block_n, wide.block_m, wide.flush, wide.warps) == (128, 256, 0, 8)
    for w_name in WEIGHTS:
        for x_name in INPUTS:
            for tokens in (1, 100, 8192):
                tiles = choose(tokens, 4096, 4096, lookup(x_name), lookup(w_name), HOPPER)
                assert tiles.flush % tiles.part == 0 and (tiles.part * tiles.parts) % (tiles.flush or 1) == 0


def test_what_block_scaled_units_take() -> None:
    fmt, plain = lookup("nvfp4"), lookup("int4_g32")
    assert block_scaled_problem(fmt, fmt, 4096, 100) is None
    refusals = {
        "compute capability 10.0": (fmt, fmt, 4096, 90),
        "minifloats": (fmt, plain, 4096, 100),
        "both sides need the same blocks": (fmt, lookup("mxfp4"), 4096, 100),
        "widths that 128 divides": (fmt, fmt, 4096 + 64, 100),
    }
    for reason, given in refusals.items():
        assert reason in str(block_scaled_problem(*given))


GROUPED = [("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("nvfp4", "mxfp4"), ("mxfp4", "nvfp4"), ("mxfp8", "mxfp4"),
           ("nvint4", "int4_g128"), ("mxint8", "mxint4")]  # fmt: skip


def test_which_inputs_are_rounded_instead() -> None:
    """Those with a scale per 16 or 32 columns on 4-bit weights, where no units multiply block scales themselves."""
    for x_name, w_name in GROUPED:
        x, w = lookup(x_name), lookup(w_name)
        assert rounded_reason(x, w, 4096, 90) and rounded_reason(x, w, 4096, 89)
        units = block_scaled_problem(x, w, 4096, 100) is None
        assert (rounded_reason(x, w, 4096, 100) is None) == units
    for x_name, w_name in (("int8_token", "int4_g128"), ("fp8_token", "mxfp4"), ("fp8_g128", "fp8_b128"),
                           ("mxfp8", "mxfp8"), ("fp8_g128", "int4_g128"),
                           ("int4_token", "int4_g32"), ("nvfp4", "fp8_channel")):  # fmt: skip
        assert rounded_reason(lookup(x_name), lookup(w_name), 4096, 90) is None


@pytest.mark.parametrize(("x_name", "w_name"), GROUPED)
def test_rounded_inputs_give_the_product_of_codes(x_name: str, w_name: str) -> None:
    """Against float64. Without a global scale, inputs are exact in BF16; with one, they are rounded once more."""
    fmt, x = lookup(x_name), 3 * normal(33, 640).bfloat16()
    weight = quantize(normal(64, 640, seed=1), lookup(w_name))
    static = static_part(fmt, x.abs().amax().float())
    codes, scales = quantize_input(x, x_name, static)
    exact, alone = (dequantize_input(codes, scales, above, x_name) for above in (static, None))
    assert torch.equal(alone.bfloat16().float(), alone), "code times scale is no BF16 number"
    rounded = fake_quantize_input(x, fmt, "vllm", "ste", static)
    torch.testing.assert_close(rounded.float(), exact, rtol=2.0**-8 if fmt.global_scale else 0, atol=0)
    truth = exact.double() @ weight.dequantize().double().T
    scale = 1.0 if static is None or not fmt.global_scale else 1.0 / float(static)
    by_codes = quantized_matmul(codes, scales, hold(weight), input_format=x_name, dtype=x.dtype, input_scale=scale)
    for found, limit in ((by_codes, 2.0**-9), (packed_linear(rounded, pack(weight)), 1.5 * 2.0**-9)):
        assert float((found.double() - truth).norm() / truth.norm()) <= limit


# --- the library's product ----------------------------------------------------------------------------------------


def test_what_the_library_multiplies() -> None:
    given = ("fp8_token", "fp8_channel", 512, 4096, 4096, torch.bfloat16, 90)
    assert library.takes(*given) and library.takes("fp8_tensor", *given[1:])
    for at, other in enumerate(("fp8_g128", "fp8_b128", 511, 4088, 4088, torch.float16, 89)):
        assert not library.takes(*given[:at], other, *given[at + 1 :])
    for pair in (("int8_token", "int8_channel"), ("fp8_token", "fp8_tensor"), ("fp8_token", "mxfp8")):
        assert not library.takes(*pair, *given[2:])


@pytest.mark.parametrize("x_name", ["fp8_token", "fp8_tensor"])
def test_the_library_gives_the_same_product(x_name: str) -> None:
    """In BF16, against float64: scales of every token and row, one above them, and a bias."""
    x, weight = 3 * normal(33, 256).bfloat16(), quantize(normal(64, 256, seed=1), lookup("fp8_channel"))
    static, bias = static_part(lookup(x_name), x.abs().amax().float()), normal(64, seed=2)
    codes, scales = quantize_input(x, x_name, static)
    truth = dequantize_input(codes, scales, static, x_name).double() @ weight.dequantize().double().T
    held = hold(weight)
    for above, added in ((1.0, None), (0.75, bias)):
        exact = truth * above + (0 if added is None else added.double())
        found = library.multiply(codes, scales, held.codes, held.scales, added, above, torch.bfloat16)
        assert float((found.double() - exact).norm() / exact.norm()) <= 2.0**-8


# --- the kernels themselves ---------------------------------------------------------------------------------------


def test_the_interpreted_kernels_are_the_reference() -> None:
    assert "all equal" in in_a_process("interpret_quantized_matmul.py", TRITON_INTERPRET="1")


def test_the_kernels_compile_for_every_architecture() -> None:
    assert "all compiled" in in_a_process("compile_quantized_matmul.py")
