"""Refitted scales against exhaustive search, and what a refit may never do."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import Scales, find_scales, per_block, rounded, to_blocks
from qat.training import refit as module
from qat.training.refit import refit

SEARCHED = ["nvfp4", "int4_g64", "mxfp4", "int4_g64_asym", "nf4_g64", "if4", "q4_k", "q5_k"]
every_format = pytest.mark.parametrize("name", CATALOG)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def importance(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) ** 3


def losses(weight: Tensor, name: str, scales: Scales, h: Tensor) -> Tensor:
    """Per block, with codes made by the stored scale, in float64."""
    fmt = lookup(name)
    blocked = to_blocks(weight, fmt)
    values = rounded(blocked, fmt, scales).double() * per_block(scales.effective()).double()
    if scales.minimum is not None:
        values -= per_block(scales.minimum.effective()).double()
    return ((values - blocked.double()).square() * to_blocks(h, fmt).double()).sum(dim=(1, 3))


@every_format
@pytest.mark.parametrize("spread", [0.6, 1.0, 1.4])
def test_no_block_loses_more_than_before_and_most_lose_less(name: str, spread: float) -> None:
    weight, h, fmt = normal(96, 256), importance(96, 256), lookup(name)
    scales = find_scales(weight * spread, fmt)
    found = refit(weight, fmt, scales, h)
    before, after = losses(weight, name, scales, h), losses(weight, name, found, h)
    assert (after <= before * (1 + 1e-5)).all()
    assert spread == 1.0 or name not in SEARCHED or (after < before).double().mean() > 0.4
    assert found.stored.dtype == fmt.scale.storage and found.stored.shape == scales.stored.shape
    assert found.global_scale is scales.global_scale and found.choice is scales.choice and found.divisor is None


@pytest.mark.parametrize("name", ["nvfp4", "int4_g64", "mxfp4", "int4_g64_asym"])
def test_refits_reach_what_an_exhaustive_search_finds(name: str) -> None:
    """All 126 codes of E4M3, all powers of two, a fine grid of plain scales, every zero point."""
    weight, h, fmt = normal(16, 128, seed=7), importance(16, 128), lookup(name)
    scales = find_scales(weight, fmt)
    found = scales
    for _ in range(6):
        found = refit(weight, fmt, found, h)
    least = losses(weight, name, scales, h)
    for zero in [None] if scales.zero_point is None else range(-8, 8):
        for ratio in torch.linspace(0.3, 2.0, 171).tolist():
            stored = fmt.scale.store(scales.effective() * ratio, scales.global_scale)
            trial = replace(scales, stored=stored)
            if zero is not None:
                trial = replace(trial, zero_point=torch.full_like(scales.zero_point, zero))
            least = torch.minimum(least, losses(weight, name, trial, h))
    reached = losses(weight, name, found, h).sum() / least.sum()
    start = losses(weight, name, scales, h).sum() / least.sum()
    assert reached < 1.15 and reached - 1 < 0.6 * (start - 1)


def test_a_refit_of_minima_reaches_what_an_exhaustive_search_finds() -> None:
    """All 63 scales and 64 minima under the numbers that the super-block keeps."""
    fmt, weight, h = lookup("q4_k"), normal(16, 256, seed=7) + 0.3, importance(16, 256)
    scales = find_scales(weight, fmt)
    found = scales
    for _ in range(6):
        found = refit(weight, fmt, found, h)
    assert found.minimum is not None and scales.minimum is not None
    assert found.minimum.global_scale is scales.minimum.global_scale
    least = losses(weight, "q4_k", scales, h)
    for scale in range(20, 64):
        for minimum in range(64):
            below = replace(scales.minimum, stored=torch.full_like(scales.stored, minimum))
            trial = replace(scales, stored=torch.full_like(scales.stored, scale), minimum=below)
            least = torch.minimum(least, losses(weight, "q4_k", trial, h))
    start = losses(weight, "q4_k", scales, h).sum() / least.sum()
    reached = losses(weight, "q4_k", found, h).sum() / least.sum()
    assert reached < 1.3 and reached - 1 < 0.5 * (start - 1)  # which has both for free


@pytest.mark.parametrize("sign", [1, -1])
def test_a_zero_point_moves_towards_the_weights_that_it_clips(sign: int) -> None:
    """Half of the weights lie at 5 steps of 1.25, half at -10, of which a zero point of 4 leaves -12 to 3; with one of
    2 all of them are codes. And the mirror image."""
    fmt, weight = lookup("int4_g64_asym"), 1.25 * sign * torch.tensor([-10.0, 5.0]).repeat(1, 32)
    zero = torch.tensor([[4 if sign > 0 else -5]], dtype=torch.int8)
    scales = Scales(torch.tensor([[1.0]], dtype=torch.bfloat16), zero_point=zero, type=fmt.scale)
    found = refit(weight, fmt, scales, importance(1, 64))
    assert found.zero_point is not None
    assert (found.stored.item(), found.zero_point.item()) == (1.25, 2 if sign > 0 else -3)
    assert float(losses(weight, fmt.name, found, torch.ones(1, 64)).sum()) == 0.0


def test_the_importance_decides() -> None:
    """A block whose only weights that matter fit one scale exactly gets that scale."""
    weight, h = normal(1, 64), torch.full((1, 64), 1e-6)
    weight[0, :8] = torch.tensor([1.0, -2.0, 3.0, 4.0, -5.0, 6.0, 7.0, -7.0]) * 0.25
    h[0, :8] = 1.0
    scales = replace(find_scales(weight, lookup("int4_g64")), stored=torch.tensor([[0.28]], dtype=torch.bfloat16))
    assert refit(weight, lookup("int4_g64"), scales, h).stored.item() == 0.25
    assert refit(weight, lookup("int4_g64"), scales).stored.item() != 0.25


@pytest.mark.parametrize("name", ["nvfp4", "int4_g64_asym", "mxfp4", "fp8_b128", "int8_tensor", "q4_k"])
def test_pieces_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, h, fmt = normal(256, 256), importance(256, 256), lookup(name)
    scales = find_scales(weight * 1.3, fmt)
    whole = refit(weight, fmt, scales, h)
    monkeypatch.setattr(module, "CPU_VALUES", 1)
    pieces = refit(weight, fmt, scales, h)
    for a, b in ((whole.stored, pieces.stored), (whole.offset, pieces.offset)):
        assert (a is None and b is None) or torch.equal(a.to(torch.float32), b.to(torch.float32))


def test_a_stack_keeps_each_matrix_above_its_own_global_scale() -> None:
    fmt, stack = lookup("nvfp4"), torch.stack([normal(32, 64), 40 * normal(32, 64, seed=1)])
    each = [find_scales(matrix, fmt) for matrix in stack]
    above = torch.cat([one.global_scale.expand(32, 1) for one in each])
    stored = torch.cat([one.stored.view(torch.uint8) for one in each]).view(torch.float8_e4m3fn)
    found = refit(stack, fmt, Scales(stored, above, type=fmt.scale))
    apart = torch.cat([refit(matrix, fmt, one).effective() for matrix, one in zip(stack, each, strict=True)])
    assert torch.equal(found.effective(), apart)


@every_format
def test_dead_and_broken_blocks_keep_their_scales(name: str) -> None:
    fmt, weight = lookup(name), normal(128, 256)
    weight[:64] = 0.0
    scales = find_scales(weight, fmt)
    dead = refit(torch.zeros_like(weight), fmt, scales, torch.zeros_like(weight))
    assert torch.equal(dead.effective(), scales.effective())
    weight[100, 3] = torch.nan
    spoiled = refit(weight, fmt, scales)
    block = losses(weight, name, scales, torch.ones_like(weight)).isnan()
    assert block.any() and torch.equal(spoiled.effective()[block], scales.effective()[block])
    assert spoiled.effective().isfinite().all() and (spoiled.effective() > 0).all()
