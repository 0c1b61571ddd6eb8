"""The compressed-tensors layout: which pairs of formats it holds, the bytes of their tensors, and its config entry.

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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.checkpoints.layouts import support
from qat.checkpoints.layouts.caches import CacheLayout, TargetCache, cache_args
from qat.checkpoints.layouts.support import FP8_BLOCK
from qat.checkpoints.layouts.target import TargetLayer
from qat.errors import CheckpointError, UnsupportedError
from qat.numbers.catalog import CATALOG, E2M1, E2M3, E4M3
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor
from qat.training.activations import static_part

METHOD = "compressed-tensors"
FUSES_TENSOR_SCALES = False  # one scale per tensor is written once per row
LAYOUT_VERSION = "0.18.0"  # the first release that packs every width as written here

_FLOATS = {4: E2M1, 6: E2M3, 8: E4M3}  # what {"type": "float", "num_bits": n} means
_SCALE_DTYPES = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
_CHUNK = 1 << 22  # codes turned into bits at a time: 32 MiB of scratch

Args = dict[str, Any]


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
        UnsupportedError: the target cannot say this pair; names the nearest formats it holds.
    """
    weights, inputs = weight_args(weight), input_args(input) if input else None
    if weights is None or (input is not None and (inputs is None or not _go_together(weights, inputs))):
        raise UnsupportedError(support.refusal(METHOD, weight, input))
    return Layout(_format_string(weights, inputs), weights, inputs)


def check(layer: TargetLayer) -> None:
    """Raise UnsupportedError where `layer` cannot be written."""
    try:
        layout(layer.weight, layer.input)
    except UnsupportedError as error:
        raise UnsupportedError(f"{layer.path}: {error}") from None
    if layer.input is not None and not layer.input.divides(layer.shape[1]):
        raise UnsupportedError(
            f"{layer.path}: inputs of width {layer.shape[1]} cannot be cut into {layer.input.name} groups; "
            "use a per-token input format"
        )


def pairs() -> list[tuple[str, str | None]]:
    """Every pair of catalogue names that `layout` accepts."""
    inputs = [(None, None), *((name, args) for name, fmt in CATALOG.items() if (args := input_args(fmt)))]
    found: list[tuple[str, str | None]] = []
    for name, fmt in CATALOG.items():
        weights = weight_args(fmt)
        if weights is not None:
            found += [(name, other) for other, args in inputs if args is None or _go_together(weights, args)]
    return found


def weight_args(fmt: Format) -> Args | None:
    """QuantizationArgs of a weight, or None where there are none that mean this format."""
    base = _base_args(fmt, dynamic=False)
    if base is None or (fmt.zero_point and base["type"] == "float"):
        return None
    if fmt.scale == "bf16" and base["num_bits"] in (2, 3, 4, 8):
        if fmt.block in ((0, 0), (1, 0)):
            plain = base["type"] == "int" or base["num_bits"] == E4M3.bits
            return {**base, "strategy": "channel"} if plain else None
        if fmt.group and base["type"] == "int":
            return {**base, "strategy": "group", "group_size": fmt.group}
        if fmt.block == FP8_BLOCK and fmt.element == E4M3:
            return {**base, "strategy": "block", "block_structure": list(fmt.block)}
    return _small_float_args(fmt, base)


def input_args(fmt: Format) -> Args | None:
    """QuantizationArgs of a layer's input, or None where there are none that mean this format."""
    base = _base_args(fmt, dynamic=True)
    if base is None or fmt.zero_point:
        return None
    if fmt.scale == "f32" and fmt.block == (1, 0) and base["num_bits"] in (4, 8):
        return {**base, "strategy": "token"}
    if fmt.scale == "f32" and fmt.group == FP8_BLOCK[1] and fmt.element == E4M3:
        return {**base, "strategy": "group", "group_size": fmt.group}
    if fmt.scale == "bf16" and fmt.block == (0, 0) and base["num_bits"] == E4M3.bits:
        return {**base, "strategy": "tensor", "dynamic": False}
    args = _small_float_args(fmt, base) if fmt.element != E2M3 else None
    return {**args, "dynamic": "local", "observer": "static_minmax"} if args and fmt.global_scale else args


def _base_args(fmt: Format, dynamic: bool) -> Args | None:
    element = fmt.element
    integer = element.kind == "integer" and element.step == 1.0
    if len(fmt.elements) > 1 or not (integer or element == _FLOATS.get(element.bits)):
        return None
    kind = "int" if integer else "float"
    return {"num_bits": element.bits, "type": kind, "symmetric": not fmt.zero_point, "dynamic": dynamic}


def _small_float_args(fmt: Format, base: Args) -> Args | None:
    """NVFP4 and the MX floats: blocks inside a row with 8-bit scales."""
    nv = fmt.scale == "e4m3" and fmt.global_scale and fmt.group == 16 and fmt.element == E2M1
    mx = fmt.scale == "e8m0" and fmt.group == 32 and base["type"] == "float"
    if not (nv or mx):
        return None
    strategy = "tensor_group" if nv else "group"
    return {**base, "strategy": strategy, "group_size": fmt.group, "scale_dtype": _SCALE_DTYPES[fmt.scale]}


