"""Scales under a layer's Hessian, for error compensation (`qat.init.gptq`).

Two choices that a plain squared error gets wrong, since it knows nothing of how columns make up for each other:

- which scale a block gets when the walk over columns arrives at it (`arrived`): the one with which the columns of the
  block, as they are by then, lose least, each after those before it were made up for. What GPTQ loses in all is the sum
  of (error / U)^2 over columns, with U the factor of the inverse Hessian, so that a block's share needs no more than
  its own columns. With E4M3 scales the candidates reach a factor of two either way, 4-over-6 among them.
- scales and codes once all are known (`refitted`): descent on tr((W - Q) H (W - Q)^T), coordinate by coordinate. For
  fixed codes c of a block the best scale is least squares, s + c^T H (w - q) / c^T H c; for fixed scales the best code
  of a column is the nearest to w + (what the errors of all other columns ask of it). Neither can raise the error.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from qat.init.scales import with_stored
from qat.numbers.format import Format
from qat.numbers.numerics import Scales, from_blocks, rounded, scaled_, to_blocks, to_elements_
from qat.numbers.scale import select

TOGETHER = 32  # columns between two updates of everything else
ANEW = 256  # columns between two times that the gradient of the columns ahead is made from all errors
RATIOS = (0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2)  # around a scale whose type has too many neighbours to try
NOISE = 1e-5  # of a row's error: what float32 sums may be off, which a gain has to exceed
AT_ONCE = {"cpu": 1 << 18}  # values of trials: those of a core's cache; the rest of a device's memory
MOST_AT_ONCE = 1 << 26


def of_block(scales: Scales, block: int) -> Scales:
    """Those of one block column; what divides is what is stored."""
    part = slice(block, block + 1)
    above = scales.global_scale
    return replace(
        scales,
        stored=scales.stored[:, part],
        global_scale=above[:, part] if above is not None and above.shape == scales.stored.shape else above,
        zero_point=None if scales.zero_point is None else scales.zero_point[:, part],
        choice=None if scales.choice is None else scales.choice[:, part],
        divisor=None,
        minimum=None if scales.minimum is None else of_block(scales.minimum, block),
    )


class Rounding:
    """How the columns of a block are rounded, made once for all of them.

    Attributes:
        scale: float32 (rows,), what a code is multiplied with.
    """

    def __init__(self, fmt: Format, own: Scales) -> None:
        self.fmt = fmt
        self.scale = own.effective().reshape(-1).contiguous()
        self.zero = None if own.zero_point is None else own.zero_point.reshape(-1).to(torch.float32)
        self.choice = None if own.choice is None else own.choice.reshape(-1)
        self.minimum = None if own.minimum is None else own.minimum.effective().reshape(-1).contiguous()

    def codes(self, values: Tensor, out: Tensor) -> Tensor:
        """Element values of one column (rows,), written to `out`."""
        if self.minimum is not None:
            values = torch.add(values, self.minimum, out=out)
        return to_elements_(torch.div(values, self.scale, out=out), self.fmt, self.zero, self.choice)

    def values(self, codes: Tensor, out: Tensor) -> Tensor:
        """What element values (..., rows) stand for, written to `out`."""
        torch.mul(codes, self.scale, out=out)
        return out if self.minimum is None else out.sub_(self.minimum)

    def lost(self, values: Tensor, out: Tensor) -> Tensor:
        """What a column loses, written to `out`."""
        codes = self.codes(values, out)
        return torch.sub(values, self.values(codes, codes), out=out)


def writable(scales: Scales) -> Scales:
    """Whose tensors `put` may change."""
    zero, choice = (None if t is None else t.clone() for t in (scales.zero_point, scales.choice))
    minimum = None if scales.minimum is None else writable(scales.minimum)
    stored = scales.stored.clone()
    return replace(scales, stored=stored, zero_point=zero, choice=choice, divisor=None, minimum=minimum)


def put(scales: Scales, block: int, own: Scales) -> None:
    """Write the scales of one block column."""
    part = slice(block, block + 1)
    scales.stored[:, part] = own.stored
    for name in ("zero_point", "choice"):
        if (mine := getattr(own, name)) is not None:
            getattr(scales, name)[:, part] = mine
    if scales.minimum is not None and own.minimum is not None:
        put(scales.minimum, block, own.minimum)


# --- on arrival -----------------------------------------------------------------------------------


def arrived(values: Tensor, fmt: Format, own: Scales, upper: Tensor) -> Scales:
    """The scales with which a block loses least, among `own` and their neighbours.

    Args:
        values: (columns, rows) of the block, moved by all columns before it.
        own: of the block.
        upper: (columns, columns), the block's part of the factor of the inverse Hessian.
    """
    columns, rows = values.shape
    trials = 1 + len(fmt.scale.sweep or RATIOS)
    high = max(1, AT_ONCE.get(values.device.type, MOST_AT_ONCE) // (trials * columns))
    parts = [slice(start, start + high) for start in range(0, rows, high)]
    found = Scales.joined([_arrived(values[:, part], fmt, own.rows(part), upper) for part in parts])
    return replace(found, global_scale=own.global_scale)


def _arrived(values: Tensor, fmt: Format, own: Scales, upper: Tensor) -> Scales:
    trials = _trials(values, fmt, own)
    lost = _walked(values, fmt, trials, upper)
    lost = torch.nan_to_num(lost, nan=torch.inf, posinf=torch.inf)
    order = torch.arange(len(lost), device=lost.device)[:, None]
    best = torch.where(lost == lost.amin(dim=0), order, len(lost)).amin(dim=0, keepdim=True)  # the first, where equal

    def taken(of_trials: Tensor | None) -> Tensor | None:
        return None if of_trials is None else of_trials.view(lost.shape).gather(0, best).view(-1, 1)

    stored = taken(fmt.scale.to_bytes(trials.stored))
    assert stored is not None
    zero, choice, minimum = taken(trials.zero_point), taken(trials.choice), own.minimum
    if minimum is not None and trials.minimum is not None:
        below = taken(trials.minimum.stored)
        assert below is not None
        minimum = replace(minimum, stored=below)
    return replace(own, stored=fmt.scale.from_bytes(stored), zero_point=zero, choice=choice, minimum=minimum)


def _trials(values: Tensor, fmt: Format, own: Scales) -> Scales:
    """`own` and its neighbours, (trials x rows, 1)."""
    if fmt.scale.sweep:
        stored = fmt.scale.neighbours(own.stored)
    else:
        ratios = _ratios(values.device)[:, None, None]
        stored = fmt.scale.store(own.effective() * ratios, own.global_scale)
    count, blocked = len(stored), values.t()[:, None, None, :]
    zero, above = (None if t is None or not t.dim() else t.repeat(count, 1) for t in (own.zero_point, own.global_scale))
    around = Scales(stored.flatten(0, 1), own.global_scale if above is None else above, zero, type=own.type)
    if own.minimum is not None:
        around = replace(around, minimum=Scales.joined([own.minimum] * count))
    if zero is not None or own.minimum is not None or not fmt.is_single:
        around = with_stored(blocked.repeat(count, 1, 1, 1), fmt, around, around.stored, None)
    return Scales.joined([own, around])


@lru_cache(maxsize=8)
def _ratios(device: torch.device) -> Tensor:
    return torch.tensor(RATIOS, device=device)


def _walked(values: Tensor, fmt: Format, trials: Scales, upper: Tensor) -> Tensor:
    """What each trial loses (trials, rows) in a walk over the block, all of them side by side."""
    count = len(trials.stored) // values.shape[1]
    rounding, diagonal = Rounding(fmt, trials), upper.diagonal()
    work, unit = values.repeat(1, count), (upper / diagonal[:, None]).t().contiguous()
    lost = torch.empty_like(work)
    for column, (now, left) in enumerate(zip(work, lost, strict=True)):
        if column:  # what all columns before it ask of it
            now.addmv_(lost[:column].t(), unit[column, :column], alpha=-1)
        rounding.lost(now, left)
    return lost.div_(diagonal[:, None]).square_().sum(dim=0).view(count, -1)


# --- once all are known ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Refitted:
    """What `refitted` found.

    Attributes:
        latent: of the weight's shape and dtype.
        scales: in which `latent` rounds to the codes.
        before, after: error of each row; equal for rows that are as they were.
    """

    latent: Tensor
    scales: Scales
    before: Tensor
    after: Tensor

    @property
    def better(self) -> int:
        """How many rows lose less."""
        return int((self.after < self.before).sum())

    @property
    def left(self) -> float:
        """Share of the error that is left, of the whole matrix."""
        return float(self.after.sum() / self.before.sum().clamp_min(torch.finfo(torch.float32).tiny))

    def rows(self, part: slice) -> "Refitted":
        """Of some rows of a matrix."""
        return Refitted(self.latent[part], self.scales.rows(part), self.before[part], self.after[part])


def refitted(weight: Tensor, latent: Tensor, fmt: Format, scales: Scales, matrix: Tensor, rounds: int) -> Refitted:
    """Scales and codes with less of tr((W - Q) H (W - Q)^T) than those that `latent` rounds to, row by row.

    Args:
        weight: W, (rows, columns) or a stack.
        latent: that rounds to the codes so far.
        fmt: a format whose blocks lie within one row; its per-tensor scale (or the numbers above a super-block), zero
            points, minima and choice of elements stay.
        matrix: H, (columns, columns), positive definite.
        rounds: of going over all blocks.
    """
    target = _columns(weight)
    lost = _columns(from_blocks(_values(latent, fmt, scales), latent.shape, fmt)) - target
    before = _errors(lost, matrix)
    descent = _Descent(target, _columns(latent), fmt, scales, matrix)
    for _ in range(rounds):
        descent.go_over()
    moved = descent.latent.t().to(weight.dtype).reshape(weight.shape)  # what such a dtype changes is judged, too
    after = _errors(_columns(from_blocks(_values(moved, fmt, descent.scales), moved.shape, fmt)) - target, matrix)
    better = after < before * (1 - NOISE)
    rows = better.view(*weight.shape[:-1], 1)
    stored = select(better[:, None], descent.scales.stored, scales.stored)
    found = replace(scales, stored=stored, divisor=None)
    return Refitted(torch.where(rows, moved, latent), found, before, torch.where(better, after, before))


def _columns(matrix: Tensor) -> Tensor:
    """(columns, rows) float32, so that one column is contiguous."""
    return matrix.detach().flatten(0, -2).to(torch.float32).t().contiguous()


def _values(latent: Tensor, fmt: Format, scales: Scales) -> Tensor:
    blocked = to_blocks(latent.detach().to(torch.float32), fmt)
    return scaled_(rounded(blocked, fmt, replace(scales, divisor=None)), scales)


def _errors(lost: Tensor, matrix: Tensor) -> Tensor:
    """e^T H e of each row; `lost` is (columns, rows)."""
    return (lost * (matrix @ lost)).sum(dim=0)


class _Descent:
    """Where it stands: codes (element values) and what they stand for; all (columns, rows).

    Attributes:
        latent: what was rounded last.
        lost: q - w. Half the gradient of the error is H times that, the pull on a column.
    """

    def __init__(self, target: Tensor, latent: Tensor, fmt: Format, scales: Scales, matrix: Tensor) -> None:
        self.fmt, self.scales, self.matrix, self.latent = fmt, writable(scales), matrix, latent.clone()
        self.target, self.width = target, fmt.block_for(target.shape[1], target.shape[0])[1]
        shape = latent.t().shape
        codes = rounded(to_blocks(latent.t(), fmt), fmt, self.scales)
        self.codes = _columns(from_blocks(codes, shape, fmt))
        self.values = _columns(from_blocks(scaled_(codes.clone(), self.scales), shape, fmt))
        self.lost = self.values - target

    def go_over(self) -> None:
        """One step for the scale of each block and for the code of each column."""
        high = max(1, ANEW // self.width) * self.width
        for start in range(0, len(self.latent), high):
            stop = min(start + high, len(self.latent))
            pull = self.matrix[start:stop] @ self.lost
            for first in range(start, stop, self.width):
                self._block(slice(first, first + self.width), pull[first - start :])

    def _block(self, part: slice, pull: Tensor) -> None:
        """Fit the block's scale, then its codes.

        Args:
            pull: on the columns of the block and those after it, up to where it is made anew; updated for these.
        """
        before, ahead = self.values[part].clone(), slice(part.stop, part.start + len(pull))
        rounding = Rounding(self.fmt, self._scale(part, pull[: self.width]))
        rounding.values(self.codes[part], self.values[part])
        pull[: self.width].addmm_(self.matrix[part, part], self.values[part] - before)
        for start in range(0, self.width, TOGETHER):
            self._round(part.start, slice(start, min(start + TOGETHER, self.width)), rounding, pull)
        pull[self.width :].addmm_(self.matrix[ahead, part], self.values[part] - before)
        torch.sub(self.values[part], self.target[part], out=self.lost[part])

    def _scale(self, part: slice, pull: Tensor) -> Scales:
        own, codes = of_block(self.scales, part.start // self.width), self.codes[part]
        now = own.effective().view(-1)
        slope = (codes * pull).sum(dim=0)
        curvature = (codes * (self.matrix[part, part] @ codes)).sum(dim=0)
        wanted = now - slope / curvature
        best, least = own.stored, torch.zeros_like(now)
        # Powers of two: the nearest in the logarithm is not always the better one.
        for share in (1.0, 0.9) if self.fmt.scale.significant_bits == 1 else (1.0,):
            trial = replace(own, stored=self.fmt.scale.store((wanted * share)[:, None], own.global_scale))
            step = trial.effective().view(-1) - now
            change = step * (step * curvature + 2 * slope)
            better = (change < least) & (wanted > 0)  # blocks of zeros, and signs that would turn, stay
            least = torch.where(better, change, least)
            best = select(better[:, None], trial.stored, best)
        found = replace(own, stored=best)
        put(self.scales, part.start // self.width, found)
        return found

    def _round(self, first: int, part: slice, rounding: Rounding, pull: Tensor) -> None:
        """Columns `part` of the block that begins at `first`; updates the pull on the rest of the block."""
        here = slice(first + part.start, first + part.stop)
        matrix, values = self.matrix[here, here], self.values[here]
        unit, own_pull = matrix / matrix.diagonal(), pull[part] / matrix.diagonal()[:, None]
        moved = torch.empty_like(values)
        columns = zip(values, own_pull, self.latent[here], self.codes[here], moved, strict=True)
        for column, (value, pulled, latent, codes, step) in enumerate(columns):
            torch.sub(value, pulled, out=latent)
            rounding.values(rounding.codes(latent, codes), step).sub_(value)
            own_pull[column + 1 :].addr_(unit[column, column + 1 :], step)
        rounding.values(self.codes[here], values)
        if part.stop < self.width:
            rest = slice(here.stop, first + self.width)
            pull[part.stop : self.width].addmm_(self.matrix[rest, here], moved)
