"""How the scale of a block is stored. A ScaleType rounds a float32 scale to the numbers it has, and decodes them again.

One object each, and everything that depends on it is asked of the object: training, packing, initialisation and files
work with any of them; kernels name those that they decode. A new one is an object here (a subclass where it is no plain
float), and the catalogue's literal that uses it.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from qat.numbers.element import EXPONENT_BIAS, Element, minifloat

ScaleRule = Literal["amax", "mean", "floor", "even", "ceil"]

TINY = torch.finfo(torch.float32).tiny  # smallest scale, so that an all-zero block still has a finite positive one
SWEEP_REACH = 8  # codes of E4M3 on each side: a factor of two either way


@dataclass(frozen=True, eq=False)
class ScaleType:
    """A plain float; subclasses override `encode` and `decode`.

    Attributes:
        name: what files, tables and kernels call it.
        storage: torch dtype of the stored tensor.
        significant_bits: of the longest significand.
        smallest, largest: positive numbers that it has. Smaller scales become the smallest, larger ones the
            largest.
        sweep: offsets, in codes, of the neighbours worth trying; empty where the codes are too fine. Needs codes of a
            byte that grow with the scale.
    """

    name: str
    storage: torch.dtype
    significant_bits: int
    smallest: float
    largest: float
    sweep: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> str:  # copies and pickles are this very object
        return next((key for key, value in globals().items() if value is self), self.name)

    def encode(self, scale: Tensor) -> Tensor:
        """What is stored of float32 scales (any shape), at most the largest; NaN stays NaN."""
        return scale.clamp(self.smallest, self.largest).to(self.storage)

    def decode(self, stored: Tensor) -> Tensor:
        """float32 values of what is stored."""
        return stored.to(torch.float32)

    def store(self, effective: Tensor, global_scale: Tensor | None = None) -> Tensor:
        """`encode` of the effective scale over the global one (which broadcasts); what is not finite becomes NaN."""
        scale = torch.where(torch.isfinite(effective), effective, torch.nan)
        return self.encode(scale if global_scale is None else scale / global_scale)

    def from_amax(self, amax: Tensor, element: Element, rule: ScaleRule, global_scale: Tensor | None = None) -> Tensor:
        """What is stored for blocks with these largest magnitudes. `rule` is read where only powers of two exist."""
        return self.store(over(amax, element.max), global_scale)

    def neighbours(self, stored: Tensor) -> Tensor:
        """Stored scales at the offsets of `sweep`, saturating: (offsets, *shape of `stored`)."""
        low, high = self._ends
        offsets = _offsets(self.sweep, stored.device).view(-1, *[1] * stored.dim())
        return self.from_bytes((self.to_bytes(stored).to(torch.int16) + offsets).clamp_(low, high).to(torch.uint8))

    @cached_property
    def _ends(self) -> tuple[int, int]:
        low, high = self.to_bytes(self.encode(torch.tensor([self.smallest, self.largest]))).tolist()
        return low, high

    def spoil(self, stored: Tensor, where: Tensor) -> Tensor:
        """`stored` with NaN `where` it says so."""
        return select(where, self.encode(torch.full_like(stored, torch.nan, dtype=torch.float32)), stored)

    def is_one_of(self, *types: "ScaleType") -> bool:
        """Whether it is one of the types that a kernel or file format knows."""
        return self in types

    @property
    def bits(self) -> int:
        """Of one scale in a file."""
        return self.storage.itemsize * 8

    @property
    def is_bytes(self) -> bool:
        """Whether packed weights and kernels hold it as raw bytes."""
        return self.storage.itemsize == 1

    def to_bytes(self, stored: Tensor) -> Tensor:
        """As packed weights and kernels hold it: types of one byte as uint8, others as they are."""
        return stored.view(torch.uint8) if self.is_bytes else stored

    def from_bytes(self, raw: Tensor) -> Tensor:
        """Undo `to_bytes`."""
        return raw.view(self.storage) if self.is_bytes else raw


@dataclass(frozen=True, eq=False)
class MinifloatScale(ScaleType):
    """The positive numbers of a small float; too large a scale becomes the largest."""

    element: Element = field(kw_only=True)

    def encode(self, scale: Tensor) -> Tensor:
        """See `ScaleType`."""
        return self.element.round(scale.clamp(self.smallest, self.largest)).to(self.storage)


@dataclass(frozen=True, eq=False)
class ExponentScale(ScaleType):
    """Powers of two, stored as float32's exponent field: the byte b is 2^(b - 127), 255 is NaN (OCP MX v1.0, 5.4)."""

    def encode(self, scale: Tensor) -> Tensor:
        """The nearest power of two in the exponent; block maxima go by a rule instead, see `from_amax`."""
        return _exponent_byte(torch.log2(scale.clamp_min(self.smallest)).round())

    def decode(self, stored: Tensor) -> Tensor:
        """See `ScaleType`."""
        bits = stored.to(torch.int32)
        value = torch.where(bits == 0, self.smallest, (bits << 23).view(torch.float32))
        return torch.where(bits == 2 * EXPONENT_BIAS + 1, torch.nan, value)

    def from_amax(self, amax: Tensor, element: Element, rule: ScaleRule, global_scale: Tensor | None = None) -> Tensor:
        """floor: OCP v1.0 section 6.3. even: amax is first rounded to the element's mantissa. ceil: the smallest power
        of two that never saturates."""
        amax = amax if global_scale is None else amax / global_scale
        if rule == "ceil":
            exponent = ceil_log2(over(amax, element.max)).to(torch.float32)
        else:
            bits = amax.contiguous().view(torch.int32)
            if rule == "even":
                bits = bits + (1 << (22 - element.mantissa_bits))
            exponent = ((bits >> 23) - EXPONENT_BIAS - element.max_exponent).to(torch.float32)
        exponent = torch.where(amax > 0, exponent, -EXPONENT_BIAS)
        return _exponent_byte(torch.where(torch.isfinite(amax), exponent, torch.nan))


