"""Linear layers with packed INT4, INT8 and FP4 weights in triton-ascend's style: a program per core, which walks over
blocks of the output. Frontend-checked only (see `kernels/npu.py`): no NPU has run it, nothing is tuned.

In: x (M, K), words int16 (N, words) as `qat.serving.words` cuts them, scales (groups, N). Out: (M, N). Vector units
decode a part of 32 columns, the cube multiplies it; scales of 32 columns and more multiply the sums of their group,
those of 16 the decoded weight.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.npu import cores
from qat.kernels.packed_linear.decode.ascend import times_scale, value
from qat.numbers.catalog import E2M1, lookup
from qat.numbers.format import Format
from qat.numbers.scale import BF16, E8M0, F16, F32, UE4M3
from qat.serving.packed import problem as packing_problem
from qat.serving.packed import reference
from qat.serving.words import PART

BLOCK_N, BLOCK_M = 64, 16


@triton.jit
def packed_linear_kernel(
    x,
    words,
    scales,
    bias,
    out,
    M,
    N,
    K,
    stride_x,
    stride_words,
    global_scale,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUBNORMALS: tl.constexpr,
    DTYPE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CORES: tl.constexpr,
):
    """Blocks (BLOCK_M, BLOCK_N) of x times the weight. GROUP is the number of columns per scale, 0 for a row."""
    PARTS: tl.constexpr = 16 // BITS
    TILE: tl.constexpr = PART * PARTS
    PER: tl.constexpr = GROUP // PART if GROUP >= PART else 1
    INSIDE: tl.constexpr = GROUP > 0 and GROUP < PART
    blocks_n = tl.cdiv(N, BLOCK_N)
    column = tl.arange(0, PART)
    for block in range(tl.program_id(0), blocks_n * tl.cdiv(M, BLOCK_M), CORES):
        n = block % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m = block // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
        in_n, in_m = n < N, m < M
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(0, tl.cdiv(K, TILE)):
            word_at = words + n[:, None] * stride_words + step * PART + column[None, :]
            word = tl.load(word_at, mask=in_n[:, None], other=0).to(tl.int32)  # the last tile is whole in memory
            partial = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for part in tl.static_range(PARTS):
                first = step * TILE + part * PART
                here = first + column
                tokens_at = x + m[:, None] * stride_x + here[None, :]
                tokens = tl.load(tokens_at, mask=in_m[:, None] & (here < K)[None, :], other=0.0).to(DTYPE)
                code = (word >> (part * BITS)) & ((1 << BITS) - 1)
                weight = value(code, KIND, BITS, SUBNORMALS)
                if INSIDE:
                    group = here // GROUP
                    in_k = in_n[:, None] & (here < K)[None, :]
                    stored = tl.load(scales + group[None, :] * N + n[:, None], mask=in_k, other=0)
                    weight = times_scale(weight, stored, SCALE)
                partial = tl.dot(tokens, tl.trans(weight.to(DTYPE)), partial, input_precision="ieee")
                # A group may be several parts, or longer than a tile: sums are scaled where either ends.
                if GROUP > 0 and (part % PER == PER - 1 or part == PARTS - 1):
                    if INSIDE:
                        total += partial
                    else:
                        stored = tl.load(scales + first // GROUP * N + n, mask=in_n & (first + 0 * n < K), other=0)
                        total += times_scale(partial, stored[None, :], SCALE)
                    partial = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if GROUP == 0:
                total += partial
        if GROUP == 0:
            stored = tl.load(scales + n, mask=in_n, other=0)
            total = times_scale(total, stored[None, :], SCALE)
        total *= global_scale
        if HAS_BIAS:
            total += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        out_at = out + m[:, None] * N + n[None, :]
        tl.store(out_at, total.to(out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def problem(fmt: Format) -> str | None:
    """Why the kernel does not multiply weights of this format, or None."""
    if reason := packing_problem(fmt):
        return reason
    if fmt.zero_point or not fmt.scale.is_one_of(F32, BF16, F16, UE4M3, E8M0):
        return f"zero points and {fmt.scale} scales have no kernel for NPUs"
    integer = fmt.element.is_integer and fmt.element.bits in (4, 8)
    return None if integer or fmt.element == E2M1 else f"no kernel for NPUs decodes {fmt.element.name}"


def constants(fmt: Format, columns: int, *, bias: bool, dtype: Any, programs: int) -> dict[str, Any]:
    """Compile-time arguments for weights of `fmt`; whatever depends on the format is derived here."""
    return {
        "KIND": fmt.element.kind,
        "BITS": fmt.element.bits,
        "SCALE": fmt.scale.name,
        "GROUP": fmt.group if fmt.group and fmt.group < columns else 0,
        "HAS_BIAS": bias,
        "SUBNORMALS": False,  # what NPUs do with subnormals was never seen
        "DTYPE": dtype,
        "PART": PART,
        "BLOCK_N": BLOCK_N,
        "BLOCK_M": BLOCK_M,
        "CORES": programs,
    }


COMPUTE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def packed_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    global_scale: float,
    format: str,
    prepared: Tensor | None = None,
) -> Tensor:
    """The operator `qat::packed_linear` on an NPU; computes in the dtype of x, sums in float32."""
    fmt, columns = lookup(format), x.shape[-1]
    if problem(fmt) is not None:
        return reference(x, words, scales, zeros, bias, global_scale, format)
    rows = words.shape[0]
    flat = x.reshape(-1, columns).contiguous()
    out = x.new_empty((*x.shape[:-1], rows))
    if out.numel() == 0:
        return out
    stored = scales.contiguous()
    stored = stored.view(torch.int8) if stored.dtype == torch.uint8 else stored
    blocks = triton.cdiv(rows, BLOCK_N) * triton.cdiv(flat.shape[0], BLOCK_M)
    programs = min(cores(x, "num_aicore"), blocks)
    fixed = constants(fmt, columns, bias=bias is not None, dtype=COMPUTE[x.dtype], programs=programs)
    sizes = flat.shape[0], rows, columns, columns, words.stride(0)
    packed_linear_kernel[(programs,)](flat, words, stored, bias, out, *sizes, global_scale, **fixed)
    return out
