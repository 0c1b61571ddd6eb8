"""FP4 (E2M1) codes as BF16 numbers where a chip has no FP4: plain integer and BF16 operators, for any device of torch.

A code is a small float: its three low bits, moved to BF16's, are right but for the bias of the exponent. One product
with a power of two corrects that (`by_exponent`), but 0.5 is a subnormal before it, which units that flush subnormals
lose. For those, `by_integers` adds the bias as an integer and knows 0.5 as a case. Scales have the same two ways: with
`times_e8m0` the exponent is added, with `times_e4m3` integers are multiplied, so that no subnormal is ever an operand.
"""

import torch
from torch import Tensor

from qat.numbers.catalog import E2M1
from qat.numbers.element import EXPONENT_BIAS
from qat.numbers.scale import UE4M3

SIGN, MAGNITUDE = 8, 7  # of a code
BF16_MANTISSA, BF16_SIGN = 7, 12  # bits of a fraction; how far a code's sign moves
MOVED = BF16_MANTISSA - E2M1.mantissa_bits  # how far its magnitude moves
CORRECTION = 2.0 ** (EXPONENT_BIAS - E2M1.exponent_bias)
HALF = (EXPONENT_BIAS - 1) << BF16_MANTISSA  # the bits of 0.5, which are also what a magnitude from 1 on lacks
INFINITY = 0xFF << BF16_MANTISSA


def by_exponent(codes: Tensor) -> Tensor:
    """BF16 values of codes (uint8, one each): one product with 2^126. For units that keep subnormals."""
    wide = codes.to(torch.int16)
    bits = (wide & SIGN) << BF16_SIGN | (wide & MAGNITUDE) << MOVED
    return bits.view(torch.bfloat16) * CORRECTION


def by_integers(codes: Tensor) -> Tensor:
    """BF16 values of codes (uint8, one each), without any product: also for units that flush subnormals."""
    wide = codes.to(torch.int16)
    return ((wide & SIGN) << BF16_SIGN | _magnitude_bits(wide & MAGNITUDE)).view(torch.bfloat16)


def _magnitude_bits(magnitude: Tensor) -> Tensor:
    return torch.where(magnitude > 1, (magnitude << MOVED) + HALF, magnitude * HALF)


def times_e8m0(codes: Tensor, scales: Tensor) -> Tensor:
    """BF16 products of codes and E8M0 bytes (uint8, of shapes that broadcast): exponents are added. What is below the
    normal numbers of BF16 is zero, as it would be on units that flush."""
    wide = codes.to(torch.int32)
    bits = _magnitude_bits(wide & MAGNITUDE)
    moved = bits + (scales.to(torch.int32) - EXPONENT_BIAS << BF16_MANTISSA)
    normal = (bits != 0) & (moved >= 1 << BF16_MANTISSA)
    bits = torch.where(normal, moved.clamp_max(INFINITY), 0)
    bits = torch.where(moved > INFINITY, INFINITY, bits)
    return ((wide & SIGN) << BF16_SIGN | bits).to(torch.int16).view(torch.bfloat16)


def times_e4m3(codes: Tensor, scales: Tensor) -> Tensor:
    """BF16 products of codes and E4M3 bytes (uint8, positive, of shapes that broadcast): an integer below 256, made a
    float and multiplied with a power of two. Exact; no operand is subnormal."""
    wide, scale = codes.to(torch.int32), scales.to(torch.int32)
    magnitude, mantissa = wide & MAGNITUDE, UE4M3.element.mantissa_bits
    doubled = torch.where(magnitude > 1, ((magnitude & 1) + 2) << (magnitude >> 1) - 1, magnitude)
    field, fraction = scale >> mantissa, scale & 2**mantissa - 1
    significand = torch.where(field > 0, fraction + 2**mantissa, fraction)
    unit = field.clamp_min(1) - UE4M3.element.exponent_bias - mantissa - 1  # of a doubled code times a significand
    power = (unit + EXPONENT_BIAS << 23).view(torch.float32)
    product = (doubled * significand).to(torch.float32) * power
    return torch.where(wide & SIGN != 0, -product, product).to(torch.bfloat16)
