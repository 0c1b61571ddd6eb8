"""The compressed-tensors layout: the bytes of its tensors, and its config entry; `engines.py` has the pairs of formats.

Everything follows from the properties of a Format. compressed-tensors itself is not needed to write; tests read the
files back with it. Choices where the layout allows several:

- Codes of up to 8 bits are one stream of bits per row, least significant first; that single rule gives the int32 words
  of integers, the nibbles of FP4 and the three-byte groups of FP6.
- One scale per weight tensor is written once per row ("channel"): engines fuse layers, and requantize those whose
  per-tensor scales differ, which would change trained weights.
- Asymmetric weights are packed, as vLLM and SGLang want them, although plain transformers then needs an option to load
  them; zero points are for weight-only layers, because no engine runs them with quantized inputs.
- Global scales are powers of two, so that the divisor stored here and the multiplier trained with agree exactly.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.checkpoints.layouts import support
from qat.checkpoints.layouts.arguments import Args, input_args, weight_args
from qat.checkpoints.layouts.caches import CacheLayout, TargetCache, cache_args
from qat.checkpoints.layouts.compressed_tensors.codes import read_layer
from qat.checkpoints.layouts.compressed_tensors.engines import ROTATED as ROTATED
from qat.checkpoints.layouts.compressed_tensors.engines import ROWS
from qat.checkpoints.layouts.compressed_tensors.engines import TABLES as TABLES
from qat.checkpoints.layouts.compressed_tensors.transforms import KEY, transform_config
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.layouts.stored import bit_stream
from qat.checkpoints.layouts.target import TargetLayer
from qat.checkpoints.shards import STEMS
from qat.errors import UnsupportedError
from qat.families import is_outside
from qat.numbers.catalog import E4M3
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor
from qat.training.activations import static_part

METHOD = "compressed-tensors"
DESCRIPTION = None
STEM = STEMS[0]
FUSES_TENSOR_SCALES = False  # one scale per tensor is written once per row
STACKS_OF = ()
LAYOUT_VERSION = "0.18.0"  # the first release that packs every width as written here


@dataclass(frozen=True)
class Layout:
    """How one (weight, input) pair is written: the format string and the two QuantizationArgs."""

    format: str
    weights: Args
    input: Args | None


# --- which pairs ----------------------------------------------------------------------------------


def layout(weight: Format, input: Format | None = None) -> Layout:
    """The layout of a pair of formats.

    Raises:
        UnsupportedError: no row of `engines.py` holds this pair; names the nearest formats that one does.
    """
    weights, inputs = weight_args(weight), input_args(input) if input else None
    if support.find(ROWS, weight, input) is None or weights is None:
        raise UnsupportedError(support.refusal(METHOD, ROWS, weight, input))
    return Layout(_format_string(weights, inputs), weights, inputs)


def check(layer: TargetLayer) -> None:
    """Raise UnsupportedError where the inputs' groups do not divide the layer."""
    if layer.input is not None and not layer.input.divides(layer.shape[1]):
        raise UnsupportedError(
            f"{layer.path}: inputs of width {layer.shape[1]} cannot be cut into {layer.input.name} groups; "
            "use a per-token input format"
        )


def _format_string(weights: Args, inputs: Args | None) -> str:
    bits, scale = weights["num_bits"], weights.get("scale_dtype")
    if scale is not None and weights["strategy"] == "tensor_group":
        return "nvfp4-pack-quantized"
    if scale is not None:
        return f"mxfp{bits}-quantized" if bits == 8 else f"mxfp{bits}-pack-quantized"
    if weights["type"] == "float":
        return "float-quantized" if inputs else "naive-quantized"
    whole = bits == 8 and weights["strategy"] == "channel" and inputs is not None and inputs["num_bits"] == 8
    return "int-quantized" if whole else "pack-quantized"


# --- bytes ----------------------------------------------------------------------------------------


def pack(q: QTensor, input: Format | None = None, amax: Tensor | None = None) -> dict[str, Tensor]:
    """Tensors of one layer, by their name below the layer's path, on CPU.

    Args:
        q: the quantized weight (rows, columns).
        input: format of the layer's input.
        amax: the input's calibrated range, float32 scalar; needed where the format has a static part.
    """
    how = layout(q.format, input)
    rows, columns = q.shape
    codes, bits = q.codes.to("cpu"), q.format.element.bits
    tensors = {"weight_scale": _stored_scale(q, rows)}
    if how.format == "pack-quantized":
        tensors["weight_packed"] = _words(_offset(codes, bits), bits)
        tensors["weight_shape"] = torch.tensor([rows, columns])
        if q.scales.zero_point is not None:
            zero = q.scales.zero_point.to("cpu").expand(tensors["weight_scale"].shape)
            tensors["weight_zero_point"] = _words(_offset(zero.view(torch.uint8), bits).t(), bits).t().contiguous()
    elif how.format.endswith("-pack-quantized"):
        tensors["weight_packed"] = bit_stream(codes, bits)
    else:
        tensors["weight"] = codes.view(torch.int8 if how.weights["type"] == "int" else torch.float8_e4m3fn)
    if q.scales.global_scale is not None:
        tensors["weight_global_scale"] = q.scales.global_scale.to("cpu").reciprocal().reshape(1)
    if input is not None and how.input is not None and how.input["dynamic"] is not True:
        assert amax is not None
        tensors.update(_static_input(input, amax.to("cpu")))
    return tensors


