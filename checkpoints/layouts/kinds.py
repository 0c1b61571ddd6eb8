"""Kinds of formats that the rows of the support tables speak of: what a scheme of an engine takes, as a question about
a Format. None is a layer whose input is not quantized."""

from qat.numbers.catalog import E2M1, E4M3
from qat.numbers.element import Element
from qat.numbers.format import Format
from qat.numbers.scale import BF16, E8M0, F32, UE4M3

TENSOR, ROW, FP8_BLOCK = (0, 0), (1, 0), (128, 128)
GROUP = (1, FP8_BLOCK[1])


def int_weight(fmt: Format, *bits: int, zero_point: bool = False) -> bool:
    """Integers of one of these widths with BF16 scales: one, one per row, or one per group of a row."""
    plain = _integer(fmt) and not fmt.prompt and fmt.scale is BF16 and (fmt.is_static or fmt.is_rowwise)
    return plain and fmt.element.bits in bits and fmt.zero_point == zero_point


def int_input(fmt: Format | None, block: tuple[int, int], *bits: int) -> bool:
    """Symmetric integers; dynamic ones have float32 scales, the static one is stored in BF16."""
    scale = BF16 if block == TENSOR else F32
    plain = fmt is not None and _integer(fmt) and not fmt.zero_point
    return fmt is not None and plain and fmt.scale is scale and fmt.block == block and fmt.element.bits in bits


def int_columns(fmt: Format, bits: int) -> bool:
    """Symmetric integers with a calibrated BF16 scale for each column."""
    plain = _integer(fmt) and not fmt.zero_point and fmt.element.bits == bits
    return plain and fmt.is_columnwise and fmt.scale is BF16


def fp8_weight(fmt: Format, *blocks: tuple[int, int]) -> bool:
    """E4M3 with BF16 scales of one of these blocks."""
    return _is(fmt, E4M3) and fmt.scale is BF16 and fmt.block in blocks


def fp8_input(fmt: Format | None, *blocks: tuple[int, int]) -> bool:
    """E4M3; dynamic ones have float32 scales, the static one is stored in BF16."""
    scale = None if fmt is None else BF16 if fmt.is_static else F32
    return fmt is not None and _is(fmt, E4M3) and fmt.scale is scale and fmt.block in blocks


def nvfp4(fmt: Format | None) -> bool:
    """FP4 in groups of 16 with E4M3 scales below a global one."""
    return fmt is not None and _is(fmt, E2M1) and fmt.scale is UE4M3 and fmt.global_scale and fmt.group == 16


def mx(fmt: Format | None, *elements: Element) -> bool:
    """One of these elements in groups of 32 with power-of-two scales."""
    return fmt is not None and fmt.scale is E8M0 and fmt.group == 32 and any(_is(fmt, e) for e in elements)


def _is(fmt: Format, element: Element) -> bool:
    return fmt.elements == (element,)


def _integer(fmt: Format) -> bool:
    return fmt.is_single and fmt.element.is_integer
