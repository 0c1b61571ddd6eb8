"""The independent reader: the file's own bytes, dequantized by the `gguf` package (the arithmetic of llama.cpp's
authors), in transformers' names and order of rows. It shares nothing with the writer but the record."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from qat.checkpoints.gguf import array_end, read_metadata
from qat.errors import CheckpointError, UnsupportedError

RECORD_KEY = "qat.record"
_HEADS = {"attn_q": "head_count", "attn_k": "head_count_kv"}
_ROTATES_NEIGHBOURS = ("llama",)
# Bytes of the blocks that have an FP16 scale, and where in them it is.
_HALVES = {
    GGMLQuantizationType.Q4_0: (18, 0),
    GGMLQuantizationType.Q5_0: (22, 0),
    GGMLQuantizationType.Q8_0: (34, 0),
    GGMLQuantizationType.Q4_K: (144, 0),
    GGMLQuantizationType.Q5_K: (176, 0),
    GGMLQuantizationType.Q6_K: (210, 208),
}
_ADDS_ONE_TO_NORMS = ("gemma2", "gemma3")


def above_of(name: str) -> str:
    """What llama.cpp calls the numbers that multiply whole matrices of a tensor, one for each."""
    return name.removesuffix(".weight") + ".scale"


class _Reader(GGUFReader):
    """`gguf`'s, but for arrays, which it keeps item by item: the tokens of a vocabulary take it seconds."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        kind = GGUFValueType(raw_type)
        if kind is not GGUFValueType.ARRAY:
            parts: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return parts
        return array_end(self.data.data, orig_offs) - orig_offs, [], [], [kind]


def check_file(path: Path) -> dict[str, Any]:
    """Settings of a GGUF file, whose header is whole.

    Raises:
        CheckpointError: it is no GGUF file, or cut short; names it.
        UnsupportedError: of another version.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    with path.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file (its first bytes are not 'GGUF')")
    return read_metadata(path)


class GgufFile:
    """A GGUF file whose tensors are all there.

    Raises:
        CheckpointError: it is no GGUF file, or cut short; names it.
        UnsupportedError: of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts = check_file(path)
        try:
            self.reader = _Reader(path)
        except Exception as error:  # numpy's, wherever the bytes end
            raise CheckpointError(f"{path} is truncated or damaged: {type(error).__name__}: {error}") from error
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in self.reader.tensors}

    @property
    def arch(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.facts.get("general.architecture"))

    @cached_property
    def record(self) -> dict[str, Any] | None:
        """What our export says of it, None of other files."""
        text = self.facts.get(RECORD_KEY)
        try:
            record = json.loads(text) if text is not None else None
        except ValueError as error:
            raise CheckpointError(f"{self.path}: its {RECORD_KEY} is no JSON") from error
        if record is not None and not isinstance(record, dict):
            raise CheckpointError(f"{self.path}: its {RECORD_KEY} is no table")
        return record

    def stored(self, name: str) -> ReaderTensor:
        """One tensor as it lies in the file."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name}") from None

    def value(self, name: str) -> Tensor:
        """float32 numbers of a tensor, rows in transformers' order."""
        tensor = self.stored(name)
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UnsupportedError(f"{self.path}: {name} is {tensor.tensor_type.name}, which is not read") from error
        found = torch.from_numpy(np.array(values, dtype=np.float32)).reshape([int(n) for n in tensor.shape[::-1]])
        if (above := above_of(name)) in self.tensors:
            found *= torch.from_numpy(np.array(self.tensors[above].data)).view(-1, *[1] * (found.dim() - 1))
        role = name.split(".")[-2]
        if self.arch in _ROTATES_NEIGHBOURS and role in _HEADS:
            heads = int(self.facts[f"{self.arch}.attention.{_HEADS[role]}"])
            pairs = found.unflatten(0, (heads, -1, 2))
            found = torch.cat([pairs[:, :, 0], pairs[:, :, 1]], dim=1).flatten(0, 1)
        return found - 1 if self.arch in _ADDS_ONE_TO_NORMS and role.endswith("_norm") else found

    def bad_scales(self, name: str) -> int:
        """How many scales of a tensor are zero or not finite; those of Q4_0 and Q5_0 may be negative."""
        tensor = self.stored(name)
        kind = tensor.tensor_type
        if kind in _HALVES:
            size, at = _HALVES[kind]
            scales = np.ascontiguousarray(tensor.data.reshape(-1, size)[:, at : at + 2]).view(np.float16)
            return int((~np.isfinite(scales) | (scales == 0)).sum())
        if kind is GGMLQuantizationType.MXFP4:
            return int((tensor.data.reshape(-1, 17)[:, 0] == 255).sum())
        if kind is GGMLQuantizationType.NVFP4:  # llama.cpp takes its NaN for zero, and no sign into account
            scales = tensor.data.reshape(-1, 36)[:, :4]
            above = self.tensors.get(above_of(name))
            bad = 0 if above is None else int((~np.isfinite(above.data) | (above.data <= 0)).sum())
            return bad + int(((scales == 0) | (scales > 0x7E)).sum())
        return 0
