"""Where scales come from: the start of a weight's scales, and observers that turn calibration batches into a range.

Weight starts minimise what the block loses, optionally weighted by how strongly each input channel is excited
(`importance`, the diagonal of the layer's Hessian). Observers are streaming: memory does not grow with the number of
batches.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from qat.errors import FormatError
from qat.numbers.format import Format
from qat.numbers.numerics import (
    Scales,
    choose_elements,
    find_scales,
    finite_amax,
    global_scale_for,
    per_block,
    rounded,
    to_blocks,
)
from qat.numbers.scale import select

Start = Literal["auto", "amax", "mse", "sweep"]
Observer = Literal["minmax", "moving_average", "percentile", "mse", "kl"]

CLIP_STEPS = 80  # ratios tried by the MSE clip, evenly from CLIP_LOW to 1
CLIP_LOW = 0.3


def start_scales(
    weight: Tensor,
    fmt: Format,
    start: Start = "auto",
    global_scale: Tensor | None = None,
    importance: Tensor | None = None,
) -> Scales:
    """Scales to begin training with.

    Args:
        weight: (rows, columns).
        start: "amax" the format's own rule; "mse" the best of 80 clipping ratios; "sweep" the best neighbour, for
            scale types that have some; "auto" sweep where it exists, else mse.
        global_scale: the fused set's per-tensor scale, if it is shared.
        importance: (columns,) non-negative weights of the squared error, e.g. the mean square of each input.

    Raises:
        FormatError: "sweep" for a scale type without neighbours.
    """
    base = find_scales(weight, fmt, global_scale)
    if start == "auto":
        start = "sweep" if fmt.scale.sweep else "mse"
    if start == "amax":
        return base
    blocked = to_blocks(weight.detach().to(torch.float32), fmt)
    error_weight = None
    if importance is not None:
        error_weight = to_blocks(importance.to(torch.float32).expand_as(weight), fmt)
    return _search(blocked, fmt, base, _candidates(fmt, base, start), error_weight)


def _candidates(fmt: Format, base: Scales, start: Start) -> Iterator[Tensor]:
    """Stored scales to try, each of the shape of `base.stored`."""
    effective = base.effective()
    if start == "mse":
        top = 2.0 if fmt.scale_rule == "mean" else 1.0  # a mean may be too small, a maximum never is
        for step in range(CLIP_STEPS):
            ratio = CLIP_LOW + (top - CLIP_LOW) * (step + 1) / CLIP_STEPS
            yield fmt.scale.store(effective * ratio, base.global_scale)
    elif fmt.scale.sweep:
        yield from fmt.scale.neighbours(base.stored)
    else:
        raise FormatError(f"{fmt.name} stores {fmt.scale} scales, too many to sweep; use start: mse (or auto)")


def _search(
    blocked: Tensor, fmt: Format, base: Scales, candidates: Iterator[Tensor], error_weight: Tensor | None
) -> Scales:
    unit = base.effective()
    best, best_error = base, _error(blocked, fmt, base, error_weight, unit)
    for stored in candidates:
        trial = _with_stored(blocked, fmt, base, stored, error_weight)
        error = _error(blocked, fmt, trial, error_weight, unit)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = replace(
            base,
            stored=select(better, trial.stored, best.stored),
            zero_point=_where_optional(better, trial.zero_point, best.zero_point),
            choice=_where_optional(better, trial.choice, best.choice),
        )
    return best


def _with_stored(blocked: Tensor, fmt: Format, base: Scales, stored: Tensor, error_weight: Tensor | None) -> Scales:
    trial = replace(base, stored=stored)
    if base.zero_point is not None:
        # A clipped asymmetric range keeps its centre: solve the zero point again for the narrower step.
        bottom = -(2 ** (fmt.element.bits - 1))
        centre = (blocked.amin(dim=(1, 3)).clamp_max(0.0) + blocked.amax(dim=(1, 3)).clamp_min(0.0)) / 2
        zero = torch.nan_to_num(-0.5 - centre / trial.effective()).round().clamp(bottom, -bottom - 1)
        return replace(trial, zero_point=zero.to(torch.int8))
    return trial if fmt.is_single else choose_elements(blocked, fmt, trial, error_weight)


def _error(blocked: Tensor, fmt: Format, scales: Scales, error_weight: Tensor | None, unit: Tensor) -> Tensor:
    """Squared error per block, (block rows, block columns) in units of `unit`, so that no square overflows."""
    difference = rounded(blocked, fmt, scales).mul_(per_block(scales.effective())).sub_(blocked)
    difference.div_(per_block(unit)).square_()
    if error_weight is not None:
        difference.mul_(error_weight)
    return difference.sum(dim=(1, 3))


def _where_optional(condition: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.where(condition, a, b)


def shared_global_scale(weights: list[Tensor], fmt: Format) -> Tensor | None:
    """One per-tensor scale for layers that a serving engine fuses; None where the format has none."""
    if not fmt.global_scale:
        return None
    return global_scale_for(torch.stack([finite_amax(weight) for weight in weights]).amax(), fmt)


@dataclass
class Histogram:
    """Counts of |x| in equal bins over [0, limit]; the limit doubles when larger values arrive, merging bin pairs."""

    bins: int = 2048
    limit: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, x: Tensor) -> None:
        """Count the magnitudes of x (any shape); NaN and infinity are left out."""
        magnitude = x.detach().to(torch.float32).abs().flatten()
        magnitude = magnitude[torch.isfinite(magnitude)]
        top = float(magnitude.amax()) if magnitude.numel() else 0.0
        if top == 0.0:
            return
        if not self.limit:
            self.limit, self.counts = top, torch.zeros(self.bins, dtype=torch.float64)
        while top > self.limit:
            self.counts = torch.cat([self.counts.view(-1, 2).sum(dim=1), torch.zeros(self.bins // 2)])
            self.limit *= 2
        self.counts += torch.histc(magnitude.cpu(), self.bins, 0, self.limit).to(torch.float64)

    @property
    def centres(self) -> Tensor:
        """Middle of each bin."""
        return (torch.arange(self.bins, dtype=torch.float64) + 0.5) * (self.limit / self.bins)


class RangeObserver:
    """Streaming estimate of the magnitude that a static activation scale should map to the element's maximum.

    minmax: the largest seen. moving_average: m <- 0.99 m + 0.01 max(batch) (PyTorch's rule). percentile: the 99.99th.
    mse: the clip with the least squared error under `fmt`. kl: TensorRT's search, 128 quantized bins against 2048.
    """

    def __init__(self, kind: Observer, fmt: Format, percentile: float = 99.99, momentum: float = 0.01) -> None:
        self.kind, self.fmt, self.percentile, self.momentum = kind, fmt, percentile, momentum
        self._amax: float | None = None
        self._histogram = Histogram()

    def add(self, x: Tensor) -> None:
        """Observe one batch of activations (any shape)."""
        top = float(finite_amax(x))
        if self._amax is None:
            self._amax = top
        elif self.kind == "moving_average":
            self._amax += self.momentum * (top - self._amax)
        else:
            self._amax = max(self._amax, top)
        if self.kind in ("percentile", "mse", "kl"):
            self._histogram.add(x)

    def amax(self) -> float:
        """The range found so far.

        Raises:
            FormatError: nothing, or only zeros, was observed.
        """
        if not self._amax:
            raise FormatError("no non-zero activations were observed; calibrate on text that reaches this layer")
        if self.kind == "percentile":
            share = self._histogram.counts.cumsum(0) / self._histogram.counts.sum()
            return float(self._histogram.centres[int((share < self.percentile / 100).sum())])
        if self.kind == "mse":
            return self._least_squares()
        if self.kind == "kl":
            return _kl_threshold(self._histogram, 2 ** (self.fmt.element.bits - 1))
        return self._amax

    def _least_squares(self) -> float:
        centres, counts = self._histogram.centres, self._histogram.counts
        limits = [float(self._amax or 0.0) * ratio / 100 for ratio in range(2, 101)]
        errors = []
        for limit in limits:
            scale = limit / self.fmt.element.max
            value = self.fmt.element.round((centres / scale).to(torch.float32)).to(torch.float64) * scale
            errors.append(float(((value - centres).square() * counts).sum()))
        return limits[errors.index(min(errors))]


def _kl_threshold(histogram: Histogram, levels: int) -> float:
    """Clip at which the clipped histogram, merged to `levels` bins, diverges least from the original."""
    counts, width = histogram.counts, histogram.limit / histogram.bins
    best, best_kl = histogram.bins, math.inf
    for keep in range(levels, histogram.bins + 1, max(1, levels // 16)):
        reference = counts[:keep].clone()
        reference[-1] += counts[keep:].sum()
        owner = torch.arange(keep) * levels // keep
        used = (counts[:keep] > 0).to(torch.float64)
        mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, owner, counts[:keep])
        cells = torch.zeros(levels, dtype=torch.float64).index_add_(0, owner, used)
        merged = (mass / cells.clamp_min(1))[owner] * used
        p, q = reference / reference.sum(), merged / merged.sum().clamp_min(1e-30)
        kl = float((p * torch.log(p.clamp_min(1e-30) / q.clamp_min(1e-30)))[p > 0].sum())
        if kl < best_kl:
            best, best_kl = keep, kl
    return (best + 0.5) * width
