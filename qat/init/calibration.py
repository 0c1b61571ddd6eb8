"""What a few batches of text are for before training: activation ranges, what weights are multiplied with, and the
steps (`qat.init.step`) that put weights and scales where training begins."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qat.errors import FormatError
from qat.init.blocks import BlockStep, walk
from qat.init.kept import KeptModel, Store
from qat.init.scales import ScaleSearch
from qat.init.step import Calibration, InitStep, Track
from qat.init.together import Together
from qat.modes import dense
from qat.quantizer import SameTensor
from qat.sharded import read
from qat.sites import Site, sites, weights

Batches = Iterable[dict[str, Tensor]]  # keyword arguments of the model


class InitPlan(Protocol):
    """What a Scheme says of its initialisation."""

    def init_of(self, path: str, module: str) -> tuple[InitStep, ...]:
        """The steps of one weight."""


class _InputSums:
    """Sums a statistic of what each weight is multiplied with. Weights that read the same tensor share theirs."""

    def __init__(self, readers: list[Site], statistic: Callable[[Tensor, Site], Tensor]) -> None:
        self.statistic = statistic
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = defaultdict(int)
        self.owner: dict[str, str] = {}  # the first weight that read the same tensor
        self.last = SameTensor()
        self.handles = [site.watch(self._see(site)) for site in readers]

    def _see(self, site: Site) -> Callable[[Tensor], None]:
        path = site.path

        def see(x: Tensor) -> None:
            first = self.last.seen(x)  # which weight saw this very tensor
            if first is not None and self.owner.get(path, first) == first:
                self.owner[path] = first
                return
            self.owner[path] = path
            self.last.remember(x, path)
            flat = x.detach().flatten(0, -2)
            with torch.autocast(flat.device.type, enabled=False):  # BF16 products would not stay positive definite
                total = self.statistic(flat, site)
            self.sums[path] = self.sums[path].add_(total) if path in self.sums else total
            self.counts[path] += len(flat)

        return see

    def remove(self) -> None:
        self.last.forget()
        for handle in self.handles:
            handle.remove()

    def add_up(self, together: Together, device: torch.device) -> None:
        """Over processes that saw other text each."""
        if together.size == 1:
            return
        found = together.gather(({path: total.shape for path, total in self.sums.items()}, self.counts, self.owner))
        shapes: dict[str, torch.Size] = {}
        owners: dict[str, str] = {}
        for own, _, owner in found:  # experts that only other text reaches have nothing here
            shapes, owners = {**own, **shapes}, {**owner, **owners}
        self.owner = owners
        self.sums = {path: self.sums.get(path, torch.zeros(shape, device=device)) for path, shape in shapes.items()}
        together.sum(*self.sums.values())
        self.counts = {path: sum(counts.get(path, 0) for _, counts, _ in found) for path in self.sums}

    def means(self) -> dict[str, Tensor]:
        means = {path: total.div_(max(self.counts[path], 1)) for path, total in self.sums.items()}
        return {path: means[owner] for path, owner in self.owner.items()}


def calibrate(model: nn.Module, batches: Batches, scheme: InitPlan) -> list[str]:
    """Run `batches` through the unquantized model, then fix activation ranges and initialise weights and scales as the
    scheme says; returns what is worth telling."""
    text = list(batches)
    mean_square = observe(model, text)
    return [*unreached(model), *initialise(model, text, scheme, mean_square)]


def initialise(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    scheme: InitPlan,
    mean_square: dict[str, Tensor],
    track: Track = dict.items,
    store: Store | None = None,
) -> list[str]:
    """From an observed model to where training begins: the steps of the scheme, in order. Those that go block by block
    come after all others, so that the blocks before one are as they will be. What is finished is kept in `store`."""
    groups: dict[tuple[InitStep, ...], dict[str, Site]] = {}
    for path, site in weights(model).items():
        groups.setdefault(scheme.init_of(path, site.module), {})[path] = site
    sentences: list[str | None] = []
    later: list[tuple[tuple[InitStep, ...], Calibration]] = []
    with torch.no_grad():
        for steps in sorted(groups, key=lambda steps: not any(step.WHOLE_MODEL for step in steps)):
            calibration = Calibration(model, batches, groups[steps], mean_square, track, store)
            all_steps = _with_scales(steps)
            first = next((index for index, step in enumerate(all_steps) if _by_block(step)), len(all_steps))
            sentences += _run_first(all_steps[:first], calibration)
            mean_square = calibration.mean_square
            later.append((all_steps[first:], calibration))
        for steps, calibration in later:
            calibration.mean_square = mean_square
            sentences += _run_later(steps, calibration)
    return [sentence for sentence in sentences if sentence]


def _run_first(steps: tuple[InitStep, ...], calibration: Calibration) -> list[str | None]:
    """Steps before any walk, from where an earlier attempt left them."""
    kept = KeptModel(calibration.store, steps, calibration.model, calibration.batches)
    sentences = kept.restore()
    if sentences:
        for step in steps[: len(sentences)]:
            step.take_up(calibration)
        torch.clear_autocast_cache()
        calibration.mean_square = observe(calibration.model, calibration.batches)
    for step in steps[len(sentences) :]:
        sentences.append(step.run(calibration))
        kept.keep(sentences)
    return sentences


def _run_later(steps: tuple[InitStep, ...], calibration: Calibration) -> list[str | None]:
    """Steps that follow each other and go block by block share one walk."""
    sentences: list[str | None] = []
    for by_block, together in groupby(steps, _by_block):
        if by_block:
            sentences += walk(calibration, [step for step in together if isinstance(step, BlockStep)])
        else:
            sentences += [step.run(calibration) for step in together]
    return sentences


def _by_block(step: InitStep) -> bool:
    return isinstance(step, BlockStep) and step.by_block


def _with_scales(steps: tuple[InitStep, ...]) -> tuple[InitStep, ...]:
    """Where no step makes scales, they follow the format's own rule (round to nearest, RTN), before any block is
    looked at."""
    if any(step.MAKES_SCALES for step in steps):
        return steps
    first = next((index for index, step in enumerate(steps) if _by_block(step)), len(steps))
    return (*steps[:first], ScaleSearch(search="amax", weighted=False), *steps[first:])


@torch.no_grad()
def observe(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Fix activation ranges; returns the mean square of each channel of what weights are multiplied with, by path."""
    quantizers: dict[Any, Site] = {}
    for site in sites(model, "input", "key", "value"):
        quantizers[site.quantizer] = site
    together, text = Together(model), batches
    if by_rows := together.size > 1 and all(quantizer.observer_kind == "minmax" for quantizer in quantizers):
        text = together.rows(batches if isinstance(batches, list) else list(batches))
    sums = _InputSums(_multiplied(model), _squares)
    for quantizer in quantizers:
        quantizer.observe()
    try:
        with dense(model):
            read(model, lambda: _read(model, text))
    except BaseException:
        for quantizer in quantizers:
            quantizer.cancel()
        raise
    finally:
        sums.remove()
    if by_rows:
        sums.add_up(together, next(model.parameters()).device)
        for tops in together.gather([quantizer.observer.top for quantizer in quantizers]):
            for quantizer, top in zip(quantizers, tops, strict=True):
                quantizer.observer.widen(top)
    for quantizer, site in quantizers.items():
        try:
            quantizer.freeze()
        except FormatError as error:
            raise FormatError(f"{site.role} of {site.path}: {error}") from error
    return sums.means()


