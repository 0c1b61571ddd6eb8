"""The modelopt layout, for TensorRT-LLM and for users of vLLM and SGLang: tensors and the two configurations.

The bytes of NVFP4 codes and block scales are those of compressed-tensors; the scales above them multiply here where
they divide there (`weight_scale_2`, `input_scale`). Ours are powers of two, so the reciprocals are exact. One algorithm
covers all quantized layers of a checkpoint. What is not quantized is excluded by its exact name, or by one wildcard per
list of experts, because engines ask for the list as a whole.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qat.checkpoints.layouts import support
from qat.checkpoints.layouts.arguments import weight_format
from qat.checkpoints.layouts.caches import CacheLayout, TargetCache, cache_args
from qat.checkpoints.layouts.kinds import ROW, TENSOR
from qat.checkpoints.layouts.modelopt.engines import ROWS
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.layouts.stored import bit_stream, shape, take, take_narrow, take_scale
from qat.checkpoints.layouts.target import TargetLayer
from qat.checkpoints.shards import STEMS
from qat.errors import UnsupportedError
from qat.families import expert_list
from qat.numbers.catalog import E4M3
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales
from qat.training.activations import static_part

METHOD = "modelopt"
DESCRIPTION = None
STEM = STEMS[0]
FUSES_TENSOR_SCALES = True
ROTATED = None
TABLES = None
STACKS_OF = ()
LAYOUT_VERSION = "0.47.0"  # of the modelopt whose files these are like
LEGACY = "hf_quant_config.json"


def check(layer: TargetLayer) -> None:
    """Nothing but the pair of formats matters."""


def algorithm(weight: Format, input: Format | None) -> str:
    """The `quant_algo` of a pair of formats.

    Raises:
        UnsupportedError: there is none; names the nearest.
    """
    row = support.find(ROWS, weight, input)
    if row is None:
        raise UnsupportedError(support.refusal(METHOD, ROWS, weight, input))
    return row.scheme


# --- bytes ----------------------------------------------------------------------------------------


def pack(q: QTensor, input: Format | None = None, amax: Tensor | None = None) -> dict[str, Tensor]:
    """Tensors of one layer, by their name below the layer's path, on CPU; arguments as in `Target.pack`."""
    algorithm(q.format, input)
    fmt, codes, stored = q.format, q.codes.to("cpu"), q.scales.stored.to("cpu")
    tensors = {"weight": bit_stream(codes, fmt.element.bits) if _packed(fmt) else codes.view(torch.float8_e4m3fn)}
    grid = () if fmt.block == TENSOR else (-1,) if fmt.block == ROW else stored.shape
    wide = stored if fmt.group else stored.to(torch.float32)
    tensors["weight_scale"] = wide.reshape(grid).contiguous()
    if q.scales.global_scale is not None:
        tensors["weight_scale_2"] = q.scales.global_scale.to("cpu").reshape(())
    if input is not None and (input.global_scale or input.block == TENSOR):
        assert amax is not None
        static = static_part(input, amax.to("cpu"))
        assert static is not None
        tensors["input_scale"] = (static.reciprocal() if input.global_scale else static).reshape(())
    return tensors


