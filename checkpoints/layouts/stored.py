"""Taking a layer's stored tensors apart: what the targets that keep scales in float32 share for `unpack`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qat.errors import CheckpointError
from qat.numbers.format import Format
from qat.numbers.scale import broken


def take(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> Tensor:
    """The tensor called `name`, of that type and one of the shapes.

    Raises:
        CheckpointError: it is missing, or has another type or shape; names it.
    """
    if name not in tensors:
        raise CheckpointError(f"{name} is missing")
    tensor = tensors[name]
    if tensor.dtype != dtype or tuple(tensor.shape) not in shapes:
        wanted = " or ".join(str([*shape]) for shape in shapes)
        raise CheckpointError(f"{name} is {tensor.dtype} {[*tensor.shape]}, not {dtype} {wanted}")
    return tensor


def take_scale(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> Tensor:
    """`take` for scales, which must be finite and positive."""
    scale = take(tensors, name, dtype, *shapes)
    if broken(scale):
        raise CheckpointError(f"{name} must be finite and positive everywhere, but is not")
    return scale


def narrowed(scale: Tensor, name: str, fmt: Format) -> Tensor:
    """A float32 scale in the type that `fmt` stores.

    Raises:
        CheckpointError: that would round it, as with scales that other tools trained in float32; names it.
    """
    narrow = scale.to(fmt.scale.storage)
    if not torch.equal(narrow.to(scale.dtype), scale):
        raise CheckpointError(f"{name} holds scales that {fmt.name} cannot: they are not exact in {fmt.scale}")
    return narrow
