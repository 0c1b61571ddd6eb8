"""Output heads as losses see them: hidden states -> logits, and the logits' gradient -> gradients, a chunk at a time.

Most heads are one matrix product, with elementwise steps behind it where the model soft-caps or scales its logits. Then
nothing is left to autograd but what made the matrix: the fake quantization of a quantized head runs once per batch, and
not once per chunk. Any other module is called, and autograd goes through it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

Sums = list[Tensor | None]
Step = tuple[str, float]  # what is done to the logits, and by what number: see `STEPS`
STEPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "multiply": lambda logits, by: logits * by,
    "divide": lambda logits, by: logits / by,
    "softcap": lambda logits, by: torch.tanh(logits / by) * by,
}


@dataclass(frozen=True)
class Product:
    """A head that is a product, and elementwise steps on it.

    Attributes:
        weight, bias: (vocabulary, hidden), and (vocabulary,) or None, with the graph of what made them.
        input: what is done to the hidden states before, or None.
        steps: what is done to the logits, in order.
    """

    weight: Tensor
    bias: Tensor | None = None
    input: Callable[[Tensor], Tensor] | None = None
    steps: tuple[Step, ...] = ()

    def first(self, rows: int) -> "Product":
        """Of the first logits only."""
        return replace(self, weight=self.weight[:rows], bias=None if self.bias is None else self.bias[:rows])

    def followed_by(self, steps: tuple[Step, ...]) -> "Product":
        """With more done to the logits."""
        return replace(self, steps=(*self.steps, *steps))


def as_product(head: nn.Module) -> Product | None:
    """The product that `head` is, or None.

    Subclasses of linear layers, tensor subclasses, hooks and replaced `forward`s may be anything. A module that is a
    product says so by a method `as_product` of the same result (quantized layers do, and what stands around a layer).
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if "forward" in vars(head) or any(getattr(head, name) for name in hooks):
        return None
    if any(type(p) is not nn.Parameter for p in head.parameters()):
        return None
    if type(head) is nn.Linear:
        return Product(head.weight, head.bias)
    claim = getattr(head, "as_product", None)
    found: Product | None = claim() if callable(claim) else None
    return found


class AnyHead(Protocol):
    """What losses ask of a head.

    Attributes:
        copies: of a chunk's logits that are alive at once.
        parameters: what gets gradients, beside the hidden states.
    """

    copies: int
    parameters: list[Tensor]

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, vocabulary)."""

    def chunk(self, hidden: Tensor, replaced: Callable[[Tensor], Tensor], needs: tuple[bool, ...], sums: Sums,
              wide: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(Loss, gradient of `hidden`); adds the parameters' gradients to `sums`, in float32 or wider if `wide`.

        `replaced` gives the loss per token and writes the gradient over the logits; `needs` says what needs gradients:
        the hidden states, then each parameter.
        """


class ProductHead:
    """See `AnyHead`. The backward pass is two matrix products with the gradient that stands where the logits stood;
    under autocast the weight is cast once instead of once per chunk."""

    def __init__(self, product: Product, device: str) -> None:
        self.parameters = [p for p in (product.weight, product.bias) if p is not None]
        self.casts = torch.is_autocast_enabled(device) and product.weight.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if self.casts else product.weight.dtype
        self.weight = product.weight.detach().to(dtype)
        self.bias = None if product.bias is None else product.bias.detach().to(dtype)
        self.steps = product.steps
        self.copies = 1 + sum(step == "softcap" for step, _ in self.steps)

    def _product(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden.to(self.weight.dtype) if self.casts else hidden, self.weight, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `AnyHead`; no gradient reaches the parameters."""
        logits = self._product(hidden)
        for step, by in self.steps:  # one operation each and in the model's order: in BF16 every one rounds
            logits = STEPS[step](logits, by)
        return logits

    def chunk(self, hidden: Tensor, replaced: Callable[[Tensor], Tensor], needs: tuple[bool, ...], sums: Sums,
              wide: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See `AnyHead`."""
        logits = self._product(hidden)
        capped = [_forward(logits, *step) for step in self.steps]
        value = replaced(logits).sum()
        for step, kept in zip(reversed(self.steps), reversed(capped), strict=True):
            _backward(logits, *step, kept)
        for index, parameter in enumerate(self.parameters):
            dtype = torch.promote_types(parameter.dtype, torch.float32) if wide else parameter.dtype
            old = sums[index]
            if needs[1 + index] and index == 0:
                sums[index] = _add_product(old, logits.t(), hidden.to(logits.dtype), dtype)
            elif needs[1 + index]:
                summed = logits.sum(dim=0, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
                sums[index] = summed if old is None else old.add_(summed)
        return value, logits @ self.weight if needs[0] else None


def _forward(logits: Tensor, step: str, by: float) -> Tensor | None:
    """One of STEPS in place; returns what its derivative needs."""
    if step == "multiply":
        logits.mul_(by)
        return None
    logits.div_(by)
    if step == "divide":
        return None
    tanh = logits.tanh_().clone()
    logits.mul_(by)
    return tanh


def _backward(gradient: Tensor, step: str, by: float, tanh: Tensor | None) -> None:
    """The gradient before the step from the one after it, in place; uses up `tanh`."""
    if tanh is not None:  # d(by tanh(x / by)) / dx
        gradient.mul_(tanh.square_().neg_().add_(1.0))
    elif step == "multiply":
        gradient.mul_(by)
    else:
        gradient.div_(by)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right in `dtype`, into `total`; no product of (vocabulary, hidden) exists beside the sum."""
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda and left.dtype != dtype:  # 16-bit operands: the product leaves the tensor cores in float32
            if total is None:
                return torch.mm(left, right, out_dtype=dtype)
            return torch.addmm(total, left, right, out_dtype=dtype, out=total)
        left, right = left.to(dtype), right.to(dtype)
        return left @ right if total is None else total.addmm_(left, right)


class WholeHead:
    """See `AnyHead`: any module; autograd goes through it, starting from the logits' gradient."""

    copies = 2

    def __init__(self, module: nn.Module) -> None:
        self.logits = module
        self.parameters: list[Tensor] = list(module.parameters())

    def chunk(self, hidden: Tensor, replaced: Callable[[Tensor], Tensor], needs: tuple[bool, ...], sums: Sums,
              wide: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See `AnyHead`; sums stay in the parameters' dtype."""
        leaf = hidden.requires_grad_(needs[0])
        inputs = [t for t, needed in zip((leaf, *self.parameters), needs, strict=True) if needed]
        with torch.enable_grad():
            logits = self.logits(leaf)
        gradient = logits.detach().clone()  # what a head returns may be what its backward pass needs
        value = replaced(gradient).sum()
        gradients = iter(torch.autograd.grad(logits, inputs, gradient) if inputs else ())
        of_hidden = next(gradients) if needs[0] else None
        for index, parameter in enumerate(self.parameters):
            if needs[1 + index]:
                old = sums[index]
                sums[index] = (torch.zeros_like(parameter) if old is None else old).add_(next(gradients))
        return value, of_hidden
