"""The scales in force and their gradients in one launch each, where PyTorch takes ten to twenty: a small layer's step
waits for launches. Exponentials stay PyTorch's, whose bits no other implementation promises."""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.fake_quantize.choose import scales_problem
from qat.kernels.fake_quantize.rounding.triton import clamp, rounded, to_bf16_grid
from qat.kernels.launch import Launch
from qat.numbers.catalog import lookup
from qat.numbers.scale import MinifloatScale
from qat.training.scales import effective_scales_backward_reference, effective_scales_reference

BLOCK = 1024


@triton.jit
def stored(
    scale,
    SCALE: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_NORMAL: tl.constexpr,
):
    """float32 scales as their type stores them, decoded; see `ScaleType.store`."""
    scale = tl.where(tl.abs(scale) < float("inf"), scale, float("nan"))
    if SCALE == "e4m3":
        scale = clamp(scale, SMALLEST, LARGEST)
        return rounded(scale, 0.0, "minifloat", MANTISSA, MIN_NORMAL, SMALLEST, LARGEST, False, (0.0,), ())
    scale = clamp(scale, SMALLEST, LARGEST)
    if SCALE == "bf16":
        return to_bf16_grid(scale, "bits")
    return scale.to(tl.float16).to(tl.float32) if SCALE == "f16" else scale


