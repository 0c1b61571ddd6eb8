"""Where scales of two levels begin: block scales (and minima) that are a few bits under the numbers of a super-block.

llama.cpp's rule searches each block's scale and minimum under weights that favour large values, and rounds what it
found to six bits. Here each block is searched for its squared error, which importance may weigh; what the rounding to
six bits then costs is won back in turns: the numbers above are fitted to the codes by least squares, the whole numbers
below them try their neighbours.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qat.numbers.format import ABOVE, Format
from qat.numbers.numerics import Scales, in_super_blocks, per_block, rounded, scaled_
from qat.numbers.scale import select

STEPS, REACH = 20, 1.0  # ranges that are tried: as many codes as the element has, that many fewer to that many more
ROUNDS = 3  # of fitting the numbers above, then those below


def block_errors(blocked: Tensor, fmt: Format, scales: Scales, error_weight: Tensor | None, unit: Tensor) -> Tensor:
    """Squared error per block, (block rows, block columns) in units of `unit`, so that no square overflows."""
    difference = scaled_(rounded(blocked, fmt, scales), scales).sub_(blocked)
    difference.div_(per_block(unit)).square_()
    if error_weight is not None:
        difference.mul_(error_weight)
    return difference.sum(dim=(1, 3))


def fitting_minimum(blocked: Tensor, fmt: Format, scales: Scales, error_weight: Tensor | None) -> Scales | None:
    """The minima that are best with these scales: of codes from a range in the middle of the block's, then by least
    squares for those codes. The numbers above them stay."""
    if fmt.minimum is None or scales.minimum is None:
        return None
    above, scale = scales.minimum.global_scale, scales.effective()
    middle = (blocked.amin(dim=(1, 3)) + blocked.amax(dim=(1, 3))) / 2
    centred = in_super_blocks(scale * (fmt.element.max / 2) - middle, fmt, fmt.minimum, above)
    surplus = rounded(blocked, fmt, replace(scales, minimum=centred)).mul_(per_block(scale)).sub_(blocked)
    weight = torch.ones_like(blocked) if error_weight is None else error_weight
    wanted = surplus.mul_(weight).sum(dim=(1, 3)) / weight.sum(dim=(1, 3))
    return in_super_blocks(torch.where(torch.isfinite(wanted), wanted, 0.0), fmt, fmt.minimum, above)


def searched(blocked: Tensor, fmt: Format, base: Scales, error_weight: Tensor | None) -> Scales:
    """Scales of two levels (minima and elements with them) by search, no worse than `base` in any super-block.

    Args:
        blocked: the weight.
        base: by the format's own rule.
        error_weight: of each squared error, like `blocked`, or None.
    """
    low, high = blocked.amin(dim=(1, 3)).clamp_max(0.0), blocked.amax(dim=(1, 3))
    unit = high - low if fmt.minimum is not None else torch.maximum(-low, high)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    x = blocked / per_block(unit)  # so that nothing over- or underflows when squared
    scale, least = base.effective() / unit, torch.full_like(low, torch.inf)
    minimum = torch.zeros_like(low) if base.minimum is None else base.minimum.effective() / unit
    choice = torch.zeros_like(low, dtype=torch.uint8) if base.choice is None else base.choice
    for index in range(len(fmt.elements)):
        for found in _least_squares(x, fmt, index, low / unit, error_weight):
            of_choice = None if fmt.is_single else torch.full_like(choice, index)
            given = Scales(found[0], choice=of_choice, minimum=Scales(found[1]))
            lost = block_errors(x, fmt, given, error_weight, torch.ones_like(least))
            better = lost < least
            least = torch.where(better, lost, least)
            scale, minimum = (torch.where(better, new, old) for new, old in zip(found, (scale, minimum), strict=True))
            choice = choice.masked_fill(better, index)
    trial = in_super_blocks(scale * unit, fmt, fmt.scale)
    trial = replace(trial, choice=None if fmt.is_single else choice)
    if fmt.minimum is not None:
        trial = replace(trial, minimum=in_super_blocks(minimum * unit, fmt, fmt.minimum))
    return _better(blocked, fmt, base, trial, error_weight, whole=True)


def _least_squares(
    x: Tensor, fmt: Format, index: int, low: Tensor, h: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scale and minimum (0 where the format has none) of each block that are best for the codes of one range after
    another, of one of the elements; `x` spans 1, or has that magnitude."""
    element, weight = fmt.elements[index], torch.ones_like(x) if h is None else h
    of_h, of_x = weight.sum(dim=(1, 3)), (weight * x).sum(dim=(1, 3))
    below = x if fmt.minimum is None else x - per_block(low)
    for step in range(STEPS + 1):
        v = element.round_(below * (element.max + REACH * (2 * step / STEPS - 1)))
        heavy = v * weight
        of_v, of_vx, of_vv = heavy.sum(dim=(1, 3)), (heavy * x).sum(dim=(1, 3)), (heavy * v).sum(dim=(1, 3))
        scale, minimum = of_vx / of_vv, torch.zeros_like(low)
        if fmt.minimum is not None:
            determinant = of_h * of_vv - of_v.square()
            minimum = (of_v * of_vx - of_vv * of_x) / determinant
            scale = torch.where(minimum < 0, scale, (of_h * of_vx - of_x * of_v) / determinant)
        yield scale.clamp_min(0.0), minimum.clamp_min(0.0)


