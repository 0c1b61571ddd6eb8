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
    """The codes and scales of one matrix (rows, columns), or of a stack of them (experts, rows, columns), each with a
    global scale of its own and made without the others.

    Args:
        fmt: the format of the codes.
        shape: of the matrix, or the stack.
        device: where it is.

    Raises:
        UnsupportedError: codes of this format do not fit the words.
    """

    NUMBERS = ("words", "scales", "zeros", "global_scale")

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    global_scale: Tensor | None

    def __init__(self, fmt: Format, shape: tuple[int, ...], device: torch.device | str) -> None:
        super().__init__()
        reason = problem(fmt)
        if reason is not None:
            raise UnsupportedError(f"{fmt.name} weights cannot be held packed: {reason}")
        self.format, self.shape = fmt, shape
        *stack, rows, columns = shape
        bits = fmt.element.bits
        width = -(-columns // tile(bits)) * tile(bits) * bits // 8
        grid = (*stack, *fmt.grid_shape(rows, columns))
        zeros = torch.zeros(grid, dtype=torch.int8, device=device) if fmt.zero_point else None
        above = torch.ones(stack, device=device) if fmt.global_scale else None
        scales = torch.ones(grid, device=device).to(fmt.scale.storage)
        self.register_buffer("words", torch.zeros(*stack, rows, width, dtype=torch.uint8, device=device))
        self.register_buffer("scales", fmt.scale.to_bytes(scales))
        self.register_buffer("zeros", zeros)
        self.register_buffer("global_scale", above)

    @torch.no_grad()
    def hold(self, weight: QTensor, expert: int | None = None) -> None:
        """Take over the codes and scales of the matrix, or of one of the stack.

        Raises:
            FormatError: a scale is zero, negative or not finite, or a code is NaN.
        """
        fmt, scales = self.format, weight.scales
        words, stored, zeros, above = self._of(expert)
        coded = to_words(finite_codes(weight), fmt.element.bits, offset=fmt.element.is_integer)
        given = (coded.view(torch.uint8), positive_scales(weight), scales.zero_point, scales.global_scale)
        for own, new in zip((words, stored, zeros, above), given, strict=True):
            if own is not None and new is not None:
                own.copy_(new)

    def _of(self, expert: int | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        every = (self.words, self.scales, self.zeros, self.global_scale)
        words, scales, zeros, above = every if expert is None else (None if t is None else t[expert] for t in every)
        assert words is not None and scales is not None
        return words, scales, zeros, above

    def dequantize(self, expert: int | None = None) -> Tensor:
        """float32: every value in the middle of its cell; of one expert, or of all."""
        if expert is None and len(self.shape) > 2:
            whole = torch.empty(self.shape, device=self.words.device)
            for index, matrix in enumerate(whole):
                matrix.copy_(self.dequantize(index))
            return whole
        fmt = self.format
        words, stored, zeros, above = self._of(expert)
        codes = from_words(words.view(torch.int16), fmt.element.bits, self.shape[-1], offset=fmt.element.is_integer)
        return QTensor(fmt, codes, Scales(fmt.scale.from_bytes(stored), above, zeros, type=fmt.scale)).dequantize()

    def before_rounding(self) -> list[Tensor]:
        """What a server keeps as it is, see `qat.modes.served`."""
        return list(self.buffers())

    def extra_repr(self) -> str:
        """Shape and format, for `print(model)`."""
        return f"{' x '.join(map(str, self.shape))}, {self.format.name}"