@triton.jit(do_not_specialize=["N", "COLUMNS"])
def effective_scales_kernel(
    start,
    factor,
    divisor_factor,
    above,
    multiplier,
    divisor,
    N,
    COLUMNS,
    SCALE: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_NORMAL: tl.constexpr,
    LEARNED: tl.constexpr,
    DIVIDES: tl.constexpr,
    ABOVE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """multiplier (N,) = stored(start * factor), divisor (N * PARTS,) = start * its factor. ABOVE: none, one for all, or
    one to a row of COLUMNS scales."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    scale = tl.load(start + at, mask=inside, other=1.0)
    if LEARNED:
        scale = scale * tl.load(factor + at, mask=inside, other=1.0)
    if ABOVE == "none":
        result = stored(scale, SCALE, SMALLEST, LARGEST, MANTISSA, MIN_NORMAL)
    else:
        whole = tl.load(above) if ABOVE == "one" else tl.load(above + at // COLUMNS, mask=inside, other=1.0)
        whole = whole + tl.zeros((BLOCK,), tl.float32)
        relative = tl.div_rn(tl.where(tl.abs(scale) < float("inf"), scale, float("nan")), whole)
        result = stored(relative, SCALE, SMALLEST, LARGEST, MANTISSA, MIN_NORMAL) * whole
    tl.store(multiplier + at, result, mask=inside)
    if DIVIDES:
        for part in tl.static_range(PARTS):
            place = (tl.program_id(0) * PARTS + part) * BLOCK + tl.arange(0, BLOCK)
            there = place < N * PARTS
            value = tl.load(start + place // PARTS, mask=there, other=1.0)
            tl.store(divisor + place, value * tl.load(divisor_factor + place, mask=there, other=1.0), mask=there)


@triton.jit(do_not_specialize=["N"])
def effective_scales_backward_kernel(
    grad_multiplier,
    grad_divisor,
    start,
    factor,
    divisor_factor,
    grad_scale,
    grad_log_divisor,
    N,
    LEARNED: tl.constexpr,
    DIVIDES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each gradient times start times the exponential, in this order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    if LEARNED:
        grad = tl.load(grad_multiplier + at, mask=inside, other=0.0) * tl.load(start + at, mask=inside, other=0.0)
        tl.store(grad_scale + at, grad * tl.load(factor + at, mask=inside, other=0.0), mask=inside)
    if DIVIDES:
        for part in tl.static_range(PARTS):
            place = (tl.program_id(0) * PARTS + part) * BLOCK + tl.arange(0, BLOCK)
            there = place < N * PARTS
            grad = tl.load(grad_divisor + place, mask=there, other=0.0)
            grad = grad * tl.load(start + place // PARTS, mask=there, other=0.0)
            factor_there = tl.load(divisor_factor + place, mask=there, other=0.0)
            tl.store(grad_log_divisor + place, grad * factor_there, mask=there)


def _parts(start: Tensor, log_divisor: Tensor | None) -> int:
    return 1 if log_divisor is None else max(1, log_divisor.numel() // max(1, start.numel()))


def _above(start: Tensor, global_scale: Tensor | None) -> str | None:
    """How the per-tensor scale lies above the others; None if in a way that the kernel does not know."""
    if global_scale is None:
        return "none"
    if global_scale.dtype != torch.float32:
        return None
    if global_scale.numel() == 1:
        return "one"
    return "row" if global_scale.shape == (len(start), 1) else None


def effective_scales(
    start: Tensor, log_scale: Tensor | None, log_divisor: Tensor | None, global_scale: Tensor | None, format: str
) -> tuple[Tensor, Tensor]:
    """The operator `qat::effective_scales` on a device that runs Triton."""
    scale, above = lookup(format).scale, _above(start, global_scale)
    plain = all(t is None or t.dtype == torch.float32 for t in (start, log_scale, log_divisor))
    if scales_problem(scale) is not None or above is None or not plain or not start.numel():
        return effective_scales_reference(start, log_scale, log_divisor, global_scale, format)
    start, factors = start.contiguous(), _exponentials(log_scale, log_divisor)
    multiplier = torch.empty(start.shape, dtype=torch.float32, device=start.device)
    divisor = start.new_empty(0 if log_divisor is None else log_divisor.shape)
    launch = _launch(format, log_scale is not None, log_divisor is not None, above, _parts(start, log_divisor))
    above_all = None if global_scale is None else global_scale.contiguous()
    call = launch.at((triton.cdiv(start.numel(), BLOCK),), start.numel(), start.shape[-1])
    call((start, *factors, above_all, multiplier, divisor))
    return multiplier, divisor


@cache
def _launch(format: str, learned: bool, divides: bool, above: str, parts: int) -> Launch:
    scale = lookup(format).scale
    element: Any = scale.element if isinstance(scale, MinifloatScale) else None
    return Launch(
        effective_scales_kernel, SCALE=scale.name, SMALLEST=scale.smallest, LARGEST=scale.largest,
        MANTISSA=element.mantissa_bits if element else 0, MIN_NORMAL=element.min_normal if element else 1.0,
        LEARNED=learned, DIVIDES=divides, ABOVE=above, PARTS=parts, BLOCK=BLOCK,
    )  # fmt: skip


@cache
def _launch_backward(learned: bool, divides: bool, parts: int) -> Launch:
    fixed = {"LEARNED": learned, "DIVIDES": divides, "PARTS": parts, "BLOCK": BLOCK}
    return Launch(effective_scales_backward_kernel, **fixed)


def _exponentials(*logs: Tensor | None) -> list[Tensor | None]:
    return [None if log is None else log.exp().contiguous() for log in logs]


def effective_scales_backward(
    grad_multiplier: Tensor | None,
    grad_divisor: Tensor | None,
    start: Tensor,
    log_scale: Tensor | None,
    log_divisor: Tensor | None,
) -> list[Tensor]:
    """The operator `qat::effective_scales_backward` on a device that runs Triton."""
    grads = grad_multiplier, grad_divisor
    logs = [log if grad is not None else None for log, grad in zip((log_scale, log_divisor), grads, strict=True)]
    plain = all(t is None or t.dtype == torch.float32 for t in (*grads, start, *logs))
    if not plain or not start.numel():
        return effective_scales_backward_reference(grad_multiplier, grad_divisor, start, log_scale, log_divisor)
    found = [None if log is None else torch.empty(log.shape, dtype=log.dtype, device=log.device) for log in logs]
    if any(each is not None for each in found):
        launch = _launch_backward(logs[0] is not None, logs[1] is not None, _parts(start, logs[1]))
        given = *(None if grad is None else grad.contiguous() for grad in grads), start.contiguous()
        call = launch.at((triton.cdiv(start.numel(), BLOCK),), start.numel())
        call((*given, *_exponentials(*logs), *found))
    return [each for each in found if each is not None]
