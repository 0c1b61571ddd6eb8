"""The differentiable ops, as `torch.library` operators: a schema, a reference implementation, and the gradient.

Device kernels register on the same names (`torch.library.register_kernel`), so PyTorch's dispatcher chooses and this
file stays the meaning. Only tensors, strings and flags cross the boundary; a Format travels by its catalogue name.
"""

from typing import Any

import torch
from torch import Tensor

from qat.catalog import lookup
from qat.gradients import Estimator, backward
from qat.numerics import Scales, from_blocks, per_block, rounded, to_blocks


@torch.library.custom_op("qat::fake_quantize", mutates_args=())
def _fake_quantize(
    x: Tensor,
    divisor: Tensor,
    multiplier: Tensor,
    zero_point: Tensor | None,
    choice: Tensor | None,
    format: str,
    estimator: str,
    round_bf16: bool,
) -> Tensor:
    fmt = lookup(format)
    blocked = to_blocks(x.detach().to(torch.float32), fmt)
    values = rounded(blocked, fmt, Scales(multiplier, None, zero_point, choice, divisor))
    y = from_blocks(values.mul_(per_block(multiplier)), x.shape, fmt)
    if round_bf16 and not fmt.exact_in_bf16:
        y = y.to(torch.bfloat16)
    return y.to(x.dtype)


@_fake_quantize.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, divisor, multiplier, zero_point, _choice, ctx.format, ctx.estimator, _round = inputs
    ctx.one_scale = divisor is multiplier
    learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    needs_x = learned or ctx.estimator == "clipped" or not ctx.one_scale
    ctx.save_for_backward(x if needs_x else None, output if learned else None, divisor, multiplier, zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y, divisor, multiplier, zero_point = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:3])
    if needs == (True, False, False) and ctx.estimator == "ste" and ctx.one_scale:
        return grad, None, None, None, None, None, None, None
    divisor = multiplier if ctx.one_scale else divisor
    grads = backward(grad, x, y, divisor, multiplier, zero_point, lookup(ctx.format), ctx.estimator, needs)
    return (*grads, None, None, None, None, None)


_fake_quantize.register_autograd(_backward, setup_context=_setup)


def fake_quantize(
    x: Tensor,
    format: str,
    scales: Scales,
    *,
    multiplier: Tensor | None = None,
    divisor: Tensor | None = None,
    estimator: Estimator = "ste",
    round_bf16: bool = False,
) -> Tensor:
    """x on the grid of `format`, in x's dtype, with gradients as `qat.gradients` defines them.

    Args:
        x: (..., columns).
        format: catalogue name.
        scales: stored scales; supplies zero point and element choice, and the multiplier where none is given.
        multiplier: float32 (block rows, block columns), effective scale that carries a gradient.
        divisor: the same, for rounding; by default the multiplier.
        estimator: "ste" or "clipped".
        round_bf16: round the result to BF16, as a server that holds dequantized BF16 weights does.
    """
    multiplier = scales.effective() if multiplier is None else multiplier
    divisor = multiplier if divisor is None else divisor
    return torch.ops.qat.fake_quantize(
        x, divisor, multiplier, scales.zero_point, scales.choice, format, estimator, round_bf16
    )
