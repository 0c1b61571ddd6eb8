"""Which operands and tiles the kernel for quantized inputs and weights runs with: closed-form rules, nothing tuned.

K is cut into segments whose number depends on the weight and the device alone. With few tokens every segment is a
program of its own, with many tokens one program runs them all; partial sums are added in the same order either way, so
that a row's result need not depend on its batch. Proven for equal tiles only.
"""

from dataclasses import dataclass
from typing import Any

import torch

from qat.kernels.device import Device
from qat.numbers.catalog import E4M3
from qat.numbers.format import Format
from qat.numbers.scale import BF16, E8M0, F16, F32, UE4M3
from qat.serving.inputs import is_paired
from qat.serving.matmul import PLAIN_BITS
from qat.serving.matmul import problem as matmul_problem
from qat.serving.packed import problem as packing_problem
from qat.serving.words import PART, tile

SPAN = 128  # columns of one step over 8-bit weights, and between two promotions of an 8-bit float sum
INTEGER, FLOAT8, FLOAT16 = "int8", "float8", "float16"


@dataclass(frozen=True)
class Tiles:
    """Launch parameters, and in words why.

    Attributes:
        operand: what both sides become: "int8" (int32 sums), "float8" (E4M3) or "float16" (float32 sums).
        part: columns of one product.
        parts: products of one step.
        flush: columns after which a partial sum is scaled into the total, 0 where the whole row has one scale.
        block_n, block_m: rows of the weight and tokens of a tile.
        segments: pieces of K whose sums are added in order.
        parallel: whether every segment is a program of its own.
        warps, stages: of a program.
        why: all of it for a reader.
    """

    operand: str
    part: int
    parts: int
    flush: int
    block_n: int
    block_m: int
    segments: int
    parallel: bool
    warps: int
    stages: int
    why: str


def problem(input_format: Format, weight_format: Format) -> str | None:
    """Why the Triton kernel does not multiply weights of one format with inputs of the other, or None."""
    decodable = weight_format.scale.is_one_of(F32, BF16, F16, UE4M3, E8M0)
    reason = None if decodable else f"the kernel does not decode {weight_format.scale} scales"
    return matmul_problem(input_format, weight_format) or reason


def operand(input_format: Format, weight_format: Format, capability: int) -> str:
    """The cheapest type that holds the codes of both sides exactly and that this GPU's tensor cores multiply."""
    sides = (input_format, weight_format)
    if any(0 < fmt.block[1] < PART for fmt in sides):
        return FLOAT16  # several scales within a product: they multiply the operands
    if all(fmt.element.is_integer for fmt in sides):
        return INTEGER
    if capability >= 89 and all(_is_float8(fmt) for fmt in sides):
        return FLOAT8
    return FLOAT16


def _is_float8(fmt: Format) -> bool:
    """Minifloats shift into its fields; the magnitude of a small integer is a code among or just above subnormals."""
    element = fmt.element
    if element.is_integer:
        return element.bits - 1 <= E4M3.mantissa_bits + 1
    return element.mantissa_bits <= E4M3.mantissa_bits and element.min_normal >= E4M3.min_normal


def block_scaled_problem(input_format: Format, weight_format: Format, columns: int, capability: int) -> str | None:
    """Why the units that multiply codes and block scales themselves do not run this product, or None: then they do."""
    sides = (input_format, weight_format)
    if capability < 100:
        return "GPUs before compute capability 10.0 have no such units"
    if not all(fmt.element.is_minifloat and fmt.scale.is_one_of(E8M0, UE4M3) for fmt in sides):
        return "they multiply minifloats with E8M0 or E4M3 scales"
    if len({(fmt.scale, fmt.group) for fmt in sides}) > 1:
        return "both sides need the same blocks"
    if columns % SPAN:
        return f"the kernel takes widths that {SPAN} divides"
    return None


def rounded_reason(input_format: Format, weight_format: Format, columns: int, capability: int) -> str | None:
    """Why inputs are rounded to their grid as 16-bit numbers, and multiplied by `qat::packed_linear`, rather than codes
    with codes here; None where codes are.

    Scales of 16 or 32 columns on both sides leave the 8-bit products nothing to win: they are multiplied into operands
    that are then 16 bits wide, or into sums every 32 columns, in a loop that waits for its own loads. A rounded input
    says the same, code times scale (exact in BF16 but for a global scale), and panels are read at the speed of memory.
    NVFP4 x NVFP4, 8192 x 8192, on an H200: 174, 169 and 5,326 us for 1, 16 and 4,096 tokens by codes, where
    `packed_linear` takes 22 and 23 us for 1 and 16 and BF16 750 for 4,096.
    """
    size = group(input_format, columns)
    if not 0 < size < SPAN or weight_format.element.bits == PLAIN_BITS or packing_problem(weight_format) is not None:
        return None
    if block_scaled_problem(input_format, weight_format, columns, capability) is None:
        return None
    return f"inputs with a scale per {size} columns are rounded: products of codes would wait for scales"


def group(fmt: Format, columns: int) -> int:
    """Columns per scale; 0 where a row has one."""
    return fmt.block[1] if fmt.block[1] < columns else 0


