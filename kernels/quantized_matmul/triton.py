"""Linear layers with quantized inputs and weights (W8A8, W4A8, W4A4) in Triton.

**What lies where.** Inputs (M, K) as `quantize_input` writes them: a byte per code, or E2M1 in pairs, the even column
in the low nibble; scales (M, groups). Weights (N, K): 8-bit codes a byte each, smaller ones in the words of
`packed_linear` (column j of every part of 32 in word j, see there); scales (groups, N).

**What is multiplied.** Operands are swapped: the weight is the left operand of the matrix product, the tokens the right
one, so that a decoded weight goes to Hopper's tensor cores from registers, also for a handful of tokens. Both sides
become one type that holds their codes exactly (see `choose.operand`), up to a power of two that is folded into the
global scale:

    int8     sums in int32. A 4-bit weight takes the upper half of its byte: 16 times its value, one shift and one mask.
    float8   E4M3. E2M1 shifts into its fields; the magnitude of a small integer is the code of its 2^-9-fold.
    float16  where no 8-bit type fits or the GPU has no such product. Scales of 16 columns multiply the operands:
             E4M3 times a 4-bit code has at most 7 significant bits.

**Where scales act.** Those of 32 columns and more multiply partial sums in float32; those of a row act once, at the
end. Sums of E4M3 products are promoted to float32 every 128 columns, because Hopper's accumulators keep fewer bits than
float32 has.

**What bounds the speed** (reckoned; docs/measurements.md has times). Few tokens: the weight's bytes, as in
`packed_linear`. Many tokens: the tensor cores where a row has one scale, for then nothing but loads and products is
in the loop; with groups, the float32 multiplications of partial sums, which at 32 columns cost as much as the products.
Programs are numbered so that eight tiles of rows meet all tokens in turn, which keeps what they share in the L2 cache.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.errors import UnsupportedError
from qat.kernels.device import Device, device_of
from qat.kernels.launch import Call, Launch
from qat.kernels.packed_linear.decode.triton import E4M3_NAN, decode, decode_scale
from qat.kernels.quantized_matmul import library
from qat.kernels.quantized_matmul.block_scaled.triton import block_scaled_matmul
from qat.kernels.quantized_matmul.choose import (
    FLOAT16,
    INTEGER,
    Tiles,
    block_scaled_problem,
    choose,
    constants,
    operand_exponent,
    problem,
    sum_dtype,
)
from qat.numbers.catalog import lookup
from qat.serving.matmul import PLAIN_BITS, reference

MOST_COLUMNS = 2**17  # int32 sums of products of two bytes stay below 2^31


@triton.jit
def operand_of_bits(
    code,
    OPERAND: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    MANTISSA8: tl.constexpr,
):
    """Operands from non-negative int16 bit patterns below 2^BITS; integers have their sign bit flipped."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    if OPERAND == "int8":
        return ((code << (8 - BITS)) ^ 0x80).to(
            tl.int8
        )  # the flipped sign bit goes back, 4 bits become 16 times 4 bits
    elif OPERAND == "float8":
        if KIND == "integer":
            value = code - HALF  # subnormals of E4M3 count in steps of 2^-9: sign and magnitude are the code
            bits = tl.abs(value) | (value & 0x80)
        else:
            bits = ((code & HALF) << (8 - BITS)) | ((code & (HALF - 1)) << (MANTISSA8 - MANTISSA))
        return bits.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return decode(code, KIND, BITS, MANTISSA, BIAS, tl.float16)


