"""`AfterStep` for optimizers that someone else makes and steps: Hugging Face's Trainer, TRL, or a plain loop.

torch calls a hook after every step of every optimizer, whoever wrapped it, and not after a step that a gradient scaler
skips; a callback of one trainer would be called by that trainer only. The number of a step is Adam's own where the
optimizer keeps one, so that a resumed run goes on counting.
"""

import sys
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from qat.sites import sites
from qat.trainers.after_step import AfterStep
from qat.trainers.optim import OptimConfig


class StepHook:
    """Goes with a model for as long as that exists.

    Args:
        model: a scheme was applied to it.
        config: gives `refit_every` and `cage`.
        steps: of the whole run; None where that is not known.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, steps: int | None) -> None:
        self.config, self.steps = config, sys.maxsize if steps is None else steps
        self._model = weakref.ref(model)
        self._counted: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Count | None] = weakref.WeakKeyDictionary()
        handle = register_optimizer_step_post_hook(self)
        weakref.finalize(model, handle.remove)

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After a step of any optimizer; one that moves nothing of the model is left alone."""
        if optimizer not in self._counted:
            self._counted[optimizer] = self._count(optimizer)
        if (count := self._counted[optimizer]) is not None:
            count.step += 1
            count.after(count.step, optimizer)

    def _count(self, optimizer: torch.optim.Optimizer) -> "_Count | None":
        model = self._model()
        if model is None:
            return None
        own = {id(site.parameter) for site in sites(model, "weight")}
        moved = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
        if not moved:
            return None
        steps = (optimizer.state.get(parameter, {}).get("step", 1) for parameter in moved)
        return _Count(AfterStep(model, self.config, self.steps), max(map(int, steps)) - 1)


class _Count:
    """Steps of one optimizer so far."""

    def __init__(self, after: AfterStep, step: int) -> None:
        self.after, self.step = after, step
