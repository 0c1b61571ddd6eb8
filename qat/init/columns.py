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

import torch
from torch import Tensor

from qat.init.scales import where_optional, with_stored
from qat.numbers.format import Format
from qat.numbers.numerics import Scales, from_blocks, per_block, rounded, to_blocks
from qat.numbers.scale import select

TOGETHER = 64  # columns between two updates of everything else
RATIOS = (0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2)  # around a scale whose type has too many neighbours to try
NOISE = 1e-5  # of a row's error: what float32 sums may be off, which a gain has to exceed


def of_block(scales: Scales, block: int) -> Scales:
    """Those of one block column; what divides is what is stored."""
    part = slice(block, block + 1)
    return replace(
        scales,
        stored=scales.stored[:, part],
        zero_point=None if scales.zero_point is None else scales.zero_point[:, part],
        choice=None if scales.choice is None else scales.choice[:, part],
        divisor=None,
    )


def codes_of_column(values: Tensor, fmt: Format, own: Scales) -> Tensor:
    """Element values of one column (rows,) by the scales of its block."""
    return rounded(values.view(-1, 1, 1, 1), fmt, own).view(-1)


def writable(scales: Scales) -> Scales:
    """Whose tensors `put` may change."""
    zero, choice = (None if t is None else t.clone() for t in (scales.zero_point, scales.choice))
    return replace(scales, stored=scales.stored.clone(), zero_point=zero, choice=choice, divisor=None)


def put(scales: Scales, block: int, own: Scales) -> None:
    """Write the scales of one block column."""
    part = slice(block, block + 1)
    scales.stored[:, part] = own.stored
    for name in ("zero_point", "choice"):
        if (mine := getattr(own, name)) is not None:
            getattr(scales, name)[:, part] = mine


# --- on arrival -----------------------------------------------------------------------------------


def arrived(values: Tensor, fmt: Format, own: Scales, upper: Tensor) -> Scales:
    """The scales with which a block loses least, among `own` and their neighbours.

    Args:
        values: (columns, rows) of the block, moved by all columns before it.
        own: of the block.
        upper: (columns, columns), the block's part of the factor of the inverse Hessian.
    """
    blocked = values.t()[:, None, None, :]
    if fmt.scale.sweep:
        stored = list(fmt.scale.neighbours(own.stored))
    else:
        stored = [fmt.scale.store(own.effective() * ratio, own.global_scale) for ratio in RATIOS]
    trials = [own, *(with_stored(blocked, fmt, own, each, None) for each in stored)]
    lost = _walked(values, fmt, trials, upper)
    best, least = own, lost[0]
    for trial, loss in zip(trials[1:], lost[1:], strict=True):
        better = loss < least
        least = torch.where(better, loss, least)
        best = _chosen(better, trial, best)
    return best


def _walked(values: Tensor, fmt: Format, trials: list[Scales], upper: Tensor) -> Tensor:
    """What each trial loses (trials, rows) in a walk over the block, all of them side by side."""
    zeros, choices = ([getattr(t, name) for t in trials] for name in ("zero_point", "choice"))
    together = Scales(
        torch.cat([trial.effective() for trial in trials]),
        zero_point=None if zeros[0] is None else torch.cat(zeros),
        choice=None if choices[0] is None else torch.cat(choices),
    )
    scale = together.stored.view(-1)
    work, lost = values.repeat(1, len(trials)), torch.zeros_like(scale)
    for column in range(len(work)):
        now = work[column]
        error = (now - codes_of_column(now, fmt, together) * scale) / upper[column, column]
        lost += error.square()
        work[column + 1 :] -= torch.outer(upper[column, column + 1 :], error)
    return lost.view(len(trials), -1)


def _chosen(better: Tensor, a: Scales, b: Scales) -> Scales:
    """Those of `a` in some rows (rows,) of a block, of `b` in others."""
    where = better[:, None]
    return replace(
        b,
        stored=select(where, a.stored, b.stored),
        zero_point=where_optional(where, a.zero_point, b.zero_point),
        choice=where_optional(where, a.choice, b.choice),
    )


# --- once all are known ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Refitted:
    """What `refitted` found.

    Attributes:
        latent: of the weight's shape and dtype.
        scales: in which `latent` rounds to the codes.
        better: how many rows lose less; others are as they were.
        left: share of the error that is left, of the whole matrix (scalar).
    """

    latent: Tensor
    scales: Scales
    better: int
    left: float


