"""A few tokens times 4-bit weights that lie in panels (`qat.serving.panels`), at the speed of memory.

**What bounds it.** A weight of 4 bits leaves a thread of an H100 some five instructions before memory is faster than it
(132 processors of 128 threads at 1.7 GHz against 3 TB/s), and a processor needs 32 KB under way. So:

* K is cut into pieces until every processor has several blocks, whose loads, decoding and products overlap; 64 x 256
  codes are one contiguous piece of memory and one step.
* Scales come through the same pipeline. Those of 16 columns multiply the weight, where E4M3 times a 4-bit code is exact
  in BF16, and in the same instruction undo the bias of the exponent that E2M1 is given; others act on float32 sums.
* Two words are decoded at a time, in assembly: shift and mask, then one multiplication or addition of two BF16. Triton
  alone takes the halves apart. Where there is no such assembly (FP16, float32, other vendors), `decode` does it.

Sums of the pieces of K are added in their order, so that a row's result depends on no other row.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.device import Device
from qat.kernels.launch import Call, Launch
from qat.kernels.packed_linear.choose import PanelTiles, choose_panels
from qat.kernels.packed_linear.decode.triton import decode, decode_scale, exp2_const
from qat.numbers.catalog import lookup
from qat.numbers.element import EXPONENT_BIAS
from qat.numbers.format import Format
from qat.numbers.scale import UE4M3
from qat.serving.panels import BESIDE, BF16_MANTISSA, ROWS, part, scales_weights, tile, wide_offset

PANEL = tl.constexpr(ROWS)
SCALE_COLUMNS = tl.constexpr(BESIDE)
WIDE_SHIFT = tl.constexpr(BF16_MANTISSA - UE4M3.element.mantissa_bits)
# E2M1 moved into BF16 is 2^-126 times itself. A scale times 2^126 may be infinite: it brings 2^110, the end the rest.
BEFORE, AFTER = 110, EXPONENT_BIAS - 1 - 110
UNDO = tl.constexpr(EXPONENT_BIAS - 1)

# The four columns of two words, $4, each a pair of BF16; lop3 0xEA is (a & b) | c, 0x4300 the 128 of `decode`.
INTEGERS = tl.constexpr("""{
.reg .b32 word, one, less;
mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308;
lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA; fma.rn.bf16x2 $0, $0, one, less;
shr.u32 word, $4, 4; lop3.b32 $1, word, 0x000F000F, 0x43004300, 0xEA; fma.rn.bf16x2 $1, $1, one, less;
shr.u32 word, $4, 8; lop3.b32 $2, word, 0x000F000F, 0x43004300, 0xEA; fma.rn.bf16x2 $2, $2, one, less;
shr.u32 word, $4, 12; lop3.b32 $3, word, 0x000F000F, 0x43004300, 0xEA; fma.rn.bf16x2 $3, $3, one, less;
}""")
# The same of E2M1, times the factors $5 to $8; adding -0 changes nothing.
MINIFLOATS = tl.constexpr("""{
.reg .b32 word, rest, zero;
mov.b32 zero, 0x80008000;
and.b32 word, $4, 0x81C081C0; fma.rn.bf16x2 $0, word, $5, zero;
shl.b32 word, $4, 3; and.b32 word, word, 0x81C081C0; fma.rn.bf16x2 $1, word, $6, zero;
shl.b32 word, $4, 6; and.b32 word, word, 0x81C081C0; fma.rn.bf16x2 $2, word, $7, zero;
shl.b32 word, $4, 1; and.b32 word, word, 0x80008000;
shr.u32 rest, $4, 5; lop3.b32 word, rest, 0x01000100, word, 0xEA;
shr.u32 rest, $4, 4; lop3.b32 word, rest, 0x00C000C0, word, 0xEA; fma.rn.bf16x2 $3, word, $8, zero;
}""")


@triton.jit
def code_of(word, PART: tl.constexpr, KIND: tl.constexpr):
    """The code of one column of a word, as `qat.serving.panels` puts it there."""
    if KIND == "integer":
        return (word >> (PART * 4)) & 0xF
    elif PART < 3:
        return ((word << (PART * 3)) >> 12) & 8 | ((word << (PART * 3)) >> 6) & 7
    else:
        return (word >> 11) & 12 | (word >> 10) & 3


@triton.jit
def column(word, factors, PART: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr,
           BIAS: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The weights of one column of words, times their factor where scales act on weights."""
    weight = decode(code_of(word, PART, KIND), KIND, BITS, MANTISSA, BIAS, DTYPE)
    return weight * factors[PART].to(DTYPE) if SCALED else weight


