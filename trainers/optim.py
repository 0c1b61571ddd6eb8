"""The optimizer: AdamW with one group for weights and one for learned scales, warm-up, then cosine.

Scales are logarithmic corrections, so their learning rate is a relative change per step and needs no tuning per layer;
they and the norms are never decayed.
"""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from pydantic import Field
from torch import nn

from qat.config import Strict
from qat.errors import ConfigError
from qat.quantizer import WeightQuantizer


class OptimConfig(Strict):
    """AdamW.

    Attributes:
        lr: of weights, at its peak.
        scale_lr: of learned scales: relative change per step.
        warmup: share of the steps with a linearly rising rate.
        final: share of the peak rate left at the last step.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights used for evaluation and export, 0 for none.
        freeze: patterns of parameter names that are not trained.
    """

    lr: float = Field(default=1e-4, gt=0)
    scale_lr: float = Field(default=1e-3, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.05, ge=0, le=1)
    final: float = Field(default=0.1, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    freeze: tuple[str, ...] = ()


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters that match a pattern out of training.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left.
    """
    for pattern in patterns:
        matched = [p for name, p in model.named_parameters() if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(f"optim.freeze pattern {pattern!r} matches no parameter")
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"optim.freeze {', '.join(patterns)} leaves no parameter to train")


def schedule(config: OptimConfig, step: int, steps: int) -> float:
    """Factor on the peak learning rate at `step` (from 0) of `steps`."""
    warm = max(1.0, config.warmup * steps)
    rising = min(1.0, (step + 1) / warm)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return rising * (config.final + (1 - config.final) * cosine)


def scale_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are learned scales."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, WeightQuantizer)
        for name, _ in module.named_parameters(recurse=False)
    }


def build(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`; every group carries its `peak` learning rate."""
    scales = scale_names(model)
    groups: dict[str, list[nn.Parameter]] = {"weight": [], "flat": [], "scale": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "scale" if name in scales else "weight" if parameter.dim() >= 2 else "flat"
            groups[kind].append(parameter)
    settings: list[dict[str, Any]] = []
    for kind, parameters in groups.items():
        if parameters:
            peak = config.scale_lr if kind == "scale" else config.lr
            decay = config.weight_decay if kind == "weight" else 0.0
            settings.append({"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay, "kind": kind})
    return torch.optim.AdamW(settings, betas=config.betas, fused=True)
