"""What training minimises. A loss is a frozen config class whose `__call__` is its maths, and `Loss` is the registry.

Distillation losses work on hidden states and the output head in chunks of tokens, so the float32 logits of student and
teacher over the whole vocabulary never exist at once: each chunk's logits are made, turned into a loss and its
gradient, and dropped. At a vocabulary of 49,152 and 1,024 tokens the naive loss holds several copies of 200 MB.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from qat.config import Strict

Piece = Callable[[Tensor, slice], Tensor]
IGNORE = -100


class CrossEntropy(Strict):
    """Next-token cross-entropy: plain QAT."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    needs_teacher: ClassVar[bool] = False

    def tokens(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        """Loss per token (tokens,) from float32 student logits (tokens, vocabulary)."""
        return functional.cross_entropy(student, targets, reduction="none", ignore_index=IGNORE)


class ForwardKL(Strict):
    """KL(teacher || student) over the full vocabulary; the QAD loss (arXiv 2601.20088). `temperature`^2 rescales it."""

    kind: Literal["forward_kl"] = "forward_kl"
    temperature: float = Field(default=1.0, gt=0)
    needs_teacher: ClassVar[bool] = True

    def tokens(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        """Loss per token (tokens,) from float32 logits (tokens, vocabulary) of both models."""
        assert teacher is not None
        t = self.temperature
        if t == 1.0:
            kl: Tensor = _ForwardKL.apply(student, teacher)
            return kl
        kl = _ForwardKL.apply(student / t, teacher / t)
        return kl * t**2


class _ForwardKL(torch.autograd.Function):
    """KL(softmax(teacher) || softmax(student)) per row, with its closed gradient softmax(student) - softmax(teacher).

    Works in place where it can: on a CPU the passes over (tokens, vocabulary) cost more than the head's matrix product.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        log_q = functional.log_softmax(student, dim=-1, dtype=dtype)
        log_p = functional.log_softmax(teacher, dim=-1, dtype=dtype)
        p = log_p.exp()
        ctx.save_for_backward(log_q, p)
        ctx.dtype = student.dtype
        return log_p.sub_(log_q).mul_(p).sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log_q, p = ctx.saved_tensors
        return (log_q.exp().sub_(p).mul_(grad[:, None])).to(ctx.dtype), None


class ReverseKL(Strict):
    """KL(student || teacher): mode-seeking; for on-policy refinement."""

    kind: Literal["reverse_kl"] = "reverse_kl"
    temperature: float = Field(default=1.0, gt=0)
    needs_teacher: ClassVar[bool] = True

    def tokens(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        """Loss per token (tokens,)."""
        assert teacher is not None
        t = self.temperature
        log_p = functional.log_softmax(teacher / t, dim=-1)
        log_q = functional.log_softmax(student / t, dim=-1)
        return functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=-1) * t**2


class JensenShannon(Strict):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, with p the teacher and q the student."""

    kind: Literal["jsd"] = "jsd"
    beta: float = Field(default=0.5, gt=0, lt=1)
    needs_teacher: ClassVar[bool] = True

    def tokens(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        """Loss per token (tokens,)."""
        assert teacher is not None
        log_p, log_q = functional.log_softmax(teacher, dim=-1), functional.log_softmax(student, dim=-1)
        weights = torch.tensor([self.beta, 1 - self.beta], device=student.device, dtype=student.dtype).log()
        log_m = torch.logsumexp(torch.stack([log_p + weights[0], log_q + weights[1]]), dim=0)
        to_teacher = functional.kl_div(log_m, log_p, reduction="none", log_target=True).sum(dim=-1)
        to_student = functional.kl_div(log_m, log_q, reduction="none", log_target=True).sum(dim=-1)
        return self.beta * to_teacher + (1 - self.beta) * to_student


DistillLoss = ForwardKL | ReverseKL | JensenShannon
Loss = Annotated[CrossEntropy | ForwardKL | ReverseKL | JensenShannon, Field(discriminator="kind")]


class _ChunkedLoss(torch.autograd.Function):
    """Sum of a per-token loss whose gradient is taken chunk by chunk in the forward pass, while the logits exist.

    Against recomputing the logits in the backward pass this saves two applications of each head per step.
    """

    @staticmethod
    def forward(ctx: Any, piece: Piece, chunk: int, student: Tensor, *parameters: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[2:]
        total = torch.zeros((), device=student.device)
        grad_student = torch.zeros_like(student) if wanted[0] else None
        trained = [p for p, needed in zip(parameters, wanted[1:], strict=True) if needed]
        grads = [torch.zeros_like(p) for p in trained]
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            hidden = student[part].detach().requires_grad_(wanted[0])
            inputs = ([hidden] if wanted[0] else []) + trained
            with torch.enable_grad():
                value = piece(hidden, part)
            total += value.detach()
            found = list(torch.autograd.grad(value, inputs)) if inputs else []
            if grad_student is not None:
                grad_student[part] = found.pop(0)
            for accumulated, grad in zip(grads, found, strict=True):
                accumulated += grad
        remaining = iter(grads)
        ctx.grads = (grad_student, *(next(remaining) if needed else None for needed in wanted[1:]))
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, ()
        return (None, None, *(None if grad is None else grad.mul_(scale) for grad in grads))


def chunked(
    loss: CrossEntropy | DistillLoss,
    student_hidden: Tensor,
    student_head: nn.Module,
    teacher_hidden: Tensor | None,
    teacher_head: nn.Module | None,
    targets: Tensor,
    chunk: int = 256,
) -> Tensor:
    """Sum of `loss` over the tokens that carry one (targets != -100), holding one chunk of logits at a time.

    Args:
        student_hidden, teacher_hidden: (batch, sequence, hidden); the teacher's carries no gradient.
        student_head, teacher_head: modules, hidden -> logits (tokens, vocabulary).
        targets: (batch, sequence), aligned with the logits.
        chunk: tokens per piece.
    """
    keep = targets.flatten() != IGNORE
    student = student_hidden.flatten(0, 1)[keep]
    teacher = teacher_hidden.flatten(0, 1)[keep] if teacher_hidden is not None else None
    wanted = targets.flatten()[keep]

    def piece(hidden: Tensor, part: slice) -> Tensor:
        teacher_logits = None
        if teacher is not None and teacher_head is not None:
            with torch.no_grad():
                teacher_logits = teacher_head(teacher[part]).float()
        return loss.tokens(student_head(hidden).float(), teacher_logits, wanted[part]).sum()

    if torch.is_grad_enabled():
        total: Tensor = _ChunkedLoss.apply(piece, chunk, student, *student_head.parameters())
        return total
    total = torch.zeros((), device=student.device)
    for start in range(0, len(wanted), chunk):
        part = slice(start, start + chunk)
        total = total + piece(student[part], part)
    return total
