"""Which operands and tiles the kernel for quantized inputs and weights runs with: closed-form rules, nothing tuned.

K is cut into segments whose number depends on the weight and the device alone. With few tokens every segment is a
program of its own, with many tokens one program runs them all; partial sums are added in the same order either way, so
that a row's result need not depend on its batch. Proven for equal tiles only: no GPU has run it yet.
"""

from dataclasses import dataclass

from qat.catalog import SCALE_ELEMENT
from qat.format import Format
from qat.layouts import PART, tile
from qat.matmul import PLAIN_BITS

SPAN = 128  # columns of one step over 8-bit weights, and between two promotions of an 8-bit float sum
INTEGER, FLOAT8, FLOAT16 = "int8", "float8", "float16"


@dataclass(frozen=True)
class Device:
    """What the rules need to know of a GPU: compute capability (90 for 9.0), multiprocessors, shared memory per block."""

    capability: int
    processors: int
    shared: int


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


def operand(input_format: Format, weight_format: Format, capability: int) -> str:
    """The cheapest type that holds the codes of both sides exactly and that this GPU's tensor cores multiply."""
    sides = (input_format, weight_format)
    if any(0 < fmt.block[1] < PART for fmt in sides):
        return FLOAT16  # several scales within a product: they multiply the operands
    if all(fmt.element.kind == "integer" for fmt in sides):
        return INTEGER
    if capability >= 89 and all(_is_float8(fmt) for fmt in sides):
        return FLOAT8
    return FLOAT16


def _is_float8(fmt: Format) -> bool:
    """Minifloats shift into its fields; a small integer's magnitude is the code of a multiple of its smallest number."""
    element = fmt.element
    if element.kind == "integer":
        return element.bits - 1 <= SCALE_ELEMENT.mantissa_bits + 1
    return element.mantissa_bits <= SCALE_ELEMENT.mantissa_bits and element.min_normal >= SCALE_ELEMENT.min_normal


def group(fmt: Format, columns: int) -> int:
    """Columns per scale; 0 where a row has one."""
    return fmt.block[1] if fmt.block[1] < columns else 0


def choose(
    tokens: int, rows: int, columns: int, input_format: Format, weight_format: Format, device: Device
) -> Tiles:
    """Tiles for quantized inputs (tokens, columns) times a weight (rows, columns)."""
    kind = operand(input_format, weight_format, device.capability)
    groups = [size for size in (group(input_format, columns), group(weight_format, columns)) if size >= PART]
    plain = weight_format.element.bits == PLAIN_BITS
    step = SPAN if plain else tile(weight_format.element.bits)
    part = min([SPAN, *groups]) if plain else PART
    flush = min([SPAN, *groups]) if groups or kind == FLOAT8 else 0
    block_n = 128 if rows >= 128 * device.processors // 2 or tokens > 64 else 64
    segments = _segments(rows, columns, step, device.processors)
    # Accumulators in registers: partial sums of a group and sums of segments come on top of the total.
    sums = 1 + (flush > 0) + (segments > 1 and not (kind == INTEGER and not flush))
    most = 256 if kind == INTEGER and sums == 1 else 64 if sums == 3 and not (plain and flush == SPAN) else 128
    block_m = next((size for size in (16, 32, 64, 128, 256) if tokens <= size or size == most), most)
    block_m, stages, stage = _fit(kind, block_n, block_m, step, plain, device.shared)
    warps = 8 if block_n * block_m * sums >= 128 * 128 else 4
    blocks = -(-rows // block_n) * -(-tokens // block_m)
    parallel = segments > 1 and 2 * blocks <= device.processors
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
    steps, blocks = -(-columns // step), -(-rows // (128 if rows >= 128 * processors // 2 else 64))
    return max(1, min(processors // max(blocks, 1), steps // 4, 8))


def _fit(kind: str, block_n: int, block_m: int, step: int, plain: bool, shared: int) -> tuple[int, int, int]:
    """Tokens per tile, stages and bytes per stage, so that two stages fit into shared memory."""
    while True:
        wide = 2 if kind == FLOAT16 else 1
        stage = block_n * (step * wide if plain else 2 * PART) + block_m * step * wide
        if block_m == 16 or 2 * stage <= shared:
            return block_m, max(2, min(4, shared // stage)), stage
        block_m //= 2
