"""The initialisation step `gptq`: error-compensated rounding (arXiv 2210.17323).

Columns are rounded one after another; what a column loses is made up for by the columns still to come, as far as the
inputs seen in calibration are correlated. The result is not codes but *latent* weights that round to them, so that
everything else (fake quantization, learned scales, export) goes on as from any other.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from qat.errors import FormatError
from qat.init.calibration import input_products
from qat.init.scales import Search, search_scales, share_global_scales
from qat.init.step import Calibration, InitStep
from qat.numbers.format import Format
from qat.numbers.numerics import Scales, rounded
from qat.sites import Site

# Share of the mean diagonal added to it. Ten times the paper's: directions that calibration hardly excites are not
# free,
# since served inputs are quantized themselves and come from other text.
DAMPING = 0.1
_TOGETHER = 64  # columns between two updates of everything to their right


def compensate(weight: Tensor, fmt: Format, scales: Scales, gram: Tensor) -> Tensor:
    """Latent weights whose nearest rounding is the GPTQ solution.

    Args:
        weight: (rows, columns), or a stack (experts, rows, columns).
        fmt: a format whose blocks lie within one row.
        scales: fixed scales of `weight`.
        gram: (columns, columns) mean of x x^T over the layer's inputs x.

    Raises:
        FormatError: the format's blocks span several rows.
    """
    stacked = weight.shape
    weight = weight.flatten(0, -2)  # rows are independent, so a stack of experts is one tall matrix
    rows, columns = weight.shape
    if not fmt.is_rowwise:
        raise FormatError(f"{fmt.name}: error compensation needs blocks within one row; use init: scales")
    upper = _inverse_factor(gram)
    width = fmt.block_for(rows, columns)[1]
    work = weight.detach().to(torch.float32).t().contiguous()  # (columns, rows): one column is contiguous
    for start in range(0, columns, _TOGETHER):
        stop = min(start + _TOGETHER, columns)
        errors = torch.empty(stop - start, rows, device=weight.device)
        for column in range(start, stop):
            values = work[column]
            lost = (values - _round_column(values, fmt, scales, column // width)) / upper[column, column]
            errors[column - start] = lost
            work[column + 1 : stop] -= torch.outer(upper[column, column + 1 : stop], lost)
        work[stop:] -= upper[start:stop, stop:].t() @ errors
    return work.t().contiguous().to(weight.dtype).view(stacked)


def _round_column(values: Tensor, fmt: Format, scales: Scales, block: int) -> Tensor:
    """Quantized values of one column (rows,) whose scales stand in block column `block`."""
    part = slice(block, block + 1)
    own = replace(
        scales,
        stored=scales.stored[:, part],
        zero_point=None if scales.zero_point is None else scales.zero_point[:, part],
        choice=None if scales.choice is None else scales.choice[:, part],
        divisor=None,
    )
    return rounded(values.view(-1, 1, 1, 1), fmt, own).view(-1) * own.effective().view(-1)


def _inverse_factor(gram: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Gram matrix; inputs that were always zero count as one."""
    matrix = gram.to(torch.float64).clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1.0
    damping = DAMPING * diagonal.mean()
    for _ in range(4):  # float32 sums over few tokens may leave a slightly negative direction: damp ten times more
        diagonal += damping
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).to(torch.float32)
        damping = damping * 10
    raise FormatError("the inputs' second moments are not positive definite; calibrate on more, or other, text")


PRODUCTS = 4 << 30  # bytes of input products at a time: Llama 8B has 33 GB of them in all, 1 GB per block


class Gptq(InitStep):
    """Scales by search, then weights moved so that each column makes up for what earlier ones lost in rounding.

    The inputs' second moments are taken as the inputs will be quantized when served. Weights that multiply nothing
    (embeddings), or were never reached, get their scales only.

    Attributes:
        search, weighted: see `qat.init.scales.ScaleSearch`.
    """

    MAKES_SCALES = True

    kind: Literal["gptq"] = "gptq"
    search: Search = "auto"
    weighted: bool = True

    def run(self, calibration: Calibration) -> str | None:
        """Go through the model in parts, of which there are never more products than PRODUCTS bytes, or one block's.

        The text is read once per part, and the last blocks come first: what a compensated weight changes comes after
        it, so that all parts see the inputs of the same model. A weight that another module shares is written last,
        therefore.
        """
        share_global_scales(calibration)
        sites, mean_square = calibration.sites, calibration.mean_square
        for path, site in sites.items():
            if path not in mean_square:
                search_scales(site, self.search)
        postponed: list[tuple[Tensor, Tensor]] = []
        counted = Counter(id(weight) for _, weight in calibration.model.named_parameters(remove_duplicate=False))
        for paths in _parts({path: square for path, square in mean_square.items() if path in sites}):
            part = {path: sites[path] for path in paths}
            products = input_products(calibration.model, calibration.batches, paths)
            shared = [site.parameter for site in part.values() if counted[id(site.parameter)] > 1]
            before = [weight.clone() for weight in shared]
            for path, site in calibration.track(part):
                gram = products[path]
                search_scales(site, self.search, gram.diagonal() if self.weighted else None)
                _compensate(site, gram)
            for weight, original in zip(shared, before, strict=True):
                postponed.append((weight, weight.clone()))
                weight.copy_(original)
            torch.clear_autocast_cache()  # it holds BF16 copies of the weights as they were
        for parameter, compensated in postponed:
            parameter.copy_(compensated)
        return None


def _compensate(site: Site, gram: Tensor) -> None:
    quantizer = site.quantizer
    with torch.autocast(site.weight.device.type, enabled=False):
        site.weight.copy_(compensate(site.weight, quantizer.format, quantizer.scales(), gram))


def _parts(mean_square: dict[str, Tensor]) -> Iterator[list[str]]:
    """The layers that have seen inputs (in that order), from the last to the first: whole decoder
    blocks, as many at a time as PRODUCTS allows. Layers that read one tensor share a mean square and their products."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for path in mean_square:
        blocks[_block(path)].append(path)
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


def _block(path: str) -> str:
    """ "model.layers.3" of everything below it; a layer outside of numbered blocks is one by itself."""
    names = path.split(".")
    number = next((index for index, name in enumerate(names) if name.isdecimal()), len(names))
    return ".".join(names[: number + 1])
