"""The scales that a weight is divided by and multiplied with, made of what is trained: one operator each way.

Learned scales are logarithmic corrections of those that training begins with. The multiplier is rounded to the numbers
that a checkpoint stores, and its gradient passes that rounding; the divisor is not stored, so nothing rounds it:

    multiplier = stored(start * exp(log_scale))        divisor = start * exp(log_divisor)
"""

from typing import Any

import torch
from torch import Tensor

from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.numbers.numerics import Scales
from qat.training.ops import operator

PART = 8  # values of a block that share a divisor where it is finer than the block (FOCUS)


def effective_scales_reference(
    start: Tensor, log_scale: Tensor | None, log_divisor: Tensor | None, global_scale: Tensor | None, format: str
) -> tuple[Tensor, Tensor]:
    """What `qat::effective_scales` means, see `effective_scales`; an empty tensor stands for no divisor."""
    latent = start if log_scale is None else start * log_scale.exp()
    return stored_scales(latent, global_scale, format).effective(), _divisor(start, log_divisor)


def stored_scales(latent: Tensor, global_scale: Tensor | None, format: str) -> Scales:
    """Float32 scales as a checkpoint stores them."""
    scale = lookup(format).scale
    return Scales(scale.store(latent, global_scale), global_scale, type=scale)


def stored_minimum(minimum: Tensor | None, above: Tensor | None, fmt: Format, part: slice) -> Scales | None:
    """Float32 minima of some block rows as a checkpoint stores them, where the format has minima."""
    if minimum is None or above is None or fmt.minimum is None:
        return None
    return Scales(fmt.minimum.store(minimum[part], above[part]), above[part], type=fmt.minimum)


def parts_of(fmt: Format) -> int:
    """Into how many parts of `PART` values a block of `fmt` divides; 0 where it does not, or into one."""
    group = fmt.group or 0
    return group // PART if group > PART and group % PART == 0 else 0


def _divisor(start: Tensor, log_divisor: Tensor | None) -> Tensor:
    if log_divisor is None:
        return start.new_empty(0)
    return _in_parts(start, log_divisor) * log_divisor.exp()


def _in_parts(start: Tensor, log_divisor: Tensor) -> Tensor:
    """`start` as often as the divisor has columns to one of it."""
    parts = log_divisor.shape[1] // max(1, start.shape[1])
    return start if parts == 1 else start.repeat_interleave(parts, dim=1)


@operator("effective_scales", effective_scales_reference)
def _(start: Tensor, log_scale: Tensor | None, log_divisor: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(start), start.new_empty(0 if log_divisor is None else log_divisor.shape)


def effective_scales_backward_reference(
    grad_multiplier: Tensor | None,
    grad_divisor: Tensor | None,
    start: Tensor,
    log_scale: Tensor | None,
    log_divisor: Tensor | None,
) -> list[Tensor]:
    """What `qat::effective_scales_backward` means: the gradients of (log_scale, log_divisor), of those with one."""
    found = []
    if grad_multiplier is not None and log_scale is not None:
        found.append(grad_multiplier * start * log_scale.exp())
    if grad_divisor is not None and log_divisor is not None:
        found.append(grad_divisor * _in_parts(start, log_divisor) * log_divisor.exp())
    return found


@operator("effective_scales_backward", effective_scales_backward_reference)
def _(*args: Any) -> list[Tensor]:
    pairs = zip(args[:2], args[3:], strict=True)
    return [torch.empty_like(log) for grad, log in pairs if grad is not None and log is not None]


class _EffectiveScales(torch.autograd.Function):
    """(multiplier, divisor or an empty tensor); `held` are the two already."""

    @staticmethod
    def forward(
        ctx: Any,
        start: Tensor,
        log_scale: Tensor | None,
        log_divisor: Tensor | None,
        global_scale: Tensor | None,
        format: str,
        held: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        if held is None:
            multiplier, divisor = torch.ops.qat.effective_scales.default(
                start, log_scale, log_divisor, global_scale, format
            )
        else:
            multiplier, divisor = (scale.detach() for scale in held)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(start, log_scale, log_divisor)
        without = [t for t, log in ((multiplier, log_scale), (divisor, log_divisor)) if log is None]
        ctx.mark_non_differentiable(*without)
        return multiplier, divisor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_multiplier: Tensor | None, grad_divisor: Tensor | None) -> tuple[Tensor | None, ...]:
        start, *logs = ctx.saved_tensors
        wanted = [
            grad if need else None
            for grad, need in zip((grad_multiplier, grad_divisor), ctx.needs_input_grad[1:3], strict=True)
        ]
        if wanted == [None, None]:
            return (None,) * 6
        found = iter(torch.ops.qat.effective_scales_backward.default(*wanted, start, *logs))
        return (None, *(None if grad is None else next(found) for grad in wanted), None, None, None)


def effective_scales(
    start: Tensor,
    log_scale: Tensor | None,
    log_divisor: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    held: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(multiplier, divisor) in force, float32, with the gradients of their logarithms.

    Args:
        start: (block rows, block columns), float32; gets no gradient.
        log_scale: the same shape, or None where the multiplier is not learned.
        log_divisor: the same shape or several columns to one of `start`; None where the multiplier also divides.
        global_scale: see `qat.numbers.numerics.Scales`.
        format: catalogue name of the weight's.
        held: what a call with the same values returned.
    """
    if log_scale is None and log_divisor is None:  # nothing learns
        multiplier = (
            torch.ops.qat.effective_scales.default(start, None, None, global_scale, format)[0]
            if held is None
            else held[0]
        )
        return multiplier, None
    again = None if held is None else (held[0], start.new_empty(0) if held[1] is None else held[1])
    multiplier, divisor = _EffectiveScales.apply(start, log_scale, log_divisor, global_scale, format, again)
    return multiplier, None if log_divisor is None else divisor
