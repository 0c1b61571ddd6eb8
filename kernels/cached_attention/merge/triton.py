"""The pieces of a sequence that programs attended to, merged by their maxima and totals, in their order."""

from functools import cache

import triton
import triton.language as tl

from qat.kernels.launch import Launch

MERGED = 32  # pieces that are merged at once


@triton.jit(do_not_specialize=["rows", "pieces"])
def merge_pieces_kernel(
    sums, ends, out, rows, pieces, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr
):
    """out (rows, WIDTH) of the pieces of each row, in their order."""
    row = tl.program_id(0).to(tl.int64)
    p, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    ends += row * pieces
    highest = tl.full((BLOCK_P,), -float("inf"), tl.float32)
    for first in range(0, pieces, BLOCK_P):
        highest = tl.maximum(highest, tl.load(ends + first + p, mask=first + p < pieces, other=-float("inf")))
    top = tl.max(highest, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros((BLOCK_P,), tl.float32)
    result = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, pieces, BLOCK_P):
        in_p = first + p < pieces
        weight = tl.exp2(tl.load(ends + first + p, mask=in_p, other=-float("inf")) - top)
        total += weight * tl.load(ends + rows.to(tl.int64) * pieces + first + p, mask=in_p, other=0.0)
        at = sums + (row * pieces + first + p)[:, None] * WIDTH + d[None, :]
        result += tl.sum(weight[:, None] * tl.load(at, mask=in_p[:, None] & (d < WIDTH)[None, :], other=0.0), 0)
    whole = tl.sum(total, 0)
    result = result / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + row * WIDTH + d, result.to(out.dtype.element_ty), mask=d < WIDTH)


@cache
def merge(width: int) -> Launch:
    """The launch for rows of so many columns."""
    return Launch(merge_pieces_kernel, WIDTH=width, BLOCK_D=triton.next_power_of_2(width), BLOCK_P=MERGED)
