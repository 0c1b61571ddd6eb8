"""The optimizer: AdamW with groups for weights, norms, learned scales and adapters, warm-up, then a cosine or a line.

Scales are logarithmic corrections, so their learning rate is a relative change per step and needs no tuning per layer;
they, the norms and adapters are never decayed.
"""

import math
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from qat.config import Strict
from qat.errors import ConfigError
from qat.lora import is_adapter
from qat.quantizer import Quantizer

LORA_RATE = 10.0  # of adapters, over that of weights
Train = Literal["all", "scales", "scales_and_norms"]
KINDS: dict[str, tuple[str, ...]] = {
    "all": ("weight", "flat", "scale", "lora"),
    "scales": ("scale",),
    "scales_and_norms": ("flat", "scale"),
}


class Cage(Strict):
    """Damping of oscillation (CAGE): after each step w <- w - lr strength (w - Q(w)), in the last part of a run.

    Attributes:
        strength: at the last step; it rises to it on a line. 0 for none.
        begin: share of the steps without it.
    """

    strength: float = Field(default=0.0, ge=0)
    begin: float = Field(default=0.8, ge=0, lt=1)

    def pull(self, step: int, steps: int) -> float:
        """The strength after `step` (from 1) of `steps`."""
        silent = self.begin * steps
        return self.strength * max(0.0, min(1.0, (step - silent) / (steps - silent)))


class RateSearch(Strict):
    """What `optim.lr: auto` tries.

    Attributes:
        rates: of weights, each from the initialisation.
        steps: with each of them, on a schedule of their own; 0 takes a tenth of the run's.
    """

    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    steps: int = Field(default=0, ge=0)


class OptimConfig(Strict):
    """AdamW.

    Attributes:
        lr: of weights, at its peak; "auto" tries some (`search`) for a few steps and takes the best.
        search: the rates that "auto" tries.
        scale_lr: of learned scales and input ranges: relative change per step.
        norm_lr: of norms and biases; by default as `lr`.
        lora_lr: of adapters; by default ten times `lr`, the usual ratio for updates that begin at zero.
        warmup: share of the steps with a linearly rising rate.
        decay: how the rate falls afterwards.
        final: share of the peak rate left at the last step.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights used for evaluation and export, 0 for none.
        train: "all"; "scales" leaves weights, norms and biases as they are, "scales_and_norms" only the weights.
        freeze: patterns of parameter names that are not trained.
        refit_every: steps between two refits of scales with `learn: refit`.
        cage: see `Cage`.
    """

    lr: float | Literal["auto"] = 1e-4
    search: RateSearch = RateSearch()
    scale_lr: float = Field(default=1e-3, ge=0)
    norm_lr: float | None = Field(default=None, ge=0)
    lora_lr: float | None = Field(default=None, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.05, ge=0, le=1)
    decay: Literal["cosine", "linear"] = "cosine"
    final: float = Field(default=0.1, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    train: Train = "all"
    freeze: tuple[str, ...] = ()
    refit_every: int = Field(default=5, ge=1)
    cage: Cage = Cage()

    @field_validator("lr")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not value > 0:
            raise ValueError("a learning rate is a number greater than 0, or `auto`")
        return value

    @property
    def peak(self) -> float:
        """The rate in force; `auto` has been replaced before anything asks."""
        if isinstance(self.lr, str):
            raise ConfigError("optim.lr: auto is settled by a run; give a number here")
        return self.lr


def is_frozen(name: str, kind: str, config: OptimConfig) -> bool:
    """Whether a parameter of this name and kind (of `KINDS`) stays as it is."""
    return kind not in KINDS[config.train] or any(fnmatchcase(name, pattern) for pattern in config.freeze)


def freeze(model: nn.Module, config: OptimConfig) -> None:
    """Take the parameters that `freeze` or `train` leaves out of training.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left.
    """
    kinds = parameter_kinds(model)
    for pattern in config.freeze:
        if not any(fnmatchcase(name, pattern) for name in kinds):
            raise ConfigError(f"optim.freeze pattern {pattern!r} matches no parameter")
    parameters = dict(model.named_parameters())
    for name, kind in kinds.items():
        if is_frozen(name, kind, config):
            parameters[name].requires_grad_(False)
    if any(p.requires_grad for p in parameters.values()):
        return
    if config.train == "scales" and "scale" not in kinds.values():
        raise ConfigError("optim.train: scales, but the scheme learns none; use scheme.learn: lsq or dual_lsq")
    raise ConfigError(f"optim.freeze {', '.join(config.freeze)} leaves no parameter to train")


def best_rate(tried: list[list[float]]) -> float:
    """Of (rate, KL) pairs: the rate with the lowest KL, the lower one where they are equal."""
    return min(tried, key=lambda pair: (pair[1], pair[0]))[0]


def schedule(config: OptimConfig, step: int, steps: int) -> float:
    """Factor on the peak learning rate at `step` (from 0) of `steps`."""
    warm = max(1.0, config.warmup * steps)
    rising = min(1.0, (step + 1) / warm)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    falling = cosine if config.decay == "cosine" else 1 - min(1.0, step / steps)
    return rising * (config.final + (1 - config.final) * falling)


def parameter_kinds(model: nn.Module) -> dict[str, str]:
    """ "weight", "flat" (norms, biases), "scale" (what quantizers learn) or "lora" of every parameter, by name."""
    scales = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Quantizer)
        for name, _ in module.named_parameters(recurse=False)
    }
    kinds = {n: "weight" if p.dim() >= 2 else "flat" for n, p in model.named_parameters()}
    return {n: "scale" if n in scales else "lora" if is_adapter(n) else kind for n, kind in kinds.items()}


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters of `model` by kind; every group carries its `peak` learning rate."""
    kinds = parameter_kinds(model)
    groups: dict[str, list[nn.Parameter]] = {"weight": [], "flat": [], "scale": [], "lora": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[kinds[name]].append(parameter)
    rates = {"flat": config.peak if config.norm_lr is None else config.norm_lr}
    rates["lora"] = LORA_RATE * config.peak if config.lora_lr is None else config.lora_lr
    settings: list[dict[str, Any]] = []
    for kind, parameters in groups.items():
        if parameters:
            peak = config.scale_lr if kind == "scale" else rates.get(kind, config.peak)
            decay = config.weight_decay if kind == "weight" else 0.0
            settings.append({"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay, "kind": kind})
    return settings


def build(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, config), betas=config.betas, fused=True)
