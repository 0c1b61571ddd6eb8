"""Experts with MX weights as vllm-ascend runs them, beside fake quantization of each, for `qat verify --engine`: both
products and the gate between them, which single matrices do not show.

Fake quantization is in float32 here, but for what operators round to BF16 between two products.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.checkpoints.layouts.ascend.simulate_experts import STACKS, SimulatedExperts
from qat.checkpoints.layouts.ascend.types import Type
from qat.families import expert_list
from qat.numbers.format import Format
from qat.training.activations import fake_quantize_input

_LEAVES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FEW, _TOKENS = 3, 16


@dataclass(frozen=True)
class Matrix:
    """One of an expert's: its tensors in Ascend's layout, and its values (n, k)."""

    tensors: Mapping[str, Tensor]
    dense: Tensor


def lists(paths: Iterable[str]) -> dict[str, list[tuple[str, str, str]]]:
    """Paths of gate, what it gates and second matrix of the first few experts of each list that has all three."""
    every = dict.fromkeys(paths)
    owners = dict.fromkeys(owner for path in every if (owner := expert_list(path)) is not None)
    found: dict[str, list[tuple[str, str, str]]] = {}
    for owner in owners:
        for first, gated, second in _LEAVES:
            few = (f"{owner}.{number}" for number in range(_FEW))
            names = [(f"{at}.{first}", f"{at}.{gated}", f"{at}.{second}") for at in few]
            if own := [three for three in names if all(name in every for name in three)]:
                found[owner] = own
    return found


def simulated_and_trained(
    kind: Type, input: Format, rule: str, experts: Sequence[Sequence[Matrix]]
) -> tuple[Tensor, Tensor, Tensor]:
    """What experts (gate, what it gates, second matrix) make of random tokens, two for each: by simulated operators, by
    fake quantization, and the sum of what the latter adds up without signs, each (tokens, columns)."""
    stacks = [[one for expert in experts for one in expert[:2]], [expert[2] for expert in experts]]
    tensors = {
        stack: {name: torch.cat([one.tensors[name] for one in own]) for name in own[0].tensors}
        for stack, own in zip(STACKS, stacks, strict=True)
    }
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, experts[0][0].dense.shape[1], generator=generator).bfloat16()
    chosen = torch.randint(len(experts), (_TOKENS, 2), generator=generator)
    shares = torch.rand(_TOKENS, 2, generator=generator).bfloat16()
    found = SimulatedExperts(kind, tensors, len(experts))(x, chosen, shares).float()

    def read(values: Tensor) -> Tensor:
        return fake_quantize_input(values, input, rule, "ste", None, "experts")

    def held(values: Tensor, is_rounded: bool) -> Tensor:
        return values.bfloat16().float() if is_rounded else values

    total, added = torch.zeros(x.shape), torch.zeros(x.shape)
    for number, (gate, up, second) in enumerate(experts):
        inner = read(x.float())
        wide, one = (held(inner @ each.dense.float().t(), kind.element != input.element) for each in (gate, up))
        y = read(held(torch.nn.functional.silu(wide) * one, True)) @ second.dense.float().t()
        each = (shares.float() * (chosen == number))[..., None] * y[:, None]
        total, added = total + each.sum(dim=1), added + each.abs().sum(dim=1)
    return found, total, added
