"""Linear layers as a server holds them: codes in words, scales in their stored dtype, nothing dequantized in memory.

`qat::packed_linear` is the operator that device kernels register on; this file is its meaning and what runs where no
kernel does.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qat.errors import FormatError, UnsupportedError
from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales
from qat.numbers.scale import broken
from qat.serving import panels
from qat.serving.words import PART, from_words, to_words

GROUPS = (0, 16, 32, 64, 128)  # columns per scale that kernels take, 0 for a whole row


@dataclass(frozen=True)
class PackedWeight:
    """The layout of a linear layer's weight, (rows, columns) when dequantized; see `pack` and `unpack`.

    Attributes:
        format: catalogue name.
        columns: of the weight; words hold whole tiles.
        words: int16 (rows, words), see `qat.serving.words`, or in the order of `qat.serving.panels`.
        scales: (block columns, rows), in the stored dtype, see `ScaleType.to_bytes`, or beside their words in panels.
        zeros: int8, same shape, or None.
        global_scale: multiplies the scales.
    """

    format: str
    columns: int
    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    global_scale: float

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(t.numel() * t.element_size() for t in (self.words, self.scales, self.zeros) if t is not None)

    def to(self, device: torch.device | str) -> "PackedWeight":
        """The same on another device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        moved = replace(self, words=self.words.to(device), scales=self.scales.to(device), zeros=zeros)
        return ordered(moved, moved.words.device.type)


def ordered(weight: PackedWeight, device: str) -> PackedWeight:
    """The same weight in the order that this type of device reads: a CPU walks along a row, a GPU across rows, and
    through panels where a weight lies in them."""
    fmt, words, scales, zeros = lookup(weight.format), weight.words, weight.scales, weight.zeros
    if device == "cpu":
        if panels.in_panels(words):
            codes, scales = panels.from_panels(words, fmt), panels.scales_from_panels(scales, fmt)
            words = to_words(codes, fmt.element.bits, offset=fmt.element.is_integer)
        scales, zeros = scales.t().contiguous().t(), None if zeros is None else zeros.t().contiguous().t()
    elif device == "cuda" and not panels.in_panels(words):
        scales, zeros = scales.contiguous(), None if zeros is None else zeros.contiguous()
        if panels.problem(fmt, words.shape[0], weight.columns) is None:
            codes = from_words(words, fmt.element.bits, weight.columns, offset=fmt.element.is_integer)
            words, scales = panels.to_panels(codes, fmt), panels.scales_to_panels(scales, fmt)
    return replace(weight, words=words, scales=scales, zeros=zeros)


def problem(fmt: Format) -> str | None:
    """Why weights of this format cannot be packed yet, or None."""
    if fmt.needs_table:
        return "its codes need a table per block"
    if fmt.element.bits not in (2, 4, 8):
        return f"codes of {fmt.element.bits} bits do not fit the words"
    if fmt.is_static:
        return "one scale for the whole tensor"
    if not fmt.is_rowwise or fmt.block[1] not in GROUPS:
        return f"blocks of {fmt.block[0]} x {fmt.block[1]} are not groups within one row"
    if fmt.group and fmt.group < PART and fmt.zero_point:
        return f"zero points of groups of {fmt.group}"
    return None


def positive_scales(weight: QTensor) -> Tensor:
    """The stored scales (block rows, block columns) as kernels hold them.

    Raises:
        FormatError: one is zero, negative or not finite.
    """
    fmt, scales = weight.format, weight.scales
    bad = broken(scales.stored, scales.type)
    if bad:
        raise FormatError(f"{fmt.name}: {bad} scales are zero, negative or not finite")
    return fmt.scale.to_bytes(scales.stored)


def one_global_scale(weight: QTensor) -> float:
    """The global scale, 1 where there is none.

    Raises:
        UnsupportedError: several, as a stack of experts has: each expert is a weight of its own.
    """
    above = weight.scales.global_scale
    if above is None:
        return 1.0
    if above.numel() != 1:
        raise UnsupportedError(f"{weight.format.name}: {above.numel()} global scales in one weight; split it by scale")
    return float(above)


def finite_codes(weight: QTensor) -> Tensor:
    """The codes, none of them a NaN: kernels decode by arithmetic that does not look for it.

    Raises:
        FormatError: there is one.
    """
    nan = weight.format.element.nan_codes
    bad = int(torch.isin(weight.codes, weight.codes.new_tensor(nan)).sum()) if nan else 0
    if bad:
        raise FormatError(f"{weight.format.name}: {bad} codes are NaN")
    return weight.codes


def pack(weight: QTensor) -> PackedWeight:
    """Codes and scales in the order that kernels read.

    Raises:
        UnsupportedError: a format that cannot be packed.
        FormatError: a scale that is zero, negative or not finite, or a code that is NaN.
    """
    fmt, scales = weight.format, weight.scales
    reason = problem(fmt)
    if reason is not None:
        raise UnsupportedError(f"{fmt.name} weights cannot be packed: {reason}")
    packed = PackedWeight(
        format=fmt.name,
        columns=weight.codes.shape[1],
        words=to_words(finite_codes(weight), fmt.element.bits, offset=fmt.element.is_integer),
        scales=positive_scales(weight).t(),
        zeros=None if scales.zero_point is None else scales.zero_point.t(),
        global_scale=one_global_scale(weight),
    )
    return ordered(packed, weight.codes.device.type)


