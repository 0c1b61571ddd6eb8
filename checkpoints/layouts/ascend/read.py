"""The independent reader of Ascend checkpoints, ours and msmodelslim's: the description, and the tensors of each type.

Written from what vllm-ascend's scheme classes do with the tensors. A static type stores no scale of its weights: it is
deq_scale / input_scale.
"""

import math
from collections.abc import Iterator
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qat.checkpoints.hf import read_json
from qat.checkpoints.layouts.ascend import caches
from qat.checkpoints.layouts.ascend.caches import C8, KEYS, OFFSET_REFUSED
from qat.checkpoints.layouts.ascend.engines import NO_PLAIN
from qat.checkpoints.layouts.ascend.types import BY_NAME, FLOAT, LEFT_OUT, TYPES, Type, type_called
from qat.checkpoints.layouts.bits import Array, float_values, raw_rows, scale_values
from qat.checkpoints.layouts.reader import HALF_RULE, NPU_RULE, ExportedFolder, PackedModule, PlainLoading, Spec
from qat.checkpoints.names import StoredNames
from qat.errors import CheckpointError, UnsupportedError
from qat.families import expert_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DESCRIPTION = "quant_model_description.json"
_VERSION = "1.0.0"
_WEIGHT = ".weight"
_SETTINGS = frozenset(("version", "model_quant_type", "group_size", "metadata", "optional", *KEYS))
_UNREAD = {
    "fa_quant_type": "quantized attention",
    "indexer_quant_type": "a quantized indexer",
    "reduce_quant_type": "quantized sums over ranks",
}
_INPUTS: dict[str, dict[str, Any]] = {
    "tensor": {"symmetric": False, "strategy": "tensor", "dynamic": False},
    "mix": {"symmetric": False, "strategy": "tensor", "dynamic": False, "prompt": "token"},
    "token": {"symmetric": True, "strategy": "token", "dynamic": True},
    "group": {"symmetric": True, "strategy": "group", "dynamic": True},
}
_MX: dict[str, Any] = {"group_size": 32, "scale_dtype": "torch.uint8"}
_PACKED, _PLAIN = "mxfp4-pack-quantized", "mxfp8-quantized"  # as compressed-tensors calls the same bytes


_ROUNDED, _DIVIDED = 1.5, 2.0**-7  # msmodelslim divides in BF16, and rounds a bias and the offset's share together


_FLOAT, _READ = 32, 0xFFFFE000  # bits of a float32 number, and those that an operator of FP16 models reads


def _deq(tensors: dict[str, Tensor]) -> Array:
    """The numbers that a static product is multiplied with, float32 (rows,): of integers, what the hardware reads."""
    stored = tensors["deq_scale"]
    if stored.dtype != torch.int64:
        return float_values(stored)
    values: Array = (stored.numpy() & _READ).astype("uint32").view("float32")
    return values


def _folded(tensors: dict[str, Tensor]) -> Array:
    """What `quant_bias` holds of the layer's own bias, int64 (rows,)."""
    sums = tensors["weight"].numpy().astype("int64").sum(axis=1)
    folded: Array = tensors["quant_bias"].numpy().astype("int64") + int(tensors["input_offset"]) * sums
    return folded


