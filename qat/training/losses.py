"""The loss over a batch, whatever it is per token (`qat.training.objectives`).

Losses work on hidden states and the output head in chunks of tokens, so that the logits of student and teacher over the
whole vocabulary never exist at once: each chunk's logits are made, turned into a loss and, where they stood, into their
gradient, and that into gradients of hidden states and head, all in the forward pass. At a vocabulary of 49,152 and
1,024 tokens the naive loss holds several copies of 200 MB.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.training.objectives import CrossEntropy, DistillLoss
from qat.training.rows import IGNORE as IGNORE

Replace = Callable[[Tensor, slice], Tensor]
Sums = list[Tensor | None]


# --- heads ------------------------------------------------------------------------------------------------------------


def as_linear(head: nn.Module) -> nn.Linear | None:
    """The linear layer that `head` is nothing more than, or None.

    Quantized heads, subclasses, tensor subclasses, hooks and replaced `forward`s are something more. So is a module
    around a layer, unless it has a method `as_linear` that returns the layer (None where it soft-caps or rescales).
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if "forward" in vars(head) or any(getattr(head, name) for name in hooks):
        return None
    if type(head) is nn.Linear:
        return head if all(type(p) is nn.Parameter for p in head.parameters()) else None
    claim = getattr(head, "as_linear", None)
    inner = claim() if callable(claim) else None
    return None if inner is None or inner is head else as_linear(inner)


