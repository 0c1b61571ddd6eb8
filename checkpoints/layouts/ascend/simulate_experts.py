"""The experts of a layer of an Ascend checkpoint as vllm-ascend runs them: stacks of what is stored for each, and the
grouped operators that its scheme class then calls, simulated (`qat.serving.npu_experts`, `npu_mx_experts`).

Inputs and outputs are of the model's type, BF16 or (on a 310P) FP16, whatever the model around them computes in. The
router is transformers' own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.adapters.experts import FIRST, SECOND
from qat.checkpoints.layouts.ascend.simulate import rows_apart
from qat.checkpoints.layouts.ascend.types import BY_NAME, Type
from qat.serving import npu, npu_mx_experts
from qat.serving.npu_experts import (
    grouped_matmul,
    grouped_matmul_swiglu_quant,
    quant_grouped_matmul_dequant,
    sent,
    swiglu,
    unpermute,
)

_FAR = 32.0  # as far as gates are asked what they compute
STACKS = (FIRST[0], SECOND)


def problem(module: Any, kinds: Mapping[str, set[str]]) -> str:
    """Why a layer's experts cannot be simulated, "" where they can.

    Args:
        module: transformers' own, or one that is quantized.
        kinds: names of the types of their matrices, by stack.
    """
    every = set().union(*kinds.values()) if kinds else set()
    if set(kinds) != set(STACKS):
        return f"only {', '.join(sorted(kinds))} is quantized"
    if len(every) > 1 or not all(BY_NAME[one].experts for one in every):
        return f"grouped products of {', '.join(sorted(every))} have no simulation"
    if module.has_bias or getattr(module, "has_post_expert_norm", False) or module.is_transposed:
        return f"{type(module).__name__} adds more to its products than a gate"
    if not _is_swiglu(module):
        return f"{type(module).__name__} has another gate than the operator's"
    return ""


def _is_swiglu(module: Any) -> bool:
    """Whether the module's gate is silu of the first half times the second, for large values, too."""
    if not module.has_gate:
        return False
    gate = torch.linspace(-_FAR, _FAR, 64)
    both = torch.stack((gate.repeat_interleave(64), gate.repeat(64)), dim=-1)
    with torch.no_grad():
        found = type(module)._apply_gate(module, both)
    expected = torch.nn.functional.silu(both[:, :1]) * both[:, 1:]
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


class SimulatedExperts(nn.Module):
    """In place of a layer's experts.

    Args:
        kind: their type.
        tensors: what is stored, by stack (`STACKS`) and name below a matrix's path: the matrices of all experts one
            below the other, gates above what they gate.
        experts: how many they are.
        model: the model's type.
    """

    def __init__(
        self,
        kind: Type,
        tensors: Mapping[str, Mapping[str, Tensor]],
        experts: int,
        model: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.kind, self.num_experts, self.model = kind, experts, model
        for stack in STACKS:
            own = _values(tensors[stack], experts) if kind.is_mx else _held(tensors[stack], experts, model)
            for name, tensor in own.items():
                self.register_buffer(f"{stack}_{name}", tensor)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, width) of any float type, the experts chosen for each and their shares (tokens, k);
        (tokens, width) of the same type comes out."""
        order, sizes = sent(top_k_index, self.num_experts)
        rows = hidden_states.to(self.model)[order // top_k_index.shape[-1]]
        of_integers = self._in_half if self.model is torch.float16 else self._of_integers
        y = (self._of_blocks if self.kind.is_mx else of_integers)(rows, sizes)
        return unpermute(y, order, top_k_weights).to(hidden_states.dtype)

    def _of_integers(self, x: Tensor, sizes: list[int]) -> Tensor:
        get, (first, second) = self.get_buffer, STACKS
        codes, scales = npu.dynamic_quant(x)
        assists = [get(f"{stack}_assist") if self.kind.pairs_rows else None for stack in STACKS]
        codes, scales = grouped_matmul_swiglu_quant(
            codes, get(f"{first}_weight"), get(f"{first}_scale").float(), sizes, pertoken_scale=scales,
            assist=assists[0],
        )  # fmt: skip
        weight, scale = get(f"{second}_weight"), get(f"{second}_scale")
        return grouped_matmul(codes, weight, scale, sizes, pertoken_scale=scales, assist=assists[1])

    def _in_half(self, x: Tensor, sizes: list[int]) -> Tensor:
        get, (first, second) = self.get_buffer, STACKS
        wide = quant_grouped_matmul_dequant(x, get(f"{first}_weight"), get(f"{first}_scale"), sizes)
        return quant_grouped_matmul_dequant(swiglu(wide), get(f"{second}_weight"), get(f"{second}_scale"), sizes)

    def _of_blocks(self, x: Tensor, sizes: list[int]) -> Tensor:
        first, second = (self.get_buffer(f"{stack}_weight") for stack in STACKS)
        bits, is_mixed = self.kind.input_element.bits, self.kind.input_element != self.kind.element
        codes, scales = npu.dynamic_mx_quant(x, bits)
        if is_mixed:  # for which no operator multiplies and gates at once
            wide = npu_mx_experts.grouped_matmul(codes, first, sizes, pertoken_scale=scales)
            codes, scales = npu_mx_experts.swiglu_group_quant(wide)
        else:
            codes, scales = npu_mx_experts.grouped_matmul_swiglu_quant(codes, first, sizes, bits, pertoken_scale=scales)
        return npu_mx_experts.grouped_matmul(codes, second, sizes, pertoken_scale=scales)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.num_experts}, {self.kind.name}"


def _held(tensors: Mapping[str, Tensor], experts: int, model: torch.dtype) -> dict[str, Tensor]:
    """Of one stack: codes (experts, k, n), scales (experts, n) in the model's type (on a 310P float32), and the sums of
    slices of `scale_bias`, where there is one."""
    assist = tensors.get("scale_bias")
    weight = tensors["weight"] if assist is None else rows_apart(tensors["weight"])
    held = {
        "weight": weight.view(experts, -1, weight.shape[-1]).transpose(1, 2).contiguous(),
        "scale": tensors["weight_scale"].to(torch.float32 if model is torch.float16 else model).view(experts, -1),
    }
    return held if assist is None else {**held, "assist": assist.sum(dim=1).view(experts, -1)}


def _values(tensors: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Of one stack with MX weights: values (experts, k, n)."""
    values = npu.mx_values(tensors["weight"], npu.pair_scales(tensors["weight_scale"]))
    return {"weight": values.view(experts, -1, values.shape[-1]).transpose(1, 2)}


def stacked(matrices: Sequence[tuple[int, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Tensors of a stack, from those of its matrices and the row at which each begins."""
    ordered = [tensors for _, tensors in sorted(matrices, key=lambda one: one[0])]
    return {name: torch.cat([tensors[name] for tensors in ordered]) for name in ordered[0]}