def refitted(weight: Tensor, latent: Tensor, fmt: Format, scales: Scales, matrix: Tensor, rounds: int) -> Refitted:
    """Scales and codes with less of tr((W - Q) H (W - Q)^T) than those that `latent` rounds to, row by row.

    Args:
        weight: W, (rows, columns) or a stack.
        latent: that rounds to the codes so far.
        fmt: a format whose blocks lie within one row; its per-tensor scale, zero points and choice of elements stay.
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
    kept = torch.where(better, after, before)
    left = float(kept.sum() / before.sum().clamp_min(torch.finfo(torch.float32).tiny))
    return Refitted(
        torch.where(rows, moved, latent), replace(scales, stored=stored, divisor=None), int(better.sum()), left
    )


def _columns(matrix: Tensor) -> Tensor:
    """(columns, rows) float32, so that one column is contiguous."""
    return matrix.detach().flatten(0, -2).to(torch.float32).t().contiguous()


def _values(latent: Tensor, fmt: Format, scales: Scales) -> Tensor:
    blocked = to_blocks(latent.detach().to(torch.float32), fmt)
    return rounded(blocked, fmt, replace(scales, divisor=None)).mul_(per_block(scales.effective()))


def _errors(lost: Tensor, matrix: Tensor) -> Tensor:
    """e^T H e of each row; `lost` is (columns, rows)."""
    return (lost * (matrix @ lost)).sum(dim=0)


class _Descent:
    """Where it stands: codes (element values), what they stand for, and what each column's error costs.

    Attributes:
        latent: (columns, rows), what was rounded last.
        pull: H (q - w), (columns, rows), half the gradient of the error.
    """

    def __init__(self, target: Tensor, latent: Tensor, fmt: Format, scales: Scales, matrix: Tensor) -> None:
        self.fmt, self.scales, self.matrix, self.latent = fmt, writable(scales), matrix, latent.clone()
        self.width = fmt.block_for(target.shape[1], target.shape[0])[1]
        shape = latent.t().shape
        codes = rounded(to_blocks(latent.t(), fmt), fmt, self.scales)
        self.codes = _columns(from_blocks(codes, shape, fmt))
        self.values = _columns(from_blocks(codes * per_block(self.scales.effective()), shape, fmt))
        self.pull = matrix @ (self.values - target)

    def go_over(self) -> None:
        """One step for the scale of each block and for the code of each column."""
        for block in range(len(self.latent) // self.width):
            part = slice(block * self.width, (block + 1) * self.width)
            own = self._scale(block, part)
            for start in range(part.start, part.stop, TOGETHER):
                self._round(slice(start, min(start + TOGETHER, part.stop)), own)

    def _scale(self, block: int, part: slice) -> Scales:
        own, codes = of_block(self.scales, block), self.codes[part]
        now = own.effective().view(-1)
        slope = (codes * self.pull[part]).sum(dim=0)
        curvature = (codes * (self.matrix[part, part] @ codes)).sum(dim=0)
        wanted = now - slope / curvature
        best, least = own, torch.zeros_like(now)
        # Powers of two: the nearest in the logarithm is not always the better one.
        for share in (1.0, 0.9) if self.fmt.scale.significant_bits == 1 else (1.0,):
            stored = self.fmt.scale.store((wanted * share)[:, None], own.global_scale)
            trial = replace(own, stored=stored)
            step = trial.effective().view(-1) - now
            change = step * (step * curvature + 2 * slope)
            better = (change < least) & (wanted > 0)  # blocks of zeros, and signs that would turn, stay
            least = torch.where(better, change, least)
            best = _chosen(better, trial, best)
        put(self.scales, block, best)
        values = codes * best.effective().view(-1)
        self._move(part, values)
        return best

    def _round(self, part: slice, own: Scales) -> None:
        scale, own_pull = own.effective().view(-1), self.pull[part].clone()
        matrix, values = self.matrix[part, part], self.values[part].clone()
        for column in range(len(values)):
            wanted = values[column] - own_pull[column] / matrix[column, column]
            codes = codes_of_column(wanted, self.fmt, own)
            self.latent[part.start + column], self.codes[part.start + column] = wanted, codes
            step = codes * scale - values[column]
            values[column] += step
            own_pull[column + 1 :] += torch.outer(matrix[column, column + 1 :], step)
        self._move(part, values)

    def _move(self, part: slice, values: Tensor) -> None:
        self.pull += self.matrix[:, part] @ (values - self.values[part])
        self.values[part] = values
