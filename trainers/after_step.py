"""What follows an optimizer step inside the module: damping of oscillation, and scales that are refitted.

Both are functions of the step, the weights and Adam's moments, all of which a resumed run gets back, so they need no
state of their own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qat.sharded import by_holder, edited, moment
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
        trained = [site for site in once.values() if next(site.parts())[0].requires_grad]
        self.trained = by_holder(model, trained)
        self.refitted = by_holder(model, [site for site in trained if site.quantizer.learn == "refit"])

    @torch.no_grad()
    def __call__(self, step: int, optimizer: Any) -> None:
        """After `step` (from 1); the rates in the optimizer's groups are those it was taken with."""
        pull = self.config.cage.pull(step, self.steps)
        if pull:
            for group in optimizer.param_groups:
                if group["kind"] == "weight":
                    self._damp(min(1.0, group["lr"] * pull))
        if step % self.config.refit_every == 0 or step == self.steps:
            for holder, sites_there in self.refitted:
                moments = [_second_moment(site, optimizer) for site in sites_there]
                with edited(holder):
                    for site, moment in zip(sites_there, moments, strict=True):
                        for weight, quantizer in site.parts():
                            quantizer.refit(weight, moment)

    def _damp(self, share: float) -> None:
        for holder, sites_there in self.trained:
            with edited(holder):
                for site in sites_there:
                    if not site.quantizer.transforms:  # the grid is that of the transformed weight
                        site.weight.lerp_(site.value().to(site.weight.dtype), share)


def _second_moment(site: Site, optimizer: Any) -> Tensor | None:
    """Adam's, as the weight multiplies; None before the first step, and of a weight that is held packed."""
    if site.is_held:
        return None
    found = moment(optimizer, site.parameter, "exp_avg_sq")
    return found.transpose(-1, -2) if found is not None and site.owner.TRANSPOSED else found
