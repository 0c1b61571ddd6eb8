"""Searched scales of two levels against llama.cpp's own rule, written here a second time, and against brute force."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qat.init.scales import initial_scales
from qat.init.super_blocks import block_errors, fitting_minimum, settled
from qat.numbers.catalog import lookup
from qat.numbers.numerics import fake_quantize, find_scales, in_super_blocks, quantize, to_blocks

MINIMA = ("q4_k", "q5_k")
NAMES = (*MINIMA, "q6_k")


def weight(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 768, generator=generator) * 0.05
    if kind == "outliers":
        return torch.where(torch.rand(x.shape, generator=generator) < 0.01, 15 * x, x)
    return x * torch.logspace(-2, 2, 768) + 0.02 if kind == "uneven" else x


def ranged(x: Tensor, h: Tensor, most: int, low: float, step: float, steps: int) -> tuple[Tensor, Tensor]:
    """llama.cpp's make_qkx2_quants, for blocks (..., n): scale and minimum by weighted least squares."""
    bottom, top = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True)
    scale, offset = (top - bottom) / most, bottom
    codes = ((x - bottom) / scale).round().clamp(0, most)
    best = (h * (scale * codes + offset - x).square()).sum(-1, keepdim=True)
    for index in range(steps + 1):
        codes = ((low + step * index + most) / (top - bottom) * (x - bottom)).round().clamp(0, most)
        of = [(h * t).sum(-1, keepdim=True) for t in (torch.ones_like(x), x, codes, codes * codes, codes * x)]
        determinant = of[0] * of[3] - of[2] ** 2
        mine, below = (of[0] * of[4] - of[1] * of[2]) / determinant, (of[3] * of[1] - of[2] * of[4]) / determinant
        mine, below = torch.where(below > 0, of[4] / of[3], mine), below.clamp_max(0)
        lost = (h * (mine * codes + below - x).square()).sum(-1, keepdim=True)
        better = lost < best
        best, scale, offset = (torch.where(better, a, b) for a, b in ((lost, best), (mine, scale), (below, offset)))
    return scale, -offset


