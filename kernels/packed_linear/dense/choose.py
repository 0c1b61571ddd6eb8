"""From how many tokens on a packed weight is decoded to dense rows for the library's product, and how many at a time.

Everything is counted in the time that one byte takes to and from memory, per weight, so that cards whose memory and
tensor cores grew together share the rule. Measured on an H200 (8192 x 8192, graphs of calls over cold operands), where
a byte per weight takes 20 us: the kernel for panels takes 26.6 us per tile of 64 tokens for INT4 and 31.7 for NVFP4,
the library 37 us as long as it waits for memory and 0.18 us per token beyond.
"""

from functools import lru_cache

TILE = 64  # tokens for which the packed kernels decode a weight once
DECODED = 1.33  # a tile of tokens in the packed kernels: decoding is what they wait for
NUMBER = 2  # bytes of a dense one, which is written and read again
PRODUCT = 0.009  # one token in the library's product
FEW = 3 * TILE  # the rule says no up to here, whatever the width of codes
SLICE_BYTES = 128 << 20  # of dense numbers at a time: what a prompt may cost in memory


def pays(tokens: int, bits: int) -> bool:
    """Whether decoding once and the library's product take less time than decoding for every tile of tokens."""
    dense = bits / 8 + NUMBER + max(NUMBER, tokens * PRODUCT)
    return dense < -(-tokens // TILE) * DECODED


@lru_cache(maxsize=1024)
def slices(rows: int, columns: int, step: int) -> tuple[range, ...]:
    """Rows that are dense together: as few equal slices as SLICE_BYTES allows, of whole steps of rows."""
    most = max(SLICE_BYTES // (NUMBER * columns) // step, 1) * step
    count = -(-rows // most)
    size = -(-rows // count // step) * step
    return tuple(range(first, min(first + size, rows)) for first in range(0, rows, size))
