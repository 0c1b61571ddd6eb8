"""A linear layer whose weight is made anew in the backward pass instead of being kept: for weights that are computed
from something much smaller (codes of a few bits, low-rank factors)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, make: Callable[[], Tensor], *learned: Tensor) -> Tensor:
        ctx.make, ctx.learned = make, learned
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.no_grad():
            weight = make()
        ctx.save_for_backward(x)
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        needs_x, needs_bias, _, *needs = ctx.needs_input_grad
        with torch.enable_grad():
            weight = ctx.make()
        rows = grad.flatten(0, -2)
        grad_x = grad @ weight.detach().to(grad.dtype) if needs_x else None
        grad_bias = rows.sum(dim=0).to(ctx.bias_dtype) if needs_bias else None
        grads: list[Tensor | None] = [None] * len(needs)
        wanted = [index for index, need in enumerate(needs) if need]
        if wanted:
            of_weight = (rows.t() @ x.flatten(0, -2)).to(weight.dtype)
            found = torch.autograd.grad(weight, [ctx.learned[i] for i in wanted], of_weight, allow_unused=True)
            for index, gradient in zip(wanted, found, strict=True):
                grads[index] = gradient
        return grad_x, grad_bias, None, *grads


def recomputed_linear(
    x: Tensor, make: Callable[[], Tensor], bias: Tensor | None, learned: Sequence[Tensor]
) -> Tensor:
    """`linear(x, make(), bias)`, of which x alone is kept for the backward pass, where `make` is called again.

    Args:
        x: (..., columns).
        make: the weight (rows, columns), the same at every call.
        bias: (rows,) or None.
        learned: the parameters that `make` reads, or parts of them.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y: Tensor = _Linear.apply(x, bias, make, *learned)
    return y
