"""The independent reader of compressed-tensors checkpoints: config groups, and the tensors of each format."""

import re
from typing import Any

import torch
from torch import Tensor

from qat.checkpoints.unpack import (
    Array,
    ExportedFolder,
    PackedModule,
    Spec,
    code_values,
    fields,
    float_values,
    raw_rows,
    scale_values,
)
from qat.errors import CheckpointError, UnsupportedError

_PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized")
_PLAIN = ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
_OF_WEIGHTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")


class CompressedTensorsFolder(ExportedFolder):
    """A compressed-tensors checkpoint on disk."""

    METHOD = "compressed-tensors"
    SUFFIXES = (*_OF_WEIGHTS, "input_scale", "input_global_scale", "input_zero_point")

    def _check_configuration(self) -> None:
        if self.quantization.get("quantization_status") != "compressed":
            raise CheckpointError(f"{self.where} must say quantization_status: compressed; else loaders read garbage")

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
        """Whether `ignore` names `path`."""
        return any(_rank(path, target, linear) is not None for target in self.quantization.get("ignore") or [])

    def _module(self, path: str, group: str) -> PackedModule:
        scheme = self.quantization["config_groups"][group]
        form = scheme.get("format") or self.quantization["format"]
        if form not in _PACKED + _PLAIN:
            raise UnsupportedError(f"{path} has format {form!r}; readable: {', '.join(_PACKED + _PLAIN)}")
        return PackedModule(path, form, scheme["weights"], scheme.get("input_activations"))

    def expected_tensors(self, module: PackedModule, rows: int, columns: int) -> dict[str, Spec]:
        """See the function."""
        return expected_tensors(module, rows, columns)

    def shape(self, path: str) -> tuple[int, int]:
        """Rows and columns of a quantized layer; integers in words say them in `weight_shape`."""
        module = self.modules[path]
        if module.format != "pack-quantized":
            return super().shape(path)
        name = f"{path}.weight_shape"
        if name not in self.names:
            raise CheckpointError(f"{self.folder}: {name} is missing")
        rows, columns = map(int, self.reader.get(name).tolist())
        return rows, columns

    def _codes_name(self, module: PackedModule) -> str:
        return "weight_packed" if module.packed else "weight"

    def _scale(self, module: PackedModule, tensors: dict[str, Tensor]) -> Array:
        scale = scale_values(tensors["weight_scale"])
        if module.weights["strategy"] == "tensor_group":
            scale = scale / float_values(tensors["weight_global_scale"])
        return scale

    def _zero_points(self, module: PackedModule, tensors: dict[str, Tensor], rows: int) -> Array | None:
        if module.weights["symmetric"]:
            return None
        stored = tensors["weight_zero_point"]
        if module.format != "pack-quantized":
            return float_values(stored.to(torch.float32))
        codes = fields(raw_rows(stored.t().contiguous()), module.bits, rows)
        points: Array = code_values(module)[codes].T.reshape(tuple(tensors["weight_scale"].shape))
        return points


def _rank(path: str, target: str, linear: bool) -> tuple[int, str] | None:
    if target.startswith("re:"):
        return (1, target) if re.match(target[3:], path) else None
    if target == path:
        return (0, target)
    return (2, target) if target == "Linear" and linear else None


def expected_tensors(module: PackedModule, rows: int, columns: int) -> dict[str, Spec]:
    """Type and shape of every tensor that a layer (rows, columns) must have, by its name below its path."""
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