@dataclass(frozen=True, eq=False)
class WholeScale(ScaleType):
    """Whole numbers of a few bits, which are multiples of a number that a super-block has; the byte 255, which no file
    holds, is NaN."""

    width: int = field(kw_only=True)

    @property
    def bits(self) -> int:
        """See `ScaleType`."""
        return self.width

    def encode(self, scale: Tensor) -> Tensor:
        """See `ScaleType`."""
        whole = scale.round().clamp(self.smallest, self.largest)
        return torch.where(torch.isnan(scale), 255.0, whole).to(torch.uint8)

    def decode(self, stored: Tensor) -> Tensor:
        """See `ScaleType`."""
        return torch.where(stored == 255, torch.nan, stored.to(torch.float32))


@lru_cache(maxsize=64)
def _offsets(sweep: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(sweep, dtype=torch.int16, device=device)


def _exponent_byte(exponent: Tensor) -> Tensor:
    byte = exponent.clamp(-EXPONENT_BIAS, EXPONENT_BIAS) + EXPONENT_BIAS
    return torch.where(torch.isnan(byte), 2.0 * EXPONENT_BIAS + 1, byte).to(torch.uint8)


def _plain(name: str, storage: torch.dtype, bits: int, smallest: float) -> ScaleType:
    return ScaleType(name, storage, bits, smallest, torch.finfo(storage).max)


def _positive(name: str, storage: torch.dtype, element: Element, reach: int) -> MinifloatScale:
    smallest, sweep = element.min_normal / 2**element.mantissa_bits, tuple(range(-reach, reach + 1))
    largest = min(element.max, torch.finfo(storage).max)  # some give codes to infinity that `element` counts as numbers
    return MinifloatScale(name, storage, element.significant_bits, smallest, largest, sweep, element=element)


def _whole(name: str, bits: int, width: int, smallest: float = 1.0) -> WholeScale:
    return WholeScale(name, torch.uint8, bits, smallest, 2.0**bits - 1, width=width)


F32 = _plain("f32", torch.float32, 24, TINY)
BF16 = _plain("bf16", torch.bfloat16, 8, TINY)
F16 = _plain("f16", torch.float16, 11, 2.0**-24)
UE4M3 = _positive("e4m3", torch.float8_e4m3fn, minifloat(4, 3, nan=True), SWEEP_REACH)  # as PTX names it
E8M0 = ExponentScale("e8m0", torch.uint8, 1, 2.0**-EXPONENT_BIAS, 2.0**EXPONENT_BIAS, (-2, -1, 0, 1))
# Of llama.cpp's super-blocks. The sign of the one in eight bits says which of two elements a block has.
U6, S8 = _whole("u6", 6, width=6), _whole("i8", 7, width=8)
U6_MINIMUM = _whole("u6", 6, width=6, smallest=0.0)  # of what is subtracted from a block, which may be nothing

_OF_STORAGE = {each.storage: each for each in (F32, BF16, F16, UE4M3, E8M0)}


def type_of(stored: Tensor) -> ScaleType:
    """The type of scales that come without their format: E8M0 where they are bytes, else the float that they are."""
    return _OF_STORAGE.get(stored.dtype, F32)


def broken(stored: Tensor, type: ScaleType | None = None) -> int:
    """How many stored scales are zero, negative or not finite; writers and servers refuse those. (The independent
    readers of checkpoints have their own test, on purpose.)"""
    values = (type or type_of(stored)).decode(stored)
    return int((~(torch.isfinite(values) & (values > 0))).sum())


def select(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.where` for tensors of one stored dtype; torch has none for floats of a byte."""
    if a.dtype.itemsize == 1 and a.dtype.is_floating_point:
        return torch.where(condition, a.view(torch.uint8), b.view(torch.uint8)).view(a.dtype)
    return torch.where(condition, a, b)


def over(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, correctly rounded on every device: by a plain number, torch on CUDA multiplies with 1 / divisor."""
    return x / torch.full_like(x, divisor)


def ceil_log2(x: Tensor) -> Tensor:
    """The exponent of the smallest power of two that is not below x; 0 where x is not positive."""
    mantissa, exponent = torch.frexp(x)
    return torch.where(x > 0, exponent - (mantissa == 0.5).to(exponent.dtype), torch.zeros_like(exponent))
