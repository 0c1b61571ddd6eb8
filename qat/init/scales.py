"""The initialisation step `scales`: the block scales that lose least, before anything is learned.

The search minimises what the block loses, optionally weighted by how strongly each input channel is excited
(`importance`, the diagonal of the layer's Hessian).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from qat.errors import FormatError
from qat.init.step import Calibration, InitStep
from qat.init.super_blocks import block_errors, fitting_minimum, searched, settled
from qat.init.together import Together, opened_parts
from qat.numbers.format import Format
from qat.numbers.numerics import (
    Scales,
    choose_elements,
    find_scales,
    finite_amax,
    global_scale_for,
    to_blocks,
    unit_scales,
)
from qat.numbers.scale import select
from qat.sites import Site

Search = Literal["auto", "amax", "mse", "sweep"]

CLIP_STEPS = 80  # ratios tried by the MSE clip, evenly from CLIP_LOW to 1
CLIP_LOW = 0.3


def initial_scales(
    weight: Tensor,
    fmt: Format,
    search: Search = "auto",
    global_scale: Tensor | None = None,
    importance: Tensor | None = None,
) -> Scales:
    """Scales to begin training with: the PTQ initialisation of one weight.

    Args:
        weight: (rows, columns).
        search: "amax" the format's own rule; "mse" the best of 80 clipping ratios; "sweep" the best neighbour, for
            scale types that have some; "auto" sweep where it exists, else mse.
        global_scale: the fused set's per-tensor scale, if it is shared.
        importance: (columns,) non-negative weights of the squared error, e.g. the mean square of each input.

    Raises:
        FormatError: "sweep" for a scale type without neighbours.
    """
    base = find_scales(weight, fmt, global_scale)
    if search == "auto":
        search = "sweep" if fmt.scale.sweep else "mse"
    if search == "amax":
        return base
    blocked = to_blocks(weight.detach().to(torch.float32), fmt)
    error_weight = None
    if importance is not None:
        error_weight = to_blocks(importance.to(torch.float32).expand_as(weight), fmt)
    if search == "mse" and fmt.super_block:
        return settled(blocked, fmt, searched(blocked, fmt, base, error_weight), error_weight)
    return _search(blocked, fmt, base, _candidates(fmt, base, search), error_weight)


def first_scales(weight: Tensor, fmt: Format, search: Search | None, together: list[Tensor]) -> Scales:
    """What a quantizer is made with, before any calibration.

    Args:
        weight: (rows, columns), or a stack of them.
        search: see `initial_scales`; None looks at no weight, for who loads scales right afterwards.
        together: the weights whose global scale it shares, itself among them.
    """
    if search is None:
        return unit_scales(weight.shape, fmt, weight.device)
    return initial_scales(weight, fmt, search, shared_global_scale(together, fmt))


def _candidates(fmt: Format, base: Scales, search: Search) -> Iterator[Tensor]:
    """Stored scales to try, each of the shape of `base.stored`."""
    effective = base.effective()
    if search == "mse":
        top = 2.0 if fmt.scale_rule == "mean" else 1.0  # a mean may be too small, a maximum never is
        for step in range(CLIP_STEPS):
            ratio = CLIP_LOW + (top - CLIP_LOW) * (step + 1) / CLIP_STEPS
            yield fmt.scale.store(effective * ratio, base.global_scale)
    elif fmt.scale.sweep:
        yield from fmt.scale.neighbours(base.stored)
    else:
        raise FormatError(f"{fmt.name} stores {fmt.scale} scales, too many to sweep; use search: mse (or auto)")


def _search(
    blocked: Tensor, fmt: Format, base: Scales, candidates: Iterator[Tensor], error_weight: Tensor | None
) -> Scales:
    unit = base.effective()
    best, best_error = base, block_errors(blocked, fmt, base, error_weight, unit)
    for stored in candidates:
        trial = with_stored(blocked, fmt, base, stored, error_weight)
        error = block_errors(blocked, fmt, trial, error_weight, unit)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = replace(
            base,
            stored=select(better, trial.stored, best.stored),
            zero_point=where_optional(better, trial.zero_point, best.zero_point),
            choice=where_optional(better, trial.choice, best.choice),
        )
    return best


def with_stored(blocked: Tensor, fmt: Format, base: Scales, stored: Tensor, error_weight: Tensor | None) -> Scales:
    """`base` with other stored scales, and the zero points and elements that are best with those."""
    trial = replace(base, stored=stored)
    if base.zero_point is not None:
        # A clipped asymmetric range keeps its centre: solve the zero point again for the narrower step.
        bottom = -(2 ** (fmt.element.bits - 1))
        centre = (blocked.amin(dim=(1, 3)).clamp_max(0.0) + blocked.amax(dim=(1, 3)).clamp_min(0.0)) / 2
        zero = torch.nan_to_num(-0.5 - centre / trial.effective()).round().clamp(bottom, -bottom - 1)
        return replace(trial, zero_point=zero.to(torch.int8))
    if base.minimum is not None:
        return replace(trial, minimum=fitting_minimum(blocked, fmt, trial, error_weight))
    return trial if fmt.is_single else choose_elements(blocked, fmt, trial, error_weight)


def where_optional(condition: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """`torch.where` of what a format may not have."""
    return None if a is None or b is None else torch.where(condition, a, b)


def shared_global_scale(weights: list[Tensor], fmt: Format) -> Tensor | None:
    """One per-tensor scale for layers that a serving engine fuses, a scalar; None where the format has none.

    Of a stack (experts, rows, columns) every matrix has its own: (experts x block rows, 1), as its block scales lie.
    """
    if not fmt.global_scale:
        return None
    if weights[0].dim() == 3:
        (stack,) = weights
        each = global_scale_for(torch.stack([finite_amax(weight) for weight in stack]), fmt)
        return each.repeat_interleave(fmt.grid_shape(*stack.shape[1:])[0])[:, None]
    return global_scale_for(torch.stack([finite_amax(weight) for weight in weights]).amax(), fmt)


class ScaleSearch(InitStep):
    """Block scales by search.

    Attributes:
        search: see `initial_scales`.
        weighted: weigh the error by the mean square of each input channel.
    """

    MAKES_SCALES = True
    DIVIDES = True

    kind: Literal["scales"] = "scales"
    search: Search = "auto"
    weighted: bool = True

    def run(self, calibration: Calibration) -> str | None:
        """Put every weight at the scales found for it."""
        together = Together(calibration.model)
        for part in opened_parts(calibration):
            sites = {path: site for path, site in part.items() if not site.is_held}  # which has those of its codes
            share_global_scales(replace(calibration, sites=sites))
            for index, (path, site) in enumerate(calibration.track(sites) if together.size == 1 else sites.items()):
                if together.owns(index):
                    search_scales(site, self.search, calibration.mean_square.get(path) if self.weighted else None)
            together.spread(list(sites.values()))
        return None


def share_global_scales(calibration: Calibration) -> None:
    """Per-tensor scales from the weights as they are now; fused layers share theirs."""
    sites = calibration.sites
    for members in {tuple(path for path in site.fused if path in sites) or (path,) for path, site in sites.items()}:
        first = sites[members[0]].quantizer.format
        if first.super_block:  # whose numbers above are each weight's own
            continue
        shared = shared_global_scale([sites[path].weight.detach() for path in members], first)
        for path in members:  # a tensor each: saved students hold one under every name
            sites[path].quantizer.global_scale = None if shared is None else shared.clone()


@torch.no_grad()
def search_scales(site: Site, search: Search, importance: Tensor | None = None) -> None:
    """Find the scales of one weight again; its per-tensor scale stays (it is shared)."""
    quantizer = site.quantizer
    with torch.autocast(site.weight.device.type, enabled=False):  # a caller's: this needs float32
        weight = quantizer.transformed(site.weight)
        quantizer.set_scales(initial_scales(weight, quantizer.format, search, quantizer.global_scale, importance))