@triton.jit
def columns(word, factors, ASSEMBLY: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr,
            BIAS: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The weights of the four columns of words (BLOCK_N, PART), given a factor each."""
    if not ASSEMBLY:
        return (column(word, factors, 0, KIND, BITS, MANTISSA, BIAS, SCALED, DTYPE),
                column(word, factors, 1, KIND, BITS, MANTISSA, BIAS, SCALED, DTYPE),
                column(word, factors, 2, KIND, BITS, MANTISSA, BIAS, SCALED, DTYPE),
                column(word, factors, 3, KIND, BITS, MANTISSA, BIAS, SCALED, DTYPE))  # fmt: skip
    elif KIND == "integer":
        first, second, third, fourth = tl.inline_asm_elementwise(
            INTEGERS, "=&r,=&r,=&r,=&r,r", [word],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
        if SCALED:
            return first * factors[0], second * factors[1], third * factors[2], fourth * factors[3]
        else:
            return first, second, third, fourth
    else:
        return tl.inline_asm_elementwise(
            MINIFLOATS, "=&r,=&r,=&r,=&r,r,r,r,r,r", [word, factors[0], factors[1], factors[2], factors[3]],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def factor(at, WIDE_OFFSET: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr):
    """Scales of a part (BLOCK_N, PART / 16), as BF16 for each of its columns (BLOCK_N, PART)."""
    SCALES: tl.constexpr = PART // SCALE_COLUMNS
    value = ((tl.load(at).to(tl.int16) << WIDE_SHIFT) + WIDE_OFFSET).to(tl.bfloat16, bitcast=True)
    wide = tl.broadcast_to(value[:, :, None], (BLOCK_N, SCALES, SCALE_COLUMNS))
    return tl.reshape(wide, (BLOCK_N, PART))


@triton.jit(do_not_specialize=["M", "share"])
def panels_kernel(
    x,
    words,
    scales,
    bias,
    out,
    sums,
    M,
    N,
    K,
    stride_x,
    share,
    global_scale,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_MANTISSA: tl.constexpr,
    SCALE_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE_OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    DTYPE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out (M, N), or float32 sums (pieces of K, M, N) where there are several, of `share` steps each. GROUP is the
    number of columns per scale, 0 for a row; SCALED: scales act on weights."""
    TILE: tl.constexpr = 4 * PART
    SCALES: tl.constexpr = PART // SCALE_COLUMNS  # of a part's row, where they act on weights
    PER: tl.constexpr = 4 if GROUP == 0 or SCALED else GROUP // PART  # parts that share a sum
    block, piece = tl.program_id(0), tl.program_id(2)
    row, j = tl.arange(0, BLOCK_N), tl.arange(0, PART)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + row
    steps = K // TILE
    panel = (block * BLOCK_N // PANEL).to(tl.int64) * PANEL  # a block may be several panels, or a part of one
    inside = block * BLOCK_N % PANEL + row
    word_at = words + panel * (K // 4)
    word_in = (inside // PANEL)[:, None] * (PANEL * K // 4) + (inside % PANEL)[:, None] * PART + j[None, :]
    in_m = (m < M)[None, :]
    x_at = x + m.to(tl.int64)[None, :] * stride_x + j[:, None]
    factor_at = scales + panel * (steps * 4 * SCALES)
    k = tl.arange(0, SCALES)
    factor_in = ((inside // PANEL) * (PANEL * steps) + inside % PANEL)[:, None] * (4 * SCALES) + k[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(piece * share, tl.minimum(piece * share + share, steps), num_stages=STAGES):
        word = tl.load(word_at + step * (PANEL * PART) + word_in)
        if SCALED:
            at = factor_at + step * (PANEL * 4 * SCALES) + factor_in
            factors = (factor(at, WIDE_OFFSET, BLOCK_N, PART), factor(at + SCALES, WIDE_OFFSET, BLOCK_N, PART),
                       factor(at + 2 * SCALES, WIDE_OFFSET, BLOCK_N, PART),
                       factor(at + 3 * SCALES, WIDE_OFFSET, BLOCK_N, PART))  # fmt: skip
        else:
            undo = exp2_const(UNDO, tl.bfloat16) if ASSEMBLY else 1.0
            factors = (undo, undo, undo, undo)
        weights = columns(word, factors, ASSEMBLY, KIND, BITS, MANTISSA, BIAS, SCALED, DTYPE)
        partial = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for index in tl.static_range(4):
            tokens = tl.load(x_at + step * TILE + index * PART, mask=in_m, other=0.0).to(DTYPE)
            partial = tl.dot(weights[index], tokens, partial, input_precision="ieee")
            if index % PER == PER - 1:
                if SCALED or GROUP == 0:
                    total += partial
                else:
                    stored = tl.load(scales + (step * (4 // PER) + index // PER) * N + n)
                    total += partial * decode_scale(stored, SCALE, SCALE_MANTISSA, SCALE_BIAS)[:, None]
                partial = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if GROUP == 0:
        total *= decode_scale(tl.load(scales + n), SCALE, SCALE_MANTISSA, SCALE_BIAS)[:, None]
    total *= global_scale
    if tl.num_programs(2) == 1:
        if HAS_BIAS:
            total += tl.load(bias + n).to(tl.float32)[:, None]
        tl.store(out + m.to(tl.int64)[None, :] * N + n[:, None], total.to(out.dtype.element_ty), mask=in_m)
    else:
        tl.store(sums + (piece.to(tl.int64) * M + m[None, :]) * N + n[:, None], total, mask=in_m)


@triton.jit(do_not_specialize=["size", "pieces"])
def add_pieces_kernel(sums, bias, out, size, pieces, N, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out (size) of sums (pieces, size), in their order; rows of N columns."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _piece in range(0, pieces):
        total += tl.load(sums + at, mask=at < size, other=0.0)
        sums += size
    if HAS_BIAS:
        total += tl.load(bias + at % N, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


ADDED = 512  # results of one program of `add_pieces_kernel`
TOGETHER = 512  # tokens of one launch: what bounds the memory of their sums


def constants(
    fmt: Format, columns: int, *, bias: bool, dtype: Any, assembly: bool, tiles: PanelTiles
) -> dict[str, Any]:
    """Compile-time arguments for weights of `fmt`."""
    return {
        "KIND": fmt.element.kind,
        "BITS": fmt.element.bits,
        "MANTISSA": fmt.element.mantissa_bits,
        "BIAS": fmt.element.exponent_bias,
        "SCALE": fmt.scale.name,
        "SCALE_MANTISSA": UE4M3.element.mantissa_bits,
        "SCALE_BIAS": UE4M3.element.exponent_bias,
        "SCALED": scales_weights(fmt),
        "WIDE_OFFSET": wide_offset(BEFORE if brings(fmt, assembly) else 0),
        "GROUP": fmt.group if fmt.group and fmt.group < columns else 0,
        "HAS_BIAS": bias,
        "ASSEMBLY": assembly,
        "DTYPE": dtype,
        "PART": part(fmt),
        "BLOCK_N": tiles.block_n,
        "BLOCK_M": tiles.block_m,
        "STAGES": tiles.stages,
    }


def brings(fmt: Format, assembly: bool) -> bool:
    """Whether scales bring a part of what undoes the bias of E2M1's exponent."""
    return assembly and fmt.element.is_minifloat and scales_weights(fmt)


def multiplies_pairs(x: Tensor, device: Device) -> bool:
    """Whether the assembly runs: BF16 in pairs, on NVIDIA's chips from sm_80 on."""
    return x.is_cuda and x.dtype == torch.bfloat16 and torch.version.hip is None and device.capability >= 80


@dataclass(frozen=True)
class Product:
    """What the shape of a product decides, worked out once: `above` multiplies the global scale, and `add` is for sums
    of several pieces of K."""

    call: Call
    add: Call
    pieces: int
    above: float


@lru_cache(maxsize=4096)
def product(
    format: str, shape: tuple[int, int, int, int], dtype: torch.dtype, bias: bool, assembly: bool, processors: int
) -> Product:
    """Of x (tokens, columns) and a weight (rows, columns) in panels; `shape` is tokens, rows, columns and the elements
    from one token of x to the next."""
    tokens, rows, columns, _ = shape
    fmt = lookup(format)
    tiles = choose_panels(tokens, rows, columns, tile(fmt), processors)
    grid = rows // tiles.block_n, triton.cdiv(tokens, tiles.block_m), tiles.pieces
    call = _launch(format, columns, dtype, bias, assembly, tiles).at(
        grid, *shape, -(-(columns // tile(fmt)) // tiles.pieces)
    )
    add = _add(bias).at((triton.cdiv(tokens * rows, ADDED),), tokens * rows, tiles.pieces, rows)
    return Product(call, add, tiles.pieces, 2.0**AFTER if brings(fmt, assembly) else 1.0)


@lru_cache(maxsize=1024)
def _launch(format: str, columns: int, dtype: torch.dtype, bias: bool, assembly: bool, tiles: PanelTiles) -> Launch:
    number = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    fixed = constants(lookup(format), columns, bias=bias, dtype=number, assembly=assembly, tiles=tiles)
    return Launch(panels_kernel, **fixed, num_warps=tiles.warps)


@cache
def _add(bias: bool) -> Launch:
    return Launch(add_pieces_kernel, HAS_BIAS=bias, BLOCK=ADDED, num_warps=4)


def multiply(
    format: str,
    shape: tuple[int, int, int, int],
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    global_scale: float,
    assembly: bool,
    processors: int,
) -> None:
    """Fill out (..., rows) from x (..., columns); see `product` for their shape."""
    tokens, rows, columns, stride = shape
    if tokens > TOGETHER:
        for first in range(0, tokens, TOGETHER):
            some, target = (t.view(tokens, -1)[first : first + TOGETHER] for t in (x, out))
            part = len(some), rows, columns, stride
            multiply(format, part, some, words, scales, bias, target, global_scale, assembly, processors)
        return
    own = product(format, shape, x.dtype, bias is not None, assembly, processors)
    above = global_scale * own.above
    if own.pieces == 1:
        own.call((x, words, scales, bias, out, out), above)
        return
    sums = x.new_empty((own.pieces, tokens, rows), dtype=torch.float32)
    own.call((x, words, scales, bias, out, sums), above)
    own.add((sums, bias, out))