def _go_together(weights: Args, inputs: Args) -> bool:
    """Whether a loader runs these two together. Zero points are for weight-only layers."""
    family, other = weights.get("scale_dtype"), inputs.get("scale_dtype")
    if not weights["symmetric"]:
        return False
    if family == _SCALE_DTYPES["e4m3"]:
        return other == family
    fp8 = inputs["type"] == "float" and inputs["num_bits"] == E4M3.bits and other is None
    if family == _SCALE_DTYPES["e8m0"]:
        small = weights["num_bits"] == E2M1.bits
        return (other == family and inputs["num_bits"] >= weights["num_bits"]) or (fp8 and small and inputs["dynamic"])
    if other is not None:
        return False
    if weights["type"] == "float":
        options = ("token", "group") if weights["strategy"] == "block" else ("token", "tensor")
        return fp8 and inputs["strategy"] in options
    if fp8:
        return inputs["strategy"] == "token" and weights["num_bits"] == 4 and weights["strategy"] == "group"
    whole = weights["num_bits"] == 8 and weights["strategy"] == "channel"
    return inputs["type"] == "int" and (inputs["strategy"] == "token" or whole)


def _format_string(weights: Args, inputs: Args | None) -> str:
    bits, family = weights["num_bits"], weights.get("scale_dtype")
    if family == _SCALE_DTYPES["e4m3"]:
        return "nvfp4-pack-quantized"
    if family == _SCALE_DTYPES["e8m0"]:
        return f"mxfp{bits}-quantized" if bits == 8 else f"mxfp{bits}-pack-quantized"
    if weights["type"] == "float":
        return "float-quantized" if inputs else "naive-quantized"
    whole = bits == 8 and weights["strategy"] == "channel" and inputs is not None and inputs["num_bits"] == 8
    return "int-quantized" if whole else "pack-quantized"


def notes(weight: Format, input: Format | None) -> list[str]:
    """What engines are known to do differently with this pair."""
    return support.notes(METHOD, weight, input)


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


def unpack(tensors: Mapping[str, Tensor], fmt: Format, shape: tuple[int, int]) -> QTensor:
    """Undo `pack`; one scale per tensor comes back as one per row."""
    from qat.checkpoints.layouts.compressed_tensors.codes import read_layer  # which reads this file's tables
    from qat.checkpoints.layouts.reader import PackedModule

    how = layout(fmt)
    form = "naive-quantized" if "weight" in tensors and how.format == "pack-quantized" else how.format
    q = read_layer(PackedModule("", form, how.weights, None), tensors)
    if q.shape != shape:
        raise CheckpointError(f"codes of shape {[*q.shape]}, not {[*shape]}")
    return q


def _stored_scale(q: QTensor, rows: int) -> Tensor:
    scale = q.scales.stored.to("cpu")
    return (scale.expand(rows, 1) if q.format.block == (0, 0) else scale).contiguous()


def _static_input(fmt: Format, amax: Tensor) -> dict[str, Tensor]:
    static = static_part(fmt, amax)
    assert static is not None
    return {"input_global_scale": static} if fmt.global_scale else {"input_scale": static.to(fmt.scale_storage)}


def _offset(codes: Tensor, bits: int) -> Tensor:
    """Two's complement of any width -> unsigned, zero in the middle: only the sign bit flips."""
    return (codes & (2**bits - 1)) ^ (1 << (bits - 1))


def _words(codes: Tensor, bits: int) -> Tensor:
    return bit_stream(codes, bits, multiple=4).view(torch.int32)


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


# --- config.json ----------------------------------------------------------------------------------


def quantization_config(layers: list[TargetLayer], ignored: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`. Targets of different groups never overlap, because loaders resolve overlaps
    differently; one group that covers every linear layer is simply called "Linear"."""
    groups: dict[str, tuple[Layout, list[str]]] = {}
    for layer in layers:
        how = layout(layer.weight, layer.input)
        groups.setdefault(repr(how), (how, []))[1].extend(layer.names)
    everything = [name for layer in layers for name in layer.names] + ignored
    # vLLM knows the output head by its name only, so "Linear" would miss it.
    inside = all("." in name for layer in layers for name in layer.names)
    uniform = len(groups) == 1 and inside
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
    }


# --- caches ---------------------------------------------------------------------------------------


def _cache_config(fmt: Format) -> dict[str, Any] | None:
    args = cache_args(fmt)
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


def files(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
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
    found = []
    for family, members in families.items():
        numbers = sorted({number for member in members for number in _numbers(member)}, key=int)
        listed = "|".join(numbers) if len(numbers) == 1 else "(?:" + "|".join(numbers) + ")"
        for number in (r"\d+", listed):
            _, dot, tail = family.partition(".")
            pattern = ".*" + re.escape(dot + tail if dot else family).replace(r"\#", number) + "$"
            matched = {path for path in everything if re.match(pattern, path)}
            if matched.isdisjoint(rest) and matched.issuperset(members):
                found.append("re:" + pattern)
                break
        else:
            found += [f"re:^{re.escape(member)}$" for member in members]
    return found


def _numbers(path: str) -> list[str]:
    return [part for part in path.split(".") if part.isdigit()]
