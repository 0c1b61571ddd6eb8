"""The initialisation step `gptq`: error-compensated rounding (arXiv 2210.17323).

Columns are rounded one after another; what a column loses is made up for by the columns still to come, as far as the
inputs seen in calibration are correlated. The result is not codes but *latent* weights that round to them, so that
everything else (fake quantization, learned scales, export) goes on as from any other.

With `sequential` the model is gone through block by block, so that each layer is fitted to the inputs that the
quantized layers before it give, and can make up for a part of what those have lost (GPTAQ, arXiv 2504.02692; Qronos,
2505.11695; QEP, 2504.09629).
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qat.errors import FormatError
from qat.init.blocks import Block, BlockStep, block_of
from qat.init.calibration import input_products
from qat.init.columns import TOGETHER, Rounding, arrived, of_block, put, refitted, writable
from qat.init.scales import Search, search_scales, share_global_scales
from qat.init.step import Calibration
from qat.init.together import Together, opened_parts
from qat.numbers.format import Format
from qat.numbers.numerics import Scales
from qat.sites import Site

# Share of the mean diagonal added to it. Ten times the paper's: directions that calibration hardly excites are not
# free, since served inputs are quantized themselves and come from other text.
DAMPING = 0.1


def compensate(weight: Tensor, fmt: Format, scales: Scales, gram: "Tensor | Inverse") -> Tensor:
    """Latent weights whose nearest rounding is the GPTQ solution.

    Args:
        weight: (rows, columns), or a stack (experts, rows, columns).
        fmt: a format whose blocks lie within one row.
        scales: fixed scales of `weight`.
        gram: (columns, columns) mean of x x^T over the layer's inputs x, or what `inverse` made of it.

    Raises:
        FormatError: the format's blocks span several rows.
    """
    return compensated(weight, fmt, scales, gram)[0]


def compensated(
    weight: Tensor, fmt: Format, scales: Scales, gram: "Tensor | Inverse", choose: bool = False
) -> tuple[Tensor, Scales]:
    """`compensate`, and the scales that its result belongs to: with `choose` each block gets its own when the walk
    arrives at it (see `qat.init.columns`), else those that were given."""
    stacked = weight.shape
    weight = weight.flatten(0, -2)  # rows are independent, so a stack of experts is one tall matrix
    rows, columns = weight.shape
    if not fmt.is_rowwise:
        raise FormatError(f"{fmt.name}: error compensation needs blocks within one row; use init: scales")
    upper = (gram if isinstance(gram, Inverse) else inverse(gram)).upper
    width = fmt.block_for(rows, columns)[1]
    # A block that gets its scales on arrival must be up to date by then.
    together = TOGETHER if not choose or TOGETHER % width == 0 or width % TOGETHER == 0 else width
    scales = writable(scales) if choose else scales
    work = weight.detach().to(torch.float32).t().contiguous()  # (columns, rows): one column is contiguous
    for start in range(0, columns, together):
        stop = min(start + together, columns)
        errors, diagonal = work.new_empty(stop - start, rows), upper.diagonal()[start:stop, None]
        unit = upper[start:stop, start:] / diagonal
        for place, (column, lost) in enumerate(zip(range(start, stop), errors.unbind(), strict=True)):
            if column % width == 0:
                own = of_block(scales, column // width)
                if choose:
                    part = slice(column, column + width)
                    own = arrived(work[part], fmt, own, upper[part, part])
                    put(scales, column // width, own)
                rounding = Rounding(fmt, own)
            rounding.lost(work[column], lost)
            work[column + 1 : stop].addr_(unit[place, place + 1 : stop - start], lost, alpha=-1)
        work[stop:].addmm_(unit[:, stop - start :].t(), errors, alpha=-1)
    return work.t().contiguous().to(weight.dtype).view(stacked), scales


@dataclass(frozen=True)
class Inverse:
    """Of a damped Gram matrix.

    Attributes:
        upper: float32 upper Cholesky factor of the inverse.
        damping: what was added to the diagonal (scalar).
        dead: inputs that were always zero, which count as one.
        singular: whether it took more damping than usual.
    """

    upper: Tensor
    damping: Tensor
    dead: int
    singular: bool


def inverse(gram: Tensor) -> Inverse:
    """Damp a Gram matrix and factorise its inverse."""
    matrix = gram.to(torch.float64).clone()
    diagonal = matrix.diagonal()
    zero = diagonal == 0
    diagonal[zero] = 1.0
    damping = DAMPING * diagonal.mean()
    added = torch.zeros_like(damping)
    for attempt in range(4):  # float32 sums over few tokens may leave a negative direction: damp more
        diagonal += damping
        added = added + damping
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).to(torch.float32)
            return Inverse(upper, added, int(zero.sum()), attempt > 0)
        damping = damping * 10
    raise FormatError("the inputs' second moments are not positive definite; calibrate on more, or other, text")


def damped(gram: Tensor, factor: Inverse) -> Tensor:
    """The float32 matrix that `factor` is the inverse of."""
    matrix = gram.to(torch.float32).clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += factor.damping
    return matrix


def corrected(weight: Tensor, lost: Tensor, gram: Tensor, share: float) -> Tensor:
    """Weights (rows, columns) that make up for what their inputs have lost: W + b W (X - X') X'^T (X' X'^T + d I)^-1.

    Args:
        lost: (columns, columns) mean of (x - x') x'^T, with x the inputs in the dense model, x' as they are now.
        gram: (columns, columns) mean of x' x'^T.
        share: b, how much of the least squares solution is taken; all of it follows the calibration text closely.
    """
    matrix = gram.to(torch.float64).clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    moved = torch.linalg.solve(matrix, lost.to(torch.float64), left=False)
    return (weight.to(torch.float64) + share * (weight.to(torch.float64) @ moved)).to(weight.dtype)


STACKED = 1 << 26  # values that are walked at once: beyond it, steps are long enough by themselves
PRODUCTS = 4 << 30  # bytes of input products at a time: Llama 8B has 33 GB of them in all, 1 GB per block


class Gptq(BlockStep):
    """Scales by search, then weights moved so that each column makes up for what earlier ones lost in rounding.

    The inputs' second moments are taken as the inputs will be quantized when served. Weights that multiply nothing
    (embeddings), or were never reached, get their scales only.

    Attributes:
        search, weighted: see `qat.init.scales.ScaleSearch`.
        sequential: take them after the quantized blocks and layers before, not in the dense model.
        correction: how much of what the inputs have lost by then the weights make up for, see `corrected`.
        choose: "arrival" lets each block take its scales when the walk over columns arrives at it, by what it and its
            columns then lose; the search before only says around which.
        refit: how often scales and codes are fitted again afterwards, see `qat.init.columns.refitted`.
    """

    MAKES_SCALES = True
    DIVIDES = True

    kind: Literal["gptq"] = "gptq"
    search: Search = "auto"
    weighted: bool = True
    sequential: bool = False
    correction: float = Field(default=0.0, ge=0.0, le=1.0)
    choose: Literal["before", "arrival"] = "before"
    refit: int = Field(default=0, ge=0, le=10)

    @model_validator(mode="after")
    def _consistent(self) -> "Gptq":
        if self.correction and not self.sequential:
            raise ValueError("gptq: correction needs the inputs of the quantized model; set sequential: true too")
        return self

    @property
    def by_block(self) -> bool:
        """See `BlockStep`."""
        return self.sequential

    def passes(self) -> float:
        """See `BlockStep`: half way through a block on average, for each of four tensors, in both streams where what
        the inputs have lost is asked for."""
        return 4.0 if self.correction else 2.0

    def run_outside(self, calibration: Calibration) -> None:
        """See `BlockStep`: as if it were not sequential."""
        self.run(calibration)

    def run_block(self, block: Block) -> Counter[str]:
        """See `BlockStep`. Layers that come later read what the compensated earlier ones give. Processes that hold the
        model together add up moments and divide the weights that read one tensor."""
        counts: Counter[str] = Counter()
        sites, together = dict(block.sites), Together(block.calibration.model)
        for group in block.groups():
            gram, lost = _moments(block, group[0], self.correction > 0 and group[0].weight.dim() == 2, together)
            mine = [site for index, site in enumerate(group) if together.owns(index)]
            if lost is not None:
                for site in mine:
                    site.weight.copy_(corrected(site.weight, lost, gram, self.correction))
                together.spread(group)  # their scales depend on each other's weights
            share_global_scales(replace(block.calibration, sites={site.path: sites.pop(site.path) for site in group}))
            for site in mine:
                search_scales(site, self.search, gram.diagonal() if self.weighted else None)
            inverses = _Inverses(counts, told=together.owns(0))
            if mine:
                self._compensate(mine, gram, inverses)
            together.spread(group)
        share_global_scales(replace(block.calibration, sites=sites))
        for site in sites.values():
            search_scales(site, self.search)
        return together.total(counts)

    def run(self, calibration: Calibration) -> str | None:
        """Go through the model in parts, of which there are never more products than PRODUCTS bytes, or one block's.

        The text is read once per part, and the last blocks come first: what a compensated weight changes comes after
        it, so that all parts see the inputs of the same model. A weight that another module shares is written last,
        therefore.
        """
        sites, mean_square = calibration.sites, calibration.mean_square
        for part in opened_parts(calibration):
            share_global_scales(replace(calibration, sites=part))
            for path, site in part.items():
                if path not in mean_square:
                    search_scales(site, self.search)
        postponed: list[tuple[Site, Tensor]] = []
        counts, together = Counter[str](), Together(calibration.model)
        counted = Counter(id(weight) for _, weight in calibration.model.named_parameters(remove_duplicate=False))
        shared = {path for path, site in sites.items() if counted[id(site.parameter)] > 1}
        for paths in _parts({path: square for path, square in mean_square.items() if path in sites}):
            own = replace(calibration, sites={path: sites[path] for path in paths})
            products = input_products(calibration.model, calibration.batches, paths)
            for part in opened_parts(own):
                postponed += self._run_part(replace(own, sites=part), products, shared, counts, together)
            torch.clear_autocast_cache()  # it holds BF16 copies of the weights as they were
        latents = {site.path: latent for site, latent in postponed}
        for part in opened_parts(replace(calibration, sites={site.path: site for site, _ in postponed})):
            for path, site in part.items():
                site.parameter.copy_(latents[path])
        return self.sentence(together.total(counts))

    def _run_part(
        self,
        part: Calibration,
        products: dict[str, Tensor],
        shared: set[str],
        counts: Counter[str],
        together: Together,
    ) -> list[tuple[Site, Tensor]]:
        """Compensate whole weights; those that are shared stay, and their latents are returned."""
        before = {path: site.parameter.clone() for path, site in part.sites.items() if path in shared}
        inverses = _Inverses(counts)
        inputs = list({id(products[path]): None for path in part.sites})  # weights that read one share its inverse
        places = [inputs.index(id(products[path])) for path in part.sites]
        tracked = part.track(part.sites) if together.size == 1 else part.sites.items()
        for place, group in groupby(zip(places, tracked, strict=True), key=itemgetter(0)):
            own = [site for _, (_, site) in group] if together.owns(place) else []
            for site in own:
                diagonal = products[site.path].diagonal()
                search_scales(site, self.search, diagonal if self.weighted else None)
            if own:
                self._compensate(own, products[own[0].path], inverses)
        together.spread(list(part.sites.values()), places)
        latents = [(part.sites[path], part.sites[path].parameter.clone()) for path in before]
        for path, original in before.items():
            part.sites[path].parameter.copy_(original)
        return latents

    def _compensate(self, sites: Sequence[Site], gram: Tensor, inverses: "_Inverses") -> None:
        """Weights that read one tensor. Rows are independent, so those of several are walked as one tall matrix."""
        factor = inverses.of(gram)
        matrix = damped(gram, factor) if self.refit else None
        for members in _stacks(sites):
            fmt, given = members[0].format, [site.quantizer.scales() for site in members]
            weights = [site.weight.flatten(0, -2) for site in members]
            weight, scales = weights[0] if len(weights) == 1 else torch.cat(weights), Scales.joined(given)
            ends = list(accumulate(len(each) for each in weights))
            parts = [slice(end - len(each), end) for end, each in zip(ends, weights, strict=True)]
            with torch.autocast(weight.device.type, enabled=False):
                latent, scales = compensated(weight, fmt, scales, factor, self.choose == "arrival")
                if matrix is not None:
                    found = refitted(weight, latent, fmt, scales, matrix, self.refit)
                    latent, scales = found.latent, found.scales
                    for own in map(found.rows, parts):
                        rows = len(own.latent)
                        inverses.counts.update(better=own.better, rows=rows, left=round(own.left * rows))
                for site, before, part in zip(members, given, parts, strict=True):
                    site.weight.copy_(latent[part].view_as(site.weight))
                    if self.refit or self.choose == "arrival":
                        site.quantizer.set_scales(replace(scales.rows(part), global_scale=before.global_scale))

    def sentence(self, counts: Counter[str]) -> str | None:
        """See `BlockStep`."""
        said = []
        if counts["rows"]:
            share, left = counts["better"] / counts["rows"], counts["left"] / counts["rows"]
            said.append(f"refitting lowered the error of {share:.0%} of the rows, to {left:.1%} on average")
        if counts["dead"]:
            said.append(f"{counts['dead']} of {counts['channels']} input channels were zero in all of the text")
        if counts["singular"]:
            said.append(f"{counts['singular']} of {counts['grams']} second moments of inputs were singular")
        if counts["dead"] or counts["singular"]:
            said.append("more calibration text may help")
        return f"gptq: {'; '.join(said)}" if said else None


class _Inverses:
    """One inverse for the layers that read one tensor; counts what is wrong with each."""

    def __init__(self, counts: Counter[str], told: bool = True) -> None:
        self.counts, self.told = counts, told
        self._last: tuple[Tensor, Inverse] | None = None

    def of(self, gram: Tensor) -> Inverse:
        """The same again, if it is the Gram matrix asked for last."""
        if self._last is None or self._last[0] is not gram:
            made = inverse(gram)
            self._last = gram, made
            if self.told:  # else by another process
                self.counts.update(dead=made.dead, channels=len(gram), singular=made.singular, grams=1)
        return self._last[1]


def _stacks(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Sites in lists of one format and dtype, of no more than STACKED values together."""
    alike: dict[tuple[str, torch.dtype], list[Site]] = defaultdict(list)
    for site in sites:
        members = alike[site.format.name, site.weight.dtype]
        if members and sum(each.parameter.numel() for each in (*members, site)) > STACKED:
            yield members[:]
            members.clear()
        members.append(site)
    yield from filter(None, alike.values())


def _moments(block: Block, site: Site, with_lost: bool, together: Together) -> tuple[Tensor, Tensor | None]:
    """Means of x' x'^T and (x - x') x'^T over what the site and its group are multiplied with, in all processes."""
    columns, device = site.weight.shape[-1], site.weight.device
    gram = torch.zeros(columns, columns, device=device)
    lost = torch.zeros_like(gram) if with_lost else None
    tokens = 0
    for dense, served in block.reads(site, with_lost):
        if served is None:
            lost = None if dense is not None else lost
            continue
        with torch.autocast(device.type, enabled=False):  # BF16 products would not stay positive definite
            x = served.float() if site.input is None else site.input.quantize(served.float())
            gram += x.t() @ x
            tokens += len(x)
            if dense is None or dense.shape != served.shape:  # experts that a router chose otherwise
                lost = None
            elif lost is not None:
                wanted = dense.float() if site.input is None else site.input.transformed(dense.float())
                lost += (wanted - x).t() @ x
    tokens = sum(together.gather(tokens))
    if not all(together.gather(lost is not None)):
        lost = None
    together.sum(gram, *([] if lost is None else [lost]))
    return gram / max(tokens, 1), None if lost is None else lost / max(tokens, 1)


def _parts(mean_square: dict[str, Tensor]) -> Iterator[list[str]]:
    """The layers that have seen inputs (in that order), from the last to the first: whole decoder
    blocks, as many at a time as PRODUCTS allows. Layers that read one tensor share a mean square and their products."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for path in mean_square:
        blocks[block_of(path)].append(path)
    part: list[str] = []
    size = 0
    for paths in reversed(blocks.values()):
        more = sum(4 * len(square) ** 2 for square in {id(s): s for s in (mean_square[p] for p in paths)}.values())
        if part and size + more > PRODUCTS:
            yield part
            part, size = [], 0
        part, size = [*part, *paths], size + more
    if part:
        yield part
