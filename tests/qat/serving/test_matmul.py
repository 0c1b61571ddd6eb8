"""The product of quantized inputs and weights: the operator's reference against integer and float64 arithmetic."""

import pytest
import torch
from torch import Tensor

from qat.errors import FormatError, UnsupportedError
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import QTensor, Scales, quantize
from qat.serving.inputs import code_dtype, dequantize_input, is_paired
from qat.serving.matmul import hold, problem, quantized_matmul, unhold

WIDE = lookup("int8_channel"), lookup("int8_token")
WEIGHTS = [name for name, fmt in CATALOG.items() if problem(WIDE[1], fmt) is None]
INPUTS = [name for name, fmt in CATALOG.items() if problem(fmt, WIDE[0]) is None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(x: QTensor) -> tuple[Tensor, Tensor]:
    """Codes and scales as `qat::quantize_input` returns them."""
    fmt, codes, stored = x.format, x.codes, x.scales.stored
    if is_paired(fmt):
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    elif fmt.element.bits == 8:
        codes = codes.view(code_dtype(fmt.element))
    else:
        codes = fmt.element.decode(codes).to(torch.int8)
    if fmt.block == (0, 0):
        return codes, stored.float().view(1)
    return codes, fmt.scale.to_bytes(stored)


def test_what_can_be_multiplied() -> None:
    """Named one by one, so that a change of the rules is seen."""
    assert {"int8_channel", "fp8_b128", "mxfp8", "int4_g128", "mxfp4", "nvfp4"} <= set(WEIGHTS)
    assert not {"nf4_g64", "if4", "mxfp6", "int3_g64", "int4_g64_asym", "int4_tensor"} & set(WEIGHTS)
    assert set(INPUTS) >= {"int8_token", "int4_token", "fp8_token", "fp8_g128", "mxfp8", "mxfp4", "nvfp4", "fp8_tensor"}
    assert not {"int8_channel", "int8_g128", "int2_token", "fp8_b128", "mxfp6", "if4"} & set(INPUTS)


@pytest.mark.parametrize("name", WEIGHTS)
def test_held_weights_lose_nothing(name: str) -> None:
    weight = quantize(normal(6, 384), lookup(name))
    held = hold(weight)
    found = unhold(held)
    assert torch.equal(found.dequantize(), weight.dequantize()) and found.parameters.keys() == weight.parameters.keys()
    assert held.codes.dtype == (torch.int16 if weight.format.element.bits < 8 else code_dtype(weight.format.element))


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_read_as_they_were_written(name: str) -> None:
    x = quantize(normal(5, 384), lookup(name))
    found = dequantize_input(*operands(x), None, name)
    above = 1.0 if x.scales.global_scale is None else x.scales.global_scale
    assert torch.equal(found * above, x.dequantize())


def test_even_columns_are_in_the_low_nibble() -> None:
    """By hand: E2M1 codes 1, 2, 15, 9 are 0.5, 1, -6, -0.5; the scale byte 128 is 2."""
    codes = torch.zeros(1, 16, dtype=torch.uint8)
    codes[0, :2] = torch.tensor([0x21, 0x9F], dtype=torch.uint8)
    found = dequantize_input(codes, torch.tensor([[128]], dtype=torch.uint8), None, "mxfp4")
    assert found[0, :5].tolist() == [1.0, 2.0, -12.0, -1.0, 0.0]


def test_the_operator() -> None:
    x, weight, bias = (
        quantize(normal(6, 64), lookup("nvfp4")),
        quantize(normal(5, 64, seed=1), lookup("nvfp4")),
        normal(5),
    )
    codes, scales = operands(x)
    codes, scales = codes.view(2, 3, 32), scales.view(2, 3, 4)
    held, above = hold(weight), float(x.scales.global_scale or 0)
    y = quantized_matmul(codes, scales, held, bias, input_format="nvfp4", dtype=torch.float32, input_scale=above)
    expected = (x.dequantize().double() @ weight.dequantize().double().T + bias).view(2, 3, 5)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-6)
    rounded = quantized_matmul(codes, scales, held, bias, input_format="nvfp4", dtype=torch.bfloat16, input_scale=above)
    assert torch.equal(rounded, y.bfloat16())
    nothing = quantized_matmul(codes[:0], scales[:0], held, input_format="nvfp4", dtype=torch.float32)
    assert nothing.shape == (0, 3, 5)
    arguments = (codes, scales, held.codes, held.scales, bias, above, "nvfp4", "nvfp4", 64, torch.bfloat16)
    torch.library.opcheck(torch.ops.qat.quantized_matmul.default, arguments)


def test_integers_are_summed_exactly() -> None:
    x, weight = quantize(normal(4, 96), lookup("int8_token")), quantize(normal(5, 96, seed=1), lookup("int4_g32"))
    ones = QTensor(weight.format, weight.codes, Scales(torch.ones_like(weight.scales.stored)))
    codes, scales = operands(x)
    y = quantized_matmul(codes, torch.ones_like(scales), hold(ones), input_format="int8_token", dtype=torch.float32)
    exact = codes.long() @ weight.format.element.decode(weight.codes).long().T
    assert torch.equal(y.long(), exact)


def test_what_cannot_be_multiplied_is_refused_by_name() -> None:
    held = hold(quantize(normal(4, 64), lookup("int8_channel")))
    codes, scales = torch.zeros(1, 64, dtype=torch.int8), torch.ones(1, 1)
    with pytest.raises(UnsupportedError, match=r"int8_g128 inputs cannot meet int8_channel weights: .* bf16 scales"):
        quantized_matmul(codes, scales, held, input_format="int8_g128", dtype=torch.float32)
    with pytest.raises(FormatError, match="an input of width 32 meets a weight of 64 columns"):
        quantized_matmul(codes[:, :32], scales, held, input_format="int8_token", dtype=torch.float32)
    with pytest.raises(UnsupportedError, match=r"int4_g64_asym weights .* zero points"):
        hold(quantize(normal(4, 64), lookup("int4_g64_asym")))
    broken = quantize(normal(4, 64), lookup("mxfp8"))
    broken.scales.stored[1, 1] = 255
    with pytest.raises(FormatError, match="mxfp8: 1 scales are zero, negative or not finite"):
        hold(broken)
