"""How the input quantizers cut their work: a closed-form rule from the shape, nothing tuned at run time."""

from dataclasses import dataclass

WIDEST = 16384  # columns that one program holds in registers
STEP = 8192  # columns per step where a row is wider than that
TILE = 2048  # columns per program where nothing is shared by a whole row
PER_THREAD = 16  # values: two vector loads of 16-bit numbers


@dataclass(frozen=True)
class Tiles:
    """Launch parameters: rows and columns of a program, and the steps in which it walks its rows (0: it does not)."""

    rows: int
    block: int
    steps: int
    warps: int


def choose(rows: int, columns: int, whole_rows: bool, processors: int) -> Tiles:
    """Tiles for x (rows, columns).

    Args:
        rows, columns: of the input.
        whole_rows: whether a program needs the whole row, for a scale per token or a norm.
        processors: of the device.
    """
    block = 1 << max(columns - 1, 0).bit_length()
    if not whole_rows:
        block = min(block, TILE)
    elif block > WIDEST:
        block = STEP
    together = max(1, TILE // block)  # short rows share a program, once every processor has one
    while together > 1 and rows < together * processors:
        together //= 2
    warps = min(max(together * block // (32 * PER_THREAD), 1), 16)
    return Tiles(together, block, -(-columns // block) if whole_rows else 0, warps)
