"""Linear layers whose inputs are quantized as well: codes times codes, W8A8, W4A8 and W4A4.

`qat::quantized_matmul` is the operator that device kernels register on; this file is its meaning and what runs where no
kernel does. Inputs come as `qat::quantize_input` makes them:

    codes   int8 (..., K) for integers, also of 4 bits; float8_e4m3fn (..., K) for 8-bit minifloats; uint8 (..., K / 2)
            for 4-bit minifloats, the even column in the low nibble
    scales  float32 (..., 1) per token, (..., groups), or (1,) where one scale is stored for the tensor; E4M3 and E8M0
            scales as bytes, (..., groups)

A scale above the input's E4M3 scales is a constant of the layer: it is folded into `global_scale`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qat.errors import FormatError, UnsupportedError
from qat.numbers.catalog import E4M3, lookup
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales
from qat.serving import inputs
from qat.serving.inputs import code_dtype, is_paired
from qat.serving.packed import GROUPS, Stored, finite_codes, one_global_scale, positive_scales
from qat.serving.words import from_words, to_words

PLAIN_BITS = 8  # codes of this size are stored as they are, smaller ones in words (qat.serving.words)


@dataclass(frozen=True)
class MatmulWeight:
    """The layout of a linear layer's weight for quantized inputs, (rows, columns) when dequantized; see `hold` and
    `unhold`.

    Attributes:
        format: catalogue name.
        columns: of the weight; words hold whole tiles.
        codes: int8 or float8_e4m3fn (rows, columns), or int16 words (rows, words).
        scales: (block columns, block rows), in the stored dtype, see `ScaleType.to_bytes`.
        global_scale: multiplies the scales.
    """

    format: str
    columns: int
    codes: Tensor
    scales: Tensor
    global_scale: float

    def to(self, device: torch.device | str) -> "MatmulWeight":
        """The same on another device."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))


def problem(input_format: Format, weight_format: Format) -> str | None:
    """Why weights of one format cannot meet inputs of the other, or None."""
    reason = inputs.problem(input_format) or _side_problem(input_format)
    if reason is None and input_format.element.bits not in (4, PLAIN_BITS):
        reason = f"codes of {input_format.element.bits} bits; 4 and {PLAIN_BITS} are packed"
    if reason is not None:
        return f"{input_format.name} inputs: {reason}"
    reason = _side_problem(weight_format)
    return None if reason is None else f"{weight_format.name} weights: {reason}"


def _side_problem(fmt: Format) -> str | None:
    element, (block_rows, block_columns) = fmt.element, fmt.block
    if fmt.needs_table:
        return "their codes need a table"
    if fmt.zero_point:
        return "zero points, which no engine runs with quantized inputs"
    if element.bits not in (2, 4, PLAIN_BITS) or (element.bits == PLAIN_BITS and not _is_plain(fmt)):
        return f"codes of {element.bits} bits fit neither bytes nor words"
    whole = block_rows != 1 and element.bits != PLAIN_BITS
    if whole or block_columns not in GROUPS or (0 < block_columns < 32 and element.bits == PLAIN_BITS):
        return f"blocks of {block_rows} x {block_columns} with codes of {element.bits} bits"
    return None


def _is_plain(fmt: Format) -> bool:
    """Whether torch has a dtype whose bit patterns are this element's codes."""
    return fmt.element.is_integer or fmt.element == E4M3


def hold(weight: QTensor) -> MatmulWeight:
    """Codes and scales in the order that kernels read.

    Raises:
        UnsupportedError: a format that cannot be stored so.
        FormatError: a scale that is zero, negative or not finite, or a code that is NaN.
    """
    fmt = weight.format
    reason = _side_problem(fmt)
    if reason is not None:
        raise UnsupportedError(f"{fmt.name} weights cannot be multiplied with quantized inputs: {reason}")
    bits, codes = fmt.element.bits, finite_codes(weight)
    plain = bits == PLAIN_BITS
    return MatmulWeight(
        format=fmt.name,
        columns=weight.codes.shape[1],
        codes=codes.view(code_dtype(fmt.element)) if plain else to_words(codes, bits, offset=fmt.element.is_integer),
        scales=positive_scales(weight).t().contiguous(),
        global_scale=one_global_scale(weight),
    )


