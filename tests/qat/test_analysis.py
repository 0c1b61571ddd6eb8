"""Crest factors and the theory of QSNR: closed forms, published crossings, and what normal numbers measure."""

import math
from itertools import pairwise

import pytest
import torch

from qat import analysis
from qat.analysis import (
    candidates,
    crossover,
    decibels,
    energy,
    expected_qsnr,
    has_theory,
    integer_qsnr,
    loss,
    minifloat_qsnr,
    row_crest,
)
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import fake_quantize, qsnr


def normal(rows: int = 512, columns: int = 1024) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


# --- measured -------------------------------------------------------------------------------------


def test_crest_factors_by_hand() -> None:
    """A sine over whole periods has sqrt(2), a square wave 1, one number among n zeros sqrt(n); zeros do not count."""
    sine = torch.sin(2 * math.pi * torch.arange(64) / 16).repeat(3, 1)
    assert row_crest(sine) == pytest.approx(math.sqrt(2), rel=1e-6)
    square = torch.tensor([[3.0, -3.0, 3.0, 3.0]])
    assert row_crest(square) == pytest.approx(1.0)
    impulse = torch.zeros(2, 64)
    impulse[0, 5] = -7.0
    assert row_crest(impulse) == pytest.approx(8.0)  # the second row is empty
    assert row_crest(torch.cat([impulse[:1], square.repeat(1, 16)])) == pytest.approx((8 + 1) / 2)
    assert row_crest(1e-25 * sine) == pytest.approx(math.sqrt(2), rel=1e-6)
    assert math.isnan(row_crest(torch.zeros(2, 8)))


def test_crest_factors_of_blocks() -> None:
    x = torch.zeros(1, 64)
    x[0, 3], x[0, 32:] = 2.0, 1.0
    assert loss(x, lookup("int4_g32"))[1] == pytest.approx((math.sqrt(32) + 1) / 2)
    assert loss(x, lookup("int4_g64"))[1] == pytest.approx(2 / math.sqrt(36 / 64))


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_slabs_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, x = lookup(name), normal(96, 256) * torch.logspace(-2, 2, 96)[:, None]
    whole = loss(x, fmt)
    assert decibels(whole[0], energy(x)) == pytest.approx(qsnr(x, fake_quantize(x, fmt)), abs=1e-6)
    monkeypatch.setattr(analysis, "SLAB", 1000)
    assert loss(x, fmt) == pytest.approx(whole, rel=1e-9)


def test_slabs_share_the_global_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is held exactly sets it so high that block scales of the others are too small to be stored."""
    fmt, x = lookup("nvfp4"), normal(32, 64) * 1e-5
    x[0] = fmt.element.max * lookup("fp8_channel").element.max
    whole = loss(x, fmt)
    assert whole[0] == pytest.approx(energy(x[1:]))  # all of them become zero
    monkeypatch.setattr(analysis, "SLAB", 64)
    assert loss(x, fmt) == pytest.approx(whole)


def test_decibels() -> None:
    assert decibels(1.0, 100.0) == pytest.approx(20.0)
    assert decibels(0.0, 1.0) == math.inf and math.isnan(decibels(0.0, 0.0))


def test_candidates_are_few_and_what_engines_hold() -> None:
    found = candidates()
    assert 6 <= len(found) <= 12 and all(has_theory(fmt) for fmt in found)
    assert {"int4_g32", "int4_g64", "int4_g128", "mxfp4", "nvfp4", "nvint4", "fp8_channel"} <= {f.name for f in found}


# --- expected -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "minifloat", "slack", "group", "crest", "decibel"),
    [
        (8, "mxfp8", 1.5, None, 7.546, 31.86),
        (6, "mxfp6", 1.5, None, 1.959, 31.54),
        (4, "mxfp4", 1.5, None, 2.042, 19.14),
        (4, "nvfp4", 1.05, 16, 2.390, 21.14),
    ],
)
def test_published_crossings(
    bits: int, minifloat: str, slack: float, group: int | None, crest: float, decibel: float
) -> None:
    """arXiv 2510.25602, whose integers count 2^(bits - 1) levels: there both curves meet, and nowhere else near."""
    element = lookup(minifloat).element

    def ahead(at: float) -> float:
        return integer_qsnr(2 ** (bits - 1), at, slack, group) - minifloat_qsnr(element, at, slack, group)

    assert ahead(crest - 0.01) > 0 > ahead(crest + 0.01)
    assert integer_qsnr(2 ** (bits - 1), crest, slack, group) == pytest.approx(decibel, abs=0.02)


def test_integers_lose_six_decibels_per_doubling() -> None:
    assert integer_qsnr(7, 2.0, 1.0) - integer_qsnr(7, 4.0, 1.0) == pytest.approx(20 * math.log10(2))
    assert integer_qsnr(128, 4.0, 1.0) == pytest.approx(4.77 + 6.02 * 8 - 20 * math.log10(4), abs=0.01)
    assert integer_qsnr(7, 3.0, 1.0, 16) - integer_qsnr(7, 3.0, 1.0) == pytest.approx(10 * math.log10(16 / 15))


def test_minifloats_between_their_limits() -> None:
    """Relative error alone while blocks are far above the subnormals, 1 / (24 x 4^m); all is lost far below them."""
    element = lookup("fp8_channel").element
    assert minifloat_qsnr(element, 2.0, 1.0) == pytest.approx(10 * math.log10(24 * 4**3), abs=0.02)
    assert minifloat_qsnr(element, 1e8, 1.0) == pytest.approx(0.0, abs=0.05)
    falling = [minifloat_qsnr(element, 2.0**power, 1.0) for power in range(1, 20)]
    assert all(a >= b - 1e-9 for a, b in pairwise(falling))


@pytest.mark.parametrize("name", [fmt.name for fmt in CATALOG.values() if has_theory(fmt) and fmt.element.bits > 3])
def test_normal_numbers_measure_what_is_expected(name: str) -> None:
    x, fmt = normal(), lookup(name)
    error, crest = loss(x, fmt)
    assert decibels(error, energy(x)) == pytest.approx(expected_qsnr(fmt, crest), abs=0.5)


@pytest.mark.parametrize("name", ["nf4_g64", "if4", "int4_g64_asym", "ternary_g64", "fp8_b128", "int8_tensor"])
def test_formats_without_theory(name: str) -> None:
    assert not has_theory(lookup(name))


def test_crossings_of_the_catalogue() -> None:
    assert crossover(lookup("mxint8"), lookup("mxfp8")) == pytest.approx(7.48, abs=0.01)
    assert crossover(lookup("nvint4"), lookup("nvfp4")) == pytest.approx(2.13, abs=0.01)
    assert crossover(lookup("mxint8"), lookup("mxfp4")) is None  # 8 bits against 4: ahead up to heavy outliers