def choose(tokens: int, rows: int, columns: int, input_format: Format, weight_format: Format, device: Device) -> Tiles:
    """Tiles for quantized inputs (tokens, columns) times a weight (rows, columns)."""
    kind = operand(input_format, weight_format, device.capability)
    groups = [size for size in (group(input_format, columns), group(weight_format, columns)) if size >= PART]
    plain = weight_format.element.bits == PLAIN_BITS
    step = SPAN if plain else tile(weight_format.element.bits)
    part = min([SPAN, *groups]) if plain else PART
    flush = min([SPAN, *groups]) if groups or kind == FLOAT8 else 0
    segments = _segments(rows, columns, step, device.processors)
    sums = 1 + (flush > 0) + (segments > 1 and not (kind == INTEGER and not flush))
    tall = sums < 3 if tokens > 64 else _is_tall(rows, device.processors)
    block_n = 128 if tall else 64
    most = _most_tokens(kind, sums, flush, len(groups), device.capability)
    block_m = next((size for size in (16, 32, 64, 128, 256) if tokens <= size or size == most), most)
    block_m, stages, stage = _fit(kind, block_n, block_m, step, plain, device.shared)
    warps = 8 if block_n * block_m * sums >= 64 * 128 else 4
    blocks = -(-rows // block_n) * -(-tokens // block_m)
    parallel = segments > 1 and segments * blocks <= 2 * device.processors
    how = "side by side" if parallel else "in turn"
    why = (
        f"{kind} operands, {blocks} tiles of {block_n} rows x {block_m} tokens on {device.processors} processors, "
        f"K in {segments} segment(s){f' {how}' if segments > 1 else ''}, {stages} stages of {stage // 1024} KB"
    )
    return Tiles(
        kind, part, step // part, flush, block_n, block_m, segments, parallel, warps=warps, stages=stages, why=why
    )


def _segments(rows: int, columns: int, step: int, processors: int) -> int:
    """From the weight alone: enough pieces to occupy the device for one token, each of at least four steps."""
    steps, blocks = -(-columns // step), -(-rows // (128 if _is_tall(rows, processors) else 64))
    return max(1, min(processors // max(blocks, 1), steps // 4, 8))


def _is_tall(rows: int, processors: int) -> bool:
    """Whether tiles of 128 rows occupy half of the device."""
    return rows >= 128 * processors // 2


def _most_tokens(kind: str, sums: int, flush: int, groups: int, capability: int) -> int:
    """Tokens per tile whose accumulators fit into registers: the total, partial sums of a group, sums of segments.

    Where tensor cores take their operands from shared memory, more fit. Found by compiling for every architecture. On
    10.0, four partial sums of 128 tokens would not fit into tensor memory, which turns the kernel into a trap.
    """
    asynchronous = 90 <= capability < 120
    if sums == 1:
        return (256 if asynchronous else 128) if kind == INTEGER else (128 if asynchronous else 64)
    if groups == 2:
        return 64 if flush == SPAN else 32
    if sums == 3:
        return 128 if flush in (0, SPAN) else 64  # of 64 rows
    return 128 if asynchronous and flush in (0, SPAN) else 64


def _fit(kind: str, block_n: int, block_m: int, step: int, plain: bool, shared: int) -> tuple[int, int, int]:
    """Tokens per tile, stages and bytes per stage, so that two stages fit into shared memory."""
    while True:
        wide = 2 if kind == FLOAT16 else 1
        stage = block_n * (step * wide if plain else 2 * PART) + block_m * step * wide
        if block_m == 16 or 2 * stage <= shared:
            return block_m, max(2, min(4, shared // stage)), stage
        block_m //= 2


def operand_exponent(fmt: Format, operand: str, *, words: bool) -> int:
    """log2 of the value of a code over the operand that it becomes."""
    element = fmt.element
    if operand == FLOAT16:
        return 0
    if operand == INTEGER:
        return element.bits - PLAIN_BITS if words else 0
    if element.is_integer:
        return E4M3.exponent_bias + E4M3.mantissa_bits - 1
    return E4M3.exponent_bias - element.exponent_bias


def constants(x: Format, w: Format, columns: int, *, bias: bool, tiles: Tiles) -> dict[str, Any]:
    """Compile-time arguments for inputs of format `x` and weights of format `w`; all that depends on them."""
    sides: dict[str, Any] = {}
    for side, fmt in (("X", x), ("W", w)):
        sides |= {
            f"{side}_KIND": fmt.element.kind,
            f"{side}_BITS": fmt.element.bits,
            f"{side}_MANTISSA": fmt.element.mantissa_bits,
            f"{side}_BIAS": fmt.element.exponent_bias,
            f"{side}_SCALE": fmt.scale.name,
            f"{side}_GROUP": group(fmt, columns),
        }
    return {
        "OPERAND": tiles.operand,
        **sides,
        "X_PAIRED": is_paired(x),
        "W_ROWS": w.block[0],
        "SCALE_MANTISSA": UE4M3.element.mantissa_bits,
        "SCALE_BIAS": UE4M3.element.exponent_bias,
        "HAS_BIAS": bias,
        "PART": tiles.part,
        "PARTS": tiles.parts,
        "FLUSH": tiles.flush,
        "BLOCK_N": tiles.block_n,
        "BLOCK_M": tiles.block_m,
        "SEGMENTS": tiles.segments,
        "PARALLEL": tiles.parallel,
    }


def sum_dtype(tiles: Tiles) -> torch.dtype:
    """Of the sums that segments leave: exact int32 where only rows have scales."""
    return torch.int32 if tiles.operand == INTEGER and tiles.flush == 0 else torch.float32
