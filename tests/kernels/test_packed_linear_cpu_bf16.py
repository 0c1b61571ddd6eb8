"""The C kernels that multiply BF16, by every instruction set that this processor has, against float64 and the bits of
the weight: every code, tails, any number of tokens, threads, NaN, what others leave in memory and in registers."""

import platform
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qat.kernels.load import cpu_problem
from qat.kernels.packed_linear import cpu
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import QTensor, quantize
from qat.serving.packed import PackedWeight, pack, problem

PACKED = [name for name, fmt in CATALOG.items() if problem(fmt) is None]
SOME_FORMATS = ["int4_g64", "int4_g128_asym", "int2_g64", "nvfp4", "mxfp4", "int8_channel", "mxfp8"]
HAS = {  # what a processor needs for an instruction set that kernels are compiled with
    "native": True,
    "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
    "avx512": torch.cpu._is_avx512_supported(),
    "avx2": torch.cpu._is_avx2_supported(),
}
pytestmark = pytest.mark.skipif(cpu_problem() is not None, reason=str(cpu_problem()))


def _forget() -> None:
    for library in (cpu.library, cpu._bf16_library, cpu._avx2_library):
        if hasattr(library, "cache_clear"):  # not what a test put in its place
            library.cache_clear()


@pytest.fixture(params=list(HAS))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels compiled for one instruction set; memory that is not written holds NaN."""
    name = str(request.param)
    if not HAS[name] or (name != "native" and platform.machine() != "x86_64"):
        pytest.skip(f"this processor has no {name}")
    monkeypatch.setenv("QAT_CPU_ISA", name)
    monkeypatch.setattr(cpu._thread, "memory", None, raising=False)
    _forget()
    try:
        cpu.library()
    except OSError as error:
        _forget()
        excuses = ("bad value", "unsupported argument", "unknown target CPU", "took more than")
        if not any(excuse in str(error) for excuse in excuses):
            raise  # the source does not compile
        pytest.skip(f"no kernels for {name} from this compiler: {error}"[:300])
    torch.use_deterministic_algorithms(True)
    yield name
    torch.use_deterministic_algorithms(False)
    _forget()


@pytest.fixture(params=["tiles", "dots"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of the roads in BF16, for any number of tokens."""
    name = str(request.param)
    monkeypatch.setattr(cpu._thread, "memory", None, raising=False)
    if not cpu._bf16_library()[1] & {"tiles": cpu._TILES, "dots": cpu._DOTS}[name]:
        pytest.skip(f"this processor has no {name}")
    monkeypatch.setattr(cpu, "road", lambda tokens, dtype: name)
    return name


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def run(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    return cpu.packed_linear(x, weight.words, weight.scales, weight.zeros, bias, weight.global_scale, weight.format)


def columns_of(name: str) -> int:
    """Some that end inside a tile of words where the format can."""
    return next(width for width in (352, 320, 384) if lookup(name).divides(width))


def assert_close(found: Tensor, x: Tensor, q: QTensor, bias: Tensor | None = None) -> None:
    dense = q.dequantize(torch.bfloat16).double()
    exact = x.double() @ dense.T + (0 if bias is None else bias.double())
    size = x.double().abs() @ dense.abs().T
    bound = (
        2.0**-8 * (exact.abs() + size) + 2.0**-18 * size
    )  # the result is rounded, and in registers the weight is not
    assert found.dtype == torch.bfloat16 and bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("with_lanes", [True, False])
def test_every_instruction_set_decodes_every_format(
    isa: str, with_lanes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if with_lanes and cpu._avx2_library() is None:
        pytest.skip("one kernel less: the same again")
    if not with_lanes:
        monkeypatch.setattr(cpu, "_avx2_library", lambda: None)
    for name in SOME_FORMATS:
        columns = columns_of(name)
        scaled = normal(37, columns).float() * torch.logspace(-4, 2, 37)[:, None]
        q, bias = quantize(scaled, lookup(name)), normal(37, seed=1)
        one_hot, dense = torch.eye(columns).bfloat16(), q.dequantize(torch.bfloat16)
        for tokens in (1, 3, 16, 40, columns):  # all roads
            assert torch.equal(run(one_hot[:tokens], pack(q)).t(), dense[:, :tokens]), (name, tokens)
        for tokens in (1, 4, 5, 17, 70):
            x = normal(tokens, columns, seed=tokens)
            x[0, 3] = 1e4
            assert_close(run(x, pack(q), bias), x, q, bias)
            assert_close(run(x.float(), pack(q)).bfloat16(), x, q)


@pytest.mark.parametrize("name", PACKED)
def test_every_code_under_every_position(name: str, way: str) -> None:
    fmt, columns = lookup(name), 512
    every = torch.tensor([code for code, value in enumerate(fmt.element.values) if value == value], dtype=torch.uint8)
    codes = torch.stack([every.roll(shift)[torch.arange(columns) % len(every)] for shift in (0, 1, 77, 100)])
    q = QTensor(fmt, codes, quantize(normal(4, columns).float(), fmt).scales)
    assert torch.equal(run(torch.eye(columns).bfloat16(), pack(q)).t(), q.dequantize(torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 16, 31, 33, 300])
@pytest.mark.parametrize("columns", [64, 576, 1088])
def test_shapes(rows: int, columns: int, way: str) -> None:
    """Integers whose sums are exact, whatever their order."""
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    q = quantize(normal(rows, columns).float(), lookup("int4_g64"))
    q = QTensor(q.format, codes, q.scales)
    q.scales.stored.fill_(0.5)
    dense = q.dequantize().double()
    for tokens in (2, 16, 17, 32, 33, 65, 1030 if rows == 33 else 90):
        x = torch.randint(-8, 9, (tokens, columns), generator=torch.Generator().manual_seed(tokens)).bfloat16()
        assert torch.equal(run(x, pack(q)), (x.double() @ dense.T).float().bfloat16())
    assert run(x[:0], pack(q)).shape == (0, rows)


@pytest.mark.parametrize("name", SOME_FORMATS)
def test_tokens_do_not_depend_on_each_other(name: str, way: str) -> None:
    weight, x = pack(quantize(normal(70, 640).float(), lookup(name))), normal(150, 640, seed=2)
    together = run(x, weight)
    for tokens in (2, 16, 21, 40, 70):
        assert torch.equal(run(x[:tokens], weight), together[:tokens])
        assert torch.equal(run(x[-tokens:], weight), together[-tokens:])
    x[1, 5], x[20, 0] = torch.nan, torch.inf
    broken = run(x, weight)
    assert broken[1].isnan().all() and not broken[20].isfinite().any()
    kept = [row for row in range(150) if row not in (1, 20)]
    assert torch.equal(broken[kept], together[kept])


@pytest.mark.parametrize("tokens", [5, 90])
def test_threads_change_nothing(tokens: int, way: str) -> None:
    weight, x = pack(quantize(normal(700, 576).float(), lookup("nvfp4"))), normal(tokens, 576)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_library_s_products_go_on_as_before(way: str) -> None:
    """It uses the same registers, and sums in the same order or nearly so."""
    q, x = quantize(normal(640, 1536).float(), lookup("int4_g64")), normal(48, 1536, seed=1)
    dense = q.dequantize(torch.bfloat16)
    before = functional.linear(x, dense)
    found = run(x, pack(q))
    assert torch.equal(functional.linear(x, dense), before)
    differ = found != before
    assert differ.float().mean() < (1e-3 if way == "tiles" else 0.02)
    torch.testing.assert_close(found, before, rtol=2.0**-7, atol=1e-3)


def test_the_road_is_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_avx2_library", lambda: object())
    assert cpu.road(1, torch.float32) == cpu.road(5000, torch.bfloat16) == "lanes"
    monkeypatch.setattr(cpu, "_avx2_library", lambda: None)
    expected = {
        3: {1: "registers", 2: "tiles", 8: "tiles", 5000: "tiles"},
        1: {1: "registers", 4: "registers", 5: "dots", cpu.SOME: "dots", cpu.SOME + 1: "slices"},
        0: {1: "registers", cpu.FEW: "registers", cpu.FEW + 1: "slices"},
    }
    for roads, told in expected.items():
        monkeypatch.setattr(cpu, "_bf16_library", lambda roads=roads: (None, roads))
        assert {tokens: cpu.road(tokens, torch.bfloat16) for tokens in told} == told
        assert cpu.road(5, torch.float32) == "registers" and cpu.road(50, torch.float32) == "slices"


def test_a_compiler_that_cannot_leaves_the_other_roads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: object) -> None:
        raise OSError("no such instructions")

    _forget()
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "load_library", fails)
        assert cpu._bf16_library() == (None, 0) and cpu._avx2_library() is None
        assert cpu.road(20, torch.bfloat16) == "slices"
    _forget()