class Reader(ExportedFolder):
    """A checkpoint with `quant_model_description.json` on disk."""

    METHOD = "ascend"
    RULE = NPU_RULE
    SCALES = ("weight_scale", "input_scale")
    SUFFIXES = ("weight", *SCALES, "weight_offset", "input_offset", "quant_bias", "deq_scale", "scale_bias")
    UNREAD = MappingProxyType(_UNREAD)
    CACHE_SCALES, CACHE_OFFSETS = caches.SCALES, caches.OFFSETS

    def _described(self) -> tuple[dict[str, Any], str]:
        where = self.folder / DESCRIPTION
        return {**read_json(where), "quant_method": self.METHOD}, str(where)

    def _check_configuration(self) -> None:
        if (version := self.quantization.get("version", _VERSION)) != _VERSION:
            raise UnsupportedError(f"{self.where}: version {version!r}, whose tensors differ; readable: {_VERSION!r}")
        for key in KEYS:
            if (said := self.quantization.get(key)) not in (None, C8):
                raise UnsupportedError(f"{self.where}: {key} is {said!r}; readable: {C8!r} (INT8, a scale per channel)")
        for name, kind in self.types.items():
            if (kind == C8) != name.endswith((*self.CACHE_SCALES, *self.CACHE_OFFSETS)):
                raise CheckpointError(f"{self.where}: {name} is {kind!r}, but {C8!r} is what scales of caches are")
            if kind not in BY_NAME and kind not in (FLOAT, C8):
                why = f" ({LEFT_OUT[kind]})" if kind in LEFT_OUT else ""
                raise UnsupportedError(f"{self.where}: {name} is {kind!r}{why}; readable: {', '.join(BY_NAME)}")
            if kind in BY_NAME:
                self._typed(kind)

    @cached_property
    def types(self) -> dict[str, str]:
        """What the description says of each tensor."""
        every = {key: value for key, value in self.quantization.items() if key not in _SETTINGS | {"quant_method"}}
        if wrong := [key for key, value in every.items() if not isinstance(value, str)]:
            raise UnsupportedError(f"{self.where}: {wrong[0]} is {every[wrong[0]]!r}, not the name of a type")
        return every

    @cached_property
    def modules(self) -> dict[str, PackedModule]:
        """Quantized layers by path: those whose weight has a type, and every one of their tensors the same.

        Raises:
            CheckpointError: a tensor has no type, or another than its weight.
        """
        if unsaid := sorted(self.names - self.types.keys()):
            raise CheckpointError(f"{self.where} does not say what {unsaid[0]} is; engines stop there ({len(unsaid)})")
        typed = {name: kind for name, kind in self.types.items() if name.endswith(_WEIGHT) and kind != FLOAT}
        found = {name.removesuffix(_WEIGHT): self._typed(kind) for name, kind in typed.items() if name in self.names}
        for path, kind in found.items():
            for key in kind.tensors:
                if (other := self.types.get(f"{path}.{key}", kind.name)) != kind.name:
                    raise CheckpointError(f"{self.where}: {path}.{key} is {other}, but its weight {kind.name}")
        return {path: self._module(path, kind.name) for path, kind in sorted(found.items())}

    def _cache_args(self) -> dict[str, Any] | None:
        """vllm-ascend goes by the first key, MindIE by the second."""
        if not any(self.quantization.get(key) for key in KEYS):
            return None
        return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}

    def _cache_scale(self, name: str) -> Tensor:
        """Also of msmodelslim's files, which store it in float32 or in the model's type; engines cast it to that."""
        scale, offset = self._sound(name), self.reader.get(name.replace("kv_cache_scale", "kv_cache_offset"))
        rows = self.reader.info(name.replace("kv_cache_scale", "weight")).shape[0]
        if scale.shape != (rows,) or offset.shape != (rows,) or not scale.is_floating_point():
            raise CheckpointError(
                f"{self.folder}: {name} is {scale.dtype}{[*scale.shape]} with an offset of {[*offset.shape]}, not a "
                f"float for each of the {rows} rows of the projection"
            )
        if bool(offset.count_nonzero()):
            raise UnsupportedError(f"{self.folder}: the offset of {name} is not zero; {OFFSET_REFUSED}")
        return scale.to(torch.bfloat16).to(torch.float32)

    def type_of(self, path: str) -> Type:
        """The type of a quantized layer."""
        return self._typed(self.types[f"{path}{_WEIGHT}"])

    def _typed(self, name: str) -> Type:
        """The type that the description means by a name."""
        size = self.quantization.get("group_size", 0)
        kind = type_called(name, size)
        if kind is None:
            sizes = ", ".join(str(one.group) for one in TYPES if one.name == name)
            raise UnsupportedError(f"{self.where}: {name} with group_size {size}; readable: {sizes}")
        return kind

    def matching_groups(self, path: str, linear: bool = True) -> list[str]:
        """The type of a layer, if it has one."""
        kind = self.types.get(f"{path}{_WEIGHT}", FLOAT)
        return [kind] if linear and kind != FLOAT else []

    def ignored(self, path: str, linear: bool = True) -> bool:
        """Whether the description says that `path` stays dense."""
        return self.types.get(f"{path}{_WEIGHT}") == FLOAT

    def _module(self, path: str, group: str) -> PackedModule:
        kind = self._typed(group)
        if kind.experts_only and expert_list(path) is None:
            raise UnsupportedError(f"{self.where}: {path} is {group}, but is no expert: {kind.experts_only}")
        number = "int" if kind.element.is_integer else "float"
        weights = {"num_bits": kind.element.bits, "type": number, "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group", **_MX} if kind.is_mx else {"strategy": "channel"}
        if kind.pairs_rows and kind.group:
            weights |= {"strategy": "group", "group_size": kind.group, "symmetric": not self._shifted(path)}
        inputs = None
        if kind.input:
            inputs = {"num_bits": kind.input_element.bits, "type": number, **_INPUTS[kind.input]}
            inputs |= _MX if kind.is_mx else {}
        form = "int-quantized" if kind.element.is_integer else _PACKED if kind.packed else _PLAIN
        return PackedModule(path, form, weights, inputs)

    def _shifted(self, path: str) -> bool:
        """Whether some offset of a layer is not zero."""
        name = f"{path}.weight_offset"
        return name in self.names and bool(self.reader.get(name).count_nonzero())

    def shape(self, path: str) -> tuple[int, ...]:
        """As of every layout; but types whose bytes hold two rows have twice as many."""
        rows, columns = super().shape(path)
        return (2 * rows if self.type_of(path).pairs_rows else rows), columns

    def expected_tensors(self, module: PackedModule, *shape: int) -> dict[str, Spec]:
        """Type and shape of every tensor that a layer (rows, columns) must have, by its name below its path."""
        rows, columns = shape
        return self.type_of(module.path).specs(rows, columns, self.half, module.path)

    @property
    def half(self) -> bool:
        """Whether it is an FP16 model, as config.json says."""
        return self.config.get("dtype", self.config.get("torch_dtype")) == "float16"

    @property
    def dense_type(self) -> str:
        """As config.json says."""
        return "F16" if self.half else super().dense_type

    @cached_property
    def rule(self) -> str:
        """An NPU's, by the type of the model."""
        return HALF_RULE if self.half else NPU_RULE

    def layer(self, path: str) -> dict[str, Tensor]:
        """As of every layout; besides, offsets and biases are what engines take them for."""
        self._check_coding(f"{path}.deq_scale")
        tensors = super().layer(path)
        kind = self.type_of(path)
        if kind.pairs_rows and kind.group:
            self._check_offsets(path, tensors["weight_offset"], 2 ** (kind.element.bits - 1))
        elif "weight_offset" in tensors and bool(tensors["weight_offset"].count_nonzero()):
            raise UnsupportedError(
                f"{self.folder}: {path}.weight_offset is not zero; vllm-ascend drops it or adds it with the wrong sign"
            )
        if kind.is_static:
            self._check_static(path, tensors)
        if "scale_bias" in tensors:
            self._check_assist(path, tensors)
        return tensors

    def _check_assist(self, path: str, tensors: dict[str, Tensor]) -> None:
        module, (rows, slices) = self.modules[path], tensors["scale_bias"].shape
        codes = self._codes(module, tensors, rows).view(np.int8).astype("float64")
        each = (codes * tensors["weight_scale"].numpy()).reshape(rows, slices, -1)
        apart = abs(tensors["scale_bias"].numpy() - 8 * each.sum(axis=-1)) - _DIVIDED * 8 * abs(each).sum(axis=-1)
        if (apart > 0).any():
            raise CheckpointError(f"{self.folder}: {path}.scale_bias is not 8 times the sums of the weight's rows")

    def _check_offsets(self, path: str, offset: Tensor, half: int) -> None:
        """Offsets are codes: those whose value is 0."""
        if bool(((offset != offset.round()) | (offset < -half) | (offset >= half)).any()):
            raise CheckpointError(
                f"{self.folder}: {path}.weight_offset must hold whole numbers from {-half} to {half - 1}"
            )

    def _codes(self, module: PackedModule, tensors: dict[str, Tensor], rows: int) -> Array:
        codes = raw_rows(tensors["weight"])
        if not self.type_of(module.path).pairs_rows:
            return codes
        each = np.stack((codes & 15, codes >> 4), axis=1).reshape(-1, codes.shape[1])
        half = 1 << module.bits - 1
        signed: Array = (each ^ half).astype(np.int8) - np.int8(half)
        return signed.view(np.uint8)

    def _zero_points(self, module: PackedModule, tensors: dict[str, Tensor], rows: int) -> Array | None:
        return None if module.weights["symmetric"] else float_values(tensors["weight_offset"])

    def _check_coding(self, name: str) -> None:
        if name in self.names and (code := self.reader.info(name).code) != ("I64" if self.half else "F32"):
            wanted = "the bits of a float32 number as int64" if self.half else "float32"
            raise CheckpointError(
                f"{self.folder}: {name} is {code}, but config.json says that the model is "
                f"{'float16' if self.half else 'not float16'}, whose engines take {wanted}"
            )

    def _check_static(self, path: str, tensors: dict[str, Tensor]) -> None:
        if self.half and bool((tensors["deq_scale"] >> _FLOAT).any()):
            raise CheckpointError(
                f"{self.folder}: {path}.deq_scale has more than the {_FLOAT} bits of a float32 number in its integers"
            )
        offset, deq = float(tensors["input_offset"]), torch.from_numpy(_deq(tensors))
        bounds = torch.iinfo(torch.int8)
        if offset != round(offset) or not bounds.min <= offset <= bounds.max:
            raise CheckpointError(
                f"{self.folder}: {path}.input_offset is {offset}, not a whole number from {bounds.min} to {bounds.max}"
            )
        if not bool((torch.isfinite(deq) & (deq > 0)).all()):
            raise CheckpointError(f"{self.folder}: {path}.deq_scale must be finite and positive everywhere")
        if "weight_scale" in tensors:
            product = tensors["weight_scale"].flatten() * tensors["input_scale"]
            if ((product - deq).abs() > _DIVIDED * deq).any():
                raise CheckpointError(f"{self.folder}: {path}.deq_scale is not input_scale times weight_scale")
        apart, bias = _folded(tensors).astype("float64"), f"{path}.bias"
        if bias in self.names:
            wanted = float_values(self.reader.get(bias)) / deq.numpy()
            apart = abs(apart - wanted) - _ROUNDED - _DIVIDED * abs(wanted) > 0
        if apart.any():
            raise CheckpointError(
                f"{self.folder}: {path}.quant_bias is not -input_offset times the sum of its row, plus the layer's "
                "bias over deq_scale"
            )

    def dense_tensors(self, rule: str = "") -> Iterator[tuple[str, Tensor]]:
        """As of every layout; but biases of static layers are what their `quant_bias` makes of them."""
        for name, tensor in super().dense_tensors(rule):
            path = name.removesuffix(".bias")
            if name != path and path in self.modules and self.type_of(path).input == "tensor":
                tensors = self.layer(path)
                value = _folded(tensors).astype("float32") * _deq(tensors)
                tensor = torch.from_numpy(value)
            yield name, tensor

    def _scale(self, module: PackedModule, tensors: dict[str, Tensor]) -> Array:
        if "weight_scale" not in tensors:
            scale: Array = (_deq(tensors) / float_values(tensors["input_scale"])).reshape(-1, 1)
            return scale
        return scale_values(tensors["weight_scale"])

    def static_input(self, path: str) -> Tensor | None:
        """Scale, as the engine casts it, and offset of a static input, float32 [2], or None."""
        if not self.type_of(path).is_static:
            return None
        model = torch.float16 if self.half else torch.bfloat16
        scale = self._sound_value(f"{path}.input_scale").to(model).to(torch.float32)
        return torch.cat([scale, self.reader.get(f"{path}.input_offset").to(torch.float32)])

    def theoretical_bits(self, module: PackedModule, *shape: int) -> float:
        """Bits per weight that the type's tensors take."""
        widths = {"I8": 8, "U8": 8, "F8_E4M3": 8, "F32": 32, "I32": 32, "I64": 64}
        specs = self.expected_tensors(module, *shape).values()
        return sum(widths[code] * math.prod(of) for code, of in specs) / math.prod(shape)

    def plain_loading(self, model: "PreTrainedModel", names: StoredNames) -> PlainLoading:
        """Not at all."""
        return PlainLoading(NO_PLAIN)
