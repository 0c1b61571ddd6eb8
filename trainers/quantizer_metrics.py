"""What quantizers do while a model trains: how many codes flip, how many weights are clipped, how far scales drift, and
what each layer's rounding costs.

Read at evaluations, never in steps: a reading rounds every weight once more, where it lies, and brings five numbers of
each to the host. Of codes and scales an even sample is remembered, on the device.
"""

import functools
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qat.numbers.element import Element
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales, in_parts, per_block, to_blocks
from qat.sharded import opened
from qat.sites import Site, sites

SAMPLE = 1 << 16  # codes, and as many scales, remembered of one weight


class QuantizerMetrics:
    """Compares with the moment it was made, and with the last reading. Where the model is divided among processes,
    every process makes one and reads.

    Args:
        model: a scheme was applied to it.
        start: codes and scales of an earlier start (`qat.trainers.why`); they replace the present ones where the file
            is there.
    """

    def __init__(self, model: nn.Module, start: Path | None = None) -> None:
        found = list(_weights(model).values())
        first = {site.path: _sample(site.quantize()) for site in opened(model, found)}
        self._last = {path: codes for path, (codes, _) in first.items()}
        if start is not None and start.is_file():
            with safe_open(start, "pt") as file:
                names = set(file.keys())
                for path, now in first.items():
                    if f"{path} codes" in names:
                        codes, scale = (_thinned(file.get_tensor(f"{path} {what}")) for what in ("codes", "scale"))
                        first[path] = codes.to(now[0].device), scale.to(now[0].device)
        self._first = first

    @torch.no_grad()
    def read(self, model: nn.Module) -> dict[str, float]:
        """Of all weights together, by number of weights:

        `quantizers/flip_rate`: share of the codes that differ from the start's; `flip_rate_last` from the last
        reading's. `clip_rate`: share of the weights beyond the outermost code's own cell. `scale_drift`: mean
        |log2(scale / scale at the start)|, as stored. `qsnr`: in dB; `qsnr/LAYER` the same of each weight.
        """
        found = _weights(model)
        by_path = {site.path: self._row(site.path, site) for site in opened(model, list(found.values()))}
        rows = torch.stack([by_path[path] for path in found]).cpu().double()
        sizes = torch.tensor([math.prod(site.shape) for site in found.values()], dtype=torch.float64)
        mean = (rows * (sizes / sizes.sum())[:, None]).sum(dim=0).tolist()
        names = ("flip_rate", "flip_rate_last", "clip_rate", "scale_drift", "qsnr")
        total = {f"quantizers/{name}": value for name, value in zip(names, mean, strict=True)}
        return total | {f"qsnr/{path}": value for path, value in zip(found, rows[:, -1].tolist(), strict=True)}

    def _row(self, path: str, site: Site) -> Tensor:
        codes, scale = _sample(site.quantize())
        (first, first_scale), last = self._first[path], self._last[path]
        self._last[path] = codes
        norms, beyond = [], []
        for latent, quantizer in site.parts():
            weight, quantized = quantizer.transformed(latent).float(), quantizer.quantize(latent)
            norms.append([torch.linalg.vector_norm(t) for t in (weight - quantized.dequantize(), weight)])
            beyond.append(clipped(weight, site.format, quantized.scales))
        noise, signal = (functools.reduce(torch.hypot, each) for each in zip(*norms, strict=True))
        drift = (scale / first_scale).log2().abs()
        return torch.stack(
            [
                (codes != first).float().mean(),
                (codes != last).float().mean(),
                torch.stack(beyond).mean(),
                torch.where(torch.isfinite(drift), drift, 0.0).mean(),
                -20 * (noise / signal).log10(),
            ]
        )


def clipped(weight: Tensor, fmt: Format, scales: Scales) -> Tensor:
    """Share of a float32 weight (..., rows, columns) that lies outside the cells of all codes, a scalar on its device:
    farther beyond the outermost value than half its distance to the next."""
    blocked = to_blocks(weight, fmt)
    divisor = scales.effective() if scales.divisor is None else scales.divisor
    if scales.minimum is not None:
        blocked = blocked + per_block(scales.minimum.effective())
    x = (in_parts(blocked, divisor) / per_block(divisor)).reshape(blocked.shape)
    if scales.zero_point is not None:
        half = 2.0 ** (fmt.element.bits - 1)
        x = x + per_block(scales.zero_point).float()
        outside = (x < -half - 0.5) | (x > half - 0.5)
    elif scales.choice is None:
        outside = _outside(x, fmt.element)
    else:
        of_element = torch.stack([_outside(x, element) for element in fmt.elements])
        chosen = per_block(scales.choice).long().expand_as(x)
        outside = of_element.gather(0, chosen[None])[0]
    return outside.sum() / max(1, weight.numel())


def _outside(x: Tensor, element: Element) -> Tensor:
    grid = element.grid
    return (x < grid[0] - (grid[1] - grid[0]) / 2) | (x > grid[-1] + (grid[-1] - grid[-2]) / 2)


def _weights(model: nn.Module) -> dict[str, Site]:
    """Each quantized weight once, under its first path."""
    once: dict[int, Site] = {}
    for site in sites(model, "weight"):
        once.setdefault(id(site.quantizer), site)
    return {site.path: site for site in once.values()}


def _sample(quantized: QTensor) -> tuple[Tensor, Tensor]:
    return _thinned(quantized.codes), _thinned(quantized.scales.effective().float())


def _thinned(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    return flat[:: math.ceil(len(flat) / SAMPLE)].clone()
