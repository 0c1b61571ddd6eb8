"""The loss against a teacher of whom only some columns are known, as a cache on disk or a server tells them.

With q the student's probabilities and S the known columns of a token, two kinds:

    the k likeliest and the mass r of the rest (its tail)   sum_S p log(p / q) + r log(r / q_rest)
                                                            gradient: q - p on S, q (1 - r / q_rest) elsewhere
    n columns drawn from p, with replacement                mean_S log(p / q)
                                                            gradient: q - (how often a column was drawn) / n

The first is a lower bound of KL(p || q), 0 only where both agree on S and on the rest's mass, and grows into it with k;
leaving the rest out and renormalising would teach the student too much confidence. The second is an estimate of KL(p ||
q) whose mean, and whose gradient's mean, is exact (sparse logit sampling, arXiv 2503.16870).

As in `qat.training.rows` the gradient is a closed form that overwrites the student's logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

IDS, LOG_P, TAIL = "teacher_ids", "teacher_log_p", "teacher_tail"  # what a batch calls the columns


class Known(NamedTuple):
    """What is known of a teacher's rows of probabilities.

    Attributes:
        ids: (tokens, k), the columns; the likeliest first, or as drawn.
        log_p: (tokens, k), their log-probabilities.
        tail: (tokens,), the mass of all other columns; None where the columns were drawn.
    """

    ids: Tensor
    log_p: Tensor
    tail: Tensor | None

    def part(self, part: slice) -> "Known":
        """Some of the tokens."""
        return Known(self.ids[part], self.log_p[part], None if self.tail is None else self.tail[part])

    def widened(self, dtype: torch.dtype) -> "Known":
        """In the dtype of the arithmetic. What rounding took from the likeliest is made up for, since their mass is
        known: 1 - tail."""
        ids, log_p = self.ids.long(), self.log_p.to(dtype)
        if self.tail is None:
            return Known(ids, log_p, None)
        tail = self.tail.to(dtype)
        return Known(ids, log_p + (torch.log1p(-tail) - log_p.logsumexp(-1))[:, None], tail)

    def first(self, k: int) -> "Known":
        """Only the `k` likeliest; the others' mass goes to the tail."""
        assert self.tail is not None
        return Known(self.ids[:, :k], self.log_p[:, :k], self.tail + self.log_p[:, k:].exp().sum(-1))

    def named(self) -> dict[str, Tensor]:
        """As entries of a batch."""
        return {IDS: self.ids, LOG_P: self.log_p} | ({} if self.tail is None else {TAIL: self.tail})


def known_in(batch: dict[str, Tensor]) -> Known | None:
    """The entries that `Known.named` made, if any."""
    return Known(batch[IDS], batch[LOG_P], batch.get(TAIL)) if IDS in batch else None


def likeliest(logits: Tensor, k: int) -> Known:
    """The `k` likeliest columns of each row of a teacher's logits (tokens, vocabulary), and the mass of the rest."""
    log_p = _log_softmax(logits)
    top, ids = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    return Known(ids, top, log_p.scatter_(-1, ids, -torch.inf).logsumexp(-1).exp())


def drawn(logits: Tensor, n: int, generator: torch.Generator) -> Known:
    """`n` columns of each row of a teacher's logits, drawn by their probabilities with replacement."""
    log_p = _log_softmax(logits)
    ids = torch.multinomial(log_p.exp(), n, replacement=True, generator=generator)
    return Known(ids, log_p.gather(-1, ids), None)


def known_rows(student_logits: Tensor, known: Known) -> Tensor:
    """Loss per row (tokens,), at least float32; **overwrites the student's logits with the gradient of the sum**.

    Args:
        student_logits: (tokens, vocabulary), any floating dtype; no leaf, and nothing that autograd saved.
        known: of the same tokens.
    """
    log_q = _log_softmax(student_logits)
    ids, log_p, tail = known.widened(log_q.dtype)
    log_q_known = log_q.gather(-1, ids)
    q = log_q.exp_()
    if tail is None:
        loss = (log_p - log_q_known).mean(-1)
        q.scatter_add_(-1, ids, torch.full_like(log_p, -1 / ids.shape[-1]))
    else:
        p = log_p.exp()
        loss = torch.where(p > 0, p * (log_p - log_q_known), 0.0).sum(-1)
        rest = q.scatter_(-1, ids, 0.0).sum(-1).clamp_min_(torch.finfo(q.dtype).tiny)  # 1 - the others would cancel
        loss += torch.where(tail > 0, tail * (tail / rest).log(), 0.0)
        q.mul_((1 - tail / rest)[:, None]).scatter_(-1, ids, log_q_known.exp_().sub_(p))
    student_logits.copy_(q)
    return loss


def _log_softmax(logits: Tensor) -> Tensor:
    return functional.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
