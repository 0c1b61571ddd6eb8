"""The loss over a batch, whatever it is per token (`qat.training.objectives`).

Losses work on hidden states and the output head (`qat.training.heads`) in chunks of tokens, so that the logits of
student and teacher over the whole vocabulary never exist at once: each chunk's logits are made, turned into a loss and,
where they stood, into their gradient, and that into gradients of hidden states and head, all in the forward pass. At a
vocabulary of 128k and 4,096 tokens every copy of the whole would take 2.1 GB, and the naive loss holds several.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UnsupportedError
from qat.training.heads import AnyHead, ProductHead, Sums, WholeHead, as_product
from qat.training.known import Known
from qat.training.objectives import CrossEntropy, DistillLoss
from qat.training.rows import IGNORE as IGNORE

Replace = Callable[[Tensor, slice], Tensor]


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
        copies: of the chunk's logits; 3 for a student's head that is more than a product.
    """
    if memory is None:
        return 256
    tokens = min(LOGIT_BYTES, memory // 32) // (vocabulary * bytes_per_logit * copies)
    return min(max(tokens // 128 * 128, 256), 8192)


def _head(
    module: nn.Module, hidden: Tensor, keep: Tensor, device: str, gaps: Tensor | None = None
) -> tuple[AnyHead, Tensor, Tensor]:
    """The head, the hidden states of the tokens that count, and what the head reads of them: a quantized head's inputs
    are quantized once, in the shape in which the model would."""

    def taken(states: Tensor) -> Tensor:
        of = states.flatten(0, 1)[keep]
        return of if gaps is None else of.masked_fill(gaps[:, None], 0.0)

    kept = taken(hidden)
    product = as_product(module)
    if product is None:
        return WholeHead(module), kept, kept
    read = kept if product.input is None else taken(product.input(hidden))
    return ProductHead(product, device), kept, read


def _automatic_chunk(head: AnyHead, teachers: int, hidden: Tensor) -> int:
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
    def forward(ctx: Any, replace: Replace, head: AnyHead, chunk: int, student: Tensor,
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
    known: Known | None = None,
    kept: Tensor | None = None,
    gaps: bool = False,
) -> Tensor:
    """Sum of `loss` over the tokens that carry one (targets != -100), holding one chunk of logits at a time.

    Args:
        student_hidden, teacher_hidden: (batch, sequence, hidden); the teacher's carries no gradient.
        student_head, teacher_head: modules, hidden -> logits (tokens, vocabulary).
        targets: (batch, sequence), aligned with the logits.
        chunk: tokens per piece; by default as `chunk_tokens` says.
        known: what is known of the teacher where it is not at hand, of the tokens with a target, in their order.
        kept: where the flattened targets carry a loss; found here by default, which on a GPU waits for a count.
        gaps: `kept` may hold -1, a place without a token: zero there is in both models, which costs and teaches nothing
            where heads are products without a bias. So the number of tokens need not be known to the host.

    Raises:
        UnsupportedError: the loss asks for more than is known.
    """
    if known is not None and (problem := loss.beyond(known.tail is None)):
        raise UnsupportedError(problem)
    device = student_hidden.device.type
    keep = (targets.flatten() != IGNORE).nonzero().squeeze(1) if kept is None else kept
    empty = keep < 0 if gaps else None
    keep = keep.clamp_min(0) if gaps else keep
    labels = targets.flatten()[keep]
    labels = labels if empty is None else labels.masked_fill(empty, IGNORE)
    head, student, read = _head(student_head, student_hidden, keep, device, empty)
    teacher, teacher_logits, teacher_read = None, None, None
    if loss.needs_teacher and teacher_hidden is not None and teacher_head is not None:
        with torch.no_grad():
            known_head, teacher, teacher_read = _head(teacher_head, teacher_hidden, keep, device, empty)
        teacher_logits = known_head.logits
    chunk = _automatic_chunk(head, teacher is not None, student) if chunk is None else chunk

    def replace(logits: Tensor, part: slice) -> Tensor:
        reference: Tensor | Known | None = None if known is None else known.part(part)
        if teacher_read is not None and teacher_logits is not None:
            with torch.no_grad():
                reference = teacher_logits(teacher_read[part])
        return loss.replace(logits, reference, labels[part])

    if torch.is_grad_enabled():
        total: Tensor = _ChunkedLoss.apply(replace, head, chunk, read, *head.parameters)
    else:
        total = torch.zeros((), device=student.device)
        for part in _parts(len(labels), chunk):
            total = total + replace(head.logits(read[part]), part).sum()
    beside = loss.hidden_loss(student, teacher)
    return total if beside is None else total + beside
