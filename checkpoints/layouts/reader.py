"""An independent reader of exported checkpoints: files in, dense BF16 weights out, by numpy bit operations.

It is written from the layouts' descriptions and shares no arithmetic with the packers, the catalogue or the trained
model, so that agreement between them means something. It also reads checkpoints that other tools wrote. Here is what
all layouts share; the rest is in each one's `read.py`.
"""

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qat.checkpoints.hf import read_json
from qat.checkpoints.layouts.bits import Array, bad_scales, bf16_bits, fields, minifloat_values, raw_rows
from qat.checkpoints.layouts.caches import ReadsCaches, refuse_unread
from qat.checkpoints.names import StoredNames
from qat.checkpoints.record import RECORD, read_record
from qat.checkpoints.shards import ShardReader
from qat.errors import CheckpointError, UnsupportedError
from qat.families import find_family, fused_sets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SCALE = re.compile(r"(weight|input)_(global_)?scale\w*|[kv]_scale")  # names of scales, in any layout
_CHUNK = 1 << 22  # weights unpacked at a time
_PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized")
_READABLE = {"BF16": ("BF16", "F16", "F32")}  # other tools store some BF16 scales so, which is read exactly

# What changes results and is not implemented, in any layout: keys of a configuration, and the last parts of names.
UNREAD_KEYS = {"transform_config": "rotations of weights and inputs"}
_UNREAD_TENSORS = {
    "pre_quant_scale": "inputs scaled per channel (AWQ, SmoothQuant)",
    "q_scale": "quantized attention",
}

NPU_RULE, HALF_RULE = "ascend", "ascend_310p"
Spec = tuple[str, tuple[int, ...]]  # safetensors type and shape


@dataclass(frozen=True)
class PackedModule:
    """One quantized layer in the words of compressed-tensors, whatever the layout: QuantizationArgs of weight and
    input, and the format string. `joint` stands between its path and the names of its tensors; `rotation` is the size
    of the block Hadamard that its input meets before it is quantized, 0 without."""

    path: str
    format: str
    weights: dict[str, Any]
    input: dict[str, Any] | None
    joint: str = "."
    rotation: int = 0

    @property
    def bits(self) -> int:
        """Width of a code."""
        return int(self.weights["num_bits"])

    @property
    def packed(self) -> bool:
        """Whether codes share bytes or words."""
        return self.format in _PACKED

    @property
    def static_input(self) -> str | None:
        """Name of the tensor that holds the calibrated part of the input's quantization, if it has one."""
        if self.input is None or self.input.get("dynamic") is True:
            return None
        return "input_global_scale" if self.input["strategy"] == "tensor_group" else "input_scale"


@dataclass(frozen=True)
class PlainLoading:
    """How plain transformers, without anything of ours, loads a checkpoint.

    Attributes:
        obstacle: why it does not, or "".
        options: what `from_pretrained` needs besides the folder.
        quantizes_inputs: whether it quantizes inputs as the checkpoint asks.
        remark: what is special, for the report.
        transforms: a TransformConfig of compressed-tensors, whose library has to apply it to the loaded model.
        state: where transformers cannot read the files itself, makes every tensor of the dense model for it.
    """

    obstacle: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    quantizes_inputs: bool = True
    remark: str = ""
    transforms: Mapping[str, Any] = field(default_factory=dict)
    state: Callable[[], dict[str, Tensor]] | None = None