class _PlainHead:
    """A linear layer. Its backward pass is two matrix products with the gradient that stands where the logits stood;
    under autocast its weight is cast once instead of once per chunk."""

    copies = 1

    def __init__(self, layer: nn.Linear, device: str) -> None:
        self.parameters = [p for p in (layer.weight, layer.bias) if p is not None]
        self.casts = torch.is_autocast_enabled(device) and layer.weight.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if self.casts else layer.weight.dtype
        self.weight = layer.weight.detach().to(dtype)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, vocabulary), without a graph."""
        return functional.linear(hidden.to(self.weight.dtype) if self.casts else hidden, self.weight, self.bias)

    def chunk(self, hidden: Tensor, replace: Callable[[Tensor], Tensor], needs: tuple[bool, ...], sums: Sums,
              wide: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(Loss, gradient of `hidden`); adds the parameters' gradients to `sums`, in float32 or wider if `wide`."""
        logits = self.logits(hidden)
        value = replace(logits).sum()
        for index, parameter in enumerate(self.parameters):
            dtype = torch.promote_types(parameter.dtype, torch.float32) if wide else parameter.dtype
            old = sums[index]
            if needs[1 + index] and index == 0:
                sums[index] = _add_product(old, logits.t(), hidden.to(logits.dtype), dtype)
            elif needs[1 + index]:
                summed = logits.sum(dim=0, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
                sums[index] = summed if old is None else old.add_(summed)
        return value, logits @ self.weight if needs[0] else None


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right in `dtype`, into `total`; no product of (vocabulary, hidden) exists beside the sum."""
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda and left.dtype != dtype:  # 16-bit operands: the product leaves the tensor cores in float32
            if total is None:
                return torch.mm(left, right, out_dtype=dtype)
            return torch.addmm(total, left, right, out_dtype=dtype, out=total)
        left, right = left.to(dtype), right.to(dtype)
        return left @ right if total is None else total.addmm_(left, right)


class _ModuleHead:
    """Any module from hidden states to logits; autograd goes through it, starting from the logits' gradient."""

    copies = 2

    def __init__(self, module: nn.Module) -> None:
        self.logits = module
        self.parameters = list(module.parameters())

    def chunk(self, hidden: Tensor, replace: Callable[[Tensor], Tensor], needs: tuple[bool, ...], sums: Sums,
              wide: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See `_PlainHead.chunk`; sums stay in the parameters' dtype."""
        leaf = hidden.requires_grad_(needs[0])
        inputs = [t for t, needed in zip((leaf, *self.parameters), needs, strict=True) if needed]
        with torch.enable_grad():
            logits = self.logits(leaf)
        gradient = logits.detach().clone()  # what a head returns may be what its backward pass needs
        value = replace(gradient).sum()
        gradients = iter(torch.autograd.grad(logits, inputs, gradient) if inputs else ())
        of_hidden = next(gradients) if needs[0] else None
        for index, parameter in enumerate(self.parameters):
            if needs[1 + index]:
                old = sums[index]
                sums[index] = (torch.zeros_like(parameter) if old is None else old).add_(next(gradients))
        return value, of_hidden


def _head(module: nn.Module, device: str) -> _PlainHead | _ModuleHead:
    layer = as_linear(module)
    return _ModuleHead(module) if layer is None else _PlainHead(layer, device)


LOGIT_BYTES = 2**30  # of logits alive at once on a GPU, if it has 32 times as much memory


def chunk_tokens(vocabulary: int, bytes_per_logit: int, memory: int | None, copies: int = 2) -> int:
    """Tokens per chunk where the user does not say: 256 without a GPU, where logits that fit a cache pay.

    With one, chunk x vocabulary x bytes_per_logit x copies is all that the chunk adds to the gradients and, under
    autocast, to one cast copy of each head; it is limited to 1 GiB or 1/32 of the memory. 2048 tokens of 128,256 BF16
    logits (two copies: student, teacher) take 1.05 GB. Free memory plays no part, so that a resumed run sums in the
    order of the interrupted one.

    Args:
        vocabulary: columns of the logits.
        bytes_per_logit: of the dtype that the head computes in.
        memory: total bytes of the GPU, None without one.
        copies: of the chunk's logits; 3 for a student's head that is not plain.
    """
    if memory is None:
        return 256
    tokens = min(LOGIT_BYTES, memory // 32) // (vocabulary * bytes_per_logit * copies)
    return min(max(tokens // 128 * 128, 256), 8192)


def _automatic_chunk(head: _PlainHead | _ModuleHead, teachers: int, hidden: Tensor) -> int:
    if not hidden.is_cuda:
        return chunk_tokens(0, 0, None)
    vocabulary = max((len(p) for p in head.parameters if p.dim() == 2), default=2**17)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype
    memory = torch.cuda.get_device_properties(hidden.device).total_memory
    return chunk_tokens(vocabulary, dtype.itemsize, memory, head.copies + teachers)


# --- the loss over a batch --------------------------------------------------------------------------------------------


class _ChunkedLoss(torch.autograd.Function):
    """Sum of a per-token loss whose gradient is taken chunk by chunk in the forward pass, while the logits exist.

    Against recomputing the logits in the backward pass this saves two applications of each head per step.
    """

    @staticmethod
    def forward(ctx: Any, replace: Replace, head: _PlainHead | _ModuleHead, chunk: int, student: Tensor,
                *parameters: Tensor) -> Tensor:  # fmt: skip
        needs = ctx.needs_input_grad[3:]
        total = torch.zeros((), device=student.device)
        grad_student = torch.zeros_like(student) if needs[0] else None
        sums: Sums = [None] * len(parameters)
        for part in _parts(len(student), chunk):

            def replaced(logits: Tensor, part: slice = part) -> Tensor:
                return replace(logits, part)

            value, grad = head.chunk(student[part].detach(), replaced, needs, sums, wide=len(student) > chunk)
            total += value
            if grad_student is not None and grad is not None:
                grad_student[part] = grad
        ctx.grads = [grad_student]
        for parameter, summed, needed in zip(parameters, sums, needs[1:], strict=True):
            if needed and summed is None:  # no token carried a loss
                summed = torch.zeros_like(parameter)
            ctx.grads.append(None if summed is None else summed.to(parameter.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, ()
        return (None, None, None, *(None if grad is None else grad.mul_(scale) for grad in grads))


def _parts(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, tokens, chunk))


def chunked(
    loss: CrossEntropy | DistillLoss,
    student_hidden: Tensor,
    student_head: nn.Module,
    teacher_hidden: Tensor | None,
    teacher_head: nn.Module | None,
    targets: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """Sum of `loss` over the tokens that carry one (targets != -100), holding one chunk of logits at a time.

    Args:
        student_hidden, teacher_hidden: (batch, sequence, hidden); the teacher's carries no gradient.
        student_head, teacher_head: modules, hidden -> logits (tokens, vocabulary).
        targets: (batch, sequence), aligned with the logits.
        chunk: tokens per piece; by default as `chunk_tokens` says.
    """
    device = student_hidden.device.type
    keep = (targets.flatten() != IGNORE).nonzero().squeeze(1)  # once: on a GPU each boolean index waits for a count
    student = student_hidden.flatten(0, 1)[keep]
    labels = targets.flatten()[keep]
    head = _head(student_head, device)
    teacher, teacher_logits = None, None
    if loss.needs_teacher and teacher_hidden is not None and teacher_head is not None:
        teacher, teacher_logits = teacher_hidden.flatten(0, 1)[keep].detach(), _head(teacher_head, device).logits
    chunk = _automatic_chunk(head, teacher is not None, student) if chunk is None else chunk

    def replace(logits: Tensor, part: slice) -> Tensor:
        known = None
        if teacher is not None and teacher_logits is not None:
            with torch.no_grad():
                known = teacher_logits(teacher[part])
        return loss.replace(logits, known, labels[part])

    if torch.is_grad_enabled():
        total: Tensor = _ChunkedLoss.apply(replace, head, chunk, student, *head.parameters)
    else:
        total = torch.zeros((), device=student.device)
        for part in _parts(len(labels), chunk):
            total = total + replace(head.logits(student[part]), part).sum()
    beside = loss.hidden_loss(student, teacher)
    return total if beside is None else total + beside
