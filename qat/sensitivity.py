"""Which layers suffer most from being quantized, told from one pass over a little text.

Three scores look only at what a layer is multiplied with (those of msModelSlim's analysis), one at what the layer gives
in its formats. They are cheap and know nothing of what the rest of the model makes of an error; the true price, KL with
one set of layers quantized, is measured in `qat.trainers.sensitivity`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.modes import dense
from qat.sites import Site, sites

Score = Literal["quartile", "std", "kurtosis", "mse"]
SAMPLE = 1 << 16  # numbers of each batch that the quartiles are taken from


@dataclass(frozen=True)
class Scores:
    """Of one layer; higher suffers more, NaN is not known (experts in a stack, inputs that were never seen).

    Attributes:
        quartile: a step of an 8-bit integer, 2 max |x| / 254, over the distance of the quartiles of the input.
        std: max |x| over the standard deviation of the input.
        kurtosis: of the input, over that of normal numbers: E[(x - mean)^4] / variance^2 - 3.
        mse: squared error of the output in the layer's formats, over the square of the output.
    """

    quartile: float
    std: float
    kurtosis: float
    mse: float


class _Seen:
    """What one layer was multiplied with, in sums: nothing of a batch is kept but a sample."""

    def __init__(self, site: Site) -> None:
        self.site, self.count = site, 0
        self.sums: Tensor | None = None  # of x, x^2, x^3, x^4; of the output's error and of the output, squared
        self.largest: Tensor | None = None
        self.samples: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, x: Tensor) -> None:
        site = self.site
        read = (x if site.input is None else site.input.transformed(x)).detach()
        flat = read.flatten().double()
        powers = [flat.pow(power).sum() for power in (1, 2, 3, 4)]
        with torch.autocast(x.device.type, enabled=False):
            sums = torch.stack([*powers, *self._output(x.detach(), read)])
        self.sums = sums if self.sums is None else self.sums + sums
        largest = flat.abs().amax()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        self.samples.append(flat[:: max(1, len(flat) // SAMPLE)].float())
        self.count += len(flat)

    def _output(self, x: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error and square of the output."""
        site = self.site
        if site.weight.dim() != 2 or read.shape[-1] != site.weight.shape[1]:
            return read.new_full((), math.nan, dtype=torch.float64), read.new_ones((), dtype=torch.float64)
        quantized = read.float() if site.input is None else site.input.quantize(x.float())
        output = functional.linear(read.float(), site.quantizer.transformed(site.weight).float())
        error = functional.linear(quantized, site.quantizer.quantize(site.weight).dequantize()) - output
        return error.double().square().sum(), output.double().square().sum()

    def scores(self) -> Scores:
        """Of everything that was seen."""
        if self.sums is None or self.largest is None:
            return Scores(math.nan, math.nan, math.nan, math.nan)
        largest, (first, second, third, fourth, error, output) = float(self.largest), self.sums.tolist()
        mean, square, cube, fourth = (value / self.count for value in (first, second, third, fourth))
        variance = square - mean**2
        central = fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4
        low, high = _quartiles(torch.cat(self.samples))
        return Scores(
            quartile=_over(2 * largest / 254, high - low),
            std=_over(largest, math.sqrt(max(variance, 0.0))),
            kurtosis=_over(central, variance**2) - 3,
            mse=_over(error, output),
        )


def _over(a: float, b: float) -> float:
    return a / b if b > 0 else math.inf if a > 0 else math.nan


def _quartiles(x: Tensor) -> tuple[float, float]:
    ordered = x.sort().values
    return float(ordered[len(ordered) // 4]), float(ordered[(3 * len(ordered)) // 4])


@torch.no_grad()
def scores(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, Scores]:
    """Scores of every quantized layer by path, from what the unquantized model computes of `batches`.

    Args:
        model: calibrated; tables, which multiply nothing, have no scores.
        batches: keyword arguments of the model.
    """
    seen = {site.path: _Seen(site) for site in sites(model, "weight") if not site.is_table}
    handles = [watching.site.watch(_watched(watching)) for watching in seen.values()]
    try:
        with dense(model, inputs=True):
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {path: watching.scores() for path, watching in seen.items()}


def _watched(seen: _Seen) -> Callable[[Tensor], None]:
    return lambda x: seen(x)


def sets(model: nn.Module) -> list[tuple[str, ...]]:
    """Paths of the quantized weights that are treated as one: fused layers, and weights that share a tensor."""
    together: dict[int, list[str]] = {}
    of_set: dict[str, list[str]] = {}
    for site in sites(model, "weight"):
        known = together.get(id(site.quantizer)) or next((of_set[p] for p in site.fused if p in of_set), None)
        members = [] if known is None else known
        members.append(site.path)
        together[id(site.quantizer)] = of_set[site.path] = members
    return list(dict.fromkeys(tuple(members) for members in of_set.values()))


def of_set(members: Iterable[str], each: dict[str, Scores], score: Score) -> float:
    """A set's score: the largest of its members'; NaN where none is known."""
    values = [getattr(each[path], score) for path in members if path in each]
    return max((value for value in values if not math.isnan(value)), default=math.nan)
