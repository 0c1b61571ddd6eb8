"""A few tokens of what each weight is multiplied with, and what its product loses when both are quantized: by this the
steps that fold something into weights choose."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qat.init.calibration import Batches
from qat.modes import dense
from qat.numbers.numerics import fake_quantize
from qat.quantizer import InputQuantizer
from qat.same_tensor import SameTensor
from qat.sites import Site, weights

TOKENS = 512  # per input
ROWS = 256  # of a weight whose product is looked at
BYTES = 1 << 30  # of samples at a time; Llama 8B has 1.7 GB of them in all


@dataclass
class Sample:
    """What one or several weights are multiplied with, as it is before any transform and quantizer.

    Attributes:
        x: (tokens, columns) float32.
        amax, mean_square: (columns,) over all the text, of which x is a part.
    """

    x: Tensor
    amax: Tensor
    mean_square: Tensor


@torch.no_grad()
def samples(model: nn.Module, batches: Batches, paths: Collection[str]) -> dict[str, Sample]:
    """By path of the weight, from the unquantized model; weights that read the same tensor share theirs."""
    text, by_path = list(batches), weights(model)
    taken = {path: _Taken(-(-TOKENS // len(text))) for path in paths}
    same = SameTensor()
    owner: dict[str, str] = {}

    def see(path: str, x: Tensor) -> None:
        first = same.seen(x)
        if first is not None and owner.setdefault(path, first) == first:
            return
        owner[path] = path
        same.remember(x, path)
        taken[path].add(x.detach().flatten(0, -2))

    handles: list[Any] = [by_path[path].watch(partial(see, path)) for path in paths]
    try:
        with dense(model, inputs=True):
            for batch in text:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    made = {path: taken[path].sample() for path in set(owner.values()) if taken[path].parts}
    return {path: made[first] for path, first in owner.items() if first in made}


class _Taken:
    """Tokens at even distances of every batch."""

    def __init__(self, per_batch: int) -> None:
        self.per_batch, self.count = per_batch, 0
        self.parts: list[Tensor] = []
        self.amax = self.squares = torch.zeros(())

    def add(self, x: Tensor) -> None:
        if not len(x):
            return
        step = max(1, len(x) // self.per_batch)
        self.parts.append(x[step // 2 :: step][: self.per_batch].float())
        x = x.float()
        amax, squares = x.abs().amax(dim=0), x.square().sum(dim=0)
        self.amax = torch.maximum(self.amax, amax) if self.count else amax
        self.squares = self.squares + squares if self.count else squares
        self.count += len(x)

    def sample(self) -> Sample:
        return Sample(torch.cat(self.parts), self.amax, self.squares / self.count)


def portions(groups: Mapping[str, Collection[str]], model: nn.Module) -> Iterator[dict[str, Collection[str]]]:
    """Groups of paths by name, as many at a time as BYTES of samples allow."""
    by_path, part, size = weights(model), dict[str, Collection[str]](), 0
    for name, paths in groups.items():
        read = {by_path[path].fused or (path,): by_path[path].weight.shape[-1] for path in paths}
        more = 4 * TOKENS * sum(read.values())
        if part and size + more > BYTES:
            yield part
            part, size = {}, 0
        part[name] = paths
        size += more
    if part:
        yield part


def some_rows(weight: Tensor) -> Tensor:
    """(rows, columns) float32 at even distances, of a matrix or of a stack."""
    flat = weight.detach().flatten(0, -2)
    return flat[:: max(1, len(flat) // ROWS)][:ROWS].float()


class Products:
    """Products of one input with the weights that read it, and what they lose when both sides are quantized.

    Args:
        sample: of the input.
        sites: the weights; of each, some rows are looked at.
    """

    def __init__(self, sample: Sample, sites: list[Site]) -> None:
        self.sample, self.sites = sample, sites
        self.rows = [some_rows(site.weight) for site in sites]
        with torch.autocast(sample.x.device.type, enabled=False):
            self.exact = [sample.x @ rows.t() for rows in self.rows]

    def lost(self, change: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], amax: Tensor) -> Tensor:
        """The squared error as a share of the product's square, summed over the weights (scalar), when sites quantize
        as they will; weights by their format's own scales.

        Args:
            change: of the columns of weights, for nothing but another way to write the same product.
            back: the same for inputs.
            amax: largest magnitude that such inputs have, which static parts of their scales follow.
        """
        x, total = back(self.sample.x), torch.zeros((), device=self.sample.x.device)
        read: dict[InputQuantizer | None, Tensor] = {None: x}
        with torch.autocast(x.device.type, enabled=False):
            for site, rows, exact in zip(self.sites, self.rows, self.exact, strict=True):
                if site.input is not None and site.input not in read:
                    read[site.input] = _quantized(site.input, x, amax)
                got = read[site.input] @ fake_quantize(site.quantizer.transformed(change(rows)), site.format).t()
                energy = exact.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
                total += (got - exact).square().sum() / energy
        return total


def _quantized(input: InputQuantizer, x: Tensor, amax: Tensor) -> Tensor:
    before = input.amax.clone()
    if input.needs_calibration:
        input.amax.copy_(input.range_of(x, amax))
    try:
        y: Tensor = input.quantize(x)
        return y
    finally:
        input.amax.copy_(before)
