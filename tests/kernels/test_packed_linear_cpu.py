"""The C kernel against float64 over every packed format: tails, many and few tokens, outliers, NaN rows, strides.

`cpu.c` alone, whose roads every processor has; test_packed_linear_cpu_avx2.py asks the one that AVX2 has instead."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qat.errors import FormatError, UnsupportedError
from qat.kernels.load import cpu_problem, load
from qat.kernels.packed_linear import cpu
from qat.kernels.packed_linear.cpu import FEW, packed_linear
from qat.kernels.packed_linear.cpu import problem as cpu_kernel_problem
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import QTensor, quantize
from qat.serving.packed import PackedLinear, PackedWeight, pack, problem, unpack

PACKED = [name for name, fmt in CATALOG.items() if problem(fmt) is None]
pytestmark = pytest.mark.skipif(cpu_problem() is not None, reason=str(cpu_problem()))


@pytest.fixture(autouse=True)
def _loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    load()
    monkeypatch.setattr(cpu, "_avx2_library", lambda: None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    return packed_linear(x, weight.words, weight.scales, weight.zeros, bias, weight.global_scale, weight.format)


def assert_close(x: Tensor, q: QTensor, bias: Tensor | None) -> None:
    dense, found = q.dequantize().double(), run(x, pack(q), bias)
    assert found.dtype == x.dtype and found.shape == (*x.shape[:-1], dense.shape[0])
    extra = 0 if bias is None else bias.double()
    exact = x.double() @ dense.T + extra
    # FP32: several hundred sums, for many tokens in torch's order. BF16: one rounding of the result, and of the weight.
    unit = 2.0**-7 if x.dtype == torch.bfloat16 else 2.0**-20 if x.numel() <= FEW * x.shape[-1] else 2.0**-18
    bound = unit * (x.double().abs() @ dense.abs().T + abs(extra)) + 1e-30
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("name", PACKED)
def test_it_decodes_every_format(name: str) -> None:
    fmt = lookup(name)
    assert cpu_kernel_problem(fmt) is None
    columns = next(width for width in (352, 320, 384) if fmt.divides(width))  # the first two end inside a tile
    q = quantize(normal(37, columns) * torch.logspace(-4, 2, 37)[:, None], fmt)
    one_hot = torch.eye(columns)
    for first in range(0, columns, FEW):
        assert torch.equal(run(one_hot[first : first + FEW], pack(q)).t(), q.dequantize()[:, first : first + FEW])
    assert torch.equal(run(one_hot, pack(q)).t(), q.dequantize())  # by dense slices
    half = run(one_hot.bfloat16(), pack(q)).t()
    assert torch.equal(half, q.dequantize(torch.bfloat16))
    bias = normal(37, seed=1)
    for tokens in (1, 3, 4, FEW, FEW + 1, 33):
        x = normal(tokens, columns, seed=tokens)
        x[0, 3] = 1e4
        assert_close(x, q, bias)
        assert_close(x.bfloat16(), q, None)


@pytest.mark.parametrize("name", PACKED)
def test_every_code_under_every_position(name: str) -> None:
    """All codes but NaN in each part of a word, by both roads."""
    fmt, columns = lookup(name), 512
    every = torch.tensor([code for code, value in enumerate(fmt.element.values) if value == value], dtype=torch.uint8)
    codes = torch.stack([every.roll(shift)[torch.arange(columns) % len(every)] for shift in (0, 1, 77, 100)])
    sample = quantize(normal(4, columns), fmt)
    q = QTensor(fmt, codes, sample.scales)
    one_hot = torch.eye(columns)
    few = torch.cat([run(one_hot[first : first + FEW], pack(q)) for first in range(0, columns, FEW)])
    assert torch.equal(few.t(), q.dequantize()) and torch.equal(run(one_hot, pack(q)).t(), q.dequantize())


@pytest.mark.parametrize("name", ["int4_g64", "nvfp4", "mxfp8", "int2_g64", "int4_g128_asym"])
def test_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    weight, x = pack(quantize(normal(40, 512), lookup(name))), normal(FEW, 512, seed=2)
    together = run(x, weight)
    for row in range(FEW):
        assert torch.equal(run(x[row : row + 1], weight), together[row : row + 1])
    x[1, 5], x[2, 0] = torch.nan, torch.inf
    broken = run(x, weight)
    assert broken[1].isnan().all() and not broken[2].isfinite().any()
    assert torch.equal(broken[[0, *range(3, FEW)]], together[[0, *range(3, FEW)]])
    assert run(x.bfloat16(), weight)[1].isnan().all()


def test_shapes_and_strides() -> None:
    q = quantize(normal(24, 256), lookup("int4_g32"))
    weight, x = pack(q), normal(2, 3, 512, seed=1)
    assert_close(x[..., ::2], q, None)
    assert_close(x[..., :256], q, None)
    assert_close(x[:, :, 256:].half().float(), q, None)
    assert run(x[:0, :, :256], weight).shape == (0, 3, 24)
    assert run(x[0, 0, :256].half(), weight).dtype == torch.float16


def test_what_does_not_fit_is_refused_before_memory_is_read() -> None:
    weight = pack(quantize(normal(24, 256), lookup("int4_g64")))
    with pytest.raises(FormatError, match=r"an input of width 1048576 needs words \[24, 262144\]"):
        run(torch.zeros(1, 1 << 20), weight)
    with pytest.raises(FormatError, match=r"must be torch\.bfloat16 or float32, not torch.float16"):
        run(normal(1, 256), replace(weight, scales=weight.scales.half()))
    with pytest.raises(FormatError, match=r"not torch\.uint8"):  # which would look up a table that BF16 scales lack
        run(normal(1, 256), replace(weight, scales=weight.scales.to(torch.uint8)))
    with pytest.raises(FormatError, match="words must be int16"):
        run(normal(1, 256), replace(weight, words=weight.words.to(torch.int8)))
    with pytest.raises(FormatError, match="has no zero points"):
        run(normal(1, 256), replace(weight, zeros=torch.zeros_like(weight.scales, dtype=torch.int8)))
    with pytest.raises(FormatError, match="int4_g64_asym has zero points"):
        run(normal(1, 256), replace(weight, format="int4_g64_asym"))
    with pytest.raises(FormatError, match=r"and a bias \[24\]"):
        run(normal(1, 256), weight, normal(23))
    strided = torch.stack([weight.words, weight.words], dim=-1)[..., 0]
    bias = normal(48)[::2]
    assert torch.equal(
        run(normal(2, 256), replace(weight, words=strided), bias), run(normal(2, 256), weight, bias.clone())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_was_prepared_for_a_layer_follows_its_tensors(dtype: torch.dtype) -> None:
    first, second = (pack(quantize(normal(24, 256, seed=n), lookup("int4_g64"))) for n in (0, 1))
    x = normal(2, 256, seed=2)
    layer = PackedLinear(first, normal(24).to(dtype))

    def same() -> bool:  # as a weight that nothing was prepared for
        return torch.equal(layer(x), run(x, layer.packed, layer.bias))

    assert same() and layer._prepared is not None and bool(layer._prepared.numel()) == (dtype != torch.float16)
    for tensor, value in ((layer.words, second.words), (layer.scales, second.scales), (layer.bias, normal(24, seed=3))):
        before = layer(x)
        assert tensor is not None
        tensor.copy_(value)
        assert same() and not torch.equal(before, layer(x))
    layer.scales.data = (layer.scales * 2).t().contiguous().t()  # another place in memory
    assert same()
    layer.scales = (layer.scales * 2).contiguous()  # ordered as a GPU wants them
    assert same()
    layer.bias = None
    assert same()
    layer.words.data = layer.words.data.clone()
    assert same()
    layer.double()
    assert layer._prepared is None and same()


def test_a_copy_is_prepared_for_itself() -> None:
    layer, x = PackedLinear(pack(quantize(normal(24, 256), lookup("int4_g64")))), normal(1, 256, seed=1)
    expected = layer(x)
    copied = copy.deepcopy(layer)
    assert copied._prepared is None and torch.equal(copied(x), expected)
    layer.words.zero_()
    assert torch.equal(copied(x), expected) and not torch.equal(layer(x), expected)


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_gradient_is_refused_where_it_would_be_lost(tokens: int) -> None:
    weight = pack(quantize(normal(24, 256), lookup("int4_g64")))
    for x, bias in ((normal(tokens, 256).requires_grad_(), None), (normal(tokens, 256), normal(24).requires_grad_())):
        y = PackedLinear(weight, bias)(x)
        assert torch.equal(y, run(x.detach(), weight, None if bias is None else bias.detach()))
        with pytest.raises(UnsupportedError, match="pass no gradient on"):
            y.sum().backward()
        with pytest.raises(UnsupportedError, match="has no gradient"):
            run(x, weight, bias)


def test_a_weight_that_shrinks_in_place_is_described_again() -> None:
    layer, x = PackedLinear(pack(quantize(normal(4096, 256), lookup("int4_g64")))), normal(1, 256, seed=1)
    expected = layer(x)
    layer.words.data, layer.scales.data = layer.words.data[:8], layer.scales.data[:, :8]
    assert torch.equal(layer(x), expected[:, :8])
    layer.scales.data = layer.scales.data[:, :4]
    with pytest.raises(FormatError, match=r"scales \[4, 8\]"):
        layer(x)
    strided = PackedLinear(pack(quantize(normal(16, 256), lookup("int4_g64"))))
    strided(x)
    strided.words.data, strided.scales.data = strided.words.data[::2], strided.scales.data[:, ::2]
    fresh = replace(strided.packed, words=strided.words.clone(), scales=strided.scales.clone())
    assert torch.equal(strided(x), run(x, fresh))


def test_no_columns_are_a_sum_of_nothing() -> None:
    words, scales = torch.zeros(24, 0, dtype=torch.int16), torch.zeros(0, 24, dtype=torch.bfloat16)
    y = torch.ops.qat.packed_linear(torch.zeros(3, 0), words, scales, None, None, 1.0, "int4_g64")
    assert y.shape == (3, 24) and not y.any()


def test_a_format_without_a_decoder_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.kernels.packed_linear.cpu.problem", lambda fmt: "no instance")
    q, x = quantize(normal(24, 256), lookup("nvfp4")), normal(3, 256)
    assert_close(x, q, None)


@pytest.mark.parametrize("rows", [64, 9000])  # one slice, several
def test_slices_are_the_dense_product_to_the_bit(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "road", lambda tokens, dtype: "slices")
    q, x, bias = (
        quantize(normal(rows, 256), lookup("int4_g64")),
        normal(20, 256, seed=1).bfloat16(),
        normal(rows, seed=2),
    )
    dense = q.dequantize(torch.bfloat16)
    for given in (None, bias.bfloat16()):
        assert torch.equal(run(x, pack(q), given), torch.nn.functional.linear(x, dense, given))


def test_slices_of_the_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = quantize(normal(50, 256), lookup("nvfp4")), normal(20, 256, seed=1)
    whole = run(x, pack(q))
    monkeypatch.setattr("qat.kernels.packed_linear.cpu.SLICE_BYTES", 7 * 256 * 4)
    torch.testing.assert_close(run(x, pack(q)), whole, rtol=1e-5, atol=1e-5)


def test_scales_are_found_again_by_row() -> None:
    """A CPU keeps them row by row; the shape is the same for every device."""
    q = quantize(normal(6, 384), lookup("int4_g64_asym"))
    weight = pack(q)
    assert weight.scales.shape == (6, 6) and weight.scales.t().is_contiguous()
    assert torch.equal(unpack(weight).dequantize(), q.dequantize())
