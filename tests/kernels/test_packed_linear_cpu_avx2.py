"""The C kernel for CPUs with AVX2 alone, against the reference's weights to the bit and float64 sums: every code,
tails, any number of tokens together, threads, every stored kind of scale, NaN, what others leave in memory."""

import platform
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qat.kernels.load import cpu_problem
from qat.kernels.packed_linear import cpu
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import QTensor, quantize
from qat.serving.packed import PackedLinear, PackedWeight, pack, problem, unpack

PACKED = [name for name, fmt in CATALOG.items() if problem(fmt) is None]
SOME_FORMATS = ["int4_g64", "int4_g128_asym", "int2_g64", "nvfp4", "mxfp4", "int8_channel", "int8_g32_asym", "mxfp8"]
pytestmark = [
    pytest.mark.skipif(cpu_problem() is not None, reason=str(cpu_problem())),
    pytest.mark.skipif(
        platform.machine() != "x86_64" or not torch.cpu._is_avx2_supported(), reason="this processor has no AVX2"
    ),
]


@pytest.fixture(autouse=True)
def lanes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This road, on processors that have more, too; memory that is not written holds NaN."""
    monkeypatch.setenv("QAT_CPU_ISA", "avx2")
    monkeypatch.setattr(cpu._thread, "memory", None, raising=False)
    cpu.library.cache_clear()
    cpu._avx2_library.cache_clear()
    assert cpu.road(1, torch.float32) == cpu.road(1000, torch.bfloat16) == "lanes"
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    cpu.library.cache_clear()
    cpu._avx2_library.cache_clear()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    return cpu.packed_linear(x, weight.words, weight.scales, weight.zeros, bias, weight.global_scale, weight.format)


def assert_close(x: Tensor, q: QTensor, weight: PackedWeight, bias: Tensor | None = None) -> None:
    """One rounding to x's dtype of sums in float32: at most 64 to a lane, 8 lanes, and the slices."""
    dense, found = q.dequantize().double(), run(x, weight, bias)
    assert found.dtype == x.dtype and found.shape == (*x.shape[:-1], dense.shape[0])
    extra = 0 if bias is None else bias.double()
    exact, size = x.double() @ dense.T + extra, x.double().abs() @ dense.abs().T + abs(extra)
    bound = 2.0**-20 * size + (2.0**-8 * exact.abs() if x.dtype == torch.bfloat16 else 0) + 1e-30
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("name", PACKED)
def test_every_code_under_every_position(name: str) -> None:
    """All codes but NaN in each part of a word, under other scales everywhere, alone and in the cache."""
    fmt, columns = lookup(name), 1024
    every = torch.tensor([code for code, value in enumerate(fmt.element.values) if value == value], dtype=torch.uint8)
    codes = torch.stack([every.roll(shift)[torch.arange(columns) % len(every)] for shift in (0, 1, 77, 100, 5)])
    scaled = normal(5, columns // 16, 1).mul(3).exp() * normal(5, columns // 16, 16)
    q = QTensor(fmt, codes, quantize(scaled.view(5, columns), fmt).scales)
    weight, one_hot = pack(q), torch.eye(columns)
    assert torch.equal(run(one_hot, weight).t(), q.dequantize())
    assert torch.equal(run(one_hot.bfloat16(), weight).t(), q.dequantize(torch.bfloat16))
    for column in range(0, columns, 37):
        assert torch.equal(run(one_hot[column : column + 1], weight).t(), q.dequantize()[:, column : column + 1])


@pytest.mark.parametrize("name", PACKED)
def test_sums(name: str) -> None:
    """Columns that end inside a tile of words where the format can, rows that fill no band, outliers, a bias."""
    fmt = lookup(name)
    columns = next(width for width in (864, 672, 1152) if fmt.divides(width))
    q = quantize(normal(43, columns) * torch.logspace(-4, 2, 43)[:, None], fmt)
    for tokens in (1, 2, 3, 5, 7, 34):
        x, bias = normal(tokens, columns, seed=tokens), normal(43, seed=1)
        x[0, 3] = 1e4
        assert_close(x, q, pack(q), bias)
        assert_close(x.bfloat16(), q, pack(q), bias.bfloat16())
        assert_close(x.bfloat16(), q, pack(q))


@pytest.mark.parametrize("rows", [1, 4, 31, 33, 300])
@pytest.mark.parametrize("columns", [64, 576, 1088])
def test_shapes(rows: int, columns: int) -> None:
    """Integers whose sums are exact, whatever their order."""
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    q = quantize(normal(rows, columns), lookup("int4_g64"))
    q = QTensor(q.format, codes, q.scales)
    q.scales.stored.fill_(0.5)
    dense = q.dequantize().double()
    for tokens in (1, 2, 4, 17, 32, 96, 97, 400 if rows == 33 else 90):
        x = torch.randint(-8, 9, (tokens, columns), generator=torch.Generator().manual_seed(tokens)).float()
        assert torch.equal(run(x, pack(q)).double(), x.double() @ dense.T)
    assert run(x[:0], pack(q)).shape == (0, rows) and run(x[:6].view(2, 3, columns), pack(q)).shape == (2, 3, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SOME_FORMATS)
def test_tokens_do_not_depend_on_each_other(name: str, dtype: torch.dtype) -> None:
    """Nor on how many they are: one alone, in a few, among many."""
    weight, x = pack(quantize(normal(70, 1152), lookup(name))), normal(150, 1152, seed=2).to(dtype)
    together = run(x, weight)
    for tokens in (1, 2, 3, 4, 16, 21, 97):
        assert torch.equal(run(x[:tokens], weight), together[:tokens])
        assert torch.equal(run(x[-tokens:], weight), together[-tokens:])
    x[1, 5], x[20, 0] = torch.nan, torch.inf
    broken = run(x, weight)
    assert broken[1].isnan().all() and not broken[20].isfinite().any()
    kept = [row for row in range(150) if row not in (1, 20)]
    assert torch.equal(broken[kept], together[kept])


@pytest.mark.parametrize("tokens", [1, 5, 90])
def test_threads_change_nothing(tokens: int) -> None:
    weight, x = pack(quantize(normal(700, 576), lookup("nvfp4"))), normal(tokens, 576)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "int4_g64", "int4_g32_asym", "q8_0"])
