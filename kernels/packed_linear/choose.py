"""Which tiles the packed linear kernel runs with: a closed-form rule from shape and device, nothing tuned at run time.

The number of splits of K depends on the weight alone, not on the number of tokens, and partial sums are added in a
fixed order, so that a row's result need not depend on its batch; on an H200 it does not (`alone` in tests/kernels/
contact.py).
"""

from dataclasses import dataclass

from qat.numbers.format import Format
from qat.numbers.scale import BF16, E8M0, F16, F32, UE4M3
from qat.serving.packed import problem as packing_problem


@dataclass(frozen=True)
class Tiles:
    """Launch parameters, and in words why."""

    block_n: int
    block_m: int
    splits: int
    warps: int
    stages: int
    why: str


def problem(fmt: Format) -> str | None:
    """Why the Triton kernel does not multiply weights of this format, or None."""
    decodable = fmt.scale.is_one_of(F32, BF16, F16, UE4M3, E8M0)
    return packing_problem(fmt) or (None if decodable else f"the kernel does not decode {fmt.scale} scales")


def choose(tokens: int, rows: int, columns: int, tile: int, processors: int) -> Tiles:
    """Tiles for x (tokens, columns) times a weight (rows, columns).

    Args:
        tokens, rows, columns: the shape of the product.
        tile: columns that one step of the kernel unpacks.
        processors: of the device.
    """
    # Every tile of tokens decodes the weight again, so one tile takes all of them while its sums fit into registers.
    block_m = next((size for size in (16, 32, 64) if tokens <= size), 64)
    # Tall tiles read fewer activations; low ones give more programs where rows are few. 64 is what a wgmma multiplies.
    block_n = 128 if rows >= 128 * processors // 2 else 64
    steps, blocks = -(-columns // tile), -(-rows // block_n)
    # Pieces of K occupy the processors that blocks of rows leave free; under four steps each, a piece would spend its
    # time filling the pipeline, and every piece writes float32 sums that must be read again.
    splits = max(1, min(processors // max(blocks, 1), steps // 4, 8))
    why = f"{blocks} blocks of {block_n} rows on {processors} processors, K in {splits} piece(s) of {steps} tiles"
    wide = block_m >= 64  # partial sums of a group double the accumulators: four warps would spill
    return Tiles(block_n, block_m, splits, warps=8 if wide and block_n >= 128 else 4, stages=3 if wide else 4, why=why)


@dataclass(frozen=True)
class PanelTiles:
    """Launch parameters of the kernel for weights in panels, and in words why."""

    block_n: int
    block_m: int
    pieces: int
    warps: int
    stages: int
    why: str


def choose_panels(tokens: int, rows: int, columns: int, tile: int, processors: int) -> PanelTiles:
    """Tiles for x (tokens, columns) times a weight (rows, columns) in panels, whose tiles have `tile` columns."""
    block_m = 16 if tokens <= 16 else 64  # every tile of tokens decodes the weight again
    block_n, steps = 64, columns // tile
    blocks = rows // block_n
    # Four blocks of four warps fill a processor; a piece of fewer than four steps spends its time filling its pipeline.
    # From the weight alone, so that a row's sums are made in one order whatever comes with it.
    pieces = max(1, min(round(4 * processors / blocks), steps // 4, 32))
    pieces = -(-steps // -(-steps // pieces))  # none is empty
    why = (
        f"panels: {blocks} blocks of {block_n} rows on {processors} processors, K in {pieces} piece(s) of {steps} tiles"
    )
    return PanelTiles(block_n, block_m, pieces, warps=4, stages=3, why=why)
