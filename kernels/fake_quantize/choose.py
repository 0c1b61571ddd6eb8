"""How the fake quantization kernels cut a tensor: a closed-form rule from format and shape, nothing tuned at run time.

Every block shape of the catalogue but the two-dimensional one is a matrix with one scale per row: groups lie one after
the other in memory, so (rows, columns) becomes (rows x groups, group); a tensor with one scale becomes a single row.
"""

from dataclasses import dataclass

from qat.numbers.format import Format
from qat.numbers.scale import BF16, E8M0, F16, F32, UE4M3, ScaleType

SMALLEST = 64  # columns of a tile, where a row has as many


@dataclass(frozen=True)
class Plan:
    """A matrix, its scales, and the tile of one program.

    Attributes:
        rows, columns: the matrix as kernels see it, contiguous.
        block_rows, block_columns: of one scale; (1, 0) is a whole row, the rest are two-dimensional.
        scale_columns: scales per row of blocks.
        tile_rows, tile_columns: values that are in registers at once, powers of two.
        segment: columns that one program of a reduction goes through, tile after tile.
    """

    rows: int
    columns: int
    block_rows: int
    block_columns: int
    scale_columns: int
    tile_rows: int
    tile_columns: int
    segment: int
    warps: int = 4

    @property
    def tiles(self) -> int:
        """Programs of a kernel that takes one tile each."""
        return -(-self.rows // self.tile_rows) * -(-self.columns // self.tile_columns)

    @property
    def segments(self) -> int:
        """Programs along one row of a reduction."""
        return -(-self.columns // self.segment)


def problem(fmt: Format) -> str | None:
    """Why fake quantization in this format runs its reference implementation also on a GPU, or None."""
    if not fmt.is_single:
        return "its element type is chosen per block"
    if fmt.minimum is not None:
        return "its blocks have minima of their own"
    if fmt.element.step != 1.0:
        return "its integers have a fractional step"
    if fmt.block[0] > 1 and any(size & (size - 1) or size < SMALLEST // 2 for size in fmt.block):
        return f"blocks of {fmt.block[0]} x {fmt.block[1]} do not hold whole tiles"
    if fmt.block[0] == 0 and fmt.block[1] > 0:
        return "its blocks are groups of columns"
    return None


def input_problem(fmt: Format) -> str | None:
    """Why inputs of this format need more than the kernel that finds their scales itself, or None."""
    if not fmt.is_rowwise:
        return "its scale is static: only rounding is left" if fmt.is_static else "its scale does not follow one row"
    if not fmt.follows_amax:
        return "its scale needs more than the largest magnitude"
    if not fmt.scale.is_one_of(F32, BF16, UE4M3, E8M0):
        return f"the kernel does not round scales to {fmt.scale}"
    return problem(fmt)


def parts_of(fmt: Format, divisors: tuple[int, ...], scales: tuple[int, ...]) -> int:
    """Parts of a block that have divisors of their own, by the two shapes; 0 where the kernels do not take them."""
    if divisors == scales:
        return 1
    parts = divisors[-1] // max(1, scales[-1])
    fits = divisors == (*scales[:-1], parts * scales[-1]) and fmt.block[0] == 1 and fmt.block[1] % max(1, parts) == 0
    return parts if fits and 1 < parts < fmt.block[1] and not parts & (parts - 1) else 0


def plan(fmt: Format, rows: int, columns: int, values: int, programs: int = 0, parts: int = 1) -> Plan:
    """The plan for x (rows, columns), neither of them 0.

    Args:
        fmt: one without a `problem`.
        rows, columns: of the tensor, all leading dimensions counted as rows.
        values: in a tile, a power of two.
        programs: cut long rows of a reduction until there are about so many programs; 0 cuts at every tile.
        parts: of a group that have divisors of their own; each is a row.
    """
    block_rows, block_columns = fmt.block
    if block_rows > 1 and block_columns:
        tile_columns = block_columns
        tile_rows = min(max(values // tile_columns, 1), block_rows)
        scale_columns = -(-columns // block_columns)
        return Plan(rows, columns, block_rows, block_columns, scale_columns, tile_rows, tile_columns, block_columns)
    if block_rows == 0:
        rows, columns = 1, rows * columns
    elif block_columns:
        rows, columns = rows * (columns // block_columns) * parts, block_columns // parts
    tile_columns = _tile_columns(columns, values)
    tile_rows = min(max(values // tile_columns, 1), _next_power(rows))
    pieces = max(1, -(-programs * tile_rows // rows))
    segment = -(-columns // (pieces * tile_columns)) * tile_columns if programs else tile_columns
    return Plan(rows, columns, 1, 0, 1, tile_rows, tile_columns, segment)


def _tile_columns(columns: int, values: int) -> int:
    """The widest tile that leaves at most an eighth of its lanes idle, else the one that leaves the fewest."""
    if columns <= SMALLEST:
        return _next_power(columns)
    widths = [size for size in (4096, 2048, 1024, 512, 256, 128, SMALLEST) if size <= values and size < 2 * columns]
    filled = {size: -(-columns // size) * size for size in widths}
    tight = [size for size in widths if 8 * filled[size] <= 9 * columns]
    return tight[0] if tight else min(widths, key=lambda size: filled[size])


def _next_power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def scales_problem(scale: ScaleType) -> str | None:
    """Why scales of this type are made by the reference implementation also on a GPU, or None."""
    return None if scale.is_one_of(F32, BF16, F16, UE4M3) else f"the kernel does not round scales to {scale}"
