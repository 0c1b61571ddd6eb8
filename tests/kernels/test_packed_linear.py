"""The packed linear kernel without a GPU: interpreted in a process of its own (FP16 and FP32; the interpreter's BF16 is
wrong) against float64, and compiled for every architecture, looking at what the compiler made of it."""

import pytest
import torch
from torch import Tensor

from qat.errors import FormatError, UnsupportedError
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import Scales, quantize
from qat.serving.matmul import QuantizedLinear, hold
from qat.serving.packed import PackedLinear, PackedWeight, pack, packed_linear, problem, unpack
from qat.serving.words import from_words, tile, to_words
from tests.kernels.processes import in_a_process

triton = pytest.importorskip("triton")
PACKED = [name for name, fmt in CATALOG.items() if problem(fmt) is None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("columns", [32, 128, 576, 1000])
def test_words_are_a_permutation(bits: int, offset: bool, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (5, columns), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = to_words(codes, bits, offset=offset)
    assert words.shape == (5, -(-columns // tile(bits)) * 32) and words.dtype == torch.int16
    assert torch.equal(from_words(words, bits, columns, offset=offset), codes)


def test_distant_columns_share_a_word() -> None:
    """By hand: word 1 of the second tile holds columns 129, 161, 193 and 225, the first in the lowest bits."""
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    for column, code in ((129, 1), (161, 2), (193, 3), (225, 4)):
        codes[0, column] = code
    words = to_words(codes, 4, offset=False)
    assert words[0, 33] == 0x4321 and int((words != 0).sum()) == 1
    assert int(to_words(codes, 4, offset=True)[0, 33]) & 0xFFFF == 0x4321 ^ 0x8888


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


# --- the kernel itself --------------------------------------------------------------------------------------------


def test_the_interpreted_kernel_is_the_reference() -> None:
    assert "all equal" in in_a_process("interpret_packed_linear.py", TRITON_INTERPRET="1")


def test_the_kernel_compiles_for_every_architecture() -> None:
    assert "all compiled" in in_a_process("compile_packed_linear.py")


def test_blocks_of_zeros_are_packed() -> None:
    """Their scale is positive, so they are not mistaken for broken ones."""
    weight = quantize(torch.zeros(2, 64), lookup("int4_g32"))
    assert not packed_linear(normal(3, 64), pack(weight)).any()
