"""The type in which a checkpoint stores what is not quantized, BF16 or FP16 (`qat.float32.stored_dtype`): what becomes
of the source's numbers in it, and which do not fit."""

import math
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from qat.checkpoints.shards import ShardReader
from qat.errors import CheckpointError

_NAMES = {"F32": "float32", "F16": "FP16", "BF16": "BF16", "F64": "float64"}
_CODES = {torch.bfloat16: "BF16", torch.float16: "F16"}


def narrowed(names: Collection[str], source: Path, dtype: torch.dtype) -> list[str]:
    """Which of the source's tensors are stored in another type, one sentence for each type."""
    sizes: dict[str, list[int]] = {}
    own = _NAMES[_CODES[dtype]]
    with ShardReader(source) as reader:
        for name in set(reader.names()) & set(names):
            kind = _NAMES.get(reader.info(name).code, own)
            if kind != own:
                sizes.setdefault(kind, []).append(math.prod(reader.info(name).shape))
    return [
        f"{len(each)} tensors ({sum(each)} numbers) that are not quantized are {kind} in the source and become "
        f"{own}, as {own} servers hold them"
        for kind, each in sorted(sizes.items())
    ]


def check_source(names: Collection[str], source: Path, dtype: torch.dtype) -> None:
    """`check_held` of tensors in files, which are read for it where the type has a smaller range than theirs."""
    if torch.finfo(dtype).max >= torch.finfo(torch.bfloat16).max:
        return
    with ShardReader(source) as reader:
        for name in sorted(set(reader.names()) & set(names)):
            check_held(name, reader.get(name), dtype)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError where what is about to be written holds NaN or infinity: the ends of its range tell, in one
    pass without a copy."""
    if tensor.is_floating_point() and tensor.numel() and not bool(torch.stack(tensor.aminmax()).isfinite().all()):
        raise CheckpointError(f"{name} holds NaN or infinity; nothing was written")


def check_held(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise CheckpointError where finite numbers become infinite in that type."""
    if not (tensor.is_floating_point() and tensor.numel()):
        return
    largest = torch.stack(tensor.detach().aminmax()).abs().max()
    if bool(largest.isfinite() & ~largest.to(dtype).isfinite()):
        raise CheckpointError(
            f"{name} holds {float(largest):.6g}, but the largest number of {_NAMES[_CODES[dtype]]}, which this "
            f"checkpoint is for, is {torch.finfo(dtype).max:.0f}; the model cannot be served in that type"
        )
