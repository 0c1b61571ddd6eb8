"""Which caches the attention kernel reads, and with which tiles: closed-form rules from formats, shapes and the device.

How many tokens one program takes depends on the tokens, the heads and the device, never on the batch, and the pieces
are merged in their order: a sequence's result does not depend on its company.
"""

from dataclasses import dataclass

from qat.numbers.format import Format
from qat.numbers.scale import BF16, F16, F32, UE4M3
from qat.serving.attention import RowLayout

WORD = 16  # bits of what the kernel loads
ROWS = 32  # queries times query heads of a head of keys: what one program multiplies at once
WIDEST = 256  # columns of a head
SHORTEST = 256  # tokens of a piece: shorter ones spend their time beginning and being merged


@dataclass(frozen=True)
class Tiles:
    """Launch parameters.

    Attributes:
        block_r: rows (queries of the query heads of one head), filled up to what tensor cores multiply.
        block_t: tokens of a step.
        piece: tokens of a program.
        warps, stages: of the program.
    """

    block_r: int
    block_t: int
    piece: int
    warps: int
    stages: int


def format_problem(fmt: Format, width: int) -> str | None:
    """Why the kernel does not read rows of `width` values of this format, or None."""
    layout, element = RowLayout(fmt, width), fmt.element
    if fmt.needs_table or element.bits not in (4, 8):
        return f"the kernel reads whole integers and floats of 4 and 8 bits, not {fmt.name}"
    if fmt.zero_point:
        return f"the kernel subtracts no zero points ({fmt.name})"
    if scale_place(fmt, width) is None:
        return f"the kernel reads a scale per tensor, per token and head, or E4M3 scales of 16 columns, not {fmt.name}"
    if width > WIDEST or width * element.bits % WORD or layout.bytes % max(2, fmt.scale.storage.itemsize):
        return f"the kernel reads heads of at most {WIDEST} columns in whole words, not {width} of {fmt.name}"
    return None


def scale_place(fmt: Format, width: int) -> str | None:
    """Where the scales of a row act: "tensor", "row", "group" (of 16 columns), or None where the kernel has no such."""
    if fmt.is_static:
        return "tensor"
    if not fmt.is_rowwise:
        return None
    if fmt.group == 16 and fmt.scale.is_one_of(UE4M3):
        return "group"
    plain = fmt.scale.is_one_of(F32, BF16, F16) and not fmt.global_scale
    return "row" if plain and fmt.grid_shape(1, width)[1] == 1 else None


def problem(key: Format, value: Format, widths: tuple[int, int], rows: int) -> str | None:
    """Why the kernel does not attend to keys and values of these formats and widths, or None.

    Args:
        key, value: their formats.
        widths: columns of a key and of a value.
        rows: queries times query heads of a head of keys.
    """
    if rows > ROWS:
        return f"{rows} queries and query heads to a head of keys; the kernel takes {ROWS}"
    return format_problem(key, widths[0]) or format_problem(value, widths[1])


def choose(tokens: int, heads: int, rows: int, processors: int, *, exact: bool) -> Tiles:
    """Tiles for so many cached tokens.

    Args:
        tokens: of a sequence.
        heads: of keys.
        rows: see `problem`.
        processors: of the device.
        exact: whether products are those of float32.
    """
    block_r = 16 if rows <= 16 else ROWS
    block_t = 32 if exact else 64
    # One sequence gives every processor about four programs; several only give more, of the same tokens each.
    share = -(-tokens * heads // (4 * processors))
    piece = max(SHORTEST, -(-share // block_t) * block_t)
    return Tiles(block_r, block_t, piece, warps=8 if exact or block_r == ROWS else 4, stages=2 if exact else 3)
