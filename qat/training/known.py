"""The loss against a teacher of whom only some columns are known, as a cache on disk or a server tells them.

With q the student's probabilities and S the known columns of a token, three kinds:

    the k likeliest and the mass r of the rest (its tail)   sum_S p log(p / q) + r log(r / q_rest)
                                                            gradient: q - p on S, q (1 - r / q_rest) elsewhere
    n columns drawn from p, with replacement                mean_S log(p / q)
                                                            gradient: q - (how often a column was drawn) / n
    the likeliest as they are and some of the others,       sum_S w log(p / q), w = max(p, step)
    drawn with probability p / step                         gradient: q - w

The first is a lower bound of KL(p || q), 0 only where both agree on S and on the rest's mass, and grows into it with k;
leaving the rest out and renormalising would teach the student too much confidence. The others are estimates of KL(p ||
q) whose means, and whose gradients' means, are exact: by sparse logit sampling (arXiv 2503.16870), and by sampling
whose inclusion probabilities are min(1, p / step), which of all with k columns has the least variance sum p^2 / pi.

As in `qat.training.rows` the gradient is a closed form that overwrites the student's logits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# What a batch calls the columns.
IDS, LOG_P, TAIL, STEP = "teacher_ids", "teacher_log_p", "teacher_tail", "teacher_step"


class Known(NamedTuple):
    """What is known of a teacher's rows of probabilities.

    Attributes:
        ids: (tokens, k), the columns; the likeliest first, or as drawn.
        log_p: (tokens, k), their log-probabilities.
        tail: (tokens,), the mass of all other columns; None where columns were drawn.
        step: (tokens,), of which every drawn column stands for so much mass; columns with less probability are the
            drawn ones. None where all were drawn, or none.
    """

    ids: Tensor
    log_p: Tensor
    tail: Tensor | None
    step: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Known":
        """With every column changed."""
        tail, step = (None if column is None else change(column) for column in (self.tail, self.step))
        return Known(change(self.ids), change(self.log_p), tail, step)

    def part(self, part: slice) -> "Known":
        """Some of the tokens."""
        return self.each(lambda column: column[part])

    def to(self, device: torch.device) -> "Known":
        """On another device."""
        return self.each(lambda column: column.to(device))

    def widened(self, dtype: torch.dtype) -> "Known":
        """In the dtype of the arithmetic. What rounding took from the likeliest is made up for, since their mass is
        known: 1 - tail, or what the drawn ones leave."""
        ids, log_p = self.ids.long(), self.log_p.to(dtype)
        if self.tail is not None:
            tail = self.tail.to(dtype)
            return Known(ids, log_p + (torch.log1p(-tail) - log_p.logsumexp(-1))[:, None], tail)
        if self.step is None:
            return Known(ids, log_p, None)
        step = self.step.to(dtype)
        drawn = log_p.exp() < step[:, None]
        likely = log_p.masked_fill(drawn, -torch.inf).logsumexp(-1)
        mass = torch.log1p(-(drawn.sum(-1) * step).clamp_max(1.0))
        return Known(ids, torch.where(drawn, log_p, log_p + (mass - likely)[:, None]), None, step)

    def first(self, k: int) -> "Known":
        """Only the `k` likeliest; the others' mass goes to the tail."""
        assert self.tail is not None
        return Known(self.ids[:, :k], self.log_p[:, :k], self.tail + self.log_p[:, k:].exp().sum(-1))

    def named(self) -> dict[str, Tensor]:
        """As entries of a batch."""
        named = zip((IDS, LOG_P, TAIL, STEP), self, strict=True)
        return {name: column for name, column in named if column is not None}


def joined(parts: list[Known]) -> Known:
    """Tokens after tokens; at least one part, all of one kind."""
    tail, step = (
        torch.cat([column for column in columns if column is not None]) if columns[0] is not None else None
        for columns in ([part.tail for part in parts], [part.step for part in parts])
    )
    return Known(torch.cat([part.ids for part in parts]), torch.cat([part.log_p for part in parts]), tail, step)


def known_in(batch: dict[str, Tensor]) -> Known | None:
    """The entries that `Known.named` made, if any."""
    return Known(batch[IDS], batch[LOG_P], batch.get(TAIL), batch.get(STEP)) if IDS in batch else None


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


def thinned(logits: Tensor, k: int, generator: torch.Generator) -> Known:
    """`k` columns of each row of a teacher's logits: the likeliest for certain, the others with probability p / step,
    by one random number per row and equal steps through their sum (systematic sampling), so that none comes twice.

    How many are certain is each row's own: those that are at least what an equal share of the rest would be.
    """
    log_p = _log_softmax(logits)
    k = min(k, log_p.shape[-1])
    top, likely = log_p.topk(k, dim=-1)
    p, best = log_p.double().exp(), top.double().exp()
    places = torch.arange(k, device=p.device)
    beyond = p.scatter(-1, likely, 0.0).sum(-1, keepdim=True)
    shares = (best.flip(-1).cumsum(-1).flip(-1) + beyond) / (k - places)  # if those before are certain
    count = (best <= shares).int().argmax(-1, keepdim=True)  # the last always is
    certain = places < count
    sums = p.scatter_(-1, likely, best.masked_fill(certain, 0.0)).cumsum(-1)
    whole = sums[:, -1:]
    start = torch.rand(len(p), 1, generator=generator, dtype=p.dtype, device=p.device)
    points = (places - count + start).clamp_min_(0.0) / (k - count) * whole
    found = torch.searchsorted(sums, points, right=True).clamp_max_(p.shape[-1] - 1)
    ids = torch.where(certain, likely, found)
    nothing = (whole == 0) & ~certain  # is left to draw from
    return Known(
        ids, log_p.gather(-1, ids).masked_fill(nothing, -torch.inf), None, (whole / (k - count))[:, 0].to(log_p.dtype)
    )


def known_rows(student_logits: Tensor, known: Known) -> Tensor:
    """Loss per row (tokens,), at least float32; **overwrites the student's logits with the gradient of the sum**.

    Args:
        student_logits: (tokens, vocabulary), any floating dtype; no leaf, and nothing that autograd saved.
        known: of the same tokens.
    """
    log_q = _log_softmax(student_logits)
    ids, log_p, tail, step = known.widened(log_q.dtype)
    log_q_known = log_q.gather(-1, ids)
    q = log_q.exp_()
    if step is not None:
        weight = log_p.exp().maximum(step[:, None])
        loss = torch.where(weight > 0, weight * (log_p - log_q_known), 0.0).sum(-1)
        q.scatter_add_(-1, ids, -weight)
    elif tail is None:
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
