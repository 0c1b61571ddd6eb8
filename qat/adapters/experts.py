"""Fused mixture-of-experts weights: stacks (experts, rows, columns), one scale grid and one global scale per expert.

The module stays what it is, an instance of a subclass made for its class: while it runs, its weight attributes answer
with the quantized stacks, so that transformers' own experts (grouped or batched products, whatever gate) compute with
them. Gate and up projection are one matrix here and share their scales; routers are modules of their own.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizer import WeightQuantizer
from qat.sites import Quantized, Quantizers, Slot

FIRST, SECOND = ("gate_up_proj", "up_proj"), "down_proj"
GATED = "grouped_mm"  # an implementation of transformers that calls `_apply_gate`, as its loop over experts may not
_NO_GATE = "a stack of experts without a gate, whose second input cannot be reached"


class QatExperts(Quantized):
    """What is added to a class of experts. `weight_quantizers`, `input_quantizers` and, where weights carry trained
    updates that are added before rounding, `lora` are by parameter name."""

    config: Any  # these four are the class's own
    num_experts: int
    is_transposed: bool
    has_gate: bool
    weight_quantizers: nn.ModuleDict
    input_quantizers: nn.ModuleDict
    routed: Tensor | None  # tokens per expert, while somebody watches

    def prepare(self, given: Mapping[str, Quantizers]) -> None:
        """Put the quantizers in place."""
        self.weight_quantizers = nn.ModuleDict({n: each.own for n, each in given.items() if each.own is not None})
        inputs = {name: each.input for name, each in given.items() if each.input is not None}
        self.input_quantizers = nn.ModuleDict(inputs)
        self._values: dict[str, Tensor] = {}
        self._watchers: dict[int, Callable[[Tensor], None]] = {}
        self.TRANSPOSED = bool(self.is_transposed)
        self.routed = None
        self.lora: Any = None

    def matrix(self, slot: str) -> Tensor:
        """A stack as it multiplies, with its update."""
        weight = super().matrix(slot)
        return self.lora[slot].merged(weight) if self.lora is not None and slot in self.lora else weight

    def quantizers(self) -> dict[str, Quantizers]:
        """By slot."""
        given = {}
        for name, own in self.weight_quantizers.items():
            assert isinstance(own, WeightQuantizer)
            given[name] = Quantizers(own, dict(self.input_quantizers.items()).get(name))
        return given

    def watch(self, slot: str, see: Callable[[Tensor], None]) -> Any:
        """See `qat.sites.Site.watch`."""
        if slot in FIRST:
            return self.register_forward_pre_hook(lambda _, args: self._count(see, *args))
        return _Watcher(self._watchers, see)

    def _count(self, see: Callable[[Tensor], None], hidden: Tensor, chosen: Tensor | None = None, *_: Any) -> None:
        if chosen is not None:
            counts = torch.bincount(chosen.flatten(), minlength=self.num_experts + 1)[: self.num_experts]
            self.routed = counts if self.routed is None else self.routed + counts
        see(hidden)

    def unreached(self) -> tuple[int, int]:
        """Experts that no watched token was sent to, and all experts."""
        return (0, 0) if self.routed is None else (int((self.routed == 0).sum()), self.num_experts)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the class computes, with quantized weights and inputs."""
        first = next((self.input_quantizers[name] for name in FIRST if name in self.input_quantizers), None)
        if first is not None:
            hidden_states = first(hidden_states)
        for name, quantizer in self.weight_quantizers.items():
            value = quantizer(self.matrix(name))
            self._values[name] = value.transpose(-1, -2) if self.TRANSPOSED else value
        before = self.config._experts_implementation
        try:
            if self._watchers or SECOND in self.input_quantizers:
                self.config._experts_implementation = GATED if before in (None, "eager") else before
            result: Tensor = super().forward(hidden_states, *args, **kwargs)
            return result
        finally:
            self._values.clear()
            self.config._experts_implementation = before

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """The class's gate; its result is what the second stack is multiplied with."""
        gated: Tensor = super()._apply_gate(gate_up)  # type: ignore[misc]  # of the class of experts
        for see in list(self._watchers.values()):
            see(gated)
        if SECOND in self.input_quantizers:
            gated = self.input_quantizers[SECOND](gated)
        return gated


class _Watcher:
    """A handle like that of a hook."""

    def __init__(self, watchers: dict[int, Callable[[Tensor], None]], see: Callable[[Tensor], None]) -> None:
        self._watchers = watchers
        watchers[id(self)] = see

    def remove(self) -> None:
        """Stop seeing."""
        self._watchers.pop(id(self), None)


def _stack(name: str) -> property:
    """A parameter that reads as its quantized value while the module runs."""

    def get(self: Any) -> Tensor:
        value: Tensor = self._values.get(name) if name in self._values else self._parameters[name]
        return value

    return property(get)


@cache
def _quantized_class(kind: Any, slots: tuple[str, ...]) -> type[nn.Module]:
    return type(f"Qat{kind.__name__}", (QatExperts, kind), {name: _stack(name) for name in slots})


class ExpertsAdapter:
    """See `qat.sites.Adapter`."""

    def takes(self, module: nn.Module) -> bool:
        """Experts as transformers fuses them: they say how their stacks lie."""
        down = module._parameters.get(SECOND)
        return down is not None and down.dim() == 3 and all(hasattr(module, n) for n in ("is_transposed", "has_gate"))

    def slots(self, module: Any) -> list[Slot]:
        """The stacks of first and second matrices."""
        slots = []
        for name in (*FIRST, SECOND):
            parameter = module._parameters.get(name)
            if parameter is not None:
                experts, rows, columns = parameter.shape
                shape = (experts, columns, rows) if module.is_transposed else (experts, rows, columns)
                no_input = "" if name in FIRST or module.has_gate else _NO_GATE
                slots.append(Slot(name, "weight", shape, no_input, module.is_transposed, low_rank=True))
        return slots

    def attach(self, module: nn.Module, quantizers: Mapping[str, Quantizers]) -> nn.Module:
        """The module itself, which becomes an instance of a quantized subclass of its class."""
        quantized_class: Any = _quantized_class
        module.__class__ = quantized_class(type(module), tuple(quantizers))
        assert isinstance(module, QatExperts)
        module.prepare(quantizers)
        return module


ADAPTER = ExpertsAdapter()