def unpack(module: PackedModule, tensors: Mapping[str, Tensor]) -> QTensor:
    """Undo `pack`, and read the variants of it that other tools write; one scale per tensor comes back as one per
    row."""
    return read_layer(module, tensors)


def _stored_scale(q: QTensor, rows: int) -> Tensor:
    scale = q.scales.stored.to("cpu")
    return (scale.expand(rows, 1) if q.format.is_static else scale).contiguous()


def _static_input(fmt: Format, amax: Tensor) -> dict[str, Tensor]:
    static = static_part(fmt, amax)
    assert static is not None
    return {"input_global_scale": static} if fmt.global_scale else {"input_scale": static.to(fmt.scale.storage)}


def _offset(codes: Tensor, bits: int) -> Tensor:
    """Two's complement of any width -> unsigned, zero in the middle: only the sign bit flips."""
    return (codes & (2**bits - 1)) ^ (1 << (bits - 1))


def _words(codes: Tensor, bits: int) -> Tensor:
    return bit_stream(codes, bits, multiple=4).view(torch.int32)


# --- config.json ----------------------------------------------------------------------------------


def quantization_config(layers: list[TargetLayer], ignored: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`. Targets of different groups never overlap, because loaders resolve overlaps
    differently; one group that covers every linear layer is simply called "Linear"."""
    groups: dict[str, tuple[Layout, list[str]]] = {}
    rotated: dict[int, list[str]] = {}
    for layer in layers:
        how = layout(layer.weight, layer.input)
        groups.setdefault(repr(how), (how, []))[1].extend(layer.names)
        if layer.rotation:
            rotated.setdefault(layer.rotation, []).extend(layer.names)
    everything = [name for layer in layers for name in layer.names] + ignored
    # vLLM knows the output head by its name only, so "Linear" would miss it; and a table is none.
    named = any(layer.is_table or is_outside(name) for layer in layers for name in layer.names)
    uniform = len(groups) == 1 and not named
    formats = {how.format for how, _ in groups.values()}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "version": LAYOUT_VERSION,
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": {
            f"group_{index}": {
                "targets": ["Linear"] if uniform else patterns(paths, everything),
                "format": how.format,
                "weights": how.weights,
                "input_activations": how.input,
                "output_activations": None,
            }
            for index, (how, paths) in enumerate(groups.values())
        },
        **_rotations(rotated, everything),
    }


def _rotations(rotated: dict[int, list[str]], everything: list[str]) -> dict[str, Any]:
    targets = {size: patterns(paths, everything) for size, paths in rotated.items()}
    return {KEY: transform_config(targets)} if targets else {}


# --- caches ---------------------------------------------------------------------------------------


def _cache_config(fmt: Format) -> dict[str, Any] | None:
    args = None if fmt.is_columnwise else cache_args(fmt)
    return None if args is None else {"kv_cache_scheme": args}


def _cache_note(fmt: Format) -> str:
    if fmt.element == E4M3:
        return "vLLM and SGLang use them without being told (their kv_cache_dtype auto)"
    return "plain transformers and `qat serve` run them, vLLM refuses the whole checkpoint"


def _cache_scales(cache: TargetCache) -> tuple[str, str]:
    if cache.projections is None:
        raise UnsupportedError(
            f"{cache.path}: loaders of {METHOD} look for k_proj and v_proj, and leave other caches unquantized"
        )
    return f"{cache.path}.k_scale", f"{cache.path}.v_scale"


CACHES = CacheLayout(_cache_config, _cache_note, _cache_scales, lambda scale: scale.to(torch.bfloat16))


def files(config: dict[str, Any], stored: Sequence[str]) -> dict[str, dict[str, Any]]:
    """config.json says everything."""
    return {}


def patterns(paths: list[str], everything: list[str]) -> list[str]:
    """`re:` targets that match `paths` and nothing else of `everything`.

    Layer numbers become \\d+ where every number belongs to `paths`, and are listed otherwise. The first component is
    left open where that stays unambiguous, because engines put models into wrappers.
    """
    rest = set(everything) - set(paths)
    families: dict[str, list[str]] = {}
    for path in paths:
        families.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1#", path), []).append(path)
    targets = []
    for family, members in families.items():
        numbers = sorted({number for member in members for number in _numbers(member)}, key=int)
        listed = "|".join(numbers) if len(numbers) == 1 else "(?:" + "|".join(numbers) + ")"
        for number in (r"\d+", listed):
            _, dot, tail = family.partition(".")
            pattern = ".*" + re.escape(dot + tail if dot else family).replace(r"\#", number) + "$"
            matched = {path for path in everything if re.match(pattern, path)}
            if matched.isdisjoint(rest) and matched.issuperset(members):
                targets.append("re:" + pattern)
                break
        else:
            targets += [f"re:^{re.escape(member)}$" for member in members]
    return targets


def _numbers(path: str) -> list[str]:
    return [part for part in path.split(".") if part.isdigit()]
