"""The orders that `qat convert` writes for engines which do not re-order weights themselves: a table, one row each.

A layout takes plain codes (uint8 bit patterns, one each, (..., rows, columns): `QTensor.codes`), or plain scales
(bytes, (..., rows, groups)), and gives the tensor that a device reads; `to_plain` takes it back. No value is changed,
and whatever fills a block up is zero. What GPUs read (`words`, `panels`) is made after loading and stands elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from qat.errors import ConfigError, nearest
from qat.numbers.format import Format
from qat.numbers.scale import E8M0, UE4M3, ScaleType
from qat.serving import fractals, nibbles, scale_orders


@dataclass(frozen=True)
class Layout:
    """One order of codes, or of scales.

    Attributes:
        name: what users type and descriptions say.
        part: what it orders.
        bits: sizes of codes that it takes; empty for scales.
        scales: types of scales that it takes; empty for codes.
        shape: of the result, in words: n rows and k columns, or groups, of the plain tensor.
        reader: who reads it.
        from_plain: (plain, bits) -> the order.
        to_plain: (ordered, bits, rows, columns) -> plain.
    """

    name: str
    part: Literal["codes", "scales"]
    shape: str
    reader: str
    from_plain: Callable[[Tensor, int], Tensor]
    to_plain: Callable[[Tensor, int, int, int], Tensor]
    bits: tuple[int, ...] = ()
    scales: tuple[ScaleType, ...] = ()

    def problem(self, fmt: Format) -> str | None:
        """Why codes, or scales, of this format do not come in this order, or None."""
        if fmt.needs_table or fmt.zero_point:
            return "a code of zero, which fills blocks up, does not stand for the number zero there"
        if self.part == "codes" and fmt.element.bits not in self.bits:
            return f"its codes have {fmt.element.bits} bits, not {' or '.join(map(str, self.bits))}"
        if self.part == "scales" and (not fmt.scale.is_one_of(*self.scales) or not fmt.group or not fmt.is_rowwise):
            return f"its scales are not {' or '.join(map(str, self.scales))} of groups within a row"
        return None


def _transposed_eights(codes: Tensor, bits: int) -> Tensor:
    return nibbles.eights(codes.transpose(-1, -2))


def _blocks(codes: Tensor, bits: int, width: int = fractals.BYTES) -> Tensor:
    blocks = fractals.to_zn(codes, fractals.row_of(bits, width))
    return nibbles.pair_columns(blocks) if bits == nibbles.BITS else blocks


def _from_blocks(blocks: Tensor, bits: int, rows: int, columns: int, width: int = fractals.BYTES) -> Tensor:
    c0 = fractals.row_of(bits, width)
    codes = nibbles.unpair_columns(blocks, c0) if bits == nibbles.BITS else blocks
    return fractals.from_zn(codes, rows, columns)


_NARROW = 16  # bytes of a row in the blocks of the 950's FP4 weights
_ALL = (
    Layout(
        "unpacked", "codes", "(n, k), a byte each", "vllm-ascend's W4A4_DYNAMIC, which packs at load",
        lambda codes, bits: codes, lambda codes, bits, rows, columns: codes, (4, 8),
    ),
    Layout(
        "pairs-k", "codes", "(n, k / 2), low nibble the even column", "MXFP4 and NVFP4 files, as they are",
        lambda codes, bits: nibbles.pair_columns(codes),
        lambda pairs, bits, rows, columns: nibbles.unpair_columns(pairs, columns), (4,),
    ),
    Layout(
        "pairs-n", "codes", "(n / 2, k), low nibble the even row", "modelslim's W4A8_DYNAMIC, MindIE's W4A16 per group",
        lambda codes, bits: nibbles.pair_rows(codes),
        lambda pairs, bits, rows, columns: nibbles.unpair_rows(pairs, rows), (4,),
    ),
    Layout(
        "int32-k", "codes", "int32 (n, k / 8), the first in the lowest bits", "npu_quant_matmul with INT4 weights",
        lambda codes, bits: nibbles.eights(codes),
        lambda words, bits, rows, columns: nibbles.uneights(words, columns), (4,),
    ),
    Layout(
        "int32-n", "codes", "int32 (k, n / 8), the first in the lowest bits", "npu_weight_quant_batchmatmul",
        _transposed_eights,
        lambda words, bits, rows, columns: nibbles.uneights(words, rows).transpose(-1, -2).contiguous(), (4,),
    ),
    Layout(
        "zn", "codes", "(k / c0, n / 16, 16, c0), c0 of 32 bytes", "310P: FRACTAL_NZ of the (n, k) weight",
        _blocks, _from_blocks, (4, 8),
    ),
    Layout(
        "nz", "codes", "(n / c0, k / 16, 16, c0), c0 of 32 bytes", "A2, A3: FRACTAL_NZ of the (k, n) weight",
        lambda codes, bits: _blocks(codes.transpose(-1, -2), bits),
        lambda blocks, bits, rows, columns: _from_blocks(blocks, bits, columns, rows).transpose(-1, -2).contiguous(),
        (4, 8),
    ),
    Layout(
        "zn-16b", "codes", "(k / c0, n / 16, 16, c0), c0 of 16 bytes", "950: the blocks of its FP4 weights",
        lambda codes, bits: _blocks(codes, bits, _NARROW),
        lambda blocks, bits, rows, columns: _from_blocks(blocks, bits, rows, columns, _NARROW), (4,),
    ),
    Layout(
        "mx-pairs", "scales", "(k / 64, n, 2)", "Ascend's MX products",
        lambda scales, bits: scale_orders.to_pairs(scales),
        lambda pairs, bits, rows, groups: scale_orders.from_pairs(pairs, rows, groups), scales=(E8M0,),
    ),
    Layout(
        "swizzled", "scales", "(n / 128, groups / 4, 32, 4, 4)", "NVIDIA's block-scaled products",
        lambda scales, bits: scale_orders.to_swizzled(scales),
        lambda tiles, bits, rows, groups: scale_orders.from_swizzled(tiles, rows, groups), scales=(E8M0, UE4M3),
    ),
)  # fmt: skip

LAYOUTS = {layout.name: layout for layout in _ALL}


def find_layout(name: str) -> Layout:
    """The layout called `name`.

    Raises:
        ConfigError: no such layout; names the nearest.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"no layout called {name!r}; nearest: {nearest(name, LAYOUTS)}; all: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def table() -> str:
    """The table of docs/ascend_layouts.md."""
    lines = ["| layout | of | tensor | takes | read by |", "|---|---|---|---|---|"]
    for layout in _ALL:
        takes = " or ".join(map(str, layout.scales)) or f"{' or '.join(map(str, layout.bits))} bits"
        lines.append(f"| `{layout.name}` | {layout.part} | {layout.shape} | {takes} | {layout.reader} |")
    return "\n".join(lines) + "\n"
