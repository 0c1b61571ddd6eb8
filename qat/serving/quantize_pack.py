"""From a weight and its scales straight to words, without codes in between: the operator `qat::quantize_pack`.

Its values are those of training (`qat.training.ops.fake_quantize`), its words those of `qat.serving.packed.pack`.
"""

import torch
from torch import Tensor

from qat.errors import UnsupportedError
from qat.numbers.catalog import lookup
from qat.numbers.numerics import Scales, quantize
from qat.serving.packed import problem
from qat.serving.words import PART, tile, to_words


def quantize_pack_reference(weight: Tensor, divisor: Tensor, zero_point: Tensor | None, format: str) -> Tensor:
    """What `qat::quantize_pack` means: the codes of weight (rows, columns) under these scales, as `PackedWeight.words`
    are. A value that is NaN gets the code of zero; it is `qat.serving.packed.pack` that refuses broken scales."""
    fmt = lookup(format)
    reason = problem(fmt)
    if reason is not None:
        raise UnsupportedError(f"{fmt.name} weights cannot be packed: {reason}")
    codes = quantize(weight, fmt, Scales(divisor, None, zero_point, None, divisor)).codes
    return to_words(codes, fmt.element.bits, offset=fmt.element.is_integer)


_quantize_pack = torch.library.custom_op("qat::quantize_pack", quantize_pack_reference, mutates_args=())


@_quantize_pack.register_fake
def _(weight: Tensor, divisor: Tensor, zero_point: Tensor | None, format: str) -> Tensor:
    tiles = -(-weight.shape[1] // tile(lookup(format).element.bits))
    return weight.new_empty(weight.shape[0], tiles * PART, dtype=torch.int16)


def quantize_pack(weight: Tensor, format: str, scales: Scales) -> Tensor:
    """Codes of weight (rows, columns) as int16 words (rows, words of whole tiles), see `qat.serving.words.to_words`.

    Args:
        weight: any float dtype.
        format: catalogue name.
        scales: stored scales, of which the divisor, where there is one, rounds.

    Raises:
        UnsupportedError: a format that cannot be packed.
    """
    divisor = scales.effective() if scales.divisor is None else scales.divisor
    if divisor.shape != scales.stored.shape:  # finer than the blocks: only the reference divides so
        return quantize_pack_reference(weight, divisor, scales.zero_point, format)
    words: Tensor = torch.ops.qat.quantize_pack(weight, divisor, scales.zero_point, format)
    return words
