"""A frozen weight that is held packed while something is trained on top of it: codes in words, and their scales.

Buffers, so that it moves, is saved and restored with its layer. Words are kept as bytes, which every way of sending
tensors between processes knows.
"""

import torch
from torch import Tensor

from qat.errors import UnsupportedError
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales
from qat.serving.packed import Stored, finite_codes, positive_scales, problem
from qat.serving.words import from_words, tile, to_words


class HeldWeight(Stored):
    """The codes and scales of one matrix (rows, columns).

    Args:
        fmt: the format of the codes.
        shape: of the matrix.
        device: where it is.

    Raises:
        UnsupportedError: codes of this format do not fit the words.
    """

    NUMBERS = ("words", "scales", "zeros", "global_scale")

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    global_scale: Tensor | None

    def __init__(self, fmt: Format, shape: tuple[int, int], device: torch.device | str) -> None:
        super().__init__()
        reason = problem(fmt)
        if reason is not None:
            raise UnsupportedError(f"{fmt.name} weights cannot be held packed: {reason}")
        self.format, (rows, self.columns) = fmt, shape
        bits = fmt.element.bits
        width = -(-self.columns // tile(bits)) * tile(bits) * bits // 8
        grid = fmt.grid_shape(*shape)
        zeros = torch.zeros(grid, dtype=torch.int8, device=device) if fmt.zero_point else None
        above = torch.ones((), device=device) if fmt.global_scale else None
        scales = torch.ones(grid, device=device).to(fmt.scale.storage)
        self.register_buffer("words", torch.zeros(rows, width, dtype=torch.uint8, device=device))
        self.register_buffer("scales", fmt.scale.to_bytes(scales))
        self.register_buffer("zeros", zeros)
        self.register_buffer("global_scale", above)

    @torch.no_grad()
    def hold(self, weight: QTensor) -> None:
        """Take over codes and scales.

        Raises:
            FormatError: a scale is zero, negative or not finite, or a code is NaN.
        """
        fmt, scales = self.format, weight.scales
        words = to_words(finite_codes(weight), fmt.element.bits, offset=fmt.element.is_integer)
        self.words.copy_(words.view(torch.uint8))
        self.scales.copy_(positive_scales(weight))
        for own, given in ((self.zeros, scales.zero_point), (self.global_scale, scales.global_scale)):
            if own is not None and given is not None:
                own.copy_(given)

    def dequantize(self) -> Tensor:
        """float32: every value in the middle of its cell."""
        fmt = self.format
        codes = from_words(self.words.view(torch.int16), fmt.element.bits, self.columns, offset=fmt.element.is_integer)
        scales = Scales(fmt.scale.from_bytes(self.scales), self.global_scale, self.zeros, type=fmt.scale)
        return QTensor(fmt, codes, scales).dequantize()

    def extra_repr(self) -> str:
        """Shape and format, for `print(model)`."""
        return f"{self.words.shape[0]} x {self.columns}, {self.format.name}"
