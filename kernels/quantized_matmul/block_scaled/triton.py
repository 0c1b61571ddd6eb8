"""The same product on units that multiply codes and block scales themselves: MXFP4, MXFP8 and NVFP4 through
`tl.dot_scaled`, for compute capability 10.0 and 12.0.

Compiled and interpreted, never run on such a GPU. `choose.block_scaled_problem` decides where it runs. 4-bit
weights leave their words for bytes of neighbouring columns in registers, since inputs hold neighbours.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.launch import Launch
from qat.kernels.quantized_matmul.choose import SPAN
from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.numbers.scale import UE4M3

TOKENS = (16, 32, 64)  # of a tile
DOT_NAME = {4: "e2m1", 8: "e4m3"}  # what tl.dot_scaled calls the elements, by bits


@triton.jit
def pair(even, odd, SHIFT: tl.constexpr):
    """The nibbles at SHIFT of two words in one byte."""
    return ((even >> SHIFT) & 0xF) | (((odd >> SHIFT) & 0xF) << 4)


@triton.jit
def neighbours(word, BLOCK_N: tl.constexpr):
    """uint8 (BLOCK_N, 64): bytes of neighbouring columns, the even one in the low nibble, from int16 words (BLOCK_N,
    32) whose nibble p of word j is column 32 p + j."""
    even, odd = tl.split(tl.reshape(word.to(tl.int32), (BLOCK_N, 16, 2)))
    low = tl.join(pair(even, odd, 0), pair(even, odd, 4))
    high = tl.join(pair(even, odd, 8), pair(even, odd, 12))
    parts = tl.permute(tl.join(low, high), (0, 3, 2, 1))
    return tl.reshape(parts, (BLOCK_N, 64)).to(tl.uint8)


@triton.jit(do_not_specialize=["M"])
def block_scaled_kernel(
    x,
    x_scales,
    w,
    w_scales,
    bias,
    out,
    M,
    N,
    K,
    stride_x,
    stride_xs,
    stride_w,
    stride_ws,
    global_scale,
    X_NAME: tl.constexpr,
    W_NAME: tl.constexpr,
    E4M3_SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out (M, N). K is a multiple of SPAN."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_n, in_m = n < N, m < M
    X_BYTES: tl.constexpr = SPAN // 2 if X_NAME == "e2m1" else SPAN
    W_UNITS: tl.constexpr = SPAN // 4 if W_NAME == "e2m1" else SPAN
    x_at = x + m.to(tl.int64)[:, None] * stride_x + tl.arange(0, X_BYTES)[None, :]
    w_at = w + n.to(tl.int64)[:, None] * stride_w + tl.arange(0, W_UNITS)[None, :]
    group = tl.arange(0, SPAN // GROUP)
    xs_at = x_scales + m.to(tl.int64)[:, None] * stride_xs + group[None, :]
    ws_at = w_scales + n[:, None] + group[None, :] * stride_ws
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(K // SPAN):
        tokens = tl.load(x_at + step * X_BYTES, mask=in_m[:, None], other=0.0)
        weight = tl.load(w_at + step * W_UNITS, mask=in_n[:, None], other=0.0)
        if W_NAME == "e2m1":
            weight = neighbours(weight, BLOCK_N)
        x_scale = tl.load(xs_at + step * (SPAN // GROUP), mask=in_m[:, None], other=0)
        w_scale = tl.load(ws_at + step * (SPAN // GROUP) * stride_ws, mask=in_n[:, None], other=0)
        if E4M3_SCALES:
            x_scale = x_scale.to(tl.float8e4nv, bitcast=True)
            w_scale = w_scale.to(tl.float8e4nv, bitcast=True)
        total = tl.dot_scaled(weight, w_scale, W_NAME, tl.trans(tokens), x_scale, X_NAME, total)
    total *= global_scale
    if HAS_BIAS:
        total += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out_at = out + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=in_n[:, None] & in_m[None, :])


def constants(x: Format, w: Format, tokens: int, *, bias: bool) -> dict[str, Any]:
    """Compile-time arguments for inputs of format `x` and weights of format `w`."""
    return {
        "X_NAME": DOT_NAME[x.element.bits],
        "W_NAME": DOT_NAME[w.element.bits],
        "E4M3_SCALES": w.scale is UE4M3,
        "GROUP": w.group,
        "HAS_BIAS": bias,
        "SPAN": SPAN,
        "BLOCK_N": 128,
        "BLOCK_M": next((size for size in TOKENS if tokens <= size), TOKENS[-1]),
    }


def block_scaled_matmul(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    global_scale: float,
    formats: tuple[str, str],
    columns: int,
) -> None:
    """Fill out (tokens, rows) from flat inputs and scales; `formats` are those of input and weight."""
    tokens, rows = x.shape[0], weight.shape[0]
    x, weight = (t.view(torch.uint8) if t.element_size() == 1 else t for t in (x, weight))
    launch = _launch(formats, next((size for size in TOKENS if tokens <= size), TOKENS[-1]), bias is not None)
    grid = (triton.cdiv(rows, launch.fixed["BLOCK_N"]), triton.cdiv(tokens, launch.fixed["BLOCK_M"]))
    strides = x.stride(0), x_scales.stride(0), weight.stride(0), weight_scales.stride(0)
    call = launch.at(grid, tokens, rows, columns, *strides)
    call((x, x_scales, weight, weight_scales, bias, out), global_scale)


@cache
def _launch(formats: tuple[str, str], tokens: int, bias: bool) -> Launch:
    fixed = constants(lookup(formats[0]), lookup(formats[1]), tokens, bias=bias)
    return Launch(block_scaled_kernel, **fixed, num_warps=4, num_stages=3)
