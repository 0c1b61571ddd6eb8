"""INT8 per token in triton-ascend's style: a program per vector core, which walks over rows. Frontend-checked only (see
`kernels/npu.py`): no NPU has run it.

In: x (M, K). Out: codes int8 (M, K), scales float32 (M, 1), as `npu_dynamic_quant` lays them out, by the reference's
arithmetic: maxima are compared as integers, which finds NaN and infinity too; quotients are divided once and rounded
half to even by the addition of a large number. How an NPU rounds a division was not seen.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.npu import cores
from qat.kernels.quantize_input.codes.triton import INFINITY, MAGIC, MAGIC_BITS, MAGNITUDE, nan_where
from qat.numbers.format import Format
from qat.numbers.scale import F32
from qat.serving.inputs import check, empty, reference
from qat.training.activations import floors

BLOCK = 1024  # values of a row at a time


@triton.jit
def quantize_rows_kernel(
    x,
    codes,
    scales,
    M,
    K,
    stride_x,
    MAX: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
    SCALE_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
    CORES: tl.constexpr,
):
    """Codes and scales of whole rows."""
    column = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), M, CORES):
        largest = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, K, BLOCK):
            value = tl.load(x + row * stride_x + first + column, mask=first + column < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & MAGNITUDE)
        bits = tl.max(largest, axis=0)
        amax = tl.maximum(bits.to(tl.float32, bitcast=True), AMAX_FLOOR)
        scale = tl.maximum(amax / MAX, SCALE_FLOOR)
        valid = bits < INFINITY
        tl.store(scales + row, nan_where(bits >= INFINITY, scale))
        for first in range(0, K, BLOCK):
            mask = first + column < K
            value = tl.load(x + row * stride_x + first + column, mask=mask, other=0.0).to(tl.float32)
            near = tl.minimum(tl.maximum(value / scale, -MAX), MAX)
            code = tl.where(valid, (near + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS, 0)
            tl.store(codes + row * K + first + column, code.to(tl.int8), mask=mask)


def problem(fmt: Format) -> str | None:
    """Why the kernel does not quantize inputs to this format, or None."""
    whole_rows = fmt.is_rowwise and not fmt.group and fmt.scale is F32 and not fmt.zero_point
    return (
        None if fmt.element.is_integer and whole_rows else "the kernel for NPUs makes integers with a scale per token"
    )


def constants(fmt: Format, programs: int) -> dict[str, Any]:
    """Compile-time arguments; whatever depends on the format is derived here."""
    amax_floor, scale_floor = floors(fmt)
    largest = float(fmt.element.max)
    return {"MAX": largest, "AMAX_FLOOR": amax_floor, "SCALE_FLOOR": scale_floor, "BLOCK": BLOCK, "CORES": programs}


def quantize_input(x: Tensor, static: Tensor | None, format: str) -> tuple[Tensor, Tensor]:
    """The operator `qat::quantize_input` on an NPU; the reference makes what the kernel does not."""
    fmt = check(format, x.shape[-1], static)
    if problem(fmt) is not None or x.numel() == 0:
        return reference(x, static, format)
    x = x if x.dtype in (torch.bfloat16, torch.float16, torch.float32) else x.to(torch.float32)
    out = empty(x, fmt)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rows, columns = flat.shape
    programs = min(cores(x, "num_vectorcore"), rows)
    quantize_rows_kernel[(programs,)](flat, out.codes, out.scales, rows, columns, columns, **constants(fmt, programs))
    return out.codes, out.scales
