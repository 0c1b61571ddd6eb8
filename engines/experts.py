"""Fused experts as a server holds them: one packed matrix per expert and projection, nothing dequantized in memory.

The module stays an instance of the architecture's class, which decides how a gate works; only its weights are gone.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qat.checkpoints.exported import ServedInput

Matrices = dict[tuple[int, int], nn.Module]  # by expert and first row


class PackedExperts(nn.Module):
    """What is added to a class of experts whose stacks are packed."""

    config: Any  # these are the class's own
    num_experts: int
    has_gate: bool
    act_fn: Callable[[Tensor], Tensor]
    inputs: list[ServedInput | None]
    first: nn.ModuleList
    second: nn.ModuleList

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, width), the chosen experts and their weights (tokens, k) -> (tokens, width)."""
        hidden_states = self._quantized(hidden_states, 0)
        total = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:  # how transformers marks experts of other devices
                continue
            token, choice = torch.where(top_k_index == expert)
            inner = _rows(self.first[expert], hidden_states[token])
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)  # type: ignore[operator]  # the class's
            outer = _rows(self.second[expert], self._quantized(inner, 1))
            total.index_add_(0, token, (outer * top_k_weights[token, choice, None]).to(total.dtype))
        return total

    def _quantized(self, x: Tensor, stack: int) -> Tensor:
        input = self.inputs[stack]
        return x if input is None else input.of(x)[0]


def _rows(parts: Any, x: Tensor) -> Tensor:
    return torch.cat([part(x) for part in parts], dim=-1)


@cache
def _packed_class(kind: Any) -> Any:
    return type(f"Packed{kind.__name__}", (PackedExperts, kind), {})


def pack_experts(module: Any, stacks: dict[str, Matrices], inputs: dict[str, ServedInput]) -> None:
    """Turn a module of fused experts into its packed self, in place.

    Args:
        module: as transformers made it, without numbers.
        stacks: the packed matrices of each stack, with the biases that the module loses.
        inputs: what quantizes the input of each stack.
    """
    slots = sorted(stacks, key=lambda slot: slot == "down_proj")
    for slot in slots:
        del module._parameters[slot]
        module._parameters.pop(f"{slot}_bias", None)
    packed_class: Any = _packed_class
    module.__class__ = packed_class(type(module))
    module.inputs = [inputs.get(slot) for slot in slots]
    for name, slot in zip(("first", "second"), slots, strict=True):
        lists = [nn.ModuleList() for _ in range(module.num_experts)]
        for (expert, _), matrix in sorted(stacks[slot].items()):
            lists[expert].append(matrix)
        setattr(module, name, nn.ModuleList(lists))
