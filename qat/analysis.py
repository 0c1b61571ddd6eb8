"""What a tensor loses in a format, and what theory says it should: crest factors, and QSNR as a function of them.

The crest factor of a block is its largest magnitude over its root mean square. For blocks of independent normal numbers
it alone decides how well a format holds them (arXiv 2510.25602): integers lose 6 dB for every doubling, small floats
next to nothing until their subnormals come into play. Where the two curves cross, the better format changes.

The formulas are the paper's, with two terms that its theorem leaves out and its measurements show: numbers that round
to zero, and the block's largest number, which a scale of enough digits holds without error. Integers count with the
largest level that they have (7, not 8), so that the curves lie where RTN measures them.
"""

import math
from collections.abc import Iterable
from statistics import NormalDist

import torch
from torch import Tensor

from qat.numbers.catalog import CATALOG
from qat.numbers.element import Element
from qat.numbers.format import Format
from qat.numbers.numerics import block_amax, fake_quantize, find_scales, finite_amax, global_scale_for, to_blocks
from qat.numbers.scale import TINY

SLAB = 1 << 24  # numbers that are in float32 at once, where blocks lie within rows
_NORMAL = NormalDist()


def candidates() -> list[Format]:
    """What a weight could become: 4 bits with a scale per group of at most 128, 8 bits with one per row; least bits
    first. One element type each, computed and not looked up, with stored scales of at most 16 bits."""

    def is_candidate(fmt: Format) -> bool:
        if fmt.element.bits == 4:
            return fmt.group is not None and fmt.group <= 128
        return fmt.element.bits == 8 and fmt.block == (1, 0)

    formats = [fmt for fmt in CATALOG.values() if has_theory(fmt) and _scale_bits(fmt) < 24 and is_candidate(fmt)]
    return sorted(formats, key=lambda fmt: (fmt.element.bits, fmt.element.kind, fmt.bits_per_weight(4096, 4096)))


# --- measured -------------------------------------------------------------------------------------


def row_crest(x: Tensor) -> float:
    """Crest factor of the rows of x (rows, columns): what one scale per row has to bridge."""
    return _mean(_crests(slab.float()[:, None, None]) for slab in _slabs(x))


def _crests(blocked: Tensor) -> tuple[float, int]:
    """Sum over the blocks of max |x| / rms(x), and how many there are; blocks of zeros do not count."""
    amax, filled = block_amax(blocked), blocked.any(dim=3).any(dim=1)
    unit = blocked / amax.clamp_min(TINY)[:, None, :, None]  # squares of tiny numbers would vanish
    crests = unit.square_().mean(dim=(1, 3)).rsqrt()[filled]
    return float(crests.double().sum()), len(crests)


def _mean(sums: Iterable[tuple[float, int]]) -> float:
    total, count = map(sum, zip(*sums, strict=True))
    return total / count if count else math.nan


def loss(x: Tensor, fmt: Format) -> tuple[float, float]:
    """(sum of squared errors of RTN, mean crest factor) of the matrix x (rows, columns) in `fmt`.

    Rows are worked on in slabs of about SLAB numbers where blocks do not reach over rows; the result is the same.
    """
    shared = global_scale_for(finite_amax(x), fmt) if fmt.global_scale else None
    error, crests = 0.0, []
    for slab in _slabs(x) if fmt.block[0] == 1 else (x,):
        values = slab.to(torch.float32)
        rounded = fake_quantize(values, fmt, find_scales(values, fmt, shared))
        error += energy(values - rounded)
        crests.append(_crests(to_blocks(values, fmt)))
    return error, _mean(crests)


def energy(x: Tensor) -> float:
    """Sum of squares of the matrix x, in float64."""
    return sum(float(slab.double().square().sum()) for slab in _slabs(x))


def _slabs(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, SLAB // max(x.shape[1], 1)))


def decibels(error: float, signal: float) -> float:
    """QSNR of a sum of squared errors in a sum of squares; infinite without an error, NaN without a signal."""
    if not signal:
        return math.nan
    return 10 * math.log10(signal / error) if error else math.inf


# --- expected -------------------------------------------------------------------------------------


def has_theory(fmt: Format) -> bool:
    """Whether `expected_qsnr` knows the format: one element type with evenly spaced or floating levels, scaled by the
    largest number of a block within a row."""
    return fmt.is_rowwise and fmt.follows_amax and not fmt.needs_table and not fmt.zero_point


def expected_qsnr(fmt: Format, crest: float) -> float:
    """QSNR in dB of normal numbers whose blocks have this crest factor; of formats that `has_theory`."""
    slack, exact = scale_slack(fmt), fmt.group if _scale_bits(fmt) > 1 else None
    if fmt.element.is_integer:
        return integer_qsnr(fmt.element.max / fmt.element.step, crest, slack, exact)
    return minifloat_qsnr(fmt.element, crest, slack, exact)


def scale_slack(fmt: Format) -> float:
    """By how much a stored scale exceeds the smallest that would do, on average: half a step of its significand."""
    return 1 + 2.0 ** -_scale_bits(fmt)


def integer_qsnr(largest: float, crest: float, slack: float, exact: int | None = None) -> float:
    """Of integers up to `largest`: uniform noise of a step squared over 12.

    Args:
        largest: level that a block's largest number is scaled to.
        crest: factor of the blocks.
        slack: of the scale, from 1.
        exact: the size of a group whose largest number is stored without error, or None.
    """
    share = 1 - 1 / exact if exact else 1.0
    return -10 * math.log10(share * (slack * crest / largest) ** 2 / 12)


def minifloat_qsnr(element: Element, crest: float, slack: float, exact: int | None = None) -> float:
    """Of a minifloat; arguments as in `integer_qsnr`. Normal numbers lose a share of themselves, subnormal ones a fixed
    step, and what is smaller than half of that step is lost whole."""
    spacing = element.min_normal * 2.0**-element.mantissa_bits
    unit = slack * crest / element.max  # of the element, in standard deviations
    zero, normal = unit * spacing / 2, unit * element.min_normal
    cdf, pdf = _NORMAL.cdf, _NORMAL.pdf
    lost = 2 * cdf(zero) - 1 - 2 * zero * pdf(zero)
    subnormal = (unit * spacing) ** 2 / 12 * 2 * (cdf(normal) - cdf(zero))
    floating = 2 * (normal * pdf(normal) + 1 - cdf(normal))
    if exact:
        floating = max(0.0, floating - crest**2 / exact)
    return -10 * math.log10(floating / (24 * 4**element.mantissa_bits) + subnormal + lost)


def crossover(integer: Format, minifloat: Format) -> float | None:
    """The crest factor below which the integers lose less, or None where the curves do not cross from 1 to 64."""

    def ahead(crest: float) -> bool:
        return expected_qsnr(integer, crest) > expected_qsnr(minifloat, crest)

    low, high = 1.0, 64.0
    if not ahead(low) or ahead(high):
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if ahead(middle) else (low, middle)
    return low


def _scale_bits(fmt: Format) -> int:
    return fmt.scale.significant_bits
