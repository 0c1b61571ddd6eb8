"""Bytes that several layouts share: streams of codes, and taking a layer's stored tensors apart again."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from qat.checkpoints.layouts.reader import PackedModule
from qat.errors import CheckpointError
from qat.numbers.format import Format
from qat.numbers.scale import broken

_CHUNK = 1 << 22  # codes turned into bits at a time: 32 MiB of scratch


def shape(module: PackedModule, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of a layer whose codes are the tensor called `weight`.

    Raises:
        CheckpointError: it is missing, or no matrix; names it.
    """
    weight = tensors.get("weight")
    if weight is None or weight.ndim != 2:
        raise CheckpointError(f"{module.path}.weight is missing, or no matrix")
    rows, width = weight.shape
    return rows, width * 8 // module.bits if module.packed else width


def take(
    module: PackedModule, tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, *shapes: tuple[int, ...]
) -> Tensor:
    """The layer's tensor called `name`, of that type and one of the shapes.

    Raises:
        CheckpointError: it is missing, or has another type or shape; names it.
    """
    if name not in tensors:
        raise CheckpointError(f"{module.path}{module.joint}{name} is missing")
    tensor = tensors[name]
    if tensor.dtype != dtype or tuple(tensor.shape) not in shapes:
        given, wanted = f"{tensor.dtype} {[*tensor.shape]}", " or ".join(str([*shape]) for shape in shapes)
        raise CheckpointError(f"{module.path}{module.joint}{name} is {given}, not {dtype} {wanted}")
    return tensor


def take_scale(
    module: PackedModule, tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, *shapes: tuple[int, ...]
) -> Tensor:
    """`take` for scales, which must be finite and positive."""
    scale = take(module, tensors, name, dtype, *shapes)
    if broken(scale):
        raise CheckpointError(f"{module.path}{module.joint}{name} must be finite and positive everywhere, but is not")
    return scale


def take_narrow(
    module: PackedModule, tensors: Mapping[str, Tensor], name: str, fmt: Format, *shapes: tuple[int, ...]
) -> Tensor:
    """`take_scale` for scales in float32, in the type that `fmt` stores.

    Raises:
        CheckpointError: besides, where that would round them, as with scales that other tools trained in float32.
    """
    scale = take_scale(module, tensors, name, torch.float32, *shapes)
    narrow = scale.to(fmt.scale.storage)
    if not torch.equal(narrow.to(scale.dtype), scale):
        path = f"{module.path}{module.joint}{name}"
        raise CheckpointError(f"{path} holds scales that {fmt.name} cannot: they are not exact in {fmt.scale}")
    return narrow


def bit_stream(codes: Tensor, bits: int, multiple: int = 1) -> Tensor:
    """Each row of uint8 `codes` (rows, columns) as consecutive `bits`-wide fields, least significant bit first.

    Returns:
        uint8 (rows, bytes), zero-padded to a multiple of `multiple` bytes.
    """
    rows, columns = codes.shape
    width = -(-columns * bits // 8)
    out = np.zeros((rows, -(-width // multiple) * multiple), dtype=np.uint8)
    step = max(1, _CHUNK // max(columns, 1))
    for start in range(0, rows, step):
        chunk = codes[start : start + step].contiguous().numpy()
        fields = np.unpackbits(chunk[..., None], axis=-1, count=bits, bitorder="little")
        out[start : start + step, :width] = np.packbits(fields.reshape(len(chunk), -1), axis=-1, bitorder="little")
    return torch.from_numpy(out)
