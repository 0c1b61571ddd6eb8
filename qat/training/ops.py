"""The differentiable ops: `torch.library` operators for both directions (a schema and a reference implementation), and
one autograd function each that joins them.

Device kernels register on the same names (`torch.library.register_kernel`), so PyTorch's dispatcher chooses and this
file stays the meaning. Only tensors, strings and flags cross the boundary; a Format travels by its catalogue name.

On a GPU a small model waits for the host, not for arithmetic. So a linear layer is one operator forward and one
backward, and none is defined by `custom_op`, whose wrappers take longer than the kernels of a small layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.numbers.numerics import Scales, from_blocks, rounded, scaled_, to_blocks
from qat.training.gradients import Estimator, backward


def operator(name: str, reference: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define `qat::<name>`, computed by `reference` where no kernel is; decorates its shape function."""
    torch.library.define(f"qat::{name}", torch.library.infer_schema(reference, mutates_args=()))
    torch.library.impl(f"qat::{name}", "CompositeExplicitAutograd", reference)
    shapes: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.library.register_fake(f"qat::{name}")
    return shapes


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
    y = _on_grid(x, lookup(format), _given(lookup(format), divisor, multiplier, zero_point, choice))
    if round_bf16 and lookup(format).rounds_in_bf16:
        y = y.to(torch.bfloat16)
    return y.to(x.dtype)


def _on_grid(x: Tensor, fmt: Format, scales: Scales) -> Tensor:
    """float32 values."""
    values = rounded(to_blocks(x.detach().to(torch.float32), fmt), fmt, scales)
    return from_blocks(scaled_(values, scales), x.shape, fmt)


def _given(
    fmt: Format, divisor: Tensor | None, multiplier: Tensor, zero_point: Tensor | None, choice: Tensor | None
) -> Scales:
    """What an operator was given; in the place of zero points are minima, float32, where the format has those."""
    if fmt.minimum is None or zero_point is None:
        return Scales(multiplier, None, zero_point, choice, divisor)
    return Scales(multiplier, None, None, choice, divisor, minimum=Scales(zero_point))


@operator("fake_quantize", fake_quantize_reference)
def _(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        divisor: Tensor | None,
        multiplier: Tensor,
        zero_point: Tensor | None,
        choice: Tensor | None,
        format: str,
        estimator: Estimator,
        round_bf16: bool,
    ) -> Tensor:
        ctx.format, ctx.estimator = format, estimator
        y: Tensor = torch.ops.qat.fake_quantize.default(
            x, divisor, multiplier, zero_point, choice, format, estimator, round_bf16
        )
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        needs_x = learned or estimator == "clipped" or divisor is not None
        ctx.save_for_backward(x if needs_x else None, y if learned else None, divisor, multiplier, zero_point, choice)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, divisor, multiplier, zero_point, choice = ctx.saved_tensors
        about = ctx.format, ctx.estimator, ctx.needs_input_grad[:3], choice
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
    choice: Tensor | None,
) -> list[Tensor | None]:
    """Gradients for (x, divisor, multiplier), as `qat::fake_quantize_backward`; what passes unchanged is not copied.
    One scale, which divides and multiplies, gets the sum of both."""
    unchanged = needs[0] and estimator == "ste" and divisor is None
    requests = [needs[0] and not unchanged, needs[2] if divisor is None else needs[1], needs[2]]
    results: list[Tensor] = []
    if any(requests):
        results = torch.ops.qat.fake_quantize_backward.default(
            grad, grad if x is None else x, y, divisor, multiplier, zero_point, format, estimator, requests, choice
        )
    grads = iter(results)
    of_x, *of_scales = [next(grads) if ask else None for ask in requests]
    if divisor is None and needs[2]:
        of_scales = [None, results[-2] + results[-1]]
    return [grad if unchanged else of_x, *of_scales]


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
    choice: Tensor | None = None,
) -> list[Tensor]:
    """What `qat::fake_quantize_backward` means: `gradients.backward` for those of (x, divisor, multiplier) that are
    needed, in this order. Without a divisor the multiplier is the one scale; y is read for the multiplier only."""
    y, fmt, wanted = grad if y is None else y, lookup(format), (needs[0], needs[1], needs[2])
    grads = backward(grad, x, y, divisor, multiplier, zero_point, fmt, _estimator(estimator), wanted, choice)
    results = [g.to(t.dtype) for g, t in zip(grads, (grad, multiplier, multiplier), strict=True) if g is not None]
    return [g.clone() if g.data_ptr() == grad.data_ptr() else g for g in results]  # an operator owns what it returns


def _estimator(name: str) -> Estimator:
    return "clipped" if name == "clipped" else "ste"


@operator("fake_quantize_backward", fake_quantize_backward_reference)
def _(grad: Tensor, x: Tensor, y: Tensor | None, divisor: Tensor | None, *args: Any) -> list[Tensor]:
    multiplier, needs = args[0], args[4]
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
    fmt = lookup(format)
    values = _on_grid(weight, fmt, _given(fmt, divisor, multiplier, zero_point, choice))
    quantized = values.to(torch.bfloat16 if round_bf16 else weight.dtype)  # exact, in as few bytes as possible
    if quantized.dtype != x.dtype:
        return _times(x, values.copy_(quantized), bias, weight.dtype), quantized
    return _times(x, quantized, bias, weight.dtype), quantized


def _times(x: Tensor, quantized: Tensor, bias: Tensor | None, weight_dtype: torch.dtype) -> Tensor:
    """x times a weight that is on its grid, rounded as that of a weight of this dtype."""
    operand = quantized if quantized.dtype == x.dtype else quantized.to(weight_dtype).to(x.dtype)
    return functional.linear(x, operand, None if bias is None else bias.to(x.dtype))


