"""Searched scales against brute force over every scale that can be stored."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qat.checkpoints.hf import load_model
from qat.errors import FormatError
from qat.init.calibration import calibrate
from qat.init.scales import first_scales, initial_scales, shared_global_scale
from qat.lora import hold
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.format import Format
from qat.numbers.numerics import Scales, find_scales, from_blocks, global_scale_for, per_block, rounded, to_blocks
from qat.numbers.scale import F16, F32, UE4M3
from qat.scheme import Scheme
from qat.sites import weights
from qat.surgery import apply
from tests.tiny import tiny_model

every_format = pytest.mark.parametrize("fmt", CATALOG.values(), ids=lambda fmt: fmt.name)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def importance(columns: int) -> Tensor:
    """A few strongly excited channels, one that is never used."""
    weights = torch.rand(columns, generator=torch.Generator().manual_seed(9)) ** 4
    weights[3] = 0.0
    return weights


def error(x: Tensor, fmt: Format, scales: Scales, weights: Tensor | None = None) -> Tensor:
    """Weighted squared error per block (or super-block, whose blocks are searched together) in float64."""
    blocked = to_blocks(x, fmt)
    difference = rounded(blocked, fmt, scales).double() * per_block(scales.effective().double()) - blocked.double()
    if scales.minimum is not None:
        difference -= per_block(scales.minimum.effective().double())
    if weights is not None:
        difference *= to_blocks(weights.expand_as(x), fmt).double().sqrt()
    lost = difference.square().sum(dim=(1, 3))
    return lost.view(len(x), -1, fmt.super_block // fmt.block[1]).sum(dim=2) if fmt.super_block else lost


def all_scales(fmt: Format, base: Scales) -> list[Tensor]:
    """Every stored scale of an 8-bit scale type: the 126 positive finite E4M3 codes, or 80 powers of two."""
    codes = range(1, 127) if fmt.scale is UE4M3 else range(87, 167)
    return [torch.full_like(base.stored.view(torch.uint8), c).view(fmt.scale.storage) for c in codes]


@pytest.mark.parametrize("name", ["nvfp4", "nvint4", "if4", "mxfp4", "mxfp6", "mxfp8", "mxint8", "mxint4"])
@pytest.mark.parametrize("weighted", [False, True])
def test_sweep_finds_the_best_of_all_scales(name: str, weighted: bool) -> None:
    fmt, x = lookup(name), normal(16, 128)
    weights = importance(128) if weighted else None
    base = find_scales(x, fmt)
    found = initial_scales(x, fmt, "sweep", importance=weights)
    best = torch.full(base.stored.shape, math.inf, dtype=torch.float64)
    for stored in all_scales(fmt, base):
        for choice in range(len(fmt.elements)):
            chosen = torch.full(base.stored.shape, choice, dtype=torch.uint8) if base.choice is not None else None
            best = torch.minimum(best, error(x, fmt, Scales(stored, base.global_scale, choice=chosen), weights))
    reached = (error(x, fmt, found, weights) - best).abs() <= best * 1e-5
    # An important value far below its block's maximum can want a scale beyond the window of codes that are tried.
    assert reached.double().mean() >= (0.98 if weighted else 1.0)
    assert (error(x, fmt, found, weights) <= error(x, fmt, base, weights) * (1 + 1e-5)).all()
    plain_is_worse = error(x, fmt, base, weights) > best * 1.0001
    assert plain_is_worse.any() or name == "mxfp8"  # which has exponents to spare


@every_format
@pytest.mark.parametrize("weighted", [False, True])
def test_a_searched_start_is_never_worse_than_amax_in_any_block(fmt: Format, weighted: bool) -> None:
    width = 200 if fmt.block[0] > 1 else 256
    x = normal(12, width) * torch.logspace(-1, 1, 12)[:, None]
    weights = importance(width) if weighted else None
    plain = error(x, fmt, initial_scales(x, fmt, "amax"), weights)
    for start in ("mse", "auto"):
        searched = error(x, fmt, initial_scales(x, fmt, start, importance=weights), weights)
        assert (searched <= plain * (1 + 1e-5)).all()
    if fmt.element.bits <= 4 and fmt.block != (0, 0):
        assert (searched < plain).any()


@every_format
def test_starts_follow_the_size_of_the_weight(fmt: Format) -> None:
    """Errors of 1e-30 and 1e30 must not vanish or overflow when squared; FP16 scales end long before."""
    x = normal(4, 256)
    weights = importance(256)
    for start in ("mse", "auto"):
        expected = initial_scales(x, fmt, start, importance=weights)
        for exponent in (2 if fmt.super_block else -4, 14) if fmt.scale is F16 or fmt.super_block else (-90, 90):
            found = initial_scales(x * 2.0**exponent, fmt, start, importance=weights)
            assert torch.equal(found.effective(), expected.effective() * 2.0**exponent)


@every_format
@pytest.mark.parametrize("shape", [(256, 512), (3, 128, 256)])
def test_scales_that_are_loaded_afterwards_are_ones_like_those_of_the_format(
    fmt: Format, shape: tuple[int, ...]
) -> None:
    if len(shape) > 2 and fmt.block[0] == 0:  # refused: one scale would span experts
        return
    x = normal(*shape)
    blank, found = first_scales(x, fmt, None, [x]), first_scales(x, fmt, "amax", [x])
    pairs = [(blank, found)]
    if found.minimum is not None:
        assert blank.minimum is not None and not blank.minimum.effective().any()
        pairs.append((blank.minimum, found.minimum))
    for own, other in pairs:
        for field in dataclasses.fields(Scales):
            a, b = getattr(own, field.name), getattr(other, field.name)
            if isinstance(b, Tensor):
                assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), field.name
            elif field.name != "minimum":
                assert a is b, field.name
    assert (blank.effective() == 1).all()
    assert blank.global_scale is None or (blank.global_scale == 1).all()
    assert all(t is None or not t.any() for t in (blank.zero_point, blank.choice))
    if blank.minimum is not None and blank.minimum.global_scale is not None:
        assert (blank.minimum.global_scale == 1).all()
        assert blank.minimum.global_scale.data_ptr() != blank.global_scale.data_ptr()


def test_start_names() -> None:
    x = normal(4, 128)
    for name, same_as in (("nvfp4", "sweep"), ("mxfp4", "sweep"), ("int4_g64", "mse"), ("nf4_g64", "mse")):
        assert torch.equal(
            initial_scales(x, lookup(name), "auto").effective(), initial_scales(x, lookup(name), same_as).effective()
        )
        assert torch.equal(
            initial_scales(x, lookup(name), "amax").effective(), find_scales(x, lookup(name)).effective()
        )
    with pytest.raises(FormatError, match=r"int4_g64 stores bf16 scales, too many to sweep; use search: mse"):
        initial_scales(x, lookup("int4_g64"), "sweep")


def test_importance_moves_the_scale_to_what_matters() -> None:
    """With all weight on one small value, clipping the outlier beside it is right; without, it is not."""
    fmt = lookup("int4_g32")
    x = torch.full((1, 32), 0.02)
    x[0, 0], x[0, 5] = 1.0, 0.33
    weights = torch.zeros(32)
    weights[5] = 1.0
    plain, weighted = initial_scales(x, fmt, "mse"), initial_scales(x, fmt, "mse", importance=weights)
    assert error(x, fmt, weighted, weights).item() < error(x, fmt, plain, weights).item()
    assert error(x, fmt, plain).item() < error(x, fmt, weighted).item()
    again = initial_scales(x, fmt, "mse", importance=weights * 1e6)
    assert torch.equal(again.stored, weighted.stored)
    unchanged = initial_scales(x, fmt, "mse", importance=torch.zeros(32))  # nothing is known: the format's own rule
    assert torch.equal(unchanged.stored, find_scales(x, fmt).stored)


def test_mse_equals_a_search_over_eighty_ratios() -> None:
    fmt, x = dataclasses.replace(lookup("int4_g64"), scale=F32), normal(8, 128)
    found = error(x, fmt, initial_scales(x, fmt, "mse"))
    amax = to_blocks(x, fmt).abs().amax(dim=(1, 3))
    trials = [error(x, fmt, Scales(amax / 7 * (0.3 + 0.7 * (i + 1) / 80))) for i in range(80)]
    torch.testing.assert_close(found, torch.stack(trials).amin(dim=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["nvfp4", "int4_g32", "mxfp4", "int4_g32_asym"])
def test_a_block_with_nan_keeps_its_nan_scale(name: str) -> None:
    fmt, x = lookup(name), normal(2, 64)
    x[1, 3] = math.nan
    found, clean = initial_scales(x, fmt, "auto"), initial_scales(torch.cat([x[:1], x[:1]]), fmt, "auto")
    assert found.effective()[1, 0].isnan() and found.effective().isnan().sum() == 1
    if not fmt.global_scale:
        assert torch.equal(found.effective()[0], clean.effective()[0])


@pytest.mark.parametrize("name", ["nvfp4", "nvint4", "if4"])
def test_fused_layers_share_the_larger_global_scale(name: str) -> None:
    fmt = lookup(name)
    small, large = normal(4, 64), normal(8, 64) * 100
    shared = shared_global_scale([small, large], fmt)
    assert shared is not None and torch.equal(shared, global_scale_for(large.abs().amax(), fmt))
    assert torch.equal(shared, shared_global_scale([large, small], fmt))
    for weight in (small, large):
        for start in ("amax", "auto"):
            assert torch.equal(initial_scales(weight, fmt, start, shared).global_scale, shared)
    assert shared_global_scale([small, large], lookup("int4_g64")) is None


def test_blocks_of_an_overhang_ignore_the_padding() -> None:
    fmt = lookup("fp8_b128")
    x = normal(130, 200) + 3
    scales = initial_scales(x, fmt, "mse")
    assert scales.stored.shape == (2, 2)
    back = from_blocks(to_blocks(x, fmt), x.shape, fmt)
    assert torch.equal(back, x)


@pytest.mark.parametrize("match", ["*.self_attn.*_proj", "*.experts.*"])
def test_what_is_held_packed_keeps_the_scales_of_its_codes(match: str, tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe", tmp_path / "model", num_hidden_layers=1)
    rules = ({"match": match, "weight": "nvfp4"}, {"match": "*", "skip": "the rest"})
    scheme = Scheme(rules=rules, init=("scales",), learn="none")
    model = apply(load_model(source), scheme)
    for site in weights(model).values():
        site.quantizer.start.mul_(2)
    before = {path: site.quantizer.scales().effective().clone() for path, site in weights(model).items()}
    hold(model)
    calibrate(model, [{"input_ids": torch.arange(2, 34).view(1, -1)}], scheme)
    assert all(torch.equal(site.quantizer.scales().effective(), before[path]) for path, site in weights(model).items())
    assert all(site.is_held for site in weights(model).values())
