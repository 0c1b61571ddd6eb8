"""Fused mixture-of-experts weights: stacks (experts, rows, columns), one scale grid and one global scale per expert.

The module stays what it is, an instance of a subclass made for its class: while it runs, its weight attributes answer
with the quantized stacks, so that transformers' own experts (grouped or batched products, whatever gate) compute with
them. Gate and up projection are one matrix here and share their scales; routers are modules of their own.

Stacks that are held packed are never whole: each expert's matrix is made when its tokens come, and again in the
backward pass, so the products are ours and what is around them is as in transformers' `grouped_mm`.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizer import LEARNED, InputQuantizer, WeightQuantizer
from qat.sites import Quantized, Quantizers, Slot
from qat.training.low_rank import updated
from qat.training.recomputed import recomputed_experts

FIRST, SECOND = ("gate_up_proj", "up_proj"), "down_proj"
GATED = "grouped_mm"  # an implementation of transformers that calls `_apply_gate`, as its loop over experts may not
_NO_GATE = "a stack of experts without a gate, whose second input cannot be reached"


class QatExperts(Quantized):
    """What is added to a class of experts. `weight_quantizers`, `input_quantizers` and, where weights carry trained
    updates that are added before rounding, `lora` are by parameter name; so is `held`, where a stack is held packed and
    no parameter."""

    config: Any  # these six are the class's own
    num_experts: int
    is_transposed: bool
    has_gate: bool
    act_fn: Any
    post_expert_norm: Any
    weight_quantizers: nn.ModuleDict
    input_quantizers: nn.ModuleDict
    routed: Tensor | None  # tokens per expert, while somebody watches

    def prepare(self, given: Mapping[str, Quantizers]) -> None:
        """Put the quantizers in place."""
        self.weight_quantizers = nn.ModuleDict({n: each.own for n, each in given.items() if each.own is not None})
        inputs = {name: each.input for name, each in given.items() if each.input is not None}
        self.input_quantizers = nn.ModuleDict(inputs)
        if isinstance(second := inputs.get(SECOND), InputQuantizer):
            second.reader = "second"
        self._values: dict[str, Tensor] = {}
        self._watchers: dict[int, Callable[[Tensor], None]] = {}
        self.TRANSPOSED = bool(self.is_transposed)
        self.routed = None
        self.lora: Any = None
        self.held: Any = None

    def matrix(self, slot: str) -> Tensor:
        """A stack as it multiplies, with its update."""
        if self._holds(slot):
            return torch.stack([self.expert(slot, index) for index in range(self.num_experts)])
        weight = super().matrix(slot)
        return self.lora[slot].merged(weight) if self.lora is not None and slot in self.lora else weight

    def _holds(self, slot: str) -> bool:
        return self.held is not None and slot in self.held

    def shape(self, slot: str) -> tuple[int, ...]:
        """(experts, rows, columns) as a stack multiplies."""
        return _shape(self, slot) or ()

    def expert(self, slot: str, index: int, factors: tuple[Tensor, ...] = ()) -> Tensor:
        """One matrix (rows, columns) of a stack, with its update.

        Args:
            factors: A and B of the update, where the caller has cut them out.
        """
        if not self._holds(slot):
            return self.matrix(slot)[index]
        weight: Tensor = self.held[slot].dequantize(index)
        if self.lora is None or slot not in self.lora:
            return weight
        update = self.lora[slot]
        A, B = factors or (update.A[index], update.B[index])
        return updated(weight, A, B, update.scaling)

    def parts(self, slot: str) -> Iterator[tuple[Tensor, WeightQuantizer]]:
        """See `qat.sites.Site.parts`."""
        if not self._holds(slot):
            yield from super().parts(slot)
            return
        (count, rows, _), whole = self.shape(slot), self.weight_quantizers[slot]
        assert isinstance(whole, WeightQuantizer)
        for index in range(count):
            yield self.expert(slot, index), whole.of_rows(slice(index * rows, (index + 1) * rows))

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
        if self.held is not None:
            return self._one_by_one(hidden_states, *args, **kwargs)
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

    def _one_by_one(self, hidden: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """hidden (tokens, columns), the experts chosen for each token and their shares. How many tokens each expert has
        is read by the host, once."""
        chosen, shares = (*args, *kwargs.values())
        top = chosen.shape[-1]
        ids, order = torch.sort(chosen.reshape(-1))
        bounds = torch.searchsorted(ids, torch.arange(self.num_experts + 1, device=ids.device)).tolist()
        sizes = [end - begin for begin, end in pairwise(bounds)]
        y = self._times(FIRST[0] if self.has_gate else FIRST[1], hidden[order // top], sizes, ids)
        y = self._times(SECOND, self._apply_gate(y) if self.has_gate else self.act_fn(y), sizes, ids)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y * shares.reshape(-1)[order].unsqueeze(-1)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return y[place].view(len(hidden), top, -1).sum(dim=1).to(hidden.dtype)

    def _times(self, slot: str, x: Tensor, sizes: list[int], ids: Tensor) -> Tensor:
        """Rows of x, `sizes` of them for each expert in turn, times its matrix, plus its bias."""
        quantizer = dict(self.weight_quantizers.items()).get(slot)
        learned: dict[str, Tensor] = {}
        if isinstance(quantizer, WeightQuantizer):
            learned = {name: own for name in LEARNED if (own := getattr(quantizer, name)) is not None}
        if self.lora is not None and slot in self.lora:
            learned |= {name: getattr(self.lora[slot], name) for name in "AB"}

        def make(index: int, parts: list[Tensor]) -> Tensor:
            own = dict(zip(learned, parts, strict=True))
            factors = (own["A"][0], own["B"][0]) if "A" in own else ()
            weight = self.expert(slot, index, factors)
            if not isinstance(quantizer, WeightQuantizer):
                return weight
            return quantizer.one(weight, index, *(own.get(name) for name in LEARNED))

        y = recomputed_experts(x, sizes, self.shape(slot)[1], make, list(learned.values()))
        bias = self._parameters.get(f"{slot}_bias")
        return y if bias is None else y + bias[ids].to(y.dtype)

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


def _shape(module: Any, name: str) -> tuple[int, ...] | None:
    """Of a stack as it multiplies, None where there is none."""
    if isinstance(module, QatExperts) and module._holds(name):
        held: tuple[int, ...] = module.held[name].shape
        return held
    parameter = module._parameters.get(name)
    if parameter is None:
        return None
    experts, rows, columns = parameter.shape
    return (experts, columns, rows) if module.is_transposed else (experts, rows, columns)


class ExpertsAdapter:
    """See `qat.sites.Adapter`."""

    def takes(self, module: nn.Module) -> bool:
        """Experts as transformers fuses them: they say how their stacks lie."""
        if isinstance(module, QatExperts):  # whose stacks may be held packed
            return True
        down = module._parameters.get(SECOND)
        return down is not None and down.dim() == 3 and all(hasattr(module, n) for n in ("is_transposed", "has_gate"))

    def slots(self, module: Any) -> list[Slot]:
        """The stacks of first and second matrices."""
        slots = []
        for name in (*FIRST, SECOND):
            shape = _shape(module, name)
            if shape is not None:
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