@triton.jit
def operand_of_bytes(code, OPERAND: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr,
                     BIAS: tl.constexpr):  # fmt: skip
    """Operands from codes stored one per byte: int8 integers (of BITS bits) or E4M3, as a byte for float16."""
    if OPERAND == "float8" and KIND == "integer":
        value = code.to(tl.int16)
        return (tl.abs(value) | (value & 0x80)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    elif OPERAND == "float16":
        if KIND == "integer":
            return code.to(tl.float16)
        else:
            value = decode(code.to(tl.int16), KIND, BITS, MANTISSA, BIAS, tl.float16)
            return tl.where((code & E4M3_NAN) == E4M3_NAN, float("nan"), value)
    else:
        return code


@triton.jit
def finished(total, x_scales, w_scales, bias, m, n, M, N, stride_xs, global_scale, X_SCALE: tl.constexpr,
             W_SCALE: tl.constexpr, W_ROWS: tl.constexpr, SCALE_MANTISSA: tl.constexpr, SCALE_BIAS: tl.constexpr,
             HAS_BIAS: tl.constexpr):  # fmt: skip
    """The epilogue on a (rows, tokens) tile: scales of whole rows ("" where there are none), the global scale, bias."""
    total = total.to(tl.float32)
    if W_SCALE != "":
        stored = tl.load(w_scales + (n // W_ROWS if W_ROWS > 0 else 0 * n), mask=n < N, other=0)
        total *= decode_scale(stored, W_SCALE, SCALE_MANTISSA, SCALE_BIAS, NAN=True)[:, None]
    if X_SCALE != "":
        stored = tl.load(x_scales + m * stride_xs, mask=m < M, other=0)
        total *= decode_scale(stored, X_SCALE, SCALE_MANTISSA, SCALE_BIAS, NAN=True)[None, :]
    total *= global_scale
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    return total


@triton.jit(do_not_specialize=["M"])
def quantized_matmul_kernel(
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
    OPERAND: tl.constexpr,
    X_KIND: tl.constexpr,
    X_BITS: tl.constexpr,
    X_MANTISSA: tl.constexpr,
    X_BIAS: tl.constexpr,
    X_SCALE: tl.constexpr,
    X_GROUP: tl.constexpr,
    X_PAIRED: tl.constexpr,
    W_KIND: tl.constexpr,
    W_BITS: tl.constexpr,
    W_MANTISSA: tl.constexpr,
    W_BIAS: tl.constexpr,
    W_SCALE: tl.constexpr,
    W_GROUP: tl.constexpr,
    W_ROWS: tl.constexpr,
    SCALE_MANTISSA: tl.constexpr,
    SCALE_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    FLUSH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PARALLEL: tl.constexpr,
):
    """out (M, N), or unscaled sums (SEGMENTS, M, N). Groups are columns per scale, 0 for a row; W_ROWS is the number
    of rows per scale of the weight, 0 for all of them."""
    STEP: tl.constexpr = PART * PARTS
    PLAIN: tl.constexpr = W_BITS == 8
    WHOLE: tl.constexpr = OPERAND == "int8" and FLUSH == 0  # exact sums: segments need not be separated
    SUM: tl.constexpr = tl.int32 if OPERAND == "int8" else tl.float32
    TOTAL: tl.constexpr = tl.int32 if WHOLE else tl.float32
    X_INSIDE: tl.constexpr = X_GROUP > 0 and X_GROUP < PART
    W_INSIDE: tl.constexpr = W_GROUP > 0 and W_GROUP < PART
    # Eight neighbouring tiles of the weight meet all tokens in turn: what they share stays in the L2 cache.
    tiles_n, tiles_m = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    band = tl.program_id(0) // (8 * tiles_m)
    height = tl.minimum(tiles_n - band * 8, 8)
    inside = tl.program_id(0) % (8 * tiles_m)
    n = (band * 8 + inside % height) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (inside // height) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_n, in_m = n < N, m < M
    column = tl.arange(0, PART)
    w_at = w + n.to(tl.int64)[:, None] * stride_w + column[None, :]
    x_row = x + m.to(tl.int64)[:, None] * stride_x
    xs_row = x_scales + m.to(tl.int64) * stride_xs
    ws_row = w_scales + (n // W_ROWS if W_ROWS > 0 else 0 * n)
    steps = tl.cdiv(K, STEP)
    share = steps if WHOLE and not PARALLEL else tl.cdiv(steps, SEGMENTS)
    summed = tl.zeros((BLOCK_N, BLOCK_M), TOTAL)
    for turn in range(1 if PARALLEL or WHOLE else SEGMENTS):
        first_step = (tl.program_id(1) if PARALLEL else turn) * share
        total = tl.zeros((BLOCK_N, BLOCK_M), TOTAL)
        for step in range(first_step, tl.minimum(first_step + share, steps)):
            partial = tl.zeros((BLOCK_N, BLOCK_M), SUM)
            if not PLAIN:
                word = tl.load(w_at + step * PART, mask=in_n[:, None], other=0)
            for part in tl.static_range(PARTS):
                first = step * STEP + part * PART
                # the tokens, (BLOCK_M, PART)
                if X_PAIRED:
                    byte = tl.arange(0, PART // 2)
                    in_x = in_m[:, None] & (first + 2 * byte < K)[None, :]
                    pair = tl.load(x_row + (first // 2 + byte)[None, :], mask=in_x, other=0).to(tl.int16)
                    code = tl.reshape(tl.join(pair & 0xF, pair >> 4), (BLOCK_M, PART))
                    tokens = operand_of_bits(code, OPERAND, X_KIND, X_BITS, X_MANTISSA, X_BIAS, SCALE_MANTISSA)
                else:
                    in_x = in_m[:, None] & (first + column < K)[None, :]
                    code = tl.load(x_row + (first + column)[None, :], mask=in_x, other=0.0)
                    tokens = operand_of_bytes(code, OPERAND, X_KIND, X_BITS, X_MANTISSA, X_BIAS)
                if X_INSIDE:
                    x_group = first // X_GROUP + tl.arange(0, PART // X_GROUP)
                    in_x = in_m[:, None] & (x_group * X_GROUP < K)[None, :]
                    stored = tl.load(xs_row[:, None] + x_group[None, :], mask=in_x, other=0.0)
                    factor = decode_scale(stored, X_SCALE, SCALE_MANTISSA, SCALE_BIAS, NAN=True).to(tl.float16)
                    grouped = tl.reshape(tokens, (BLOCK_M, PART // X_GROUP, X_GROUP)) * factor[:, :, None]
                    tokens = tl.reshape(grouped, (BLOCK_M, PART))
                # the weight, (BLOCK_N, PART)
                if PLAIN:
                    in_w = in_n[:, None] & (first + column < K)[None, :]
                    code = tl.load(w_at + first, mask=in_w, other=0.0)
                    weight = operand_of_bytes(code, OPERAND, W_KIND, W_BITS, W_MANTISSA, W_BIAS)
                else:
                    code = (word >> (part * W_BITS)) & ((1 << W_BITS) - 1)
                    weight = operand_of_bits(code, OPERAND, W_KIND, W_BITS, W_MANTISSA, W_BIAS, SCALE_MANTISSA)
                if W_INSIDE:
                    w_group = first // W_GROUP + tl.arange(0, PART // W_GROUP)
                    in_w = in_n[:, None] & (w_group * W_GROUP < K)[None, :]
                    stored = tl.load(ws_row[:, None] + w_group[None, :] * stride_ws, mask=in_w, other=0)
                    factor = decode_scale(stored, W_SCALE, SCALE_MANTISSA, SCALE_BIAS, NAN=True).to(tl.float16)
                    grouped = tl.reshape(weight, (BLOCK_N, PART // W_GROUP, W_GROUP)) * factor[:, :, None]
                    weight = tl.reshape(grouped, (BLOCK_N, PART))
                if FLUSH == 0:
                    total = tl.dot(weight, tl.trans(tokens), total, out_dtype=SUM)
                else:
                    partial = tl.dot(weight, tl.trans(tokens), partial, out_dtype=SUM)
                    if (part + 1) * PART % FLUSH == 0:
                        scaled = partial.to(tl.float32)
                        if W_GROUP >= PART:
                            in_w = in_n & (first + 0 * n < K)
                            stored = tl.load(ws_row + first // W_GROUP * stride_ws, mask=in_w, other=0)
                            scaled *= decode_scale(stored, W_SCALE, SCALE_MANTISSA, SCALE_BIAS, NAN=True)[:, None]
                        if X_GROUP >= PART:
                            in_x = in_m & (first + 0 * m < K)
                            stored = tl.load(xs_row + first // X_GROUP, mask=in_x, other=0)
                            scaled *= decode_scale(stored, X_SCALE, SCALE_MANTISSA, SCALE_BIAS, NAN=True)[None, :]
                        total += scaled
                        partial = tl.zeros((BLOCK_N, BLOCK_M), SUM)
        if PARALLEL or WHOLE:
            summed = total
        else:
            summed += total
    out_at = out + m.to(tl.int64)[None, :] * N + n[:, None]
    if PARALLEL:
        out_at += tl.program_id(1).to(tl.int64) * M * N
    else:
        summed = finished(summed, x_scales, w_scales, bias, m, n, M, N, stride_xs, global_scale,
                          "" if X_GROUP else X_SCALE, "" if W_GROUP else W_SCALE, W_ROWS, SCALE_MANTISSA, SCALE_BIAS,
                          HAS_BIAS)  # fmt: skip
    tl.store(out_at, summed.to(out.dtype.element_ty), mask=in_n[:, None] & in_m[None, :])


@triton.jit(do_not_specialize=["M"])
def add_segments_kernel(
    sums,
    x_scales,
    w_scales,
    bias,
    out,
    M,
    N,
    stride_xs,
    global_scale,
    X_SCALE: tl.constexpr,
    X_GROUP: tl.constexpr,
    W_SCALE: tl.constexpr,
    W_GROUP: tl.constexpr,
    W_ROWS: tl.constexpr,
    SCALE_MANTISSA: tl.constexpr,
    SCALE_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (M, N) from unscaled sums (SEGMENTS, M, N), added in order; a program makes BLOCK columns of one row."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1) + tl.arange(0, 1)
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    segment = tl.num_programs(1).to(tl.int64) * N
    total = tl.zeros((BLOCK, 1), sums.dtype.element_ty)
    for _segment in tl.static_range(SEGMENTS):
        total += tl.load(sums + at, mask=n[:, None] < N, other=0)
        at += segment
    total = finished(total, x_scales, w_scales, bias, m, n, M, N, stride_xs, global_scale,
                     "" if X_GROUP else X_SCALE, "" if W_GROUP else W_SCALE, W_ROWS, SCALE_MANTISSA, SCALE_BIAS,
                     HAS_BIAS)  # fmt: skip
    tl.store(out + m.to(tl.int64)[None, :] * N + n[:, None], total.to(out.dtype.element_ty), mask=n[:, None] < N)


@dataclass(frozen=True)
class Product:
    """What the shape of a product decides, worked out once: `scale` multiplies the global scale, `add` is for sums of
    parallel segments. Without a call, units that know block scales multiply."""

    call: Call | None
    add: Call
    tiles: Tiles
    scale: float


@lru_cache(maxsize=4096)
def product(
    input_format: str, weight_format: str, sizes: tuple[int, ...], bias: bool, device: Device
) -> Product | None:
    """Of inputs (tokens, columns) and a weight (rows, columns), `sizes` and strides; None where the reference
    multiplies.

    Raises:
        UnsupportedError: so many columns that integer sums would overflow.
    """
    tokens, rows, columns, _, stride_xs, *_ = sizes
    x, w = lookup(input_format), lookup(weight_format)
    if problem(x, w) is not None:
        return None
    tiles = choose(tokens, rows, columns, x, w, device)
    launch, add = _launches(input_format, weight_format, columns, bias, tiles)
    scaled = block_scaled_problem(x, w, columns, device.capability) is None
    if not scaled and tiles.operand == INTEGER and columns > MOST_COLUMNS:
        raise UnsupportedError(f"{columns} columns of integers: the kernel's int32 sums hold at most {MOST_COLUMNS}")
    words = w.element.bits != PLAIN_BITS
    exponent = operand_exponent(x, tiles.operand, words=False) + operand_exponent(w, tiles.operand, words=words)
    grid = (triton.cdiv(rows, tiles.block_n) * triton.cdiv(tokens, tiles.block_m), tiles.segments * tiles.parallel or 1)
    added = add.at((triton.cdiv(rows, ADDED), tokens), tokens, rows, stride_xs)
    return Product(None if scaled else launch.at(grid, *sizes), added, tiles, 2.0**exponent)


@lru_cache(maxsize=1024)
def _launches(input_format: str, weight_format: str, columns: int, bias: bool, tiles: Tiles) -> tuple[Launch, Launch]:
    fixed = constants(lookup(input_format), lookup(weight_format), columns, bias=bias, tiles=tiles)
    few = {name: value for name, value in fixed.items() if name in add_segments_kernel.arg_names}
    launch = Launch(quantized_matmul_kernel, **fixed, num_warps=tiles.warps, num_stages=tiles.stages)
    return launch, Launch(add_segments_kernel, **few, BLOCK=ADDED, num_warps=2)


ADDED = 256  # columns of one program of `add_segments_kernel`


def _flat(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def quantized_matmul(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    global_scale: float,
    input_format: str,
    weight_format: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The operator `qat::quantized_matmul` on a device that runs Triton."""
    rows = weight.shape[0]
    flat, weight = _flat(codes), weight if weight.stride(-1) == 1 else weight.contiguous()
    tokens, x_scales = flat.shape[0], _flat(scales)
    if tokens >= library.MANY:
        capability = device_of(codes).capability
        if library.takes(input_format, weight_format, tokens, rows, columns, dtype, capability):
            y = library.multiply(flat, scales, weight, weight_scales, bias, global_scale, dtype)
            return y.view(*codes.shape[:-1], rows)
    stride_xs = 0 if lookup(input_format).is_static else x_scales.stride(0)
    sizes = tokens, rows, columns, flat.stride(0), stride_xs, weight.stride(0), weight_scales.stride(0)
    own = product(input_format, weight_format, sizes, bias is not None, device_of(codes))
    formats = input_format, weight_format
    if own is None:
        return reference(codes, scales, weight, weight_scales, bias, global_scale, *formats, columns, dtype)
    out = torch.empty((*codes.shape[:-1], rows), dtype=dtype, device=codes.device)
    if tokens == 0 or rows == 0:
        return out
    tiles = own.tiles
    if own.call is None:
        block_scaled_matmul(flat, x_scales, weight, weight_scales, bias, out, global_scale, formats, columns)
        return out
    if tiles.operand == FLOAT16:  # which has to read E4M3 without the type, for GPUs that lack it
        flat, weight = (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (flat, weight))
    global_scale *= own.scale
    segments = (tiles.segments, tokens, rows)
    target = torch.empty(segments, dtype=sum_dtype(tiles), device=out.device) if tiles.parallel else out
    own.call((flat, x_scales, weight, weight_scales, bias, target), global_scale)
    if tiles.parallel:
        own.add((target, x_scales, weight_scales, bias, out), global_scale)
    return out
