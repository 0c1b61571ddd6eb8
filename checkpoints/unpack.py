"""An independent reader of compressed-tensors checkpoints: files in, dense BF16 weights out, by numpy bit operations.

It is written from the layout's description and shares no arithmetic with the packer, the catalogue or the trained
model, so that agreement between them means something. It also reads checkpoints that other tools wrote.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qat.checkpoints.hf import read_json
from qat.checkpoints.shards import ShardReader
from qat.errors import CheckpointError, UnsupportedError

_CHUNK = 1 << 22  # weights unpacked at a time
_PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized")
_PLAIN = ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
_OF_WEIGHTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")
_SUFFIXES = (*_OF_WEIGHTS, "input_scale", "input_global_scale", "input_zero_point")

Array = NDArray[Any]
Spec = tuple[str, tuple[int, ...]]  # safetensors type and shape


@dataclass(frozen=True)
class PackedModule:
    """One quantized layer as the configuration describes it: QuantizationArgs of weight and input, and the format."""

    path: str
    format: str
    weights: dict[str, Any]
    input: dict[str, Any] | None

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


def expected_tensors(module: PackedModule, rows: int, columns: int) -> dict[str, Spec]:
    """Type and shape of every tensor that a layer (rows, columns) must have, by its name below the layer's path."""
    bits, args = module.bits, module.weights
    specs: dict[str, Spec] = {"weight_scale": (_scale_type(module), _scale_shape(args, rows, columns))}
    if module.format == "pack-quantized":
        specs["weight_packed"] = ("I32", (rows, -(-columns * bits // 32)))
        specs["weight_shape"] = ("I64", (2,))
    elif module.packed:
        specs["weight_packed"] = ("U8", (rows, columns * bits // 8))
    else:
        specs["weight"] = ("I8" if args["type"] == "int" else "F8_E4M3", (rows, columns))
    if not args["symmetric"]:
        blocks = specs["weight_scale"][1]
        packed = ("I32", (-(-rows * bits // 32), *blocks[1:]))
        specs["weight_zero_point"] = packed if module.format == "pack-quantized" else ("I8", blocks)
    if args["strategy"] == "tensor_group":
        specs["weight_global_scale"] = ("F32", (1,))
    if module.static_input:
        specs[module.static_input] = ("F32" if module.static_input == "input_global_scale" else "BF16", (1,))
    return specs


def _scale_type(module: PackedModule) -> str:
    if module.weights["strategy"] == "tensor_group":
        return "F8_E4M3"
    return "U8" if module.format.startswith("mxfp") else "BF16"


def _scale_shape(args: dict[str, Any], rows: int, columns: int) -> tuple[int, ...]:
    if args["strategy"] == "tensor":
        return (1,)
    if args["strategy"] == "block":
        block_rows, block_columns = args["block_structure"]
        return -(-rows // block_rows), -(-columns // block_columns)
    group = args.get("group_size") or 0
    return (rows, columns // group if group > 0 else 1)


def theoretical_bits(module: PackedModule, rows: int, columns: int) -> float:
    """Bits per weight that the configuration promises: code, and share of scale and zero point."""
    scales = 1
    for size in _scale_shape(module.weights, rows, columns):
        scales *= size
    per_scale = (16 if _scale_type(module) == "BF16" else 8) + (0 if module.weights["symmetric"] else module.bits)
    return module.bits + scales * per_scale / (rows * columns)


class ExportedFolder:
    """A compressed-tensors checkpoint on disk.

    Raises:
        CheckpointError: no config.json, no quantization_config of this method, or no safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.quantization: dict[str, Any] = self.config.get("quantization_config") or {}
        method = self.quantization.get("quant_method")
        where = f"{folder / 'config.json'}: quantization_config"
        if method != "compressed-tensors":
            raise CheckpointError(f"{where} describes {method or 'nothing'}, not compressed-tensors")
        if self.quantization.get("quantization_status") != "compressed":
            raise CheckpointError(f"{where} must say quantization_status: compressed; loaders read garbage otherwise")
        self.reader = ShardReader(folder)

    @cached_property
    def names(self) -> frozenset[str]:
        """Every stored tensor."""
        return frozenset(self.reader.names())

    @cached_property
    def modules(self) -> dict[str, PackedModule]:
        """Quantized layers by path: those with a stored scale, described by the group that targets them."""
        paths = sorted(name.removesuffix(".weight_scale") for name in self.names if name.endswith(".weight_scale"))
        return {path: self._describe(path) for path in paths}

    def matching_groups(self, path: str, linear: bool = True) -> list[str]:
        """Names of the config groups that target `path`, the one loaders choose first: exact names, then regular
        expressions, then the class name (for linear layers)."""
        ranked = []
        for group, scheme in self.quantization["config_groups"].items():
            hits = [rank for target in scheme["targets"] if (rank := _rank(path, target, linear)) is not None]
            if hits:
                ranked.append((min(hits), group))
        return [group for _, group in sorted(ranked)]

    def ignored(self, path: str, linear: bool = True) -> bool:
        """Whether the configuration excludes `path`."""
        return any(_rank(path, target, linear) is not None for target in self.quantization.get("ignore") or [])

    def _describe(self, path: str) -> PackedModule:
        groups = self.matching_groups(path)
        if not groups or self.ignored(path):
            raise CheckpointError(f"{path} is stored quantized, but no config group targets it, or `ignore` names it")
        scheme = self.quantization["config_groups"][groups[0]]
        form = scheme.get("format") or self.quantization["format"]
        if form not in _PACKED + _PLAIN:
            raise UnsupportedError(f"{path} has format {form!r}; readable: {', '.join(_PACKED + _PLAIN)}")
        return PackedModule(path, form, scheme["weights"], scheme.get("input_activations"))

    def dense(self, path: str) -> Tensor:
        """The BF16 weight of a quantized layer, (rows, columns), as loaders dequantize it."""
        module = self.modules[path]
        stored = self.reader.get(f"{path}.weight_packed" if module.packed else f"{path}.weight")
        scale = _scales(self.reader.get(f"{path}.weight_scale"))
        if module.weights["strategy"] == "tensor_group":
            scale = scale / _floats(self.reader.get(f"{path}.weight_global_scale"))
        rows, columns = self._shape(module, stored)
        zero = self._zero_points(module, rows, scale.shape)
        codes, table = _raw_rows(stored), _values(module)
        out = np.empty((rows, columns), dtype=np.uint16)
        step = max(1, _CHUNK // max(columns, 1))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            fields = _fields(codes[part], module.bits, columns) if module.packed else codes[part]
            per_weight = _expander(module.weights, part, columns)
            value = table[fields]
            if zero is not None:
                value = value - per_weight(zero)
            out[part] = _bf16_bits(value * per_weight(scale))
        return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)

    def static_input(self, path: str) -> Tensor | None:
        """The calibrated scale or divisor of a layer's input, float32 [1], where it has one."""
        name = self.modules[path].static_input
        return None if name is None else self.reader.get(f"{path}.{name}").to(torch.float32)

    def dense_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the dense model, quantized layers unpacked, one at a time."""
        for path in self.modules:
            yield f"{path}.weight", self.dense(path)
        for name in sorted(self.names - self.quantized_names):
            yield name, self.reader.get(name)

    @cached_property
    def quantized_names(self) -> frozenset[str]:
        """Stored tensors that belong to quantized weights and inputs."""
        return frozenset(f"{path}.{suffix}" for path in self.modules for suffix in _SUFFIXES) & self.names

    def _shape(self, module: PackedModule, stored: Tensor) -> tuple[int, int]:
        if module.format == "pack-quantized":
            rows, columns = map(int, self.reader.get(f"{module.path}.weight_shape").tolist())
            if stored.shape != (rows, -(-columns * module.bits // 32)):
                raise CheckpointError(f"{module.path}: weight_shape {[rows, columns]} does not fit {[*stored.shape]}")
            return rows, columns
        rows, width = stored.shape
        return rows, width * 8 // module.bits if module.packed else width

    def _zero_points(self, module: PackedModule, rows: int, shape: tuple[int, ...]) -> Array | None:
        if module.weights["symmetric"]:
            return None
        stored = self.reader.get(f"{module.path}.weight_zero_point")
        if module.format != "pack-quantized":
            return stored.numpy().astype(np.float32)
        fields = _fields(_raw_rows(stored.t().contiguous()), module.bits, rows)
        return _values(module)[fields].T.reshape(shape)


def _rank(path: str, target: str, linear: bool) -> tuple[int, str] | None:
    if target.startswith("re:"):
        return (1, target) if re.match(target[3:], path) else None
    if target == path:
        return (0, target)
    return (2, target) if target == "Linear" and linear else None


# --- bits -----------------------------------------------------------------------------------------


def _raw_rows(tensor: Tensor) -> Array:
    """The bytes of a 2-D tensor, (rows, bytes per row)."""
    flat = tensor.contiguous().view(torch.uint8).numpy()
    return flat.reshape(tensor.shape[0], -1)


def _fields(rows: Array, bits: int, count: int) -> Array:
    """The first `count` fields of `bits` bits of each row of bytes, least significant bit first."""
    first = np.arange(count) * bits
    padded = np.pad(rows, ((0, 0), (0, 1))).astype(np.uint16)
    pair = padded[:, first // 8] | padded[:, first // 8 + 1] << 8
    result: Array = (pair >> (first % 8).astype(np.uint16)) & (2**bits - 1)
    return result


def _values(module: PackedModule) -> Array:
    """float32 value of every code: offset binary where packed, two's complement where not, or a small float."""
    count = 1 << (module.bits if module.packed else 8)
    if module.weights["type"] == "int":
        codes = np.arange(count, dtype=np.float32)
        return codes - count // 2 if module.packed else np.where(codes < count // 2, codes, codes - count)
    exponent, mantissa = {4: (2, 1), 6: (2, 3), 8: (4, 3)}[module.bits]
    return _minifloat_values(exponent, mantissa)


def _minifloat_values(exponent: int, mantissa: int) -> Array:
    codes = np.arange(1 << (1 + exponent + mantissa))
    field, fraction = (codes >> mantissa) & ((1 << exponent) - 1), codes & ((1 << mantissa) - 1)
    lowest = 2 - (1 << (exponent - 1)) - mantissa  # exponent of one unit of a subnormal's fraction
    whole = np.where(field == 0, fraction, fraction + (1 << mantissa))
    value = np.ldexp(whole.astype(np.float32), lowest + np.maximum(field, 1) - 1)
    value = np.where(codes >> (exponent + mantissa), -value, value)
    if exponent == 4:  # E4M3: all ones is not a number
        value[(codes & (codes.size // 2 - 1)) == codes.size // 2 - 1] = np.nan
    return value.astype(np.float32)


def _floats(tensor: Tensor) -> Array:
    """float32 values of a stored float tensor, from its bits."""
    if tensor.dtype == torch.float32:
        return tensor.numpy()
    if tensor.dtype == torch.bfloat16:
        return (tensor.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if tensor.dtype == torch.float8_e4m3fn:
        return _minifloat_values(4, 3)[tensor.view(torch.uint8).numpy()]
    raise UnsupportedError(f"scales of type {tensor.dtype} are not part of the layout")


def _scales(tensor: Tensor) -> Array:
    if tensor.dtype != torch.uint8:
        return _floats(tensor)
    exponent = tensor.numpy().astype(np.uint32)
    bits = np.where(exponent == 0, 1 << 22, exponent << 23).astype(np.uint32)  # 2^-127 is subnormal
    return bits.view(np.float32)


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


def _bf16_bits(values: Array) -> Array:
    """Round float32 to BF16, half to even, as uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    result: Array = np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
    return result


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes; in float tensors -0 counts as +0, which no product can tell apart."""
    plain = tensor.detach().to("cpu")
    if plain.dtype.itemsize > 1 and plain.is_floating_point():
        plain = plain + 0.0
    return hashlib.sha256(plain.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