def unpack(weight: PackedWeight) -> QTensor:
    """Undo `pack`."""
    fmt = lookup(weight.format)
    weight = ordered(weight, "cpu") if panels.in_panels(weight.words) else weight
    codes = from_words(weight.words, fmt.element.bits, weight.columns, offset=fmt.element.is_integer)
    stored = fmt.scale.from_bytes(weight.scales.t().contiguous())
    above = torch.full((), weight.global_scale, device=stored.device) if fmt.global_scale else None
    zeros = None if weight.zeros is None else weight.zeros.t().contiguous()
    return QTensor(fmt, codes, Scales(stored, above, zeros))


def reference(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    global_scale: float,
    format: str,
    prepared: Tensor | None = None,
) -> Tensor:
    """What `qat::packed_linear` means: x times the dequantized weight, in float32, rounded once to x's dtype.

    `prepared` is what `qat::prepare_packed` made of the same weight, for kernels that have something to prepare.
    """
    weight = unpack(PackedWeight(format, x.shape[-1], words, scales, zeros, global_scale)).dequantize()
    y = x.to(torch.float32) @ weight.t()
    return (y if bias is None else y + bias).to(x.dtype)


# Defined without `custom_op`, whose autograd wrapper costs as much as the product of a small layer.
torch.library.define("qat::packed_linear", torch.library.infer_schema(reference, mutates_args=()))
torch.library.impl("qat::packed_linear", "CompositeExplicitAutograd", reference)


def prepare_reference(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    global_scale: float,
    format: str,
    columns: int,
) -> Tensor:
    """What a kernel wants to know of a weight before the first product; its layer keeps it. Nothing, unless a kernel
    says so."""
    return words.new_empty(0, dtype=torch.uint8)


torch.library.define("qat::prepare_packed", torch.library.infer_schema(prepare_reference, mutates_args=()))
torch.library.impl("qat::prepare_packed", "CompositeExplicitAutograd", prepare_reference)


@torch.library.register_fake("qat::packed_linear")
def _(x: Tensor, words: Tensor, *args: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], panels.rows_of(words))


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., columns) times the weight, (..., rows) in x's dtype; products are summed in float32.

    Raises:
        FormatError: x has another width than the weight.
        UnsupportedError: in the backward pass, packed weights are for inference.
    """
    return _checked(
        x, weight.columns, weight.words, weight.scales, weight.zeros, bias, weight.global_scale, weight.format
    )


_OPERATOR = torch.ops.qat.packed_linear.default


def _checked(x: Tensor, columns: int, *weight: Any) -> Tensor:
    if x.shape[-1] != columns:
        raise FormatError(f"an input of width {x.shape[-1]} meets a weight of {columns} columns")
    bias = weight[3]
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        through: Tensor = _ForInference.apply(x, *weight)
        return through
    y: Tensor = _OPERATOR(x, *weight)
    return y


class _ForInference(torch.autograd.Function):
    """A forward pass needs no `torch.no_grad()`; a backward pass is refused instead of losing gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weight: Any) -> Tensor:
        y: Tensor = _OPERATOR(x, *weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise UnsupportedError("packed weights are for inference: they pass no gradient on; train with qat train")


class Stored(nn.Module):
    """A module some of whose buffers are stored numbers: `model.half()` and the like must not convert those."""

    NUMBERS: ClassVar[tuple[str, ...]] = ()
    _INTEGERS: ClassVar[dict[int, torch.dtype]] = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        buffers = {name: buffer for name in self.NUMBERS if (buffer := getattr(self, name)) is not None}
        for name, buffer in buffers.items():  # integers are moved, never converted
            setattr(self, name, buffer.view(self._INTEGERS[buffer.element_size()]))
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
            setattr(self, name, getattr(self, name).view(buffer.dtype))
        return self


class PackedLinear(Stored):
    """A linear layer with a packed weight, for inference. It owns what the kernel prepared for its tensors."""

    NUMBERS = ("words", "scales", "zeros")

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("words", weight.words)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.register_buffer("bias", bias)
        self.format, self.global_scale = weight.format, weight.global_scale
        self.in_features, self.out_features = weight.columns, panels.rows_of(weight.words)
        self._prepared: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # it speaks of this layer's tensors, not of a copy's

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._prepared = None
        weight = ordered(self.packed, self.words.device.type)
        self.words, self.scales, self.zeros = weight.words, weight.scales, weight.zeros
        return self

    @property
    def packed(self) -> PackedWeight:
        """The weight."""
        return PackedWeight(self.format, self.in_features, self.words, self.scales, self.zeros, self.global_scale)

    def prepare(self) -> None:
        """Let the kernel prepare what it wants; the first call does it, but a compiled one cannot."""
        weight = (self.words, self.scales, self.zeros, self.bias, self.global_scale, self.format)
        self._prepared = torch.ops.qat.prepare_packed(*weight, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        weight = (self.words, self.scales, self.zeros, self.bias, self.global_scale, self.format)
        if self._prepared is None and not torch.compiler.is_compiling():
            self.prepare()
        return _checked(x, self.in_features, *weight, self._prepared)

    def extra_repr(self) -> str:
        """Shape and format, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format}"