def symmetric(x: Tensor) -> Tensor:
    """llama.cpp's make_qx_quants for 64 codes: the scale, of either sign, by least squares weighted with x^2."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best, scale = torch.full_like(extreme, -1.0), torch.zeros_like(extreme)
    for index in range(-9, 10):
        codes = (-(32 + 0.1 * index) / extreme * x).round().clamp(-32, 31)
        up, down = (x**3 * codes).sum(-1, keepdim=True), (x * x * codes * codes).sum(-1, keepdim=True)
        better = up * up / down > best
        best, scale = torch.where(better, up * up / down, best), torch.where(better, up / down, scale)
    return scale


def theirs(x: Tensor, name: str) -> Tensor:
    """What llama.cpp makes of rows of weights without an importance matrix."""
    blocks = x.view(len(x), -1, 256 // lookup(name).block[1], lookup(name).block[1])
    if name == "q6_k":
        scale = symmetric(blocks)
        extreme = scale.gather(-2, scale.abs().argmax(-2, keepdim=True))
        d = (extreme / -128).half().float()
        step = d * (scale * (-128 / extreme)).round().clamp_max(127)
        return ((blocks / step).nan_to_num().round().clamp(-32, 31) * step).view(x.shape)
    most, (low, step, steps) = (15, (-1.0, 0.1, 20)) if name == "q4_k" else (31, (-0.5, 0.1, 15))
    h = blocks.square().mean(-1, keepdim=True).sqrt() + blocks.abs()
    scale, minimum = ranged(blocks, h, most, low, step, steps)
    kept = []
    for each in (scale, minimum):
        top = each.amax(-2, keepdim=True)
        kept.append((top / 63).half().float() * (each * (63 / top)).nan_to_num().round().clamp_max(63))
    codes = ((blocks + kept[1]) / kept[0]).nan_to_num().round().clamp(0, most)  # any code where the scale is zero
    return (codes * kept[0] - kept[1]).view(x.shape)


def lost(x: Tensor, y: Tensor) -> Tensor:
    """Of each super-block."""
    return (x - y).double().square().view(len(x), -1, 256).sum(-1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["normal", "outliers", "uneven"])
def test_no_worse_than_llama_cpps_rule(name: str, kind: str) -> None:
    x, fmt = weight(kind), lookup(name)
    ours, plain = fake_quantize(x, fmt, initial_scales(x, fmt)), fake_quantize(x, fmt)
    other = theirs(x, name)
    assert lost(x, ours).sum() < 0.97 * lost(x, other).sum()
    assert float((lost(x, ours) <= lost(x, other)).float().mean()) > 0.9
    assert (lost(x, ours) <= lost(x, plain) * (1 + 1e-5)).all()
    assert 0.8 * lost(x, plain).sum() < lost(x, other).sum() < 1.01 * lost(x, plain).sum()  # it is a rule at all


@pytest.mark.parametrize("name", NAMES)
def test_the_importance_of_a_channel_counts(name: str) -> None:
    x, fmt = weight("normal"), lookup(name)
    importance = torch.rand(768, generator=torch.Generator().manual_seed(9)) ** 4
    importance[:32] = 0.0  # a block that nothing reads
    with_it, without = (fake_quantize(x, fmt, initial_scales(x, fmt, importance=h)) for h in (importance, None))
    weighted = [((x - y).square() * importance).sum() for y in (with_it, without)]
    assert weighted[0] < 0.95 * weighted[1]
    assert lost(x, with_it).isfinite().all() and lost(x, with_it).sum() < 4 * lost(x, without).sum()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_settled_loses_no_more_and_stays_what_a_file_holds(name: str) -> None:
    x, fmt = weight("uneven"), lookup(name)
    base = find_scales(x, fmt)
    found = settled(to_blocks(x, fmt), fmt, base, None)
    assert (lost(x, fake_quantize(x, fmt, found)) <= lost(x, fake_quantize(x, fmt, base)) * (1 + 1e-5)).all()
    assert lost(x, fake_quantize(x, fmt, found)).sum() < 0.98 * lost(x, fake_quantize(x, fmt, base)).sum()
    for each, kind in ((found, fmt.scale), (found.minimum, fmt.minimum)):
        if each is not None and kind is not None and each.global_scale is not None:
            assert int(each.stored.min()) >= kind.smallest and int(each.stored.max()) <= kind.largest
            above = each.global_scale.view(len(x), 3, -1)
            assert torch.equal(above.half().float(), above) and torch.equal(above, above[..., :1].expand_as(above))


def test_the_number_above_is_least_squares() -> None:
    """Codes and whole numbers are given, so that the best FP16 number can be had by trying all near it."""
    fmt = lookup("q4_k")
    x = weight("normal")[:4, :256]
    found = settled(to_blocks(x, fmt), fmt, find_scales(x, fmt), None)
    now = lost(x, fake_quantize(x, fmt, found))
    assert found.global_scale is not None
    for ratio in (0.97, 0.99, 0.995, 1.005, 1.01, 1.03):
        above = (found.global_scale * ratio).half().float()
        assert (lost(x, fake_quantize(x, fmt, replace(found, global_scale=above))) > now * 0.985).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_minima_fit_their_scales(weighted: bool) -> None:
    """Against all 64, block by block."""
    fmt, x = lookup("q4_k"), weight("uneven")
    blocked, base = to_blocks(x, fmt), find_scales(x, fmt)
    h = None if not weighted else torch.rand(blocked.shape, generator=torch.Generator().manual_seed(3)) ** 3
    scales = replace(base, stored=(base.stored.float() * 0.9).round().clamp(1, 63).to(torch.uint8))
    minimum = fitting_minimum(blocked, fmt, scales, h)
    assert minimum is not None and scales.minimum is not None
    every = []
    for code in range(64):
        trial = replace(scales, minimum=replace(scales.minimum, stored=torch.full_like(scales.stored, code)))
        every.append(block_errors(blocked, fmt, trial, h, scales.effective()))
    least = torch.stack(every).amin(dim=0)
    found = block_errors(blocked, fmt, replace(scales, minimum=minimum), h, scales.effective())
    assert found.sum() < 1.15 * least.sum()


def test_a_block_of_one_sign_needs_no_minimum_or_no_more_than_one_end() -> None:
    fmt = lookup("q4_k")
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).abs() + 1.0
    up, down = (initial_scales(sign * x, fmt) for sign in (1, -1))
    assert up.minimum is not None and down.minimum is not None
    assert (up.minimum.effective() < up.effective()).all() and int(down.minimum.stored.min()) > 0
    span = (x.amax() - x.amin()) / 15
    assert float((fake_quantize(-x, fmt, down) + x).abs().max()) < float(span)


def test_two_levels_hold_what_is_asked_for() -> None:
    fmt = lookup("q4_k")
    wanted = torch.tensor([[63.0, 31.5, 1.0, 0.0, torch.inf, torch.nan, 0.4, 62.6]])
    found = in_super_blocks(wanted, fmt, fmt.scale)
    assert found.stored.tolist() == [[63, 32, 1, 1, 255, 255, 1, 63]]
    assert found.effective()[0, :4].tolist() == [63.0, 32.0, 1.0, 1.0] and found.effective()[0, 4:6].isnan().all()
    assert fmt.minimum is not None and in_super_blocks(wanted, fmt, fmt.minimum).stored[0, 3] == 0
    given = in_super_blocks(wanted, fmt, fmt.scale, torch.full((1, 8), 2.0))
    assert given.stored[0, :2].tolist() == [32, 16]
    assert quantize(torch.zeros(1, 256), fmt, found).scales.minimum is None
