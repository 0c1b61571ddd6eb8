"""Straight to words: the codes of the packer, rounded by the divisor."""

import dataclasses

import pytest
import torch
from torch import Tensor

from qat.errors import UnsupportedError
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import find_scales, quantize
from qat.serving.packed import pack
from qat.serving.packed import problem as packing_problem
from qat.serving.quantize_pack import quantize_pack
from qat.serving.words import from_words

PACKED = [name for name, fmt in CATALOG.items() if packing_problem(fmt) is None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
