"""The differentiable ops, as `torch.library` operators: a schema, a reference implementation, and the gradient.

Device kernels register on the same names (`torch.library.register_kernel`), so PyTorch's dispatcher chooses and this
file stays the meaning. Only tensors, strings and flags cross the boundary; a Format travels by its catalogue name.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.numbers.numerics import Scales, from_blocks, per_block, rounded, to_blocks
from qat.training.gradients import Estimator, backward


def fake_quantize_reference(
    x: Tensor,
    divisor: Tensor | None,
    multiplier: Tensor,
    zero_point: Tensor | None,
    choice: Tensor | None,
    format: str,
    estimator: str,
    round_bf16: bool,
) -> Tensor:
    """What `qat::fake_quantize` means, and what device kernels fall back to. Without a divisor there is one scale."""
    y = _on_grid(x, lookup(format), Scales(multiplier, None, zero_point, choice, divisor))
    if round_bf16 and lookup(format).rounds_in_bf16:
        y = y.to(torch.bfloat16)
    return y.to(x.dtype)


def _on_grid(x: Tensor, fmt: Format, scales: Scales) -> Tensor:
    """float32 values; `scales.stored` is the multiplier."""
    values = rounded(to_blocks(x.detach().to(torch.float32), fmt), fmt, scales)
    return from_blocks(values.mul_(per_block(scales.stored)), x.shape, fmt)


_fake_quantize = torch.library.custom_op("qat::fake_quantize", fake_quantize_reference, mutates_args=())


@_fake_quantize.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, divisor, multiplier, zero_point, _choice, ctx.format, ctx.estimator, _round = inputs
    learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    needs_x = learned or ctx.estimator == "clipped" or divisor is not None
    ctx.save_for_backward(x if needs_x else None, output if learned else None, divisor, multiplier, zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y, divisor, multiplier, zero_point = ctx.saved_tensors
    about = ctx.format, ctx.estimator, ctx.needs_input_grad[:3]
    return (*_gradients(grad, x, y, divisor, multiplier, zero_point, *about), *[None] * 5)


def _gradients(
    grad: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    divisor: Tensor | None,
    multiplier: Tensor,
    zero_point: Tensor | None,
    format: str,
    estimator: str,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for (x, divisor, multiplier), as `qat::fake_quantize_backward`; what passes unchanged is not copied.
    One scale, which divides and multiplies, gets the sum of both."""
    unchanged = needs[0] and estimator == "ste" and divisor is None
    requests = [needs[0] and not unchanged, needs[2] if divisor is None else needs[1], needs[2]]
    results: list[Tensor] = []
    if any(requests):
        results = torch.ops.qat.fake_quantize_backward(
            grad, grad if x is None else x, y, divisor, multiplier, zero_point, format, estimator, requests
        )
    grads = iter(results)
    of_x, *of_scales = [next(grads) if ask else None for ask in requests]
    if divisor is None and needs[2]:
        of_scales = [None, results[-2] + results[-1]]
    return [grad if unchanged else of_x, *of_scales]


_fake_quantize.register_autograd(_backward, setup_context=_setup)


