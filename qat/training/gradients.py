"""Gradients through rounding. Rounding itself counts as the identity (straight-through); everything else is exact.

With v = x / divisor, forward y = round(clip(v)) * multiplier, the estimators are

    dy/dx          = multiplier / divisor      ("ste": everywhere; "clipped": only where v is not clipped)
    dy/dmultiplier = round(clip(v))
    dy/ddivisor    = -v * multiplier / divisor where v is not clipped, else 0

and with multiplier == divisor == s their sum is LSQ's rule (arXiv 1902.08153): round(v) - v inside, the bound outside.
Learning the two separately is Dual-LSQ, with a divisor for each eight values of a block FOCUS. Where a block has a
minimum m, x + m and y + m stand for x and y; m itself is refitted, not learned. Activation scales follow the data and
get no gradient.
"""

from typing import Literal

import torch
from torch import Tensor

from qat.numbers.format import Format
from qat.numbers.numerics import from_blocks, in_parts, per_block, to_blocks

Estimator = Literal["ste", "clipped"]


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    divisor: Tensor | None,
    multiplier: Tensor,
    zero_point: Tensor | None,
    fmt: Format,
    estimator: Estimator,
    needs: tuple[bool, bool, bool],
    choice: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for (x, divisor, multiplier).

    Args:
        grad: d loss / d y, shape of x.
        x, y: input and output of the fake quantization, (..., columns).
        divisor, multiplier: (block rows, block columns), float32; without a divisor, the multiplier is the one scale. A
            divisor may have several columns to a block, see `qat.numbers.numerics.Scales`.
        zero_point: (block rows, block columns) or None; minima, float32, where the format has those.
        estimator: "ste" or "clipped".
        needs: which of the three to compute.
        choice: (block rows, block columns), index of the element type of each block, or None where there is one.
    """
    needs_x, needs_divisor, needs_multiplier = needs
    dividing = multiplier if divisor is None else divisor
    grad_x = grad_divisor = grad_multiplier = None
    blocked_grad = to_blocks(grad, fmt)
    if needs_divisor or needs_multiplier:  # for one scale the two nearly cancel: no products or sums in BF16
        blocked_grad = blocked_grad.to(torch.promote_types(grad.dtype, torch.float32))
    clipped = torch.zeros(())  # made only when someone asks
    minimum, zero_point = (zero_point, None) if fmt.minimum is not None else (None, zero_point)

    def above(t: Tensor) -> Tensor:
        return to_blocks(t, fmt) if minimum is None else to_blocks(t, fmt).to(torch.float32) + per_block(minimum)

    parts = dividing.shape[1] // max(1, multiplier.shape[1])
    of_parts = multiplier if parts == 1 else multiplier.repeat_interleave(parts, dim=1)
    if needs_divisor or (needs_x and estimator == "clipped"):
        zeros, chosen = (
            t if t is None or parts == 1 else t.repeat_interleave(parts, dim=1) for t in (zero_point, choice)
        )
        clipped = _clipped(in_parts(above(x), dividing), dividing, zeros, fmt, chosen)
    if needs_multiplier:
        grad_multiplier = (blocked_grad * above(y)).sum(dim=(1, 3)) / multiplier
    if needs_divisor:
        moved = in_parts(blocked_grad * above(x), dividing).masked_fill_(clipped, 0.0)
        # Divided twice: the square of a tiny divisor (of a block of zeros) would be 0, of a huge one infinity.
        grad_divisor = -(moved.sum(dim=(1, 3)) / dividing) * (of_parts / dividing)
    if needs_x:
        passed = blocked_grad
        if divisor is not None:
            passed = in_parts(passed, divisor) * per_block(of_parts / divisor)
        if estimator == "clipped":
            passed = in_parts(passed, dividing).masked_fill(clipped, 0.0)
        grad_x = from_blocks(passed.reshape(blocked_grad.shape), x.shape, fmt).to(grad.dtype)
    return grad_x, grad_divisor, grad_multiplier


def _clipped(blocked: Tensor, divisor: Tensor, zero_point: Tensor | None, fmt: Format, choice: Tensor | None) -> Tensor:
    """True where x lies beyond the representable range (not merely rounded to its end)."""
    if zero_point is None and {-each.low for each in fmt.elements} == {each.high for each in fmt.elements[:1]}:
        return blocked.abs() > per_block(divisor * fmt.element.max)
    low, high = torch.full_like(divisor, fmt.element.low), torch.full_like(divisor, fmt.element.high)
    if choice is not None:
        for index, other in enumerate(fmt.elements[1:], start=1):
            low, high = low.masked_fill(choice == index, other.low), high.masked_fill(choice == index, other.high)
    if zero_point is not None:
        half = 2 ** (fmt.element.bits - 1)
        low, high = -half - zero_point.to(divisor.dtype), half - 1 - zero_point.to(divisor.dtype)
    return (blocked < per_block(low * divisor)) | (blocked > per_block(high * divisor))
