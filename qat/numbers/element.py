"""What a code means. An Element is its decode table (code -> value) plus how to round a real number onto that table.

Four constructors cover the field: `integer(bits)`, `unsigned(bits)`, `minifloat(exponent, mantissa)`, `table(values)`.
Everything else (largest value, sign handling, encode) is derived from the table, so packers, kernels and tests cannot
disagree with it. Codes are always the raw bit pattern in a uint8: two's complement for integers, sign-exponent-mantissa
for minifloats, the position for tables.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["integer", "minifloat", "table"]

EXPONENT_BIAS = 127  # of float32 and, by definition, of the E8M0 scale type

# Tensors, since torch makes one of a number at every call; by value on every device. See `Element.round_`.
_BINADE = torch.tensor(0x7F800000, dtype=torch.int32, device="cpu")
_DROPS = tuple(torch.tensor(1.5 * 2.0 ** (23 - mantissa), device="cpu") for mantissa in range(8))


@dataclass(frozen=True)
class Element:
    """One scalar code book of at most 8 bits.

    `values[code]` is the decoded value; NaN marks codes that are never produced. `low` and `high` bound what rounding
    may return: for integers the symmetric range, so that +x and -x round alike and gradients carry no bias.
    """

    name: str
    kind: Kind
    bits: int
    values: tuple[float, ...]
    low: float
    high: float
    mantissa_bits: int = 0
    min_normal: float = 1.0
    step: float = 1.0

    @property
    def is_integer(self) -> bool:
        """Whether values are whole numbers, their codes two's complement."""
        return self.kind == "integer" and self.step == 1.0 and self.low < 0

    @property
    def is_minifloat(self) -> bool:
        """Whether codes are sign, exponent and mantissa."""
        return self.kind == "minifloat"

    @property
    def nan_codes(self) -> tuple[int, ...]:
        """The codes that mean NaN."""
        return tuple(code for code, value in enumerate(self.values) if value != value)

    @property
    def max(self) -> float:
        """Largest magnitude that rounding returns; block scales map the largest element here."""
        return max(self.high, -self.low)

    @property
    def max_exponent(self) -> int:
        """floor(log2(max)), the exponent offset of the OCP MX scale rules."""
        return int(torch.tensor(self.max).log2().floor().item())

    @property
    def significant_bits(self) -> int:
        """Bits of the longest significand on the grid; 24 where values are arbitrary float32 numbers."""
        if self.is_minifloat:
            return self.mantissa_bits + 1
        return max(self.bits - 1, 1) if self.is_integer else 24

    @property
    def exponent_bias(self) -> int:
        """Of a minifloat: its smallest normal number is 2^(1 - bias); 0 for others."""
        return 1 - int(math.log2(self.min_normal)) if self.is_minifloat else 0

    def round(self, x: Tensor) -> Tensor:
        """Round fp32 `x` (any shape, in units of this element) to the nearest value, ties to even code, saturating.

        NaN stays NaN. Returns a new tensor of values, not codes.
        """
        return self.round_(x.clone())

    def round_(self, x: Tensor) -> Tensor:
        """In-place `round`; `x` must be float32."""
        if self.kind == "table":
            return x.copy_(self._round_by_table(x))
        x.clamp_(self.low, self.high)
        if self.kind == "integer":
            return x.round_() if self.step == 1.0 else x.div_(self.step).round_().mul_(self.step)
        # Adding c = 1.5 * 2^(23-m) * 2^e, with 2^e the binade of x, makes fp32 hardware drop every bit below the
        # m-th of the mantissa, ties to even; subtracting c again is exact. 2^e never falls below the smallest
        # normal, which gives the subnormals their fixed spacing.
        binade = (x.view(torch.int32) & _BINADE).view(torch.float32)
        binade.clamp_min_(self.min_normal).mul_(_DROPS[self.mantissa_bits])
        return x.add_(binade).sub_(binade)

    def encode(self, rounded: Tensor) -> Tensor:
        """Codes (uint8) of values that `round` returned. Zero always gets the code of +0; NaN gets code 0."""
        finite = torch.nan_to_num(rounded).contiguous()  # bucketize warns about strides
        if self.kind == "integer":
            whole = finite if self.step == 1.0 else finite.div_(self.step).round_()
            return whole.to(torch.int16).to(torch.uint8) & (2**self.bits - 1)
        if self.kind == "table":
            return self._nearest_index(finite).to(torch.uint8)
        magnitudes = _positive_values(self).to(finite.device)
        index = torch.bucketize(finite.abs(), magnitudes)
        sign = (finite < 0).to(torch.int64) << (self.bits - 1)
        return (index | sign).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of uint8 `codes`."""
        table = _decode_table(self).to(codes.device)  # selected, which is eight times as fast as indexed
        return table.index_select(0, codes.reshape(-1).to(torch.int64)).view(codes.shape)

    def _round_by_table(self, x: Tensor) -> Tensor:
        values = _sorted_values(self).to(x.device)
        return torch.where(torch.isnan(x), x, values[self._sorted_index(x)])

    def _sorted_index(self, x: Tensor) -> Tensor:
        values = _sorted_values(self).to(x.device)
        return torch.bucketize(x.contiguous(), (values[1:] + values[:-1]) / 2)

    def _nearest_index(self, x: Tensor) -> Tensor:
        """Code of the nearest entry; the lower one on a tie (tables have no even code)."""
        return _sorted_codes(self).to(x.device)[self._sorted_index(x)]

    @cached_property
    def grid(self) -> tuple[float, ...]:
        """The values that rounding can return, ascending, each once."""
        return tuple(sorted({v for v in self.values if v == v and self.low <= v <= self.high}))


@lru_cache(maxsize=64)
def _decode_table(element: Element) -> Tensor:
    return torch.tensor(element.values, dtype=torch.float32)


@lru_cache(maxsize=64)
def _sorted_values(element: Element) -> Tensor:
    return torch.tensor(element.grid, dtype=torch.float32)


@lru_cache(maxsize=64)
def _sorted_codes(element: Element) -> Tensor:
    return torch.tensor([element.values.index(v) for v in element.grid])


@lru_cache(maxsize=64)
def _positive_values(element: Element) -> Tensor:
    half = element.values[: len(element.values) // 2]
    return torch.tensor([v for v in half if v == v], dtype=torch.float32)


def integer(bits: int, step: float = 1.0, *, full: bool = False) -> Element:
    """Two's-complement integer times `step`; rounding uses the symmetric range +-(2^(bits-1) - 1), or with `full` all
    codes. A negative step mirrors those: the same codes under a negative scale."""
    half = 2 ** (bits - 1)
    values = tuple(step * (code if code < half else code - 2 * half) + 0.0 for code in range(2 * half))  # no -0
    ends = -step * (half if full else half - 1), step * (half - 1)
    name = (f"int{bits}" if step == 1.0 else f"int{bits}x{step:.4g}") + "full" * full
    return Element(name, "integer", bits, values, min(ends), max(ends), step=step)


def unsigned(bits: int) -> Element:
    """The whole numbers from 0 to 2^bits - 1, which are their own codes: what is left of a block above its minimum."""
    values = tuple(float(code) for code in range(2**bits))
    return Element(f"uint{bits}", "integer", bits, values, values[0], values[-1])


def minifloat(exponent: int, mantissa: int, *, nan: bool = False) -> Element:
    """Sign, `exponent` and `mantissa` bits, bias 2^(exponent-1)-1, with subnormals and no infinities (OCP MX v1.0,
    5.3).

    `nan=True` gives the all-ones code to NaN, as E4M3 does.
    """
    bias = 2 ** (exponent - 1) - 1
    min_normal = 2.0 ** (1 - bias)
    magnitudes = []
    for code in range(2 ** (exponent + mantissa)):
        field, fraction = code >> mantissa, code & (2**mantissa - 1)
        if field == 0:
            magnitudes.append(min_normal * fraction / 2**mantissa)
        else:
            magnitudes.append(2.0 ** (field - bias) * (1 + fraction / 2**mantissa))
    if nan:
        magnitudes[-1] = float("nan")
    high = magnitudes[-2] if nan else magnitudes[-1]
    values = tuple(magnitudes) + tuple(-v for v in magnitudes)
    bits = 1 + exponent + mantissa
    return Element(f"e{exponent}m{mantissa}", "minifloat", bits, values, -high, high, mantissa, min_normal)


def table(name: str, values: tuple[float, ...]) -> Element:
    """Any finite list of values; the code is the position.

    Rounding goes to the nearest, the lower one on a tie; the boundaries are the midpoints as float32 numbers.
    """
    bits = (len(values) - 1).bit_length()
    return Element(name, "table", bits, values, min(values), max(values))
