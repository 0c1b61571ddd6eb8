"""Adapters that peft puts around the layers of a prepared model (`get_peft_model`, TRL's `peft_config`).

peft adds s BA x to what a layer gives, so after its weight is rounded, which no packed checkpoint holds. Here each such
layer hands its factors to the quantized layer inside, which adds them before rounding with the function that `qat.lora`
trains and merges with. peft keeps the parameters, their names and files: its checkpoints stay its own.
"""

import contextlib
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UnsupportedError
from qat.sites import Quantized, sites
from qat.text import some
from qat.training.low_rank import left_out, updated

_SEEN = "_qat_peft_seen"
_INSTEAD = (
    "target only quantized linear layers with a LoraConfig (target_modules), or train adapters with `lora` of a job"
)


def inner(model: nn.Module) -> nn.Module:
    """The model that peft wraps, or the model itself.

    Raises:
        UnsupportedError: what peft adds is no update of weights.
    """
    if not (hasattr(model, "get_base_model") and hasattr(model, "active_peft_config")):
        return model
    wrapped: Any = model
    if wrapped.active_peft_config.is_prompt_learning:
        raise UnsupportedError(f"{wrapped.active_peft_config.peft_type} learns prompts, which no checkpoint holds")
    base: nn.Module = wrapped.get_base_model()
    return base


def watch(model: Any) -> None:
    """Take over the adapters that peft may put on `model` later, at the first pass that sees them.

    peft calls the model's `forward`, not the model, so the hook is on the body below its head.
    """
    body = model.base_model
    body.register_forward_pre_hook(lambda *_: take_over(model))


def take_over(model: nn.Module) -> None:
    """Have the adapters of peft that are on a prepared model added before rounding; again where there are new ones.

    Raises:
        UnsupportedError: one that cannot be; names it, and says what to do.
    """
    configs = getattr(model, "peft_config", None) or {}
    seen = tuple(id(config) for config in configs.values())
    if getattr(model, _SEEN, ()) == seen:
        return
    if configs:
        _take_over(model)
    setattr(model, _SEEN, seen)


def _take_over(model: nn.Module) -> None:
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    others = []
    for path, module in model.named_modules():
        if type(module) is Linear and isinstance(module.base_layer, Quantized):
            module.__class__ = _rounded_class()
        if isinstance(module, _rounded_class()):
            module.check(path)
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            others.append(f"{path} ({type(module).__name__})")
    if others:
        raise UnsupportedError(
            f"peft put something on {some(others)} that cannot be added before rounding, so what is trained would not "
            f"be what is exported; {_INSTEAD}"
        )
    learned = [p for site in sites(model) for p in site.quantizer.parameters()]
    if learned and not any(parameter.requires_grad for parameter in learned):
        warnings.warn(
            "peft froze the scales of this prepared model, which its scheme would learn (`learn`): they stay where "
            "qat.prepare left them",
            UserWarning,
            stacklevel=2,
        )


class _Carried:
    """What a quantized layer takes for its `lora` while it computes: the factors that a layer of peft holds."""

    merges = True

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def merged(self, weight: Tensor, _: Tensor | None = None) -> Tensor:
        """The weight with its update, see `qat.training.low_rank.updated`."""
        total: Tensor = self.layer.updated(weight)
        return total


class _Read(_Carried):
    """The same for readers, who ask for one weight many times, part by part: the last one is kept."""

    last: "tuple[Any, Tensor] | None" = None

    @torch.no_grad()
    def merged(self, weight: Tensor, _: Tensor | None = None) -> Tensor:
        """See `_Carried`."""
        last = _Read.last
        if last is None or last[0] is not self:
            _Read.last = last = self, super().merged(weight)
        return last[1]


@cache
def _rounded_class() -> Any:
    from peft.tuners.lora import Linear

    class RoundedLora(Linear):  # type: ignore[misc, unused-ignore]  # a class of peft, which may be missing
        """peft's layer around a quantized one, its update added before rounding."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            """x (..., columns) -> (..., rows)."""
            if kwargs.get("adapter_names") is not None:
                raise UnsupportedError("adapter_names: a quantized layer has one weight for all rows of a batch")
            with carrying(self):
                return self.base_layer(x)

        def updated(self, weight: Tensor) -> Tensor:
            """The weight with the update of the active adapter."""
            names = [name for name in self.active_adapters if name in self.lora_A]
            if self.disable_adapters or self.merged or not names:
                return weight
            (name,) = names
            layer: Any = self  # whose dictionaries hold modules with weights
            A, share = layer.lora_A[name].weight, getattr(layer.lora_dropout[name], "p", 0.0)
            A = left_out(A, share) if self.training and share else A
            magnitude = layer.lora_magnitude_vector[name].weight if self.use_dora.get(name) else None
            return updated(weight, A, layer.lora_B[name].weight, self.scaling[name], magnitude)

        def before_rounding(self) -> list[nn.Parameter]:
            """See `qat.training.low_rank.LowRank`."""
            kinds = (self.lora_A, self.lora_B, self.lora_magnitude_vector)
            return [parameter for kind in kinds for parameter in kind.parameters()]

        def check(self, path: str) -> None:
            """Refuse what is more than W + s BA, or DoRA."""
            strange = [n for n, v in self.lora_variant.items() if v is not None and not self.use_dora.get(n)]
            strange += [name for name, bias in self.lora_bias.items() if bias]
            if strange:
                raise UnsupportedError(f"{path}: adapter {strange[0]!r} is more than LoRA or DoRA; {_INSTEAD}")
            active = [name for name in self.active_adapters if name in self.lora_A]
            if len(active) > 1:
                raise UnsupportedError(f"{path}: {some(active)} are active at once; use model.set_adapter for one")

    return RoundedLora


@contextlib.contextmanager
def carrying(layer: Any, reading: bool = False) -> Iterator[None]:
    """The quantized layer inside `layer`, where that is peft's, has its update in this context; to be read only."""
    if layer is None:
        yield
        return
    layer.base_layer.lora = _Read(layer) if reading else _Carried(layer)
    try:
        yield
    finally:
        layer.base_layer.lora = _Read.last = None


def wrapping(model: nn.Module) -> dict[int, Any]:
    """peft's layers by the identity of the quantized layer inside, all taken over."""
    take_over(model)
    if not getattr(model, "peft_config", None):
        return {}
    kind = _rounded_class()
    return {id(module.base_layer): module for module in model.modules() if isinstance(module, kind)}


@contextlib.contextmanager
def carried(model: nn.Module) -> Iterator[None]:
    """Every quantized layer that peft has a layer around has its update in this context."""
    with contextlib.ExitStack() as held:
        for layer in wrapping(model).values():
            held.enter_context(carrying(layer))
        yield


@contextlib.contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The prepared model under its own names, each weight with its update; peft's layers are back afterwards."""
    model = inner(model)
    layers = wrapping(model)
    if not layers:
        yield model
        return
    own = {id(layer) for layer in layers.values()}
    places = [(path, module) for path, module in model.named_modules() if id(module) in own]
    with contextlib.ExitStack() as held:
        for path, layer in places:
            held.enter_context(carrying(layer, reading=True))
            model.set_submodule(path, layer.base_layer)
            held.callback(model.set_submodule, path, layer)
        yield model