def unhold(weight: MatmulWeight) -> QTensor:
    """Undo `hold`."""
    fmt, codes = lookup(weight.format), weight.codes
    if fmt.element.bits == PLAIN_BITS:
        patterns = codes.view(torch.uint8)
    else:
        patterns = from_words(codes, fmt.element.bits, weight.columns, offset=fmt.element.is_integer)
    above = torch.tensor(weight.global_scale, device=codes.device) if fmt.global_scale else None
    return QTensor(fmt, patterns, Scales(fmt.scale.from_bytes(weight.scales.t().contiguous()), above))


def reference(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    global_scale: float,
    input_format: str,
    weight_format: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """What `qat::quantized_matmul` means: the product of the dequantized operands in float32, rounded once."""
    x = inputs.unpack(codes, scales, None, input_format).dequantize()
    w = unhold(MatmulWeight(weight_format, columns, weight, weight_scales, 1.0)).dequantize()
    y = (x @ w.t()) * global_scale
    return (y if bias is None else y + bias).to(dtype)


_quantized_matmul = torch.library.custom_op("qat::quantized_matmul", reference, mutates_args=())


@_quantized_matmul.register_fake
def _(codes: Tensor, scales: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], weight.shape[0], dtype=args[-1])


def quantized_matmul(
    codes: Tensor,
    scales: Tensor,
    weight: MatmulWeight,
    bias: Tensor | None = None,
    *,
    input_format: str,
    dtype: torch.dtype,
    input_scale: float = 1.0,
) -> Tensor:
    """Quantized input (..., columns) times the weight, (..., rows) in `dtype`.

    Products are summed in int32 or float32 and rounded once; see `kernels/README.md` for what tensor cores make of it.

    Args:
        codes, scales: as `qat::quantize_input` returns them.
        weight: see `hold`.
        bias: (rows,) or None.
        input_format: catalogue name.
        dtype: of the result.
        input_scale: constant of the layer above the input's scales, 1 / g where g is its stored divisor.

    Raises:
        UnsupportedError: these two formats cannot meet.
        FormatError: the input has another width than the weight.
    """
    fmt = lookup(input_format)
    reason = problem(fmt, lookup(weight.format))
    if reason is not None:
        raise UnsupportedError(f"{input_format} inputs cannot meet {weight.format} weights: {reason}")
    width = codes.shape[-1] * (2 if is_paired(fmt) else 1)
    if width != weight.columns:
        raise FormatError(f"an input of width {width} meets a weight of {weight.columns} columns")
    y: Tensor = torch.ops.qat.quantized_matmul(
        codes,
        scales,
        weight.codes,
        weight.scales,
        bias,
        weight.global_scale * input_scale,
        input_format,
        weight.format,
        weight.columns,
        dtype,
    )
    return y


class QuantizedLinear(Stored):
    """A linear layer for inference whose input arrives as codes and scales (see the module), results in `dtype`."""

    NUMBERS = ("codes", "scales")

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: MatmulWeight,
        input_format: str,
        input_scale: float,
        dtype: torch.dtype,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, tensor in (("codes", weight.codes), ("scales", weight.scales), ("bias", bias)):
            self.register_buffer(name, tensor)
        self.format, self.global_scale, self.input_format = weight.format, weight.global_scale, input_format
        self.input_scale, self.dtype = input_scale, dtype
        self.in_features, self.out_features = weight.columns, weight.codes.shape[0]

    def forward(self, codes: Tensor, scales: Tensor) -> Tensor:
        """(..., out_features)."""
        weight = MatmulWeight(self.format, self.in_features, self.codes, self.scales, self.global_scale)
        return quantized_matmul(
            codes,
            scales,
            weight,
            self.bias,
            input_format=self.input_format,
            dtype=self.dtype,
            input_scale=self.input_scale,
        )

    def extra_repr(self) -> str:
        """Shape and formats, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format} x {self.input_format}"