class ExportedFolder(ReadsCaches, ABC):
    """An exported checkpoint on disk, whatever its layout; open one with `qat.checkpoints.layouts.open_export`.

    Raises:
        CheckpointError: no config.json, no quantization_config of this method, or no safetensors.
        UnsupportedError: something that changes results and is not implemented; names it.
    """

    METHOD: ClassVar[str]  # quant_method, which is also the name of the export target
    SCALE: ClassVar[str] = "weight_scale"  # the tensor that marks a layer as quantized
    SCALES: ClassVar[tuple[str, ...]]  # every scale a quantized layer may have; but for SCALE, one number each
    SUFFIXES: ClassVar[tuple[str, ...]]  # every tensor a quantized layer may have, besides its bias
    UNREAD: ClassVar[Mapping[str, str]] = UNREAD_KEYS  # keys of the configuration that ask for what is not implemented
    RULE: ClassVar[str] = "vllm"  # activation rule of those who serve the layout
    JOINT: ClassVar[str] = "."  # between a layer's path and the names of its tensors
    DENSE: ClassVar[str] = ".weight"  # what follows the path in the name of its dense tensor
    TRANSPOSED: ClassVar[bool] = False  # whether dense tensors are stored (..., columns, rows)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.quantization, self.where = self._described()
        method = self.quantization.get("quant_method")
        if method != self.METHOD:
            raise CheckpointError(f"{self.where} describes {method or 'nothing'}, not {self.METHOD}")
        refuse_unread(self.quantization, self.where, self.UNREAD)
        self._check_configuration()
        self.reader = ShardReader(folder)
        for name in sorted(self.names):
            if what := _UNREAD_TENSORS.get(name.rpartition(".")[2]):
                raise UnsupportedError(f"{folder}: {name} belongs to {what}, which is not implemented")
        self._check_caches()

    # What a layout has to say.

    def _described(self) -> tuple[dict[str, Any], str]:
        """The configuration, and where it stands."""
        return self.config.get("quantization_config") or {}, f"{self.folder / 'config.json'}: quantization_config"

    @abstractmethod
    def _check_configuration(self) -> None:
        """Raise where `quantization_config` is of a kind or version that this reader does not know."""

    @abstractmethod
    def matching_groups(self, path: str, linear: bool = True) -> list[str]:
        """Names of the parts of the configuration that quantize `path`, the one loaders choose first."""

    @abstractmethod
    def ignored(self, path: str, linear: bool = True) -> bool:
        """Whether the configuration excludes `path`."""

    @abstractmethod
    def _module(self, path: str, group: str) -> PackedModule:
        """The layer `path` as `group` describes it."""

    @abstractmethod
    def expected_tensors(self, module: PackedModule, *shape: int) -> dict[str, Spec]:
        """Type and shape of every tensor that a layer of that shape must have, by its name below its path."""

    @abstractmethod
    def _scale(self, module: PackedModule, tensors: dict[str, Tensor]) -> Array:
        """float32 multiplier of each block (block rows, block columns), matrices of a stack one below the other, from
        tensors that `layer` has checked."""

    @abstractmethod
    def plain_loading(self, model: "PreTrainedModel", names: StoredNames) -> PlainLoading:
        """How plain transformers loads this checkpoint of `model`, whose tensors are called `names`."""

    def _codes_name(self, module: PackedModule) -> str:
        return "weight"

    def _zero_points(self, module: PackedModule, tensors: dict[str, Tensor], rows: int) -> Array | None:
        return None

    def _codes(self, module: PackedModule, tensors: dict[str, Tensor], rows: int) -> Array:
        """The bytes of codes, a row of them for each row of the weight."""
        return raw_rows(tensors[self._codes_name(module)].reshape(rows, -1))

    @classmethod
    def tensor_name(cls, path: str, key: str) -> str:
        """What a layer's tensor is called that is `key` below the layer's path."""
        return f"{path}{cls.JOINT}{key}"

    # What follows for every layout.

    @cached_property
    def names(self) -> frozenset[str]:
        """Every stored tensor."""
        return frozenset(self.reader.names())

    @cached_property
    def modules(self) -> dict[str, PackedModule]:
        """Quantized layers by path: those with a stored scale, described by the group that targets them."""
        mark = self.tensor_name("", self.SCALE)
        return {p: self._describe(p) for p in sorted(n.removesuffix(mark) for n in self.names if n.endswith(mark))}

    def _describe(self, path: str) -> PackedModule:
        groups = self.matching_groups(path)
        if not groups or self.ignored(path):
            raise CheckpointError(f"{path} is stored quantized, but no config group targets it, or `ignore` names it")
        return self._module(path, groups[0])

    def check_tied(self, head: str, table: str) -> None:
        """An output layer that multiplies with the stored tensors of a packed table: the configuration speaks of it as
        of the table, or not at all.

        Raises:
            UnsupportedError: it quantizes the layer otherwise, or what the layer reads.
        """
        if self.ignored(head) or not self.matching_groups(head):
            return
        other, own = self._describe(head), self.modules[table]
        if (other.format, other.weights, other.input, other.rotation) != (own.format, own.weights, None, 0):
            raise UnsupportedError(
                f"{head} is tied to {table}, which is stored packed, but is quantized in another way; readable: the "
                "same weights, and inputs as they come"
            )

    @cached_property
    def rule(self) -> str:
        """Whose arithmetic inputs follow (`qat.training.activations`): an NPU's where that was trained."""
        rules = (read_record(self.folder) or {}).get("activation_rules")
        return NPU_RULE if rules == [NPU_RULE] else self.RULE

    @cached_property
    def weights(self) -> dict[str, str]:
        """Paths of the quantized layers by the name of their dense tensor."""
        return {path + self.DENSE: path for path in self.modules}

    @cached_property
    def quantized_names(self) -> frozenset[str]:
        """Stored tensors that belong to quantized weights, inputs and caches."""
        of_modules = frozenset(self.tensor_name(path, key) for path in self.modules for key in self.SUFFIXES)
        return (of_modules | self.cache_names) & self.names

    @cached_property
    def dense_names(self) -> frozenset[str]:
        """Names of the tensors of the dense model: one in place of what is stored of each quantized layer."""
        return (self.names - self.quantized_names) | self.weights.keys()

    @cached_property
    def fused(self) -> list[list[str]]:
        """Sets of layers that share one value where engines keep one: those that were trained so, as the record says;
        without a record those of the model's family."""
        recorded = (read_record(self.folder) or {}).get("fused")
        if recorded is None:
            paths = sorted(n.removesuffix(".weight") for n in self.dense_names if n.endswith(".weight"))
            return fused_sets(paths, find_family(self.config.get("model_type")).fused)
        if not all(isinstance(group, list) and all(isinstance(path, str) for path in group) for group in recorded):
            raise CheckpointError(f"{self.folder / RECORD}: `fused` must be lists of layers")
        return [list(group) for group in recorded]

    def oriented(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """From the shape of a dense tensor to that of the weight as it multiplies."""
        return (*shape[:-2], shape[-1], shape[-2]) if self.TRANSPOSED else shape

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a quantized weight as it multiplies, from that of its codes: (rows, columns)."""
        module = self.modules[path]
        name = self.tensor_name(path, self._codes_name(module))
        shape = self.reader.info(name).shape
        if len(shape) != 2:
            raise CheckpointError(f"{name} is {[*shape]}, not a matrix")
        return shape[0], shape[1] * 8 // module.bits if module.packed else shape[1]

    def layer(self, path: str) -> dict[str, Tensor]:
        """Stored tensors of a quantized layer by their name below its path.

        Raises:
            CheckpointError: one is missing, has another type or shape than the configuration asks for, or is a scale
                that is zero, negative or not finite; names it.
        """
        tensors = {}
        for key, (code, shape) in self.expected_tensors(self.modules[path], *self.shape(path)).items():
            name = self.tensor_name(path, key)
            if name not in self.names:
                raise CheckpointError(f"{self.folder}: {name} is missing")
            info = self.reader.info(name)
            if info.code not in _READABLE.get(code, (code,)) or info.shape != shape:
                raise CheckpointError(f"{self.folder}: {name} is {info.code}{[*info.shape]}, not {code}{[*shape]}")
            tensors[key] = self._sound(name) if key in self.SCALES else self.reader.get(name)
        return tensors

    def _sound(self, name: str) -> Tensor:
        """A stored scale, if it can be one."""
        scale = self.reader.get(name)
        if count := bad_scales(scale):
            raise CheckpointError(f"{self.folder}: {name} is zero, negative or not finite in {count} places")
        return scale

    def _sound_value(self, name: str) -> Tensor:
        """A stored scale that is one number, float32 [1]."""
        scale = self._sound(name)
        if scale.numel() != 1:
            raise CheckpointError(f"{self.folder}: {name} is {[*scale.shape]}, not one number")
        return scale.to(torch.float32).reshape(1)

    def dense(self, path: str) -> Tensor:
        """The BF16 weight of a quantized layer as it multiplies, (..., rows, columns), as loaders dequantize it; raises
        as `layer`."""
        return torch.from_numpy(self._values(path, exact=False).view(np.int16)).view(torch.bfloat16)

    def multiplied(self, path: str, rule: str = "") -> Tensor:
        """The weight that an engine multiplies with by an activation rule (`self.rule` without one): `dense`, or codes
        times scales in float32, where an NPU multiplies integers and scales their sums."""
        module = self.modules[path]
        integers = module.input is not None and module.weights["type"] == module.input["type"] == "int"
        exact = integers and (rule or self.rule) in (NPU_RULE, HALF_RULE)
        return torch.from_numpy(self._values(path, exact)) if exact else self.dense(path)

    def _values(self, path: str, exact: bool) -> Array:
        """Codes times scales, float32 or the bits of BF16 (uint16)."""
        module, tensors, shape = self.modules[path], self.layer(path), self.shape(path)
        rows, columns = math.prod(shape[:-1]), shape[-1]
        scale, zero = self._scale(module, tensors), self._zero_points(module, tensors, rows)
        codes = self._codes(module, tensors, rows)
        table = code_values(module)
        out = np.empty((rows, columns), dtype=np.float32 if exact else np.uint16)
        step = max(1, _CHUNK // max(columns, 1))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            chunk = fields(codes[part], module.bits, columns) if module.packed else codes[part]
            per_weight = _expander(module.weights, part, columns)
            value = table[chunk]
            if zero is not None:
                value = value - per_weight(zero)
            value = value * per_weight(scale)
            out[part] = value if exact else bf16_bits(value)
        return out.reshape(shape)

    @property
    def dense_type(self) -> str:
        """The safetensors type of what is not quantized."""
        return "BF16"

    def static_input(self, path: str) -> Tensor | None:
        """The calibrated scale (or, above E4M3 block scales, the divisor) of a layer's input, float32 [1], or None."""
        name = self.modules[path].static_input
        return None if name is None else self._sound_value(self.tensor_name(path, name))

    def dense_tensors(self, rule: str = "") -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the dense model, quantized layers as `multiplied`, one at a time; raises as `layer`, and if a
        scale belongs to no quantized layer."""
        stray = sorted(n for n in self.names - self.quantized_names if _SCALE.fullmatch(n.rpartition(".")[2]))
        if stray:
            raise CheckpointError(
                f"{self.folder}: {stray[0]} belongs to no {self.METHOD} layer; was it made for another target?"
            )
        for name, path in self.weights.items():
            weight = self.multiplied(path, rule)
            yield name, weight.transpose(-1, -2).contiguous() if self.TRANSPOSED else weight
        for name in sorted(self.names - self.quantized_names):
            yield name, self.reader.get(name)

    def theoretical_bits(self, module: PackedModule, *shape: int) -> float:
        """Bits per weight that the configuration promises: code, and share of scale and zero point."""
        code, grid = self.expected_tensors(module, *shape)[self.SCALE]
        per_scale = {"F32": 32, "BF16": 16}.get(code, 8) + (0 if module.weights["symmetric"] else module.bits)
        return module.bits + math.prod(grid) * per_scale / math.prod(shape)


def code_values(module: PackedModule) -> Array:
    """float32 value of every code: offset binary where packed, two's complement where not, or a small float."""
    count = 1 << (module.bits if module.packed else 8)
    if module.weights["type"] == "int":
        codes = np.arange(count, dtype=np.float32)
        return codes - count // 2 if module.packed else np.where(codes < count // 2, codes, codes - count)
    exponent, mantissa = {4: (2, 1), 6: (2, 3), 8: (4, 3)}[module.bits]
    return minifloat_values(exponent, mantissa)


def _expander(args: dict[str, Any], part: slice, columns: int) -> Callable[[Array], Array]:
    """A function from values per block to values that broadcast over the rows `part`."""
    if args["strategy"] == "tensor":
        return lambda values: values.reshape(1, 1)
    if args["strategy"] == "block":
        block_rows, block_columns = args["block_structure"]
        rows = np.arange(part.start, part.stop) // block_rows
        return lambda values: values[rows][:, np.arange(columns) // block_columns]
    group = args.get("group_size") or 0
    return lambda values: np.repeat(values[part], group, axis=1) if group > 0 else values[part]


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes; in float tensors -0 counts as +0, which no product can tell apart."""
    whole = hashlib.sha256()
    add_to_digest(whole, tensor)
    return whole.hexdigest()


def add_to_digest(whole: "hashlib._Hash", tensor: Tensor) -> None:
    """The bytes of a further part of a tensor; see `digest`."""
    plain = tensor.detach().to("cpu").contiguous().reshape(-1)
    for part in plain.split(_CHUNK) if plain.numel() else ():
        part = part + 0.0 if part.dtype.itemsize > 1 and part.is_floating_point() else part
        whole.update(part.view(torch.uint8).numpy().data)
