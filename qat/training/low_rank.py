"""The trained low-rank update of a frozen weight (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353).

Added before rounding, its arithmetic is float32, whatever autocast says: the same function makes the weight of a
forward pass and of an export. Beside the weight, both factors are rounded to BF16 with the scaling in the second, as
they will be stored: some engines multiply it in, in BF16, while they load.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.training.ops import operator

TINY = torch.finfo(torch.float32).tiny


def updated(weight: Tensor, A: Tensor, B: Tensor, scaling: float, magnitude: Tensor | None = None) -> Tensor:
    """W + s BA, float32; with DoRA magnitude x direction of it, no gradient passing the norm (as in peft).

    Args:
        weight: (rows, columns), or a stack (experts, rows, columns).
        A: (..., rank, columns).
        B: (..., rows, rank).
        scaling: s.
        magnitude: (rows,), or None without DoRA.
    """
    if torch.compiler.is_compiling():
        whole: Tensor = _Recorded.apply(weight, A, B, scaling, magnitude)
        return whole
    return low_rank_update_reference(weight, A, B, scaling, magnitude)


def low_rank_update_reference(weight: Tensor, A: Tensor, B: Tensor, scaling: float, magnitude: Tensor | None) -> Tensor:
    """What `qat::low_rank_update` means: `updated`, as one operator, whose products no compiler computes otherwise than
    an export does."""
    with torch.autocast(weight.device.type, enabled=False):
        total = weight.float() + (B.float() @ A.float()) * scaling
        return total if magnitude is None else (magnitude / _norms(total)).unsqueeze(-1) * total


def _norms(total: Tensor) -> Tensor:
    return torch.linalg.vector_norm(total.detach(), dim=-1).clamp(min=TINY)  # a row of zeros stays one


@operator("low_rank_update", low_rank_update_reference)
def _(weight: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, A: Tensor, B: Tensor, scaling: float, magnitude: Tensor | None) -> Tensor:
        ctx.scaling = scaling
        ctx.save_for_backward(weight if magnitude is not None else None, A, B, magnitude)
        y: Tensor = torch.ops.qat.low_rank_update.default(weight, A, B, scaling, magnitude)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, A, B, magnitude = ctx.saved_tensors
        of_magnitude = None
        if magnitude is not None:
            total = torch.ops.qat.low_rank_update.default(weight, A, B, ctx.scaling, None)
            norms = _norms(total)
            of_magnitude = (grad * total).sum(-1) / norms
            grad = (magnitude / norms).unsqueeze(-1) * grad
        scaled = grad * ctx.scaling
        of_A, of_B = B.transpose(-1, -2) @ scaled, scaled @ A.transpose(-1, -2)
        return grad if ctx.needs_input_grad[0] else None, of_A, of_B, None, of_magnitude


def left_out(A: Tensor, share: float) -> Tensor:
    """A for one training pass that leaves out a share of the columns, the same for all tokens."""
    return A * functional.dropout(torch.ones_like(A[0]), share)


def beside_factors(A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A and s B in BF16, as an adapter that is not merged is stored; it is then scaled by 1."""
    return A.to(torch.bfloat16), (B * scaling).to(torch.bfloat16)


class LowRank(nn.Module):
    """A trained update of one frozen weight (rows, columns): A (rank, columns) as peft draws it, and B = 0; or one for
    each weight of a stack (experts, rows, columns).

    Args:
        weight: the frozen one; gives sizes, device and, with `dora`, the first magnitudes.
        rank: of B A.
        scaling: what B A is multiplied with.
        dropout: share of the columns of A that one training pass leaves out.
        dora: learn the magnitude of every row apart.
        merges: it is added to the weight before rounding, else to what the layer gives.
    """

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        *,
        dropout: float = 0.0,
        dora: bool = False,
        merges: bool = True,
    ) -> None:
        super().__init__()
        self.merges = merges
        *experts, rows, columns = weight.shape
        self.scaling, self.dropout = scaling, dropout
        together = torch.empty(math.prod(experts) * rank, columns)
        drawn = nn.init.kaiming_uniform_(together, a=math.sqrt(5)).view(*experts, rank, columns)
        self.A = nn.Parameter(drawn.to(weight.device))  # equal on every device
        self.B = nn.Parameter(torch.zeros(*experts, rows, rank, device=weight.device))
        norm = torch.linalg.vector_norm(weight.detach().float(), dim=1) if dora else None
        self.magnitude = None if norm is None else nn.Parameter(norm)

    def drawn(self) -> Tensor | None:
        """What one training pass multiplies the columns of A with; None where it leaves none out."""
        drops = self.training and self.dropout > 0
        return functional.dropout(torch.ones_like(self.A[0]), self.dropout) if drops else None

    def merged(self, weight: Tensor, drawn: Tensor | None = None) -> Tensor:
        """`updated`; a second call of one training pass is given what was `drawn` for the first."""
        drawn = self.drawn() if drawn is None else drawn
        A = self.A if drawn is None else self.A * drawn
        return updated(weight, A, self.B, self.scaling, self.magnitude)

    def beside(self, x: Tensor) -> Tensor:
        """s BA x of the factors as they are stored (gradients pass their rounding); dropout by token, as in peft."""
        if self.training and self.dropout > 0:
            x = functional.dropout(x, self.dropout)
        stored = beside_factors(self.A.detach(), self.B.detach(), self.scaling)
        A, B = (p + (q.to(p.dtype) - p.detach()) for p, q in zip((self.A, self.B * self.scaling), stored, strict=True))
        return functional.linear(functional.linear(x, A), B)

    def before_rounding(self) -> list[nn.Parameter]:
        """What is rounded with the weight, or where it is used, not by itself."""
        return list(self.parameters())
