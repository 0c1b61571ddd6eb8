"""Losses between rows of logits, as one operator: the loss per token, and its gradient where the logits were.

`qat::distill_rows` is all of a loss but its matrix products. Its gradients are closed forms, so nothing is remembered
between a forward and a backward pass, and they overwrite the student's logits, which nobody needs afterwards: over a
vocabulary each copy saved counts. Device kernels register on the same name.

With student and teacher logits x and y, q = softmax(x / t) and p = softmax(y / t), the losses and their gradients are

    forward_kl     sum p log(p / q)                               (q - p) / t
    reverse_kl     sum q log(q / p)                               q (log(q / p) - loss) / t
    jsd            b sum p log(p / m) + (1 - b) sum q log(q / m)  (1 - b) q (log(q / m) - sum q log(q / m)) / t
    cross_entropy  -log q[target]                                 (q - onehot(target)) / t

with m = b p + (1 - b) q, all of it times t^2. A column that a model rules out (logit -inf) has probability 0, and
0 log 0 is 0; a loss is infinite only where one model rules out what the other allows.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from qat.errors import UnsupportedError

IGNORE = -100  # the target of a position without one; cross entropy skips it
KINDS = ("forward_kl", "reverse_kl", "jsd", "cross_entropy")


def reference(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor | None,
    kind: str,
    temperature: float,
    beta: float,
    scale: float,
) -> Tensor:
    """What the operator means, see `distill_rows`; in float32, or float64 for float64 logits."""
    log_q = _log_softmax(student_logits, temperature)
    room = student_logits if student_logits.dtype == log_q.dtype else torch.empty_like(log_q)
    if kind == "cross_entropy":
        assert targets is not None
        loss, gradient = _cross_entropy(log_q, targets, room)
    else:
        assert teacher_logits is not None
        log_p = _log_softmax(teacher_logits, temperature)
        if kind == "forward_kl":
            loss, gradient = _forward_kl(log_q, log_p, room)
        elif kind == "reverse_kl":
            loss, gradient = _reverse_kl(log_q, log_p, room)
        else:
            loss, gradient = _jensen_shannon(log_q, log_p, room, beta)
    if temperature * scale != 1.0:
        gradient.mul_(temperature * scale)
    if gradient is not student_logits:
        student_logits.copy_(gradient)
    return loss if temperature == 1.0 else loss.mul_(temperature**2)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits if temperature == 1.0 else logits.to(dtype) / temperature
    return functional.log_softmax(scaled, dim=-1, dtype=dtype)


def _may_look(tensor: Tensor) -> bool:
    """Whether asking for a few rows costs less than a pass over all: other devices would have to be waited for."""
    return tensor.device.type == "cpu"


def _expectation(weight: Tensor, ratio: Tensor, out: Tensor) -> Tensor:
    """Row sums of weight * ratio, with 0 log 0 = 0; the products stay in `out`, which may be `ratio`.

    Only rows that came out NaN are looked at again, and only their ratios change: a pass over all costs more.
    """
    total = torch.mul(weight, ratio, out=out).sum(dim=-1)
    again = total.isnan()
    if not _may_look(total):
        empty = (weight == 0) & again[:, None]
        ratio.masked_fill_(empty, 0.0)
        return torch.where(again, out.masked_fill_(empty, 0.0).sum(dim=-1), total)
    if bool(again.any()):
        empty = weight[again] == 0
        total[again] = out[again].masked_fill(empty, 0.0).sum(dim=-1)
        ratio[again] = ratio[again].masked_fill(empty, 0.0)
    return total


def _forward_kl(log_q: Tensor, log_p: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.exp(log_p, out=room)
    loss = _expectation(p, log_p.sub_(log_q), out=log_p)
    return loss, torch.sub(log_q.exp_(), p, out=room)


def _reverse_kl(log_q: Tensor, log_p: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.exp(log_q, out=room)
    ratio = log_q.sub_(log_p)
    loss = _expectation(q, ratio, out=log_p)
    return loss, torch.mul(ratio.sub_(loss[:, None]), q, out=room)


def _jensen_shannon(log_q: Tensor, log_p: Tensor, room: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(q / m) are functions of log(q / p) alone: no mixture is formed, nothing cancels at p = q."""
    log_b, log_rest = math.log(beta), math.log1p(-beta)
    zero = log_q.new_zeros(())
    q = torch.exp(log_q, out=room)
    odds = log_q.sub_(log_p).add_(log_rest - log_b)
    p = log_p.exp_()
    of_teacher = torch.logaddexp(odds, zero).neg_().sub_(log_b)
    to_teacher = _expectation(p, of_teacher, out=of_teacher)
    of_student = torch.logaddexp(odds.neg_(), zero, out=odds).neg_().sub_(log_rest)
    to_student = _expectation(q, of_student, out=p)
    loss = beta * to_teacher + (1 - beta) * to_student
    return loss, torch.mul(of_student.sub_(to_student[:, None]), q, out=room).mul_(1 - beta)


def _cross_entropy(log_q: Tensor, targets: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    ignored = targets == IGNORE
    column = targets.masked_fill(ignored, 0)[:, None]
    loss = log_q.gather(-1, column).squeeze(-1).neg_().masked_fill_(ignored, 0.0)
    gradient = torch.exp(log_q, out=room)
    gradient.scatter_add_(-1, column, -torch.ones_like(column, dtype=gradient.dtype))
    if not _may_look(gradient):
        gradient.masked_fill_(ignored[:, None], 0.0)
    elif bool(ignored.any()):
        gradient[ignored] = 0.0
    return loss, gradient


@torch.library.custom_op("qat::distill_rows", mutates_args=("student_logits",))
def _distill_rows(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor | None,
    kind: str,
    temperature: float,
    beta: float,
    scale: float,
) -> Tensor:
    return reference(student_logits, teacher_logits, targets, kind, temperature, beta, scale)


@_distill_rows.register_fake
def _(student_logits: Tensor, *args: object) -> Tensor:
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    return student_logits.new_empty(len(student_logits), dtype=dtype)


def distill_rows(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor | None,
    kind: str,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
    scale: float = 1.0,
) -> Tensor:
    """Loss per row (tokens,) in float32, times temperature^2; **overwrites the student's logits with their gradient**.

    Args:
        student_logits: (tokens, vocabulary), any floating dtype; afterwards d(sum of losses)/d(logits) times `scale`,
            rounded to that dtype. A leaf or a tensor that autograd saved must not be given.
        teacher_logits: the same shape; unused by cross_entropy.
        targets: (tokens,) int64, for cross_entropy; a row of `IGNORE` has no loss and no gradient.
        kind: one of `KINDS`.
        temperature: divides the logits of both.
        beta: the teacher's weight in the mixture of jsd.
        scale: of the gradient only.

    Raises:
        UnsupportedError: another kind, or the two models' vocabularies differ.
    """
    if kind not in KINDS:
        raise UnsupportedError(f"no loss {kind!r} over rows of logits; there are {', '.join(KINDS)}")
    other = targets if kind == "cross_entropy" else teacher_logits
    if other is None:
        raise UnsupportedError(f"{kind} needs {'targets' if kind == 'cross_entropy' else 'teacher logits'}")
    if other.shape != student_logits.shape[: other.dim()]:
        raise UnsupportedError(
            f"{kind} compares student logits {tuple(student_logits.shape)} with {tuple(other.shape)}: both models need "
            "the same tokens and the same vocabulary"
        )
    loss: Tensor = torch.ops.qat.distill_rows(student_logits, teacher_logits, targets, kind, temperature, beta, scale)
    return loss