@operator("quantized_linear", quantized_linear_reference)
def _(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    quantized = torch.empty_like(weight, dtype=torch.bfloat16 if args[-1] else weight.dtype)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), quantized


def quantized_linear_backward_reference(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    quantized: Tensor | None,
    divisor: Tensor | None,
    multiplier: Tensor,
    zero_point: Tensor | None,
    format: str,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    needs: Sequence[bool],
    choice: Tensor | None = None,
) -> list[Tensor]:
    """What `qat::quantized_linear_backward` means: the gradients that are needed of (x, weight, bias, divisor,
    multiplier), in this order. What is around the matrix products goes by `qat::fake_quantize_backward`.

    Args:
        grad: d loss / d y.
        x, weight, quantized: as the forward pass had and returned them; None where nothing that is needed reads it.
        weight_dtype, bias_dtype: of the two gradients.
    """
    needs_x, needs_weight, needs_bias, needs_divisor, needs_multiplier = needs
    rows = grad.flatten(0, -2)
    grad_x = grad_bias = None
    if needs_x:
        assert quantized is not None
        grad_x = grad @ quantized.to(grad.dtype)
    if needs_bias:
        grad_bias = rows.sum(dim=0).to(bias_dtype)
    of_weight: Sequence[Tensor | None] = (None, None, None)
    if needs_weight or needs_divisor or needs_multiplier:
        assert x is not None
        grad_weight = (rows.t() @ x.flatten(0, -2)).to(weight_dtype)
        wanted = (needs_weight, needs_divisor, needs_multiplier)
        about = format, "ste", wanted, choice
        of_weight = _gradients(grad_weight, weight, quantized, divisor, multiplier, zero_point, *about)
    found = (grad_x, of_weight[0], grad_bias, *of_weight[1:])
    return [gradient for gradient, need in zip(found, needs, strict=True) if need and gradient is not None]


@operator("quantized_linear_backward", quantized_linear_backward_reference)
def _(grad: Tensor, x: Tensor | None, weight: Tensor | None, quantized: Tensor | None, *args: Any) -> list[Tensor]:
    divisor, multiplier, _zero, _format, weight_dtype, bias_dtype, needs = args[:7]
    columns = next(t.shape[-1] for t in (x, weight, quantized) if t is not None) if any((*needs[:2], *needs[3:])) else 0
    found = (
        grad.new_empty(*grad.shape[:-1], columns),
        grad.new_empty(grad.shape[-1], columns, dtype=weight_dtype),
        grad.new_empty(grad.shape[-1], dtype=bias_dtype),
        torch.empty_like(multiplier if divisor is None else divisor),
        torch.empty_like(multiplier),
    )
    return [like for like, need in zip(found, needs, strict=True) if need]


class _QuantizedLinear(torch.autograd.Function):
    """(x times the weight on its grid, that weight), or with `held`, which is that weight already, the product alone
    of the two that are then one tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        divisor: Tensor | None,
        multiplier: Tensor,
        zero_point: Tensor | None,
        choice: Tensor | None,
        format: str,
        round_bf16: bool,
        held: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if held is None:
            y, quantized = torch.ops.qat.quantized_linear.default(
                x, weight, bias, divisor, multiplier, zero_point, choice, format, round_bf16
            )
        else:
            y, quantized = _times(x, held, bias, weight.dtype), held.detach()
        ctx.mark_non_differentiable(quantized)
        ctx.set_materialize_grads(False)
        ctx.about = format, weight.dtype, weight.dtype if bias is None else bias.dtype
        needs_x, *of_weight = (ctx.needs_input_grad[index] for index in (0, 1, 3, 4))
        ctx.save_for_backward(
            x if any(of_weight) else None,
            weight if any(of_weight[1:]) or divisor is not None else None,  # else its gradient passes unchanged
            quantized if needs_x or any(of_weight[1:]) else None,
            divisor,
            multiplier,
            zero_point,
            choice,
        )
        return y, quantized

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _grad_quantized: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:5]
        if grad is None:
            return (None,) * 10
        *saved, choice = ctx.saved_tensors
        found = iter(torch.ops.qat.quantized_linear_backward.default(grad, *saved, *ctx.about, needs, choice))
        return (*(next(found) if need else None for need in needs), *[None] * 5)


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
        scales: stored scales; supplies zero point or minimum, and element choice, and the multiplier where none is
            given.
        multiplier: float32 (block rows, block columns), effective scale that carries a gradient.
        divisor: the same, for rounding; None where the multiplier is the one scale.
        estimator: "ste" or "clipped".
        round_bf16: round the result to BF16, as a server that holds dequantized BF16 weights does.
    """
    multiplier = scales.effective() if multiplier is None else multiplier
    y: Tensor = _FakeQuantize.apply(x, divisor, multiplier, scales.offset, scales.choice, format, estimator, round_bf16)
    return y


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
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear(x, fake_quantize(weight), bias)` with the same gradients, and less to remember for them: the quantized
    weight waits for the backward pass in two bytes per value where BF16 holds it exactly.

    Returns the product and, without a gradient, that quantized weight.

    Args:
        x: (..., columns), in the dtype to compute in.
        weight: (rows, columns).
        bias: (rows,) or None.
        format, scales, multiplier, divisor, round_bf16: as in `fake_quantize`.
        held: the quantized weight that a call with this very weight and these scales returned.
    """
    multiplier = scales.effective() if multiplier is None else multiplier
    y, quantized = _QuantizedLinear.apply(
        x, weight, bias, divisor, multiplier, scales.offset, scales.choice, format, round_bf16, held
    )
    return y, quantized