def test_scales_of_every_kind(name: str) -> None:
    """float32 in the place of bytes, BF16 and FP16: the same numbers, the same result."""
    fmt, x = lookup(name), normal(3, 704, seed=1)
    q = quantize(normal(24, 704), fmt)
    weight = pack(q)
    wide = fmt.scale.decode(fmt.scale.from_bytes(weight.scales.t().contiguous())).float().t()
    same = replace(weight, scales=wide)
    for tokens in (1, 3):
        assert torch.equal(run(x[:tokens], same), run(x[:tokens], weight))
        assert_close(x[:tokens], q, weight)


def test_half_float_scales_are_read_where_they_lie() -> None:
    """Other roads copy them at every call, so that nothing can be prepared for a layer."""
    layer, x = PackedLinear(pack(quantize(normal(24, 256), lookup("q8_0")))), normal(2, 256, seed=1)
    expected = run(x, layer.packed)
    found = cpu.prepare_packed(layer.words, layer.scales, None, None, 1.0, "q8_0", 256)
    assert found.numel() and torch.equal(
        cpu.packed_linear(x, layer.words, layer.scales, None, None, 1.0, "q8_0", found), expected
    )


def test_a_global_scale_is_part_of_the_weight() -> None:
    """Of any size, as other producers store it: multiplied with the scales first, as `dequantize` does."""
    for name, scale in (("nvfp4", 0.3), ("nvint4", 1e-4)):
        weight = replace(pack(quantize(normal(24, 256), lookup(name))), global_scale=float(torch.tensor(scale)))
        assert torch.equal(run(torch.eye(256), weight).t(), unpack(weight).dequantize())


def test_no_columns_are_a_sum_of_nothing() -> None:
    words, scales = torch.zeros(24, 0, dtype=torch.int16), torch.zeros(0, 24, dtype=torch.bfloat16)
    for tokens in (1, 3):
        y = cpu.packed_linear(torch.zeros(tokens, 0), words, scales, None, None, 1.0, "int4_g64")
        assert y.shape == (tokens, 24) and not y.any()


def test_where_it_cannot_be_compiled_other_roads_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: object) -> None:
        raise OSError("no such instructions")

    cpu._avx2_library.cache_clear()
    monkeypatch.setattr(cpu, "load_library", fails)
    assert cpu._avx2_library() is None and cpu.road(1, torch.float32) == "registers"
