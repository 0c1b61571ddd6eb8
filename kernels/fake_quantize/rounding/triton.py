"""Float32 numbers to the nearest value of an element, as functions that the training kernels call: the bits of
`qat.numbers.numerics`, by operations that IEEE 754 fixes to the last bit, on a GPU and interpreted alike.

A division is the most expensive of them: ten instructions and a branch. Within a block the divisor is one number, so
its reciprocal is made once, correctly rounded, and a quotient is a product that its residual corrects.
"""

import triton
import triton.language as tl

ALL = tl.constexpr(tl.PropagateNan.ALL)
ROUNDER = tl.constexpr(1.5 * 2.0**23)  # adding it drops the fraction, ties to even
SIGN = tl.constexpr(-(2**31))
INFINITY = tl.constexpr(0x7F800000)  # the bits of float32's; above it lie the NaNs
TOP = tl.constexpr(0x7F000000)  # those of 2^127
HALF_NORMAL = tl.constexpr(0x00400000)  # those of 2^-127


@triton.jit
def clamp(x, low, high):
    """As torch.clamp: NaN stays NaN."""
    return tl.minimum(tl.maximum(x, low, propagate_nan=ALL), high, propagate_nan=ALL)


@triton.jit
def unit(d):
    """What `quotient` wants to know of a divisor d: (power, near, inverse), so that x / d is x * power / near.

    Near is d without its exponent, in [1, 2), or less for subnormal numbers; inverse is 1 / near, rounded. What x / d
    is where d is 0, infinite or NaN, x * power is: x * infinity, x * 0, NaN. The sign of d is that of power.
    """
    bits = d.to(tl.int32, bitcast=True)
    magnitude = bits & ~SIGN
    finite = (magnitude > 0) & (magnitude < INFINITY)
    exponent = tl.maximum(TOP - (magnitude & INFINITY), HALF_NORMAL)
    power = tl.where(finite, exponent, INFINITY - magnitude)  # of 0 infinity, of infinity 0, of NaN one
    near = tl.where(finite, magnitude.to(tl.float32, bitcast=True) * power.to(tl.float32, bitcast=True), 1.0)
    return (power | (bits & SIGN)).to(tl.float32, bitcast=True), near, tl.div_rn(1.0, near)


@triton.jit
def quotient(scaled, near, inverse):
    """scaled / near as one division rounds it, for results that no subnormal number is near; see `unit`.

    The product with the reciprocal is off by less than 1.5 units in the last place. The residual of that is exact, or
    off by half of its own unit, and the sum that corrects is rounded once. What it rounds is so near to the quotient
    that it rounds as the quotient does, unless that is within four of the steps in which quotients by this divisor
    differ from numbers halfway between two others. There are 23 million such pairs of significands;
    tests/kernels/test_quotients.py divides them all.
    """
    q = scaled * inverse
    return tl.fma(tl.fma(-near, q, scaled), inverse, q)


@triton.jit
def nearest(
    x,
    signed,
    KIND: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_NORMAL: tl.constexpr,
    ZEROS: tl.constexpr,
    GRID: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    """float32 x, in units of the element and not beyond its bounds by more than rounding, to the nearest value. An
    integer 0 has the sign of `signed`, as the reference leaves it that of x."""
    if KIND == "table":
        y = tl.full(x.shape, GRID[0], tl.float32)
        for index in tl.static_range(len(BOUNDS)):
            y = tl.where(x > BOUNDS[index], GRID[index + 1], y)
        return tl.where(x == x, y, x)
    elif KIND == "integer" and ZEROS:
        return x + ROUNDER - ROUNDER
    elif KIND == "integer":
        sign = signed.to(tl.int32, bitcast=True) & SIGN  # the sum below loses that of -0.0, which torch.round keeps
        return ((x + ROUNDER - ROUNDER).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    else:  # see Element.round_
        binade = (x.to(tl.int32, bitcast=True) & INFINITY).to(tl.float32, bitcast=True)
        # Times this, as large as leaves MANTISSA bits of x to the sum: the addition rounds, half to even.
        binade = tl.maximum(binade, MIN_NORMAL)
        dropper: tl.constexpr = 1.5 * 2.0 ** (23 - MANTISSA)
        return tl.fma(binade, -dropper, tl.fma(binade, dropper, x))


@triton.jit
def rounded(
    x,
    zero,
    KIND: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_NORMAL: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZEROS: tl.constexpr,
    GRID: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    """float32 x, in units of the element, to the nearest value (zero point subtracted). LOW and HIGH bound the values,
    or the codes where there are zero points: clamped first, which is the same for whole bounds."""
    if KIND != "table":
        x = clamp(x, LOW - zero, HIGH - zero)
    return nearest(x, x, KIND, MANTISSA, MIN_NORMAL, ZEROS, GRID, BOUNDS)


@triton.jit
def divided(
    x,
    d,
    zero,
    KIND: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_NORMAL: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZEROS: tl.constexpr,
    GRID: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    """`rounded(x / d)`; d and zero have fewer elements, one to a block.

    x is clamped before it is divided, to what the bounds are before: a clamped quotient is off the bound by one
    rounding at most, and the grid takes it back. So nothing infinite meets the residual.
    """
    power, near, inverse = unit(d)
    scaled = clamp(x * power, (LOW - zero) * near, (HIGH - zero) * near)
    return nearest(quotient(scaled, near, inverse), scaled, KIND, MANTISSA, MIN_NORMAL, ZEROS, GRID, BOUNDS)


@triton.jit
def to_bf16_grid(x, HOW: tl.constexpr):
    """float32 x rounded to a BF16 number, half to even, NaN stays NaN. HOW: "cast", or "bits" by integer arithmetic
    where casts do not round (Triton's interpreter), or "" to leave it."""
    if HOW == "bits":
        bits = x.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, near.to(tl.float32, bitcast=True), x)
    elif HOW == "cast":
        x = x.to(tl.bfloat16).to(tl.float32)
    return x
