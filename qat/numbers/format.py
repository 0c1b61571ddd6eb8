"""How a tensor becomes codes and scales. A Format is an Element, a block, and the type and rule of the block's scale.

It is data: packers, kernels, exporters and tests derive what they need (bits per weight, storage shapes, grids) from
these fields, and only the name crosses an op boundary. `scale` always multiplies when dequantizing:

    value = (element_value - zero_point) * scale * global_scale

and where blocks have minima of their own, element_value * scale - minimum.
"""

import math
from dataclasses import dataclass

from qat.numbers.element import Element
from qat.numbers.scale import F16, ScaleRule, ScaleType

ABOVE = F16  # what block scales and minima of a super-block are multiples of


@dataclass(frozen=True, kw_only=True)
class Format:
    """One number format for a 2-D tensor (rows, columns); tensors of more dimensions are flattened to rows.

    Attributes:
        elements: the allowed element types; with more than one, each block stores which it uses.
        block: rows and columns that share a scale; 0 means the whole axis. (1, 16): sixteen neighbours of a row.
        scale: how the scale is stored, and therefore rounded during training.
        scale_rule: how the scale follows from the block. "amax" maps the largest magnitude to the element's largest;
            "mean" is the mean magnitude (BitNet b1.58); "floor", "even" and "ceil" are the three power-of-two rules
            in use for E8M0 (OCP MX v1.0; compressed-tensors and vLLM; modelopt).
        global_scale: a second, per-tensor scale above the block scales, so that scales of a byte fit. It is rounded
            up to a power of two: multiplier and divisor conventions then agree exactly, and code x scale fits BF16.
        zero_point: asymmetric integers, value = (code - zero_point) * scale.
        super_block: columns whose block scales are whole multiples of one FP16 number; 0: none. It is what
            `qat.numbers.numerics.Scales` has as global scale.
        minimum: how what is subtracted from a block is stored, likewise under an FP16 number; None: nothing is.
        prompt: of inputs, the format that tokens of a prompt have in place of this one, which answers have; "" where
            all tokens have this one.
        source: where the definition comes from.
    """

    name: str
    elements: tuple[Element, ...]
    block: tuple[int, int]
    scale: ScaleType
    scale_rule: ScaleRule = "amax"
    global_scale: bool = False
    zero_point: bool = False
    super_block: int = 0
    minimum: ScaleType | None = None
    prompt: str = ""
    source: str = ""

    @property
    def element(self) -> Element:
        """The only (or the first) element."""
        return self.elements[0]

    @property
    def is_single(self) -> bool:
        """Whether all blocks use the same element type."""
        return len(self.elements) == 1

    @property
    def needs_table(self) -> bool:
        """Whether codes have to be looked up: arithmetic gives the values of whole integers and minifloats only."""
        return not self.is_single or not (self.element.is_integer or self.element.is_minifloat)

    @property
    def is_static(self) -> bool:
        """Whether the whole tensor shares one scale; an input's is then calibrated, not found on the fly."""
        return self.block == (0, 0)

    @property
    def is_columnwise(self) -> bool:
        """Whether every column has a scale of its own, over all rows; a cache's are then calibrated."""
        return self.block == (0, 1)

    @property
    def is_rowwise(self) -> bool:
        """Whether a block lies within one row."""
        return self.block[0] == 1

    @property
    def follows_amax(self) -> bool:
        """Whether a block's largest magnitude decides its scale."""
        return not self.zero_point and self.minimum is None and self.scale_rule != "mean"

    @property
    def group(self) -> int | None:
        """Columns per block where a block is a part of one row, else None."""
        return self.block[1] if self.is_rowwise and self.block[1] > 0 else None

    def block_for(self, rows: int, columns: int) -> tuple[int, int]:
        """The block with "whole axis" filled in (1 where the axis is empty)."""
        return self.block[0] or rows or 1, self.block[1] or columns or 1

    def grid_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scale tensor."""
        block_rows, block_columns = self.block_for(rows, columns)
        return math.ceil(rows / block_rows), math.ceil(columns / block_columns)

    @property
    def unit(self) -> int:
        """What the width of a row must be a multiple of; 2-D blocks may overhang."""
        return self.super_block or self.group or 1

    def divides(self, columns: int) -> bool:
        """Whether rows of this width can be stored."""
        return columns % self.unit == 0

    @property
    def exact_in_bf16(self) -> bool:
        """Whether every element x scale product is a BF16 number, so that serving in BF16 rounds nothing.

        A product of a- and b-bit significands has a+b bits (b where a is one bit); BF16 holds 8. A zero point widens
        the element by its sign bit. Holds above BF16's smallest numbers, about 1e-38, where it loses bits of its own.
        """
        if self.super_block:
            return False
        widest = max(element.bits if self.zero_point else element.significant_bits for element in self.elements)
        narrow, wide = sorted((widest, self.scale.significant_bits))
        return (wide if narrow == 1 else narrow + wide) <= 8

    @property
    def rounds_in_bf16(self) -> bool:
        """Whether BF16 may round an element x scale product, counting global scales of other tools, which are no powers
        of two."""
        return self.global_scale or not self.exact_in_bf16

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Stored bits per element, with scales, zero points and the global scale."""
        scales = math.prod(self.grid_shape(rows, columns))
        lists = [self.scale] if self.minimum is None else [self.scale, self.minimum]
        per_scale = sum(each.bits for each in lists) + (self.element.bits if self.zero_point else 0)
        total = rows * columns * self.element.bits + scales * per_scale + (32 if self.global_scale else 0)
        if self.super_block:
            total += rows * columns // self.super_block * len(lists) * ABOVE.bits
        return total / (rows * columns)

    def bits_per_row(self, columns: int) -> float:
        """Stored bits of one row by itself, with the scales that follow it (a cached key or value of one head)."""
        scales = self.grid_shape(1, columns)[1] if self.is_rowwise else 0
        return columns * self.element.bits + scales * self.scale.storage.itemsize * 8
