"""Packed weights: nothing is lost, what cannot be packed is refused, and the module is one of PyTorch."""

import pytest
import torch
from torch import Tensor

from qat.errors import FormatError, UnsupportedError
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import Scales, quantize
from qat.serving.matmul import QuantizedLinear, hold
from qat.serving.packed import PackedLinear, PackedWeight, pack, packed_linear, problem, unpack

PACKED = [name for name, fmt in CATALOG.items() if problem(fmt) is None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PACKED)
def test_packing_loses_nothing(name: str) -> None:
    weight = quantize(normal(6, 384), lookup(name))
    packed = pack(weight)
    found = unpack(packed)
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.dequantize(), weight.dequantize())
    assert packed.nbytes < 6 * 384 * 2
    one_hot = torch.eye(384)
    assert torch.equal(packed_linear(one_hot, packed).t(), weight.dequantize())


def test_what_cannot_be_packed_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="nf4_g64 weights cannot be packed: its codes need a table"):
        pack(quantize(normal(4, 64), lookup("nf4_g64")))
    weight = quantize(normal(4, 64), lookup("mxfp4"))
    broken = weight.scales.stored.clone()
    broken[1, 1] = 255
    with pytest.raises(FormatError, match="mxfp4: 1 scales are zero, negative or not finite"):
        pack(type(weight)(weight.format, weight.codes, Scales(broken)))
    weight = quantize(normal(4, 64), lookup("mxfp8"))
    weight.codes[2, 3] = 0xFF
    with pytest.raises(FormatError, match="mxfp8: 1 codes are NaN"):
        pack(weight)
    weight = quantize(normal(4, 64), lookup("mxfp4"))
    with pytest.raises(FormatError, match="an input of width 32 meets a weight of 64 columns"):
        packed_linear(normal(1, 32), pack(weight))


def test_the_module_and_opcheck() -> None:
    weight, bias = quantize(normal(6, 64), lookup("int4_g32_asym")), normal(6, seed=2)
    layer, x = PackedLinear(pack(weight), bias), normal(2, 3, 64, seed=1)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight.dequantize(), bias))
    assert layer(x[:0]).shape == (0, 3, 6) and not list(layer.parameters())
    packed: PackedWeight = layer.packed
    arguments = (x, packed.words, packed.scales, packed.zeros, bias, packed.global_scale, packed.format)
    torch.library.opcheck(torch.ops.qat.packed_linear.default, arguments)


@pytest.mark.parametrize("name", ["int4_g32_asym", "nvfp4", "fp8_channel"])
def test_a_model_that_changes_its_dtype_keeps_stored_numbers(name: str) -> None:
    """half() would turn BF16 scales into FP16, and FP8 codes into their values."""
    weight = quantize(normal(6, 64) * 1e-6, lookup(name))
    layer, expected = PackedLinear(pack(weight), normal(6)), weight.dequantize()
    for changed in (layer.half(), layer.to(torch.bfloat16), layer.double()):
        assert torch.equal(unpack(changed.packed).dequantize(), expected)
    assert layer.bias is not None and layer.bias.dtype == torch.float64
    if not weight.format.zero_point:
        coded = QuantizedLinear(hold(weight), "int8_token", 1.0, torch.float32)
        before = coded.codes.clone(), coded.scales.clone()
        coded.half().double()
        for old, new in zip(before, (coded.codes, coded.scales), strict=True):
            assert old.dtype == new.dtype and torch.equal(old.view(torch.uint8), new.view(torch.uint8))


def test_blocks_of_zeros_are_packed() -> None:
    """Their scale is positive, so they are not mistaken for broken ones."""
    weight = quantize(torch.zeros(2, 64), lookup("int4_g32"))
    assert not packed_linear(normal(3, 64), pack(weight)).any()
