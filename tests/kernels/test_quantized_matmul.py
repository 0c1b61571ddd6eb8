"""The product of quantized inputs and weights: the operator's reference against integer and float64 arithmetic, and its
kernels without a GPU: interpreted in a process of its own, and compiled for every architecture."""

import pytest
import torch
from torch import Tensor

from qat.kernels.quantized_matmul.choose import (
    Device,
    block_scaled_problem,
    choose,
    operand,
)
from qat.numbers.catalog import CATALOG, lookup
from qat.serving.matmul import problem
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


# --- the kernels themselves ---------------------------------------------------------------------------------------


def test_the_interpreted_kernels_are_the_reference() -> None:
    assert "all equal" in in_a_process("interpret_quantized_matmul.py", TRITON_INTERPRET="1")


def test_the_kernels_compile_for_every_architecture() -> None:
    assert "all compiled" in in_a_process("compile_quantized_matmul.py")
