"""The differentiable ops, as `torch.library` operators: a schema, a reference implementation, and the gradient.

Device kernels register on the same names (`torch.library.register_kernel`), so PyTorch's dispatcher chooses and this
file stays the meaning. Only tensors, strings and flags cross the boundary; a Format travels by its catalogue name.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qat.catalog import lookup
from qat.format import Format
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
    y = _on_grid(x, lookup(format), Scales(multiplier, None, zero_point, choice, divisor))
    if round_bf16 and not lookup(format).exact_in_bf16:
        y = y.to(torch.bfloat16)
    return y.to(x.dtype)


def _on_grid(x: Tensor, fmt: Format, scales: Scales) -> Tensor:
    """float32 values; `scales.stored` is the multiplier."""
    values = rounded(to_blocks(x.detach().to(torch.float32), fmt), fmt, scales)
    return from_blocks(values.mul_(per_block(scales.stored)), x.shape, fmt)


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


@torch.library.custom_op("qat::quantized_linear", mutates_args=())
def _quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    divisor: Tensor,
    multiplier: Tensor,
    zero_point: Tensor | None,
    choice: Tensor | None,
    format: str,
    round_bf16: bool,
) -> tuple[Tensor, Tensor]:
    values = _on_grid(weight, lookup(format), Scales(multiplier, None, zero_point, choice, divisor))
    kept = values.to(torch.bfloat16 if round_bf16 else weight.dtype)  # exact, in as few bytes as possible
    used = kept if kept.dtype == x.dtype else values.copy_(kept).to(weight.dtype).to(x.dtype)
    return functional.linear(x, used, None if bias is None else bias.to(x.dtype)), kept


@_quantized_linear.register_fake
def _(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    kept = torch.empty_like(weight, dtype=torch.bfloat16 if args[-1] else weight.dtype)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), kept


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, divisor, multiplier, zero_point, _choice, ctx.format, _round = inputs
    ctx.one_scale = divisor is multiplier
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)  # nothing flows back through the kept weight
    needs_x, *of_weight = (ctx.needs_input_grad[index] for index in (0, 1, 3, 4))
    ctx.save_for_backward(
        x if any(of_weight) else None,
        weight if any(of_weight) else None,
        output[1] if needs_x or any(of_weight[1:]) else None,
        divisor,
        multiplier,
        zero_point,
    )


def _backward_linear(ctx: Any, grad: Tensor, _grad_kept: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, kept, divisor, multiplier, zero_point = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_divisor, needs_multiplier = ctx.needs_input_grad[:5]
    rows = grad.flatten(0, -2)
    grad_x = grad @ kept.to(grad.dtype) if needs_x else None
    grad_bias = rows.sum(dim=0).to(ctx.bias_dtype) if needs_bias else None
    of_weight: tuple[Tensor | None, ...] = (None, None, None)
    if needs_weight or needs_divisor or needs_multiplier:
        grad_weight = (rows.t() @ x.flatten(0, -2)).to(weight.dtype)
        divisor = multiplier if ctx.one_scale else divisor
        needs = (needs_weight, needs_divisor, needs_multiplier)
        scales = (divisor, multiplier, zero_point)
        of_weight = backward(grad_weight, weight, kept, *scales, lookup(ctx.format), "ste", needs)
    return (grad_x, of_weight[0], grad_bias, *of_weight[1:], None, None, None, None)


_quantized_linear.register_autograd(_backward_linear, setup_context=_setup_linear)


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


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    format: str,
    scales: Scales,
    *,
    multiplier: Tensor | None = None,
    divisor: Tensor | None = None,
    round_bf16: bool = False,
) -> Tensor:
    """`linear(x, fake_quantize(weight), bias)` with the same gradients, and less to remember for them: the quantized
    weight waits for the backward pass in two bytes per value where BF16 holds it exactly.

    Args:
        x: (..., columns), in the dtype to compute in.
        weight: (rows, columns).
        bias: (rows,) or None.
        format, scales, multiplier, divisor, round_bf16: as in `fake_quantize`.
    """
    multiplier = scales.effective() if multiplier is None else multiplier
    divisor = multiplier if divisor is None else divisor
    y, _ = torch.ops.qat.quantized_linear(
        x, weight, bias, divisor, multiplier, scales.zero_point, scales.choice, format, round_bf16
    )
    return y
