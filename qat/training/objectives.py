"""What training minimises: a loss is a frozen config class, `Loss` the registry, `qat.training.rows` the arithmetic.

Each says what it makes of rows of logits (`tokens`, with a graph; `replace`, without), and distillation losses may add
one between final hidden states. `qat.training.losses` sums them over a batch.
"""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from qat.config import Strict
from qat.errors import UnsupportedError
from qat.training.known import Known, known_rows
from qat.training.rows import KINDS, distill_rows


class _Loss(Strict):
    kind: str
    needs_teacher: ClassVar[bool] = True

    def hidden_loss(self, student: Tensor, teacher: Tensor | None) -> Tensor | None:
        """A loss on the final hidden states (tokens, hidden) of both, summed and weighted; None where there is none."""
        return None

    def tokens(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        """Loss per token (tokens,), at least float32, from logits (tokens, vocabulary) of both models; differentiable.

        A loss that `qat.training.rows` does not know overrides this; it may rely on float32 logits.
        """
        value: Tensor = _PerToken.apply(self, student, teacher, targets)
        return value

    def beyond(self, sampled: bool, k: int | None = None) -> str | None:
        """Why this loss cannot be had where only some of a teacher's columns are known (`Known`), or None.

        Args:
            sampled: whether they were drawn.
            k: how many, if that is to be compared.
        """
        return (
            f"loss {self.kind} needs the teacher's probability of every token, of which a cache holds some; use "
            "forward_kl, top_kl, or a mixture of one with cross_entropy"
        )

    def replace(self, student: Tensor, teacher: Tensor | Known | None, targets: Tensor) -> Tensor:
        """`tokens`, without a graph; the student's logits are overwritten with the gradient of the sum. A teacher that
        is only `Known` comes to losses with nothing `beyond`."""
        assert not isinstance(teacher, Known)
        if self.kind in KINDS:
            settings = {name: getattr(self, name) for name in ("temperature", "beta") if hasattr(self, name)}
            return distill_rows(student, teacher, targets, self.kind, **settings)
        dtype = torch.promote_types(student.dtype, torch.float32)
        leaf = student.detach().to(dtype).requires_grad_()
        with torch.enable_grad():
            value = self.tokens(leaf, None if teacher is None else teacher.to(dtype), targets)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        student.copy_(gradient)
        return value.detach()


class CrossEntropy(_Loss):
    """Next-token cross-entropy: plain QAT."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    needs_teacher: ClassVar[bool] = False

    def beyond(self, sampled: bool, k: int | None = None) -> str | None:
        """See `_Loss`."""
        return None

    def replace(self, student: Tensor, teacher: Tensor | Known | None, targets: Tensor) -> Tensor:
        """See `_Loss`."""
        return super().replace(student, None, targets)


class _Distillation(_Loss):
    """What losses against a teacher have in common.

    Attributes:
        hidden: weight of a second loss, between the final hidden states; 0 for none.
        hidden_measure: 1 - cosine per token, or the squared distance relative to the teacher's square.
    """

    hidden: float = Field(default=0.0, ge=0)
    hidden_measure: Literal["cosine", "mse"] = "cosine"

    def _more_than_columns(self, temperature: float = 1.0) -> str | None:
        """What `beyond` says of the settings that need more than columns at temperature 1."""
        if self.hidden:
            return "loss.hidden compares with the teacher's hidden states, which no cache holds; use loss.hidden=0"
        if temperature != 1.0:
            return (
                f"loss {self.kind} at temperature {temperature:g} weighs all of the teacher's columns anew, and a "
                "cache holds some at temperature 1; use temperature: 1"
            )
        return None

    def hidden_loss(self, student: Tensor, teacher: Tensor | None) -> Tensor | None:
        """See `_Loss`.

        Raises:
            UnsupportedError: the models have hidden states of two widths.
        """
        if not self.hidden or teacher is None:
            return None
        if student.shape != teacher.shape:
            raise UnsupportedError(
                f"loss.hidden compares hidden states of {student.shape[-1]} and {teacher.shape[-1]} columns; use a "
                "teacher of the student's width, or loss.hidden=0"
            )
        with torch.autocast(student.device.type, enabled=False):
            wide = torch.promote_types(student.dtype, torch.float32)
            x, y = student.to(wide), teacher.to(wide)
            if self.hidden_measure == "cosine":
                return self.hidden * (1 - functional.cosine_similarity(x, y, dim=-1)).sum()
            tiny = torch.finfo(wide).tiny
            return self.hidden * ((x - y).square().sum(-1) / y.square().sum(-1).clamp_min(tiny)).sum()


class ForwardKL(_Distillation):
    """KL(teacher || student) over the full vocabulary; the QAD loss (arXiv 2601.20088). `temperature`^2 rescales it."""

    kind: Literal["forward_kl"] = "forward_kl"
    temperature: float = Field(default=1.0, gt=0)

    def beyond(self, sampled: bool, k: int | None = None) -> str | None:
        """See `_Loss`."""
        return self._more_than_columns(self.temperature)

    def replace(self, student: Tensor, teacher: Tensor | Known | None, targets: Tensor) -> Tensor:
        """See `_Loss`."""
        if isinstance(teacher, Known):
            return known_rows(student, teacher)
        return super().replace(student, teacher, targets)


class ReverseKL(_Distillation):
    """KL(student || teacher): mode-seeking; for on-policy refinement."""

    kind: Literal["reverse_kl"] = "reverse_kl"
    temperature: float = Field(default=1.0, gt=0)


class JensenShannon(_Distillation):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, with p the teacher and q the student."""

    kind: Literal["jsd"] = "jsd"
    beta: float = Field(default=0.5, gt=0, lt=1)


class ConfidenceAwareKL(_Distillation):
    """gamma KL(student || teacher) + (1 - gamma) KL(teacher || student) (CAKLD, arXiv 2402.10631): mode-seeking where
    the teacher is sure. `gamma` null is per token the teacher's probability of the target, the published rule one
    number for all: its mean."""

    kind: Literal["cakld"] = "cakld"
    gamma: float | None = Field(default=None, ge=0, le=1)

    def replace(self, student: Tensor, teacher: Tensor | Known | None, targets: Tensor) -> Tensor:
        """See `_Loss`."""
        assert isinstance(teacher, Tensor)
        backward = student.clone()
        forward_loss = distill_rows(student, teacher, targets, "forward_kl")
        backward_loss = distill_rows(backward, teacher, targets, "reverse_kl")
        gamma = self._gamma(teacher, targets, forward_loss.dtype)
        student.lerp_(backward, gamma[:, None].to(student.dtype))
        return forward_loss.lerp(backward_loss, gamma)

    def _gamma(self, teacher: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        if self.gamma is not None:
            return torch.full((len(targets),), self.gamma, dtype=dtype, device=teacher.device)
        at = teacher.gather(-1, targets.clamp_min(0)[:, None]).squeeze(-1).to(dtype)
        return (at - teacher.to(dtype).logsumexp(-1)).exp()


class TopKL(_Distillation):
    """KL(teacher || student) over the teacher's `k` likeliest tokens and one bucket for the rest: a lower bound of the
    full KL, 0 only where both agree on those and on the rest's sum. For teachers whose whole rows are not at hand; no
    gain in quality."""

    kind: Literal["top_kl"] = "top_kl"
    k: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0)

    def beyond(self, sampled: bool, k: int | None = None) -> str | None:
        """See `_Loss`."""
        if sampled:
            return (
                "loss top_kl needs the teacher's likeliest tokens, and the cache holds drawn ones; use forward_kl, or "
                "teacher_cache.kind: topk"
            )
        if k is not None and self.k > k:
            return f"loss top_kl needs the {self.k} likeliest tokens, and the cache holds {k}; use loss.k={k} or less"
        return self._more_than_columns(self.temperature)

    def replace(self, student: Tensor, teacher: Tensor | Known | None, targets: Tensor) -> Tensor:
        """See `_Loss`."""
        if isinstance(teacher, Known):
            wide = teacher.widened(torch.promote_types(student.dtype, torch.float32))
            return known_rows(student, wide.first(self.k))
        return super().replace(student, teacher, targets)

    def tokens(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        """See `_Loss`."""
        assert teacher is not None
        parts = []
        with torch.no_grad():
            top = (teacher / self.temperature).topk(min(self.k, teacher.shape[-1] - 1), dim=-1).indices
        for logits in (teacher, student):
            log = (logits / self.temperature).log_softmax(-1)
            tail = log.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
            parts.append(torch.cat((log.gather(-1, top), tail), dim=-1))
        log_p, log_q = parts
        p = log_p.exp()
        return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1) * self.temperature**2


_Single = CrossEntropy | ForwardKL | ReverseKL | JensenShannon | ConfidenceAwareKL | TopKL


class Mixture(_Distillation):
    """A weighted sum of losses.

    Attributes:
        losses: at least two, one of them against a teacher; `hidden` stands beside them, not inside.
        weights: one for each.
    """

    kind: Literal["mixture"] = "mixture"
    losses: tuple[Annotated[_Single, Field(discriminator="kind")], ...] = Field(min_length=2)
    weights: tuple[Annotated[float, Field(gt=0)], ...]

    @model_validator(mode="after")
    def _fits(self) -> "Mixture":
        if len(self.losses) != len(self.weights):
            raise ValueError(f"{len(self.losses)} losses need {len(self.losses)} weights, not {len(self.weights)}")
        if not any(loss.needs_teacher for loss in self.losses):
            raise ValueError("a mixture needs a loss against the teacher; use method: qat for cross-entropy alone")
        if any(getattr(loss, "hidden", 0.0) for loss in self.losses):
            raise ValueError("put `hidden` beside `losses`, not into one of them")
        return self

    def beyond(self, sampled: bool, k: int | None = None) -> str | None:
        """See `_Loss`."""
        reasons = [self._more_than_columns(), *(loss.beyond(sampled, k) for loss in self.losses)]
        return next((reason for reason in reasons if reason), None)

    def replace(self, student: Tensor, teacher: Tensor | Known | None, targets: Tensor) -> Tensor:
        """See `_Loss`."""
        total: Tensor | None = None
        gradient = torch.zeros_like(student)
        for loss, weight in zip(self.losses, self.weights, strict=True):
            own = student.clone()
            value = loss.replace(own, teacher, targets).mul_(weight)
            gradient.add_(own, alpha=weight)
            total = value if total is None else total.add_(value)
        assert total is not None
        student.copy_(gradient)
        return total


DistillLoss = ForwardKL | ReverseKL | JensenShannon | ConfidenceAwareKL | TopKL | Mixture
Loss = Annotated[CrossEntropy | DistillLoss, Field(discriminator="kind")]


class _PerToken(torch.autograd.Function):
    """A loss per row of whole logits, with the gradient that `replace` leaves."""

    @staticmethod
    def forward(ctx: Any, loss: _Loss, student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
        gradient = student.detach().clone()
        value = loss.replace(gradient, teacher, targets)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * grad[:, None].to(gradient.dtype), None, None
