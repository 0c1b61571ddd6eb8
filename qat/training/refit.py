"""Scales that follow their weights: refitted by least squares, weighted by how much each weight matters.

The rule of QUASAR (arXiv 2608.13966). With codes q = round(w / s0) for a trial scale s0, the best multiplier is
s* = sum h q w / sum h q^2, and the loss under a stored scale s is sum h (s q - w)^2 = s^2 sum h q^2 - 2 s sum h q w +
a constant, so that one pass of rounding per trial decides. h is Adam's second moment of the weight, its gradient's mean
square. Codes are made again with the scale that is kept, which only comes nearer: nothing a refit does raises the loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qat.numbers.format import Format
from qat.numbers.numerics import Scales, per_block, rounded, to_blocks
from qat.numbers.scale import TINY, select

TRIALS = (0.8, 0.9, 1.0, 1.1, 1.25)  # around the scale in force; weights move little between two refits
POWERS = (0.5, 1.0, 2.0)  # where scales are powers of two
NOISE = 1e-6  # of a block's energy: what float32 sums may be off, which a gain has to exceed
CPU_VALUES = 1 << 18  # per piece: what is made of it stays in the cache of a core


@dataclass(frozen=True)
class _Sums:
    """Over each block, with h the importance, w the weight (above the minimum in force) and v the element values at a
    trial scale."""

    vw: Tensor
    vv: Tensor
    v: Tensor | None = None
    w: Tensor | None = None
    h: Tensor | None = None
    more: Tensor | None = None

    def shifted(self, by: Tensor) -> "_Sums":
        """The same of v - by: another zero point under the same codes."""
        assert self.v is not None and self.w is not None and self.h is not None
        return _Sums(self.vw - by * self.w, self.vv - 2 * by * self.v + by.square() * self.h)

    def raised(self, by: Tensor) -> "_Sums":
        """The same of w + by, another minimum under the same codes, and what that adds to the loss of any scale."""
        assert self.v is not None and self.w is not None and self.h is not None
        return _Sums(self.vw + by * self.v, self.vv, more=by * (2 * self.w + by * self.h))


@torch.no_grad()
def refit(weight: Tensor, fmt: Format, scales: Scales, importance: Tensor | None = None) -> Scales:
    """The scales that lose least among `scales` and their neighbours, block by block.

    Args:
        weight: (..., rows, columns), float.
        scales: in force; the per-tensor scale and the choice of elements stay.
        importance: of each weight's squared error, the weight's shape, not negative; None counts all alike.
    """
    importance = None if importance is None else to_blocks(importance.to(torch.float32), fmt)
    blocked = to_blocks(weight.detach().to(torch.float32), fmt)
    if blocked.device.type != "cpu":
        return _refit(blocked, fmt, scales, importance)
    high = max(1, CPU_VALUES // max(1, blocked[:1].numel()))
    parts = [slice(start, start + high) for start in range(0, len(blocked), high)]
    found = [
        _refit(blocked[part], fmt, scales.rows(part), None if importance is None else importance[part])
        for part in parts
    ]
    best = Scales.joined(found)
    minimum = None
    if scales.minimum is not None and best.minimum is not None:
        minimum = replace(scales.minimum, stored=best.minimum.stored)
    return replace(scales, stored=best.stored, zero_point=best.zero_point, minimum=minimum)


def _refit(blocked: Tensor, fmt: Format, scales: Scales, importance: Tensor | None) -> Scales:
    kept = scales.effective()
    best = scales
    least: Tensor | None = None
    for trial, sums in _trials(blocked, fmt, scales, importance):
        if trial.divisor is None:  # the scales in force come first
            least = _loss(kept, sums)
            continue
        assert least is not None
        for candidate, at in _solved(fmt, trial, sums):
            scale = candidate.effective()
            loss = _loss(scale, at)
            better = loss < least - NOISE * scale.square() * at.vv
            least = torch.where(better, loss, least)
            zero = candidate.zero_point
            if zero is not None and best.zero_point is not None:
                zero = torch.where(better, zero, best.zero_point)
            below = best.minimum
            if below is not None and candidate.minimum is not None:
                below = replace(below, stored=select(better, candidate.minimum.stored, below.stored))
            best = replace(best, stored=select(better, candidate.stored, best.stored), zero_point=zero, minimum=below)
    return best


def _loss(scale: Tensor, sums: _Sums) -> Tensor:
    """Less the part that no scale changes; a NaN is never less than anything, so a spoiled block keeps its scale."""
    loss = scale * (scale * sums.vv - 2 * sums.vw)
    return loss if sums.more is None else loss + sums.more


def _trials(blocked: Tensor, fmt: Format, scales: Scales, importance: Tensor | None) -> Iterator[tuple[Scales, _Sums]]:
    """(trial scales, with the trial as divisor unless it is the one in force; sums there), the one in force first."""
    kept = scales.effective()
    ratios = POWERS if fmt.scale.significant_bits == 1 else TRIALS
    above = blocked if scales.minimum is None else blocked + per_block(scales.minimum.effective())
    weighted = above if importance is None else above * importance
    affine = scales.zero_point is not None or scales.minimum is not None
    of_w = weighted.sum(dim=(1, 3)) if affine else None
    of_h = None
    if affine:
        ones = blocked.new_full(kept.shape, float(blocked.shape[1] * blocked.shape[3]))
        of_h = ones if importance is None else importance.sum(dim=(1, 3))
    for ratio in sorted(ratios, key=lambda ratio: ratio != 1.0):
        v = rounded(blocked, fmt, replace(scales, divisor=(kept * ratio).clamp_min(TINY)))
        vw = (v * weighted).sum(dim=(1, 3))
        heavy = v if importance is None else v * importance
        of_v = heavy.sum(dim=(1, 3)) if affine else None
        sums = _Sums(vw, v.mul_(heavy).sum(dim=(1, 3)), of_v, of_w, of_h)
        if ratio == 1.0:
            yield scales, sums
        yield replace(scales, divisor=kept * ratio), sums


def _solved(fmt: Format, trial: Scales, sums: _Sums) -> Iterator[tuple[Scales, _Sums]]:
    """Stored scales (and zero points) that are best for the codes of one trial."""
    above, zero = trial.global_scale, trial.zero_point
    if fmt.scale.significant_bits == 1:
        assert trial.divisor is not None
        yield replace(trial, stored=fmt.scale.store(trial.divisor, above)), sums
        return
    yield replace(trial, stored=fmt.scale.store(_positive(sums.vw / sums.vv, trial), above)), sums
    if zero is None and trial.minimum is None:
        return
    assert sums.v is not None and sums.w is not None and sums.h is not None
    slope = (sums.vw - sums.v * sums.w / sums.h) / (sums.vv - sums.v.square() / sums.h)
    if zero is None:
        yield _raised(fmt, trial, sums, (slope * sums.v - sums.w) / sums.h)
        return
    move = torch.nan_to_num((sums.v - sums.w / slope) / sums.h).round()
    bottom = -(2 ** (fmt.element.bits - 1))
    moved = (zero.to(move.dtype) + move).clamp(bottom, -bottom - 1)
    sums = sums.shifted(moved - zero.to(move.dtype))
    stored = fmt.scale.store(_positive(sums.vw / sums.vv, trial), above)
    yield replace(trial, stored=stored, zero_point=moved.to(torch.int8)), sums


def _raised(fmt: Format, trial: Scales, sums: _Sums, by: Tensor) -> tuple[Scales, _Sums]:
    """With minima that are higher by about so much, and the scale that is best then."""
    assert trial.minimum is not None and fmt.minimum is not None
    now = trial.minimum.effective()
    minimum = replace(trial.minimum, stored=fmt.minimum.store(now + by, trial.minimum.global_scale))
    sums = sums.raised(minimum.effective() - now)
    stored = fmt.scale.store(_positive(sums.vw / sums.vv, trial), trial.global_scale)
    return replace(trial, stored=stored, minimum=minimum), sums


def _positive(scale: Tensor, trial: Scales) -> Tensor:
    """Where nothing decides (a block of zeros) or a sign is wrong: the trial's."""
    assert trial.divisor is not None
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, trial.divisor)
