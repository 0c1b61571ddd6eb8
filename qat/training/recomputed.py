"""Linear layers whose weights are made anew in the backward pass instead of being kept: for weights that are computed
from something much smaller (codes of a few bits, low-rank factors). One layer, or a stack of them, one at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
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
    x: Tensor, make: Callable[[], Tensor], bias: Tensor | None, learned: Sequence[nn.Parameter]
) -> Tensor:
    """`linear(x, make(), bias)`, of which x alone is kept for the backward pass, where `make` is called again.

    Args:
        x: (..., columns).
        make: the weight (rows, columns), the same at every call.
        bias: (rows,) or None.
        learned: the parameters that `make` reads.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y: Tensor = _Linear.apply(x, bias, make, *learned)
    return y


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: list[int], width: int, make: Callable[[int, list[Tensor]], Tensor], *learned: Tensor
    ) -> Tensor:
        ctx.sizes, ctx.make, ctx.learned = sizes, make, learned
        ctx.save_for_backward(x)
        y = x.new_zeros(len(x), width)  # one tensor from the start: between large ones small ones leave holes
        with torch.no_grad():
            for index, rows in _reached(sizes):
                weight = make(index, [_part(t, index, len(sizes)) for t in learned])
                torch.mm(x[rows], weight.to(x.dtype).t(), out=y[rows])
                del weight
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        grad_x = torch.zeros_like(x) if needs_x else None
        wanted = [(t, torch.zeros_like(t)) if need else (t, None) for t, need in zip(ctx.learned, needs, strict=True)]
        for index, rows in _reached(ctx.sizes):
            own = [_part(t, index, len(ctx.sizes)).detach().requires_grad_(total is not None) for t, total in wanted]
            with torch.enable_grad():
                weight = ctx.make(index, own)
            if grad_x is not None:
                torch.mm(grad[rows], weight.detach().to(grad.dtype), out=grad_x[rows])
            if weight.requires_grad:
                of_weight = (grad[rows].t() @ x[rows]).to(weight.dtype)
                of_own = torch.autograd.grad(weight, [t for t in own if t.requires_grad], of_weight, allow_unused=True)
                totals = [total for _, total in wanted if total is not None]
                for total, found in zip(totals, of_own, strict=True):
                    if found is not None:
                        _part(total, index, len(ctx.sizes)).copy_(found)
                del of_weight, of_own
            del weight
        return grad_x, None, None, None, *(total for _, total in wanted)


def _reached(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Index and rows of every expert that has some."""
    end = 0
    for index, size in enumerate(sizes):
        begin, end = end, end + size
        if size:
            yield index, slice(begin, end)


def _part(tensor: Tensor, index: int, count: int) -> Tensor:
    high = len(tensor) // count
    return tensor[index * high : (index + 1) * high]


def recomputed_experts(
    x: Tensor,
    sizes: list[int],
    width: int,
    make: Callable[[int, list[Tensor]], Tensor],
    learned: Sequence[Tensor],
) -> Tensor:
    """Rows of x times the matrices of a stack, each made when its rows come, and again in the backward pass; x alone is
    kept.

    Args:
        x: (rows, columns), those of the first matrix first; 0 comes of rows that no matrix has.
        sizes: how many rows each matrix has.
        width: rows of a matrix.
        make: index and its part of everything `learned` -> a matrix (width, columns), the same at every call.
        learned: the parameters that `make` reads, each as many equal parts along its first dimension as matrices.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y: Tensor = _Experts.apply(x, sizes, width, make, *learned)
    return y
