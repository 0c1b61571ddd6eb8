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

from qat.checkpoints.wrapped import carried
from qat.errors import ConfigError
from qat.sites import sites
from qat.text import some
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
        model = self._model()
        if model is not None and (count := self._counted[optimizer]) is not None:
            count.step += 1
            with carried(model):
                count.after(count.step, _AsOurs(optimizer, count.weights) if self.config.cage.strength else optimizer)

    def _count(self, optimizer: torch.optim.Optimizer) -> "_Count | None":
        model = self._model()
        if model is None:
            return None
        own = {id(site.parameter) for site in sites(model, "weight")}
        updates = {id(p) for module in model.modules() for p in getattr(module, "before_rounding", list)()}
        own |= updates
        weights = {id(p) for group in optimizer.param_groups for p in group["params"]} & own
        if not weights:
            return None
        if weights & updates and self.config.cage.strength:
            raise ConfigError("cage moves weights, which peft leaves frozen; leave cage or the adapters out")
        steps = (s["step"] for p, s in optimizer.state.items() if id(p) in weights and "step" in s)
        with carried(model):
            return _Count(AfterStep(model, self.config, self.steps), weights, max(map(int, steps), default=1) - 1)


class _Count:
    """Steps of one optimizer so far, and which quantized weights it moves."""

    def __init__(self, after: AfterStep, weights: set[int], step: int) -> None:
        self.after, self.weights, self.step = after, weights, step


class _AsOurs:
    """An optimizer with the groups that `AfterStep` knows: one of quantized weights.

    Raises:
        ConfigError: they have several rates.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: set[int]) -> None:
        rates = {float(g["lr"]) for g in optimizer.param_groups if any(id(p) in weights for p in g["params"])}
        if len(rates) > 1:
            raise ConfigError(
                f"cage pulls weights by their learning rate, and they have several ({some(map(str, sorted(rates)))}); "
                "give quantized weights one, or leave cage out"
            )
        self.state, self.param_groups = optimizer.state, [{"kind": "weight", "lr": rates.pop()}]