def unpack(module: PackedModule, tensors: Mapping[str, Tensor]) -> QTensor:
    """Undo `pack`; one scale per tensor comes back as one per row.

    Raises:
        CheckpointError: a tensor is missing or does not fit, or a scale is zero, negative or not finite; names it.
    """
    fmt, (rows, columns) = weight_format(module.weights), shape(module, tensors)
    grid = fmt.grid_shape(rows, columns)
    if _packed(fmt):
        pairs = take(module, tensors, "weight", torch.uint8, (rows, columns // 2))
        codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
    else:
        codes = take(module, tensors, "weight", torch.float8_e4m3fn, (rows, columns)).view(torch.uint8)
    if fmt.group:
        stored = take_scale(module, tensors, "weight_scale", fmt.scale.storage, grid)
    else:
        stored = take_narrow(module, tensors, "weight_scale", fmt, (), grid[:1]).reshape(-1, 1).expand(grid)
    above = take_scale(module, tensors, "weight_scale_2", torch.float32, ()) if fmt.global_scale else None
    return QTensor(fmt, codes, Scales(stored.contiguous(), above))


def _packed(fmt: Format) -> bool:
    return fmt.element.bits == 4


# --- configuration --------------------------------------------------------------------------------


def quantization_config(layers: list[TargetLayer], ignored: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`: modelopt's flat form, and the group size where flat readers look for it.

    Raises:
        UnsupportedError: layers of several algorithms, or names that engines cannot tell apart.
    """
    algorithms: dict[str, TargetLayer] = {}
    for layer in layers:
        algorithms.setdefault(algorithm(layer.weight, layer.input), layer)
    if len(algorithms) > 1:
        mixture = ", ".join(f"{layer.path} is {name}" for name, layer in algorithms.items())
        raise UnsupportedError(
            f"{METHOD} checkpoints hold one algorithm here, but {mixture}; give all layers one scheme, "
            "or use the target compressed-tensors"
        )
    excluded = exclusions(ignored, [name for layer in layers for name in layer.names])
    ((name, layer),) = algorithms.items()
    weights, inputs = _arguments(layer.weight), layer.input and _arguments(layer.input)
    return {
        "quant_method": METHOD,
        "quant_algo": name,
        **({"group_size": layer.weight.group} if layer.weight.group else {}),
        "ignore": excluded,
        "config_groups": {
            "group_0": {
                **({"input_activations": inputs} if inputs else {}),
                "weights": weights | ({"strategy": "channel"} if layer.weight.block == ROW else {}),
                "targets": ["Linear"],
            }
        },
        "producer": {"name": METHOD, "version": LAYOUT_VERSION},  # engines recognise the layout by this name
    }


def _arguments(fmt: Format) -> dict[str, Any]:
    return {
        "dynamic": False,
        "num_bits": fmt.element.bits,
        "type": "float",
        **({"group_size": fmt.group} if fmt.group else {}),
    }


# --- caches ---------------------------------------------------------------------------------------


def _cache_config(fmt: Format) -> dict[str, Any] | None:
    args = cache_args(fmt)
    if args is None or fmt.element != E4M3:
        return None
    return {"kv_cache_scheme": {key: args[key] for key in ("dynamic", "num_bits", "type")}}


def _cache_note(fmt: Format) -> str:
    return "vLLM, SGLang and TensorRT-LLM use them without being told"


def _cache_scales(cache: TargetCache) -> tuple[str, str]:
    if cache.projections is None:
        raise UnsupportedError(f"{cache.path}: {METHOD} stores scales of caches at k_proj and v_proj, which it lacks")
    return f"{cache.projections[0]}.k_scale", f"{cache.projections[1]}.v_scale"


CACHES = CacheLayout(_cache_config, _cache_note, _cache_scales, lambda scale: scale.reshape(()))


def files(config: dict[str, Any], stored: Sequence[str]) -> dict[str, dict[str, Any]]:
    """hf_quant_config.json, which older engines read: the same in the nested form, with each key that vLLM asks for."""
    quantization = {
        "quant_algo": config["quant_algo"],
        "kv_cache_quant_algo": "FP8" if "kv_cache_scheme" in config else None,
        "group_size": config.get("group_size"),
        "exclude_modules": config["ignore"],
    }
    return {LEGACY: {"producer": config["producer"], "quantization": quantization}}


def exclusions(ignored: list[str], quantized: list[str]) -> list[str]:
    """Names and wildcards (fnmatch) for every path in `ignored` and for none in `quantized`.

    Raises:
        UnsupportedError: an excluded name is a part of a quantized one, which vLLM would then exclude too.
    """
    excluded: dict[str, None] = {}
    for path in ignored:
        experts = expert_list(path)
        whole = experts is not None and not any(other.startswith(f"{experts}.") for other in quantized)
        excluded[f"{experts}*" if whole else path] = None
    for name in excluded:
        for path in quantized:
            if name.removesuffix("*") in path:
                raise UnsupportedError(
                    f"{METHOD}: {name} stays dense, but engines would leave out {path} too, which contains that name; "
                    "quantize both, neither, or use the target compressed-tensors"
                )
    return list(excluded)
