"""How many operations a linear layer issues in training: what a GPU's host has to launch, whatever the layer's size.

    python -m tests.qat.training.operations        # the table of docs/measurements.md

Counted where PyTorch dispatches, views included, an operator of `qat` as one; forward and backward, no optimizer.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qat.adapters.linear import QatLinear
from qat.numbers.catalog import lookup
from qat.numbers.numerics import find_scales
from qat.quantizer import InputQuantizer, Learn, WeightQuantizer

CASES = (("int4_g64", None), ("nvfp4", None), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("int8_channel", "int8_token"))
LEARN: tuple[Learn, ...] = ("none", "lsq", "dual_lsq", "focus", "refit")


class Operations(TorchDispatchMode):
    """Counts by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def layers(weight: str | None, input: str | None, learn: Learn, readers: int = 1) -> nn.ModuleList:
    """Linear layers that read one tensor; without a format, plain ones."""
    made = nn.ModuleList()
    shared = None
    if input is not None:
        shared = InputQuantizer(lookup(input), "vllm", "clipped", "minmax")
        shared.amax.fill_(4.0)
        shared.consumers = readers
    for _ in range(readers):
        linear = nn.Linear(128, 64, bias=False)
        if weight is not None:
            fmt = lookup(weight)
            quantizer = WeightQuantizer(fmt, find_scales(linear.weight.detach(), fmt), learn)
            linear = QatLinear.wrap(linear, quantizer, shared)
        made.append(linear)
    return made


def count(made: nn.ModuleList, autocast: bool) -> tuple[float, float]:
    """Operations per layer, (forward, backward), of the second micro-batch of a step: gradients are added up."""
    for _ in range(2):
        x: Tensor = torch.randn(2, 8, 128).requires_grad_()
        with Operations() as forward, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ys = [layer(x) for layer in made]
        grads = [torch.ones_like(y) for y in ys]
        with Operations() as backward:
            torch.autograd.backward(ys, grads)
    return forward.seen.total() / len(made), backward.seen.total() / len(made)


def main() -> None:
    """Print the table."""
    print(f"{'weight':<13} {'input':<11} {'':<9} " + " ".join(f"{learn:>9}" for learn in LEARN))
    for autocast in (False, True):
        how = "bf16" if autocast else "fp32"
        print(f"{'dense':<13} {'':<11} {how:<9} {sum(count(layers(None, None, 'none'), autocast)):>9.0f}")
        for weight, input in CASES:
            found = [sum(count(layers(weight, input, learn), autocast)) for learn in LEARN]
            print(f"{weight:<13} {input or '':<11} {how:<9} " + " ".join(f"{each:>9.0f}" for each in found))


if __name__ == "__main__":
    main()