def settled(blocked: Tensor, fmt: Format, scales: Scales, error_weight: Tensor | None) -> Scales:
    """`scales` after the numbers above were fitted and those below tried their neighbours, in turns; nothing of it
    makes a super-block lose more."""
    for _ in range(ROUNDS):
        scales = _better(blocked, fmt, scales, _above(blocked, fmt, scales, error_weight), error_weight, whole=True)
        for scale, minimum in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1)):
            if minimum and scales.minimum is None:
                continue
            trial = replace(scales, stored=_moved(scales.stored, scale, fmt.scale.smallest, fmt.scale.largest))
            if scales.minimum is not None and fmt.minimum is not None:
                kind = fmt.minimum
                below = _moved(scales.minimum.stored, minimum, kind.smallest, kind.largest)
                trial = replace(trial, minimum=replace(scales.minimum, stored=below))
            scales = _better(blocked, fmt, scales, trial, error_weight, whole=False)
    return scales


def _moved(stored: Tensor, by: int, low: float, high: float) -> Tensor:
    moved = (stored.to(torch.int16) + by).clamp(int(low), int(high)).to(stored.dtype)
    return torch.where(stored > high, stored, moved)  # NaN stays


def _above(blocked: Tensor, fmt: Format, scales: Scales, h: Tensor | None) -> Scales:
    """The numbers above that are best for the codes and the whole numbers in force: least squares in two unknowns, or
    in one."""
    weight = torch.ones_like(blocked) if h is None else h
    now = scales.global_scale
    assert now is not None
    target = blocked / per_block(now)
    a = rounded(blocked, fmt, scales).mul_(per_block(fmt.scale.decode(scales.stored)))
    of_aa, of_ax = (_in_super_blocks(each, fmt) for each in (a * a * weight, a * target * weight))
    if scales.minimum is None or fmt.minimum is None:
        return replace(scales, global_scale=_stored(of_ax / of_aa, now))
    b = per_block(fmt.minimum.decode(scales.minimum.stored)).expand_as(a)
    pairs = (b * b, a * b, b * target)
    of_bb, of_ab, of_bx = (_in_super_blocks(each * weight, fmt) for each in pairs)
    determinant = of_aa * of_bb - of_ab.square()
    alone = of_bb == 0
    first = torch.where(alone, of_ax / of_aa, (of_bb * of_ax - of_ab * of_bx) / determinant)
    second = (of_ab * of_ax - of_aa * of_bx) / determinant
    before = scales.minimum.global_scale
    assert before is not None
    kept = torch.where(alone, before / now, second)
    minimum = replace(scales.minimum, global_scale=_stored(kept, now, before))
    return replace(scales, global_scale=_stored(first, now), minimum=minimum)


def _in_super_blocks(blocked: Tensor, fmt: Format) -> Tensor:
    """Sums over super-blocks, for each block of theirs."""
    blocks = fmt.super_block // fmt.block[1]
    sums = blocked.sum(dim=(1, 3))
    return sums.view(len(sums), -1 if sums.numel() else 0, blocks).sum(dim=2).repeat_interleave(blocks, dim=1)


def _stored(ratio: Tensor, unit: Tensor, before: Tensor | None = None) -> Tensor:
    """`ratio` in units of `unit` as a file holds it; what is in force where that is not a positive number."""
    wanted = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio * unit, unit if before is None else before)
    return ABOVE.decode(ABOVE.store(wanted))


def _better(blocked: Tensor, fmt: Format, now: Scales, trial: Scales, h: Tensor | None, *, whole: bool) -> Scales:
    """Block by block, or super-block by super-block, that of the two which loses less."""
    unit = now.effective()
    if whole:  # one unit for all that is added up
        blocks = fmt.super_block // fmt.block[1]
        unit = unit.view(len(unit), -1 if unit.numel() else 0, blocks).amax(dim=2).repeat_interleave(blocks, dim=1)
    before, after = (block_errors(blocked, fmt, each, h, unit) for each in (now, trial))
    if whole:
        before, after = (_in_super_blocks(each[:, None, :, None], fmt) for each in (before, after))
    return _chosen(after < before, trial, now)


def _chosen(where: Tensor, a: Scales, b: Scales) -> Scales:
    above, choice = (
        None if x is None or y is None else torch.where(where, x, y)
        for x, y in ((a.global_scale, b.global_scale), (a.choice, b.choice))
    )
    minimum = None if a.minimum is None or b.minimum is None else _chosen(where, a.minimum, b.minimum)
    return replace(b, stored=select(where, a.stored, b.stored), global_scale=above, choice=choice, minimum=minimum)
