"""What follows an optimizer step inside the module: damping of oscillation, and scales that are refitted.

Both are functions of the step, the weights and Adam's moments, all of which a resumed run gets back, so they need no
state of their own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qat.sites import Site, sites
from qat.trainers.optim import OptimConfig


class AfterStep:
    """Goes over the quantized weights that are trained, each once.

    Args:
        model: a scheme was applied to it.
        config: of the optimizer.
        steps: of the whole run.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        once = {id(site.quantizer): site for site in sites(model, "weight")}
        self.trained = [site for site in once.values() if site.weight.requires_grad]
        self.refitted = [site for site in self.trained if site.quantizer.learn == "refit"]

    @torch.no_grad()
    def __call__(self, step: int, optimizer: Any) -> None:
        """After `step` (from 1); the rates in the optimizer's groups are those it was taken with."""
        pull = self.config.cage.pull(step, self.steps)
        if pull:
            for group in optimizer.param_groups:
                if group["kind"] == "weight":
                    self._damp(min(1.0, group["lr"] * pull))
        if step % self.config.refit_every == 0 or step == self.steps:
            for site in self.refitted:
                site.quantizer.refit(site.weight, _second_moment(site, optimizer))

    def _damp(self, share: float) -> None:
        for site in self.trained:
            if not site.quantizer.transforms:  # the grid is that of the transformed weight
                site.weight.lerp_(site.value().to(site.weight.dtype), share)


def _second_moment(site: Site, optimizer: Any) -> Tensor | None:
    """Adam's, as the weight multiplies; None before the first step."""
    moment: Tensor | None = optimizer.state.get(site.parameter, {}).get("exp_avg_sq")
    return moment.transpose(-1, -2) if moment is not None and site.owner.TRANSPOSED else moment
