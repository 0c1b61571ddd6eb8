"""The independent reader of compressed-tensors checkpoints: config groups, and the tensors of each format."""

import importlib.util
import re
from collections.abc import Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat.checkpoints.architecture import read_config
from qat.checkpoints.layouts.bits import Array, fields, float_values, raw_rows, scale_values
from qat.checkpoints.layouts.caches import says_nothing
from qat.checkpoints.layouts.compressed_tensors.transforms import KEY, online, rotations
from qat.checkpoints.layouts.reader import ExportedFolder, PackedModule, PlainLoading, Spec, code_values
from qat.checkpoints.matrices import dense_parts
from qat.checkpoints.names import StoredNames, skeleton, stored_names, tables, wanted_while_loading
from qat.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized")
_PLAIN = ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
_VERSION = "0"  # major number of the releases whose checkpoints are read
_DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}  # of the library's QuantizationArgs
_GROUPED = ("group", "tensor_group")
_LINEAR, _EMBEDDING = "Linear", "Embedding"  # classes that groups may target


class Reader(ExportedFolder):
    """A compressed-tensors checkpoint on disk."""

    METHOD = "compressed-tensors"
    SCALES = ("weight_scale", "weight_global_scale", "input_scale", "input_global_scale")
    SUFFIXES = (*SCALES, "weight", "weight_packed", "weight_shape", "weight_zero_point", "input_zero_point")
    UNREAD = MappingProxyType({})  # transforms are read

    def _check_configuration(self) -> None:
        """Besides, `config_groups` get the defaults that other tools leave away: nobody else sees incomplete ones."""
        if self.quantization.get("quantization_status") != "compressed":
            raise CheckpointError(f"{self.where} must say quantization_status: compressed; else loaders read garbage")
        version = self.quantization.get("version")
        if version is not None and str(version).partition(".")[0] != _VERSION:
            raise UnsupportedError(f"{self.where}: version {version!r} of the format; readable: {_VERSION}.x")
        sparsity = self.quantization.get("sparsity_config") or {}
        if sparsity.get("targets") and sparsity.get("format") != "dense":
            raise UnsupportedError(
                f"{self.where}: sparsity_config with format {sparsity.get('format')!r}; readable: 'dense' weights"
            )
        groups = self.quantization.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(f"{self.where}: config_groups is {groups!r}, not a table of at least one group")
        complete = {name: _complete_group(group, f"{self.where}: {name}") for name, group in groups.items()}
        self.quantization = {**self.quantization, "config_groups": complete}
        given = self.quantization.get(KEY)
        self.rotations = [] if says_nothing(given) else rotations(given, f"{self.where}: {KEY}")

    def _cache_args(self) -> dict[str, Any] | None:
        scheme = self.quantization.get("kv_cache_scheme")
        where = f"{self.where}: kv_cache_scheme"
        return None if says_nothing(scheme) else _complete_args(scheme, where, ("tensor",))

    def matching_groups(self, path: str, linear: bool = True) -> list[str]:
        """Names of the config groups that target `path`, the one loaders choose first: exact names, then regular
        expressions, then the class name."""
        ranked, linear = [], linear and path not in self._embeddings
        for group, scheme in self.quantization["config_groups"].items():
            hits = [rank for target in scheme["targets"] if (rank := _rank(path, target, linear)) is not None]
            if hits:
                ranked.append((min(hits), group))
        return [group for _, group in sorted(ranked)]

    @cached_property
    def _embeddings(self) -> frozenset[str]:
        """Paths of embeddings, where a group targets their class, as those of llm-compressor do."""
        targets = {target for group in self.quantization["config_groups"].values() for target in group["targets"]}
        if _EMBEDDING not in targets:
            return frozenset()
        model = skeleton(read_config(self.folder))
        return frozenset(tables(model, stored_names(model)))

    def ignored(self, path: str, linear: bool = True) -> bool:
        """Whether `ignore` names `path`."""
        return any(_rank(path, target, linear) is not None for target in self.quantization.get("ignore") or [])

    def _module(self, path: str, group: str) -> PackedModule:
        scheme = self.quantization["config_groups"][group]
        form = scheme.get("format") or self.quantization.get("format")
        if form not in _PACKED + _PLAIN:
            raise UnsupportedError(f"{path} has format {form!r}; readable: {', '.join(_PACKED + _PLAIN)}")
        return PackedModule(path, form, scheme["weights"], scheme["input_activations"], rotation=self._rotation(path))

    def _rotation(self, path: str) -> int:
        sizes = {size for size, targets, ignored in self.rotations if _any(path, targets) and not _any(path, ignored)}
        if len(sizes) > 1:
            raise UnsupportedError(f"{self.where}: {KEY} rotates the input of {path} more than once")
        return sizes.pop() if sizes else 0

    def expected_tensors(self, module: PackedModule, *shape: int) -> dict[str, Spec]:
        """See the function."""
        return expected_tensors(module, *shape)

    def shape(self, path: str) -> tuple[int, ...]:
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

    def plain_loading(self, model: "PreTrainedModel", names: StoredNames) -> PlainLoading:
        """By the library's own decompressor."""
        if importlib.util.find_spec("compressed_tensors") is None:
            return PlainLoading("compressed-tensors is not installed")
        groups = self.quantization["config_groups"].values()
        affine = any(m.packed and not m.weights["symmetric"] for m in self.modules.values())
        modules = names.modules
        packed_tables = tables(model, names) & self.modules.keys()
        fp8 = all(group["weights"]["type"] == "float" and group["weights"]["num_bits"] == 8 for group in groups)
        of_experts = {path for path in self.modules if f"{path}.weight" in names.parts}
        if any(self.modules[path].weights["strategy"] == "tensor_group" for path in of_experts):
            return PlainLoading("transformers reads NVFP4 experts without their global scale (its issue 48371)")
        if affine and of_experts:
            return PlainLoading("transformers does not load asymmetric packed experts")
        if dense_parts(model, names, self.weights) and not fp8:
            return PlainLoading(
                "transformers cannot load dense tensors that it merges (fused experts) beside this format"
            )
        packed = [path for path, module in self.modules.items() if module.packed]
        if wanted := wanted_while_loading(model, [modules[path] for path in packed if path in modules]):
            return PlainLoading(
                f"transformers cannot load packed layers of {', '.join(wanted)}, whose weights it initialises"
            )
        left = online(self.quantization[KEY]) if self.rotations else {}
        remark = "with its transform_config applied by compressed-tensors, " if left else ""
        if not affine and not packed_tables:
            return PlainLoading(transforms=left, remark=remark)
        if len(groups) > 1:  # transformers would decode all layers by the first
            remark += "with every layer decompressed by compressed-tensors, "
            return PlainLoading(quantizes_inputs=False, remark=remark, transforms=left, state=self._decompressed)
        from transformers import CompressedTensorsConfig

        options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        remark += f"with dequantize=True, as {'packed tables' if packed_tables else 'asymmetric weights'} need, "
        return PlainLoading(options=options, quantizes_inputs=False, remark=remark, transforms=left)

    def _decompressed(self) -> dict[str, Tensor]:
        """Every tensor of the dense model, those of quantized layers as the library decompresses them."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        dense = {name: self.reader.get(name) for name in self.names - self.quantized_names}
        for path, module in self.modules.items():
            scheme = QuantizationScheme(targets=[path], weights=module.weights, format=module.format)
            compressor = BaseCompressor.get_value_from_registry(module.format)
            dense[path + self.DENSE] = compressor.decompress(self.layer(path), scheme)["weight"].to(torch.bfloat16)
        return dense


def _complete_group(group: Any, where: str) -> dict[str, Any]:
    """A config group whose arguments are complete and can be read.

    Raises:
        CheckpointError: something is missing, or is not what the format has there; names it.
        UnsupportedError: something that is not implemented and changes results; names it.
    """
    if not isinstance(group, dict):
        raise UnsupportedError(f"{where} is {group!r}, perhaps a preset's name; readable: groups written out")
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where}.targets is {targets!r}, not a list of names")
    if group.get("output_activations"):
        raise UnsupportedError(f"{where}.output_activations: quantized outputs are not implemented; readable: null")
    weights, inputs = group.get("weights"), group.get("input_activations")
    weights = _complete_args(weights, f"{where}.weights", ("tensor", "channel", "block", *_GROUPED))
    if inputs is not None:
        strategies = ("tensor", "token", *_GROUPED)
        inputs = _complete_args(inputs, f"{where}.input_activations", strategies, (True, False, "local"))
    return {**group, "weights": weights, "input_activations": inputs}


def _complete_args(
    given: Any, where: str, strategies: tuple[str, ...], dynamic: tuple[bool | str, ...] = (False,)
) -> dict[str, Any]:
    """QuantizationArgs with the library's defaults written out; raises as `_complete_group`."""
    if not isinstance(given, dict):
        raise CheckpointError(f"{where} is {given!r}, not a table that says how to quantize")
    args = _DEFAULTS | given
    size, block = args.get("group_size"), args.get("block_structure")
    if args.get("strategy") is None:
        args["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
    allowed: dict[str, tuple[Any, ...]] = {
        "type": ("int", "float"),
        "num_bits": (4, 6, 8) if args["type"] == "float" else tuple(range(2, 9)),
        "symmetric": (True, False),
        "strategy": strategies,
        "dynamic": dynamic,
        "actorder": (None, False, "weight", "static"),  # an order of calibrating, gone from what is stored
    }
    for key, options in allowed.items():
        if (value := args.get(key)) not in options:
            raise UnsupportedError(f"{where}.{key} is {value!r}; readable: {', '.join(map(repr, options))}")
    if args["strategy"] in _GROUPED and not (isinstance(size, int) and size > 0):
        raise CheckpointError(f"{where}.group_size is {size!r}, but strategy {args['strategy']!r} needs a positive one")
    if args["strategy"] not in _GROUPED and size not in (None, -1):
        raise CheckpointError(f"{where}.group_size is {size!r}, but strategy {args['strategy']!r} has no groups")
    sides = isinstance(block, list) and len(block) == 2 and all(isinstance(side, int) and side > 0 for side in block)
    if (args["strategy"] == "block") != (block is not None) or (block is not None and not sides):
        raise CheckpointError(
            f"{where}.block_structure is {block!r}, but strategy 'block' needs [rows, columns], and no other has one"
        )
    return args


def _any(path: str, targets: Sequence[str]) -> bool:
    return any(_rank(path, target, True) is not None for target in targets)


def _rank(path: str, target: str, linear: bool) -> tuple[int, str] | None:
    if target.startswith("re:"):
        return (1, target) if re.match(target[3:], path) else None
    if target == path:
        return (0, target)
    return (2, target) if target == (_LINEAR if linear else _EMBEDDING) else None


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
