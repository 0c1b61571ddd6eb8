"""Observers: calibration batches in, the magnitude that a static activation scale should map to the maximum out.

They are streaming: memory does not grow with the number of batches.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from qat.errors import FormatError
from qat.numbers.format import Format
from qat.numbers.numerics import finite_amax

Observer = Literal["minmax", "moving_average", "percentile", "mse", "kl"]


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

    @property
    def top(self) -> float:
        """The largest magnitude so far, where that is what is looked for; 0 where nothing was observed."""
        return self._amax or 0.0

    def widen(self, top: float) -> None:
        """Take another observer's `top` into account, which saw other text."""
        self._amax = max(self.top, top)

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

    def range(self) -> tuple[float, ...]:
        """`amax`, as every observer says it."""
        return (self.amax(),)

    def _least_squares(self) -> float:
        centres, counts = self._histogram.centres, self._histogram.counts
        limits = [float(self._amax or 0.0) * ratio / 100 for ratio in range(2, 101)]
        errors = []
        for limit in limits:
            scale = limit / self.fmt.element.max
            value = self.fmt.element.round((centres / scale).to(torch.float32)).to(torch.float64) * scale
            errors.append(float(((value - centres).square() * counts).sum()))
        return limits[errors.index(min(errors))]


class TwoSidedObserver:
    """The lowest and the highest value, for static formats with a zero point: an observer for each side of zero.

    Raises:
        FormatError: a kind that looks for a clip under a symmetric grid (mse, kl).
    """

    def __init__(self, kind: Observer, fmt: Format) -> None:
        if kind in ("mse", "kl"):
            raise FormatError(
                f"observer: {kind} finds a symmetric range, but {fmt.name} has a zero point; use minmax, "
                "moving_average or percentile"
            )
        self._sides = RangeObserver(kind, fmt), RangeObserver(kind, fmt)

    def add(self, x: Tensor) -> None:
        """Observe one batch of activations (any shape)."""
        below, above = self._sides
        below.add(x.clamp_max(0))
        above.add(x.clamp_min(0))

    @property
    def top(self) -> tuple[float, float]:
        """Those of both sides."""
        return self._sides[0].top, self._sides[1].top

    def widen(self, top: tuple[float, float]) -> None:
        """See `RangeObserver`."""
        for side, other in zip(self._sides, top, strict=True):
            side.widen(other)

    def range(self) -> tuple[float, ...]:
        """Lowest and highest value; a side on which nothing lies ends at 0.

        Raises:
            FormatError: nothing, or only zeros, was observed.
        """
        below, above = (side.amax() if side.top else 0.0 for side in self._sides)
        if not below and not above:
            self._sides[1].amax()  # which says so
        return -below, above


class ColumnObserver:
    """The magnitude of each column, for formats with a scale per column.

    Raises:
        FormatError: a kind that needs a histogram, of which there would be one for each column.
    """

    def __init__(self, kind: Observer, fmt: Format, momentum: float = 0.01) -> None:
        if kind not in ("minmax", "moving_average"):
            raise FormatError(
                f"observer: {kind} needs a histogram, and {fmt.name} has a scale for each column; use minmax or "
                "moving_average"
            )
        self.kind, self.momentum = kind, momentum
        self._amax = torch.zeros(0)

    def add(self, x: Tensor) -> None:
        """Observe one batch (..., columns)."""
        found = column_amax(x).cpu()
        if not len(self._amax):
            self._amax = found
        elif self.kind == "moving_average":
            self._amax = self._amax + self.momentum * (found - self._amax)
        else:
            self._amax = torch.maximum(self._amax, found)

    @property
    def top(self) -> tuple[float, ...]:
        """The largest magnitudes so far."""
        return tuple(self._amax.tolist())

    def widen(self, top: tuple[float, ...]) -> None:
        """See `RangeObserver`."""
        if top:
            other = torch.tensor(top)
            self._amax = torch.maximum(self._amax, other) if len(self._amax) else other

    def range(self) -> tuple[float, ...]:
        """That of each column; of one that held only zeros, the smallest of the others.

        Raises:
            FormatError: nothing, or only zeros, was observed.
        """
        seen = self._amax[self._amax > 0]
        if not len(seen):
            raise FormatError("no non-zero values were observed; calibrate on text that reaches this layer")
        return tuple(torch.where(self._amax > 0, self._amax, seen.min()).tolist())


AnyObserver = RangeObserver | TwoSidedObserver | ColumnObserver


def observer_for(kind: Observer, fmt: Format) -> AnyObserver:
    """The observer of the ranges that a format with a static part has.

    Raises:
        FormatError: there is none of this kind.
    """
    if fmt.is_columnwise:
        return ColumnObserver(kind, fmt)
    return TwoSidedObserver(kind, fmt) if fmt.is_static and fmt.zero_point else RangeObserver(kind, fmt)


def column_amax(x: Tensor) -> Tensor:
    """Largest finite magnitude of each column of x (..., columns), float32."""
    magnitude = x.detach().to(torch.float32).abs().flatten(0, -2)
    return torch.where(torch.isfinite(magnitude), magnitude, 0.0).amax(dim=0)


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
