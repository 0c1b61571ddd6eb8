"""Stored tensors back to codes: the inverse of packing for every format, and what is wrong with a bad one is named."""

import pytest
import torch
from torch import Tensor

from qat.checkpoints.layouts.arguments import weight_format
from qat.checkpoints.layouts.compressed_tensors import write as target
from qat.checkpoints.layouts.compressed_tensors.codes import read_layer
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.layouts.support import pairs
from qat.errors import CheckpointError, UnsupportedError
from qat.numbers.catalog import lookup
from qat.numbers.numerics import QTensor, quantize

WEIGHTS = sorted({weight for weight, _ in pairs(target.ROWS)})


def stored(name: str, input: str | None = None, columns: int = 256) -> tuple[PackedModule, QTensor, dict[str, Tensor]]:
    fmt, other = lookup(name), lookup(input) if input else None
    generator = torch.Generator().manual_seed(3)
    q = quantize(torch.randn(24, columns, generator=generator) * torch.logspace(-3, 2, 24)[:, None], fmt)
    how = target.layout(fmt, other)
    return PackedModule("a.b", how.format, how.weights, how.input), q, target.pack(q, other)


@pytest.mark.parametrize("name", WEIGHTS)
def test_reading_undoes_packing(name: str) -> None:
    module, q, tensors = stored(name)
    found = read_layer(module, tensors)
    assert torch.equal(found.codes, q.codes)
    assert torch.equal(found.dequantize(torch.bfloat16), q.dequantize(torch.bfloat16))
    if q.format.block != (0, 0):  # one scale for all is held once per row
        assert found.format == q.format or found.format.block == q.format.block
        assert torch.equal(found.scales.stored.view(torch.uint8), q.scales.stored.view(torch.uint8))


def test_a_single_block_stays_one() -> None:
    module, q, tensors = stored("fp8_b128", columns=96)
    assert tensors["weight_scale"].shape == (1, 1)
    assert torch.equal(read_layer(module, tensors).dequantize(), q.dequantize())


def test_the_lowest_code_of_other_tools_is_kept() -> None:
    """compressed-tensors uses -8 of INT4; our own quantizer does not."""
    module, _, tensors = stored("int4_g64")
    tensors["weight_packed"] = torch.zeros_like(tensors["weight_packed"])
    found = read_layer(module, tensors)
    expected = -8 * tensors["weight_scale"].float().repeat_interleave(64, dim=1)
    assert torch.equal(found.dequantize(), expected)


def test_whole_bytes_with_few_bits() -> None:
    """4-bit values in int8, as compressed-tensors writes some W4A8 checkpoints."""
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    weight = torch.tensor([[-7, 3], [0, -1]], dtype=torch.int8)
    scale = torch.tensor([[2.0], [0.5]], dtype=torch.bfloat16)
    found = read_layer(PackedModule("p", "int-quantized", args, None), {"weight": weight, "weight_scale": scale})
    assert found.dequantize().tolist() == [[-14.0, 6.0], [0.0, -0.5]]


def test_scales_are_read_in_a_type_that_kernels_know() -> None:
    """FP16 models have float16 scales: two bytes, like BF16, but other numbers."""
    module, _, tensors = stored("int4_g64")
    half = {**tensors, "weight_scale": tensors["weight_scale"].half()}
    found = read_layer(module, half)
    assert found.scales.stored.dtype == torch.float32
    assert torch.equal(found.scales.stored, half["weight_scale"].float())
    wide = {**tensors, "weight_scale": tensors["weight_scale"].float()}
    assert torch.equal(read_layer(module, wide).scales.stored, wide["weight_scale"])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("nvfp4", {"weight_scale": None}, r"\.weight_scale is missing"),
        ("nvfp4", {"weight_global_scale": torch.zeros(1)}, r"a.b.weight_global_scale must be finite and positive"),
        ("mxfp4", {"weight_scale": torch.full((24, 8), 255).byte()}, r"a.b.weight_scale must be finite"),
        ("int4_g64", {"weight_scale": torch.ones(24, 3).bfloat16()}, r"a.b.weight_scale is \[24, 3\], but 24 x 256"),
        ("int4_g64", {"weight_scale": -torch.ones(24, 4).bfloat16()}, r"a.b.weight_scale must be finite"),
        ("int4_g64", {"weight_shape": torch.tensor([24, 999])}, r"codes are \[24, 256\], not the \[24, 999\]"),
        ("int4_g64", {"weight_scale": torch.ones(24, 4).double()}, r"a.b.weight_scale is torch.float64, but int4_g64"),
        ("int4_g64", {"weight_scale": torch.ones(24, 4).byte()}, r"scales are torch.bfloat16 or torch.float32"),
        ("nvfp4", {"weight_scale": torch.ones(24, 16)}, r"is torch.float32, but nvfp4 scales are torch.float8_e4m3fn"),
        ("mxfp4", {"weight_scale": torch.ones(24, 8).half()}, r"is torch.float16, but mxfp4 scales are torch.uint8"),
        ("int4_g64_asym", {"weight_zero_point": None}, r"a.b.weight_zero_point is missing"),
    ],
)
def test_what_is_wrong_is_named(name: str, change: dict[str, Tensor | None], message: str) -> None:
    module, _, tensors = stored(name)
    for key, value in change.items():
        tensors.pop(key)
        if value is not None:
            tensors[key] = value
    with pytest.raises(CheckpointError, match=message):
        read_layer(module, tensors)


def test_unknown_weights_are_refused() -> None:
    args = {"num_bits": 5, "type": "int", "strategy": "channel", "symmetric": True}
    with pytest.raises(UnsupportedError, match=r"weights quantized as .* are not in the catalogue"):
        weight_format(args)
