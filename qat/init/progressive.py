"""The initialisation step `progressive`: weights learn in wider formats before they meet their own (W16, W4, W2).

From 16 bits to two is a long way for one rounding. So every integer format that is narrower than the first of `bits`
gives way to its sibling of that width (same blocks, scales and zero points), with scales searched anew for the weights
as they are, and the model is trained so on calibration text against the model that it was, before anything was rounded;
then the next width. In the end each weight has its own format again, whose scales begin anew from the weights as they
are now: what follows (`scales`, `gptq`), and the export, see an ordinary model of that format.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from qat.errors import ConfigError
from qat.init.calibration import observe
from qat.init.reconstruct import BETAS, KEPT_BACK, divergence, learning, shuffled
from qat.init.scales import ScaleSearch
from qat.init.step import Calibration, InitStep
from qat.modes import dense
from qat.numbers.catalog import widened
from qat.quantizer import LEARNED
from qat.sites import Site, weights

WARMUP = 0.1  # share of the steps with a rising rate
CLIP = 1.0  # largest norm of the gradient


class Progressive(InitStep):
    """Train in wider formats first.

    Attributes:
        bits: of the weights, one stage after the other.
        steps: per stage, each on one batch of calibration text.
        lr: of the weights, norms and biases that are trained at all, at its peak; falls to zero.
        scale_lr: of learned scales: relative change per step.
        seed: of the order of the text.
    """

    WHOLE_MODEL = True

    kind: Literal["progressive"] = "progressive"
    bits: tuple[Literal[8, 4, 3], ...] = (4,)
    steps: int = Field(default=60, ge=1)
    lr: float = Field(default=1e-4, gt=0.0)
    scale_lr: float = Field(default=1e-3, ge=0.0)
    seed: int = Field(default=0, ge=0)

    @field_validator("bits")
    @classmethod
    def _narrowing(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        if not bits or any(after >= before for before, after in pairwise(bits)):
            raise ValueError(f"bits names widths from the widest to the narrowest, such as [8, 4], not {list(bits)}")
        return bits

    def passes(self, rows: int) -> float:
        """What it costs, in forward passes over `rows` of calibration text (of which a step reads two rows): a step has
        one of the dense model, and a backward pass takes two."""
        return len(self.bits) * (4 * self.steps * 2 / rows + 2 * 2 / KEPT_BACK)

    def run(self, calibration: Calibration) -> str | None:
        """Train stage by stage, go back to the formats of the scheme, and observe again what the layers read."""
        fit = _Fit(calibration, self)
        with torch.enable_grad(), learning(calibration.model, fit.names):
            said = fit.run()
        calibration.mean_square = observe(calibration.model, calibration.batches)
        return said


class _Fit:
    """Trains a model stage by stage."""

    def __init__(self, calibration: Calibration, settings: Progressive) -> None:
        self.settings, self.model = settings, calibration.model
        self.calibration = replace(calibration, sites=weights(calibration.model))
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.names = set(trained)
        self.scales = [p for name, p in trained.items() if name.rpartition(".")[2] in LEARNED]
        own = {id(scale) for scale in self.scales}
        self.values = [p for p in trained.values() if id(p) not in own]
        if not {id(p) for p in self.values} & {id(site.parameter) for site in self.calibration.sites.values()}:
            raise ConfigError("progressive trains quantized weights, and optim leaves them all frozen; leave it out")
        self.before = [p.detach().clone() for p in self.values]
        count = len(calibration.batches)
        self.kept_back = list(range(0, count, KEPT_BACK))
        self.learned_from = [index for index in range(count) if index not in self.kept_back] or self.kept_back

    def run(self) -> str:
        """All stages; what came of them. One that is no better on the text kept back is undone."""
        said = []
        start = self.before
        for bits in self.settings.bits:
            with _wider(self.calibration.sites, bits) as count:
                first, last = self._stage(bits)
            said.append(f"{count} layers in {bits} bits from a KL of {first:.4f} to {last:.4f}")
            if not last < first:
                said[-1] += ", no better on the text kept back, so this is undone"
                self._put(start)
            elif bits != self.settings.bits[-1]:
                start = [p.detach().clone() for p in self.values]
        self._search("amax", weighted=False)  # of their own formats; corrections learned before are gone
        return f"progressive: {'; then '.join(said)}"

    def _stage(self, bits: int) -> tuple[float, float]:
        """Train in the formats as they are now; the KL on the text kept back, before and after."""
        steps = self.settings.steps
        self._search("auto", weighted=True)
        first = self._judge()
        rates = ((self.values, self.settings.lr), (self.scales, self.settings.scale_lr))
        groups = [{"params": parameters, "lr": rate} for parameters, rate in rates if parameters]
        optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
        warm = max(1.0, WARMUP * steps)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: min(1.0, (at + 1) / warm) * (1 - at / steps))
        order = shuffled(self.learned_from, self.settings.seed)
        for _ in self.calibration.track({f"{bits} bits, step {step + 1}": step for step in range(steps)}):
            self._loss(next(order)).backward()
            nn.utils.clip_grad_norm_([*self.values, *self.scales], CLIP)
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
        return first, self._judge()

    def _loss(self, index: int) -> Tensor:
        """KL divergence from the model as it was, mean over tokens."""
        return divergence(self.model, self.calibration.batches[index], self._as_before())

    @torch.no_grad()
    def _judge(self) -> float:
        return float(torch.stack([self._loss(index) for index in self.kept_back]).mean())

    @contextlib.contextmanager
    def _as_before(self) -> Iterator[None]:
        """The model before the step, nothing in it rounded."""
        now = [p.data for p in self.values]
        try:
            for parameter, data in zip(self.values, self.before, strict=True):
                parameter.data = data
            torch.clear_autocast_cache()  # it holds BF16 copies of what was there
            with dense(self.model, inputs=True):
                yield
        finally:
            for parameter, data in zip(self.values, now, strict=True):
                parameter.data = data
            torch.clear_autocast_cache()

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.values, values, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def _search(self, search: Any, weighted: bool) -> None:
        """Scales for the weights as they are, in the formats as they are."""
        ScaleSearch(search=search, weighted=weighted).run(replace(self.calibration, track=dict.items))
        torch.clear_autocast_cache()


@contextlib.contextmanager
def _wider(sites: dict[str, Site], bits: int) -> Iterator[int]:
    """Weights of narrower integer formats have `bits` inside this context; how many there are."""
    own = {id(site.quantizer): (site.quantizer, site.format) for site in sites.values()}
    wide = [(quantizer, fmt, widened(fmt, bits)) for quantizer, fmt in own.values()]
    changed = [(quantizer, fmt, other) for quantizer, fmt, other in wide if other is not None]
    try:
        for quantizer, _, other in changed:
            quantizer.format = other
        yield len(changed)
    finally:
        for quantizer, fmt, _ in changed:
            quantizer.format = fmt