def _read(model: nn.Module, batches: Batches) -> None:
    for batch in batches:
        model(**batch)


def unreached(model: nn.Module) -> list[str]:
    """A sentence where the text of `observe` did not reach every part that data chooses between (experts)."""
    owners: dict[str, Site] = {site.module: site for site in sites(model, "weight")}
    counts = {module: site.owner.unreached() for module, site in owners.items()}
    missed, all_parts = (sum(count[index] for count in counts.values()) for index in (0, 1))
    layers = sum(count[1] > 0 for count in counts.values())
    if not missed:
        return []
    reached = f"{missed} of {all_parts} experts of {layers} layers were reached by no calibration token"
    shared = any(site.input is not None for module, site in owners.items() if counts[module][0])
    return [reached + ("; they share their layer's input range" if shared else "")]


def _multiplied(model: nn.Module) -> list[Site]:
    return [site for site in sites(model, "weight") if not site.is_table]


def _squares(x: Tensor, site: Site) -> Tensor:
    read = x if site.input is None else site.input.transformed(x)
    return read.float().square().sum(dim=0)


def _products(x: Tensor, site: Site) -> Tensor:
    x = x.float() if site.input is None else site.input.quantize(x.float())
    return x.t() @ x


@torch.no_grad()
def input_products(model: nn.Module, batches: Batches, paths: Collection[str] | None = None) -> dict[str, Tensor]:
    """Mean of x x^T over what these weights (all by default) are multiplied with, by path: one (columns, columns)
    float32 matrix per distinct input. Inputs are quantized as they will be when served, so that weights fit what they
    will meet; the layers before them are not."""
    readers = [site for site in _multiplied(model) if paths is None or site.path in paths]
    sums, together = _InputSums(readers, _products), Together(model)
    text = together.rows(batches if isinstance(batches, list) else list(batches)) if together.size > 1 else batches
    try:
        with dense(model, inputs=True):
            read(model, lambda: _read(model, text))
    finally:
        sums.remove()
    sums.add_up(together, next(model.parameters()).device)
    return sums.means()