def fake_quantize_backward_reference(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    divisor: Tensor | None,
    multiplier: Tensor,
    zero_point: Tensor | None,
    format: str,
    estimator: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """What `qat::fake_quantize_backward` means: `gradients.backward` for those of (x, divisor, multiplier) that are
    needed, in this order. Without a divisor the multiplier is the one scale; y is read for the multiplier only."""
    y, fmt, wanted = grad if y is None else y, lookup(format), (needs[0], needs[1], needs[2])
    grads = backward(grad, x, y, divisor, multiplier, zero_point, fmt, _estimator(estimator), wanted)
    results = [g.to(t.dtype) for g, t in zip(grads, (grad, multiplier, multiplier), strict=True) if g is not None]
    return [g.clone() if g.data_ptr() == grad.data_ptr() else g for g in results]  # an operator owns what it returns


def _estimator(name: str) -> Estimator:
    return "clipped" if name == "clipped" else "ste"


_fake_quantize_backward = torch.library.custom_op(
    "qat::fake_quantize_backward", fake_quantize_backward_reference, mutates_args=()
)


@_fake_quantize_backward.register_fake
def _(grad: Tensor, x: Tensor, y: Tensor | None, divisor: Tensor | None, *args: Any) -> list[Tensor]:
    multiplier, needs = args[0], args[-1]
    dividing = torch.empty_like(multiplier if divisor is None else divisor)
    shapes = (torch.empty_like(grad, memory_format=torch.contiguous_format), dividing, torch.empty_like(multiplier))
    return [torch.empty_like(like) for like, need in zip(shapes, needs, strict=True) if need]


def quantized_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    divisor: Tensor | None,
    multiplier: Tensor,
    zero_point: Tensor | None,
    choice: Tensor | None,
    format: str,
    round_bf16: bool,
) -> tuple[Tensor, Tensor]:
    """What `qat::quantized_linear` means: (x times the weight on its grid, that weight)."""
    values = _on_grid(weight, lookup(format), Scales(multiplier, None, zero_point, choice, divisor))
    quantized = values.to(torch.bfloat16 if round_bf16 else weight.dtype)  # exact, in as few bytes as possible
    operand = quantized if quantized.dtype == x.dtype else values.copy_(quantized).to(weight.dtype).to(x.dtype)
    return functional.linear(x, operand, None if bias is None else bias.to(x.dtype)), quantized


_quantized_linear = torch.library.custom_op("qat::quantized_linear", quantized_linear_reference, mutates_args=())


@_quantized_linear.register_fake
def _(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    quantized = torch.empty_like(weight, dtype=torch.bfloat16 if args[-1] else weight.dtype)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), quantized


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, divisor, multiplier, zero_point, _choice, ctx.format, _round = inputs
    ctx.bias_dtype, ctx.weight_dtype = None if bias is None else bias.dtype, weight.dtype
    ctx.set_materialize_grads(False)  # nothing flows back through the quantized weight
    needs_x, *of_weight = (ctx.needs_input_grad[index] for index in (0, 1, 3, 4))
    ctx.save_for_backward(
        x if any(of_weight) else None,
        weight if any(of_weight[1:]) or divisor is not None else None,  # else its gradient passes unchanged
        output[1] if needs_x or any(of_weight[1:]) else None,
        divisor,
        multiplier,
        zero_point,
    )


def _backward_linear(ctx: Any, grad: Tensor, _grad_quantized: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, quantized, divisor, multiplier, zero_point = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_divisor, needs_multiplier = ctx.needs_input_grad[:5]
    rows = grad.flatten(0, -2)
    grad_x = grad @ quantized.to(grad.dtype) if needs_x else None
    grad_bias = rows.sum(dim=0).to(ctx.bias_dtype) if needs_bias else None
    of_weight: Sequence[Tensor | None] = (None, None, None)
    if needs_weight or needs_divisor or needs_multiplier:
        grad_weight = (rows.t() @ x.flatten(0, -2)).to(ctx.weight_dtype)
        needs = (needs_weight, needs_divisor, needs_multiplier)
        of_weight = _gradients(
            grad_weight, weight, quantized, divisor, multiplier, zero_point, ctx.format, "ste", needs
        )
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
    """x on the grid of `format`, in x's dtype, with gradients as `qat.training.gradients` defines them.

    Args:
        x: (..., columns).
        format: catalogue name.
        scales: stored scales; supplies zero point and element choice, and the multiplier where none is given.
        multiplier: float32 (block rows, block columns), effective scale that carries a gradient.
        divisor: the same, for rounding; None where the multiplier is the one scale.
        estimator: "ste" or "clipped".
        round_bf16: round the result to BF16, as a server that holds dequantized BF16 weights does.
    """
    multiplier = scales.effective() if multiplier is None else multiplier
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
    y, _ = torch.ops.qat.quantized_linear(
        x, weight, bias, divisor, multiplier, scales.zero_point, scales.choice, format, round_bf16
    )
    return y
