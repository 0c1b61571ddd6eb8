"""The Ascend layout as msmodelslim writes it: plain tensors, and `quant_model_description.json`, which names the type
of every one of them. Nothing is stored in a device's own order: engines do that after loading (docs/ascend.md).

Scales are written in float32 but are BF16 numbers, as they were trained, because vllm-ascend casts them to the model's
type. What a static type folds together (`deq_scale`, `quant_bias`) is exact: the product of two BF16 numbers is a
float32 number, and the offset's share of the bias a whole number. FP16 models differ in `deq_scale` (`in_half`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qat.checkpoints.layouts import support
from qat.checkpoints.layouts.arguments import weight_format
from qat.checkpoints.layouts.ascend.caches import C8, KEYS, is_of_cache
from qat.checkpoints.layouts.ascend.caches import CACHES as CACHES
from qat.checkpoints.layouts.ascend.engines import ROWS as ROWS
from qat.checkpoints.layouts.ascend.types import BY_NAME, FLOAT, INT4_BITS, SLICES, Type, find_type, is_second
from qat.checkpoints.layouts.npu import ENGINES, HALF, unpaired
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.layouts.stored import bit_stream, shape, take, take_narrow, take_scale
from qat.checkpoints.layouts.target import TargetLayer
from qat.checkpoints.shards import STEMS
from qat.errors import UnsupportedError
from qat.families import expert_list, find_family, fused_sets
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales
from qat.numbers.scale import F32
from qat.serving.nibbles import pair_rows, unpair_rows
from qat.text import some
from qat.training.activations import static_part
from qat.training.half import READ_BITS, SCALE_BITS
from qat.training.half import RULE as HALF_RULE
from qat.training.npu import bias_codes, offset_of

METHOD = "ascend"
DESCRIPTION = "quant_model_description.json"
STEM = STEMS[1]
FUSES_TENSOR_SCALES = False  # weights have none
ROTATED = None
TABLES = None
STACKS_OF = ()
MINDIE = ENGINES[2]  # which asks config.json for the type, in its own words
_WORD = 8  # rows that engines put into one word
_MISSED = 8  # by which an operator reads halves of inputs too small
VERSION = "1.0.0"  # of the description; vllm-ascend reads other versions in another way


def kind_of(weight: Format, input: Format | None) -> Type:
    """The type of a pair of formats.

    Raises:
        UnsupportedError: there is none; names the nearest.
    """
    kind = find_type(weight, input)
    if kind is None:
        raise UnsupportedError(support.refusal(METHOD, ROWS, weight, input))
    return kind


def check(layer: TargetLayer) -> None:
    """Raise UnsupportedError where engines would not compute what was trained."""
    kind = kind_of(layer.weight, layer.input)
    if layer.half and not any(HALF in one.devices for one in kind.npu):
        able = ", ".join(other.name for other in BY_NAME.values() if any(HALF in one.devices for one in other.npu))
        raise UnsupportedError(f"{layer.path}: no engine loads {kind.name} in FP16 models; it can be {able}")
    if layer.bias and kind.unbiased:
        raise UnsupportedError(
            f"{layer.path} adds a bias, and {kind.name} cannot: {kind.unbiased}; give it another pair"
        )
    if kind.experts_only and expert_list(layer.path) is None:
        raise UnsupportedError(
            f"{layer.path}: only experts can be {kind.name}: {kind.experts_only}; give it another pair, such as "
            "int8_channel weights"
        )
    if kind.pairs_rows and not kind.group and (layer.shape[-2] % _WORD or layer.shape[-1] % SLICES):
        raise UnsupportedError(
            f"{layer.path}: {kind.name} needs rows by {_WORD} and columns by {SLICES}, but has {[*layer.shape]}"
        )
    if said := unpaired(layer.path, layer.weight, layer.shape[-1]):
        raise UnsupportedError(said)
    if not kind.pads and layer.shape[-1] // kind.group % 2:
        raise UnsupportedError(
            f"{layer.path}: vllm-ascend takes scales of {kind.name} in pairs, columns by {2 * kind.group}, but this "
            f"has {layer.shape[-1]}; give it another pair, such as mxfp8 weights"
        )
    if kind.packed and layer.shape[-1] % 2:
        raise UnsupportedError(f"{layer.path}: {kind.name} packs two columns into a byte, but has {layer.shape[-1]}")
    if kind.pairs_rows and kind.group:
        _check_groups(layer, kind)
    if expert_list(layer.path) is not None and not kind.experts:
        can = ", ".join(other.name for other in BY_NAME.values() if other.experts)
        raise UnsupportedError(f"{layer.path}: no engine on Ascend runs experts as {kind.name}; they can be {can}")


def _check_groups(layer: TargetLayer, kind: Type) -> None:
    rows, columns = layer.shape
    if rows % 2 or columns % kind.group:
        raise UnsupportedError(
            f"{layer.path}: {kind.name} packs two rows into a byte, in groups of {kind.group} columns, but this is "
            f"{rows} x {columns}; give it another pair, or none"
        )
    if columns == kind.group:
        raise UnsupportedError(
            f"{layer.path} has one group of {kind.group} columns in a row, by which engines know codes that are packed "
            "along rows; give it smaller groups, or another pair"
        )


# --- bytes ----------------------------------------------------------------------------------------


def pack(q: QTensor, input: Format | None = None, amax: Tensor | None = None) -> dict[str, Tensor]:
    """Tensors of one layer, by their name below the layer's path, on CPU; arguments as in `Target.pack`."""
    static = None if input is None or amax is None else static_part(input, amax.to("cpu"))
    return tensors_of(kind_of(q.format, input), q, static)


def tensors_of(kind: Type, q: QTensor, static: Tensor | None) -> dict[str, Tensor]:
    """`pack`, given what is stored of the input's range (see `static_part`)."""
    codes, stored = q.codes.to("cpu"), q.scales.stored.to("cpu")
    if kind.is_mx:
        return {"weight": _bytes(codes, kind), "weight_scale": stored}
    scale, zero = stored.to(torch.float32), q.scales.zero_point
    if not kind.is_static:
        offset = torch.zeros_like(scale) if zero is None else zero.to("cpu", torch.float32).expand_as(scale)
        rows = {"weight": _bytes(codes, kind), "weight_scale": scale, "weight_offset": offset.contiguous()}
        return {**rows, "scale_bias": _assist(codes, scale, 1)} if "scale_bias" in kind.tensors else rows
    assert static is not None
    weight, offset = _bytes(codes, kind), offset_of(static)
    sums = weight.to(torch.int64).sum(dim=1)
    rows = {"weight_scale": scale, "weight_offset": torch.zeros_like(scale)} if "weight_scale" in kind.tensors else {}
    return {
        **rows,
        "weight": weight,
        "input_scale": static[:1].clone(),
        "input_offset": offset.clone(),
        "quant_bias": (-offset.to(torch.int64) * sums).to(torch.int32),
        "deq_scale": scale.flatten() * static[0],
    }


def placed(tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tensors of a layer at `path`: `scale_bias` of a matrix behind a gate is in slices of its columns."""
    if "scale_bias" not in tensors or not is_second(path):
        return tensors
    codes = unpair_rows(tensors["weight"].view(torch.uint8), len(tensors["weight_scale"]))
    return {**tensors, "scale_bias": _assist(codes, tensors["weight_scale"], SLICES)}


def _assist(codes: Tensor, scale: Tensor, slices: int) -> Tensor:
    """8 times the sums of the weight that raw 4-bit codes stand for, by row and slice of its columns: whole numbers
    times scales."""
    sums = _signed(codes, INT4_BITS).to(torch.int64).unflatten(1, (slices, -1)).sum(dim=-1)
    return _MISSED * sums.to(torch.float32) * scale


def fold_bias(tensors: dict[str, Tensor], bias: Tensor) -> dict[str, Tensor]:
    """The tensors of a layer that adds `bias` (rows,), which static types hold in `quant_bias`, too.

    Raises:
        UnsupportedError: the number does not fit int32, or engines would read it otherwise.
    """
    if "quant_bias" not in tensors:
        return tensors
    whole = tensors["quant_bias"].to(torch.int64) + bias_codes(bias.to("cpu"), tensors["deq_scale"]).to(torch.int64)
    bounds = torch.iinfo(torch.int32)
    if bool(((whole < bounds.min) | (whole > bounds.max)).any()):
        raise UnsupportedError(
            f"a bias of {float(bias.abs().max()):.4g} in units of the layer's scales "
            f"({float(tensors['deq_scale'].min()):.4g} at least) does not fit int32; "
            "use int8_token inputs (W8A8_DYNAMIC), which leave it alone"
        )
    return {**tensors, "quant_bias": whole.to(torch.int32)}


def in_half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a layer of an FP16 model: `deq_scale` as integers whose low 32 bits are those of the float32.

    Raises:
        UnsupportedError: the hardware, which reads 19 of these bits, would take one for another number.
    """
    if "deq_scale" not in tensors:
        return tensors
    bits = tensors["deq_scale"].view(torch.int32)
    if bool((bits & ((1 << (F32.significant_bits - READ_BITS)) - 1)).any()):
        raise UnsupportedError(
            f"a deq_scale has more than {READ_BITS} significant bits, of which operators of FP16 models drop the rest: "
            f"calibrate inputs with activation_rule: {HALF_RULE}, which leaves their scales {SCALE_BITS}"
        )
    return {**tensors, "deq_scale": bits.to(torch.int64)}


def _bytes(codes: Tensor, kind: Type) -> Tensor:
    """Raw codes as they are stored: a byte each, integers with their sign, or two neighbours of a row or of a column in
    one, the first low."""
    if kind.packed:
        return bit_stream(codes, kind.element.bits)
    if kind.pairs_rows:
        return pair_rows(codes).view(torch.int8)
    if not kind.element.is_integer:
        return codes.view(torch.float8_e4m3fn)
    return _signed(codes, kind.element.bits)


def _signed(codes: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    return ((codes.to(torch.int16) ^ half) - half).to(torch.int8)


def unpack(module: PackedModule, tensors: Mapping[str, Tensor]) -> QTensor:
    """Undo `pack`.

    Raises:
        CheckpointError: a tensor is missing or does not fit, or a scale is zero, negative or not finite; names it.
    """
    fmt, (rows, columns) = weight_format(module.weights), shape(module, tensors)
    if "scale_bias" in tensors or (fmt.group and fmt.element.is_integer):
        return _unpack_pairs(module, tensors, fmt, rows, columns)
    grid = fmt.grid_shape(rows, columns)
    if module.packed:
        pairs = take(module, tensors, "weight", torch.uint8, (rows, columns // 2))
        codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
    else:
        dtype = torch.int8 if fmt.element.is_integer else torch.float8_e4m3fn
        codes = take(module, tensors, "weight", dtype, (rows, columns)).view(torch.uint8)
        codes = codes & (2**fmt.element.bits - 1)
    if fmt.group:
        return QTensor(fmt, codes, Scales(take_scale(module, tensors, "weight_scale", fmt.scale.storage, grid)))
    if "deq_scale" in tensors and "weight_scale" not in tensors:
        if tensors["deq_scale"].dtype == torch.int64:
            tensors = {**tensors, "deq_scale": tensors["deq_scale"].to(torch.int32).view(torch.float32)}
        deq = take_scale(module, tensors, "deq_scale", torch.float32, (rows,))
        tensors = {"weight_scale": (deq / take_scale(module, tensors, "input_scale", torch.float32, (1,))).view(grid)}
    return QTensor(fmt, codes, Scales(take_narrow(module, tensors, "weight_scale", fmt, grid)))


def _unpack_pairs(
    module: PackedModule, tensors: Mapping[str, Tensor], fmt: Format, pairs: int, columns: int
) -> QTensor:
    """`unpack` of a type whose bytes hold two rows."""
    stored = take(module, tensors, "weight", torch.int8, (pairs, columns)).view(torch.uint8)
    grid = fmt.grid_shape(2 * pairs, columns)
    offset = take(module, tensors, "weight_offset", torch.float32, grid)
    scale = take_narrow(module, tensors, "weight_scale", fmt, grid)
    zero = offset.to(torch.int8) if fmt.zero_point else None
    return QTensor(fmt, unpair_rows(stored, 2 * pairs), Scales(scale, zero_point=zero, type=fmt.scale))


# --- description ----------------------------------------------------------------------------------


def quantization_config(layers: list[TargetLayer], ignored: list[str]) -> dict[str, Any]:
    """What the description will say: types by path, what stays dense, and the one group size; and in "config" what
    config.json gets.

    Raises:
        UnsupportedError: engines would fuse layers of several types, or need several group sizes.
    """
    types = {layer.path: kind_of(layer.weight, layer.input) for layer in layers}
    groups = sorted({kind.group for kind in types.values() if kind.group})
    if len(groups) > 1:
        raise UnsupportedError(f"{METHOD}: a model has one group size, but these layers need {groups}")
    _check_fused({path: kind.name for path, kind in types.items()} | dict.fromkeys(ignored, FLOAT), layers)
    names = list(dict.fromkeys(kind.name for kind in types.values()))
    return {
        "quant_method": METHOD,
        "model_quant_type": names[0] if names else FLOAT,
        "group_size": groups[0] if groups else 0,
        "types": {name: types[layer.path].name for layer in layers for name in layer.names},
        "config": {"quantize": names[0].lower()} if len(names) == 1 and MINDIE in _engines(names[0]) else {},
        "ignored": ignored,
    }


def _engines(name: str) -> set[str]:
    return {one.engine for one in BY_NAME[name].npu}


def _check_fused(types: dict[str, str], layers: list[TargetLayer]) -> None:
    model_type = layers[0].model_type if layers else ""
    experts: dict[str, list[str]] = {}
    for path in types:
        if (owner := expert_list(path)) is not None:
            experts.setdefault(owner, []).append(path)
    for members in (*fused_sets(types, find_family(model_type).fused), *experts.values()):
        if len({types[path] for path in members}) > 1:
            listed = some([f"{path} is {types[path]}" for path in members])
            raise UnsupportedError(
                f"engines on Ascend fuse these layers and refuse several types among them: {listed}; give them one "
                "format, or none"
            )


def files(config: dict[str, Any], stored: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The description: the type of every stored tensor, and of an output layer that is tied to the embedding."""
    kinds = {f"{path}.{name}": kind for path, kind in config["types"].items() for name in BY_NAME[kind].tensors}
    kinds |= dict.fromkeys(filter(is_of_cache, stored), C8)
    named = dict.fromkeys((*(f"{path}.weight" for path in (*config["ignored"], *config["types"])), *stored))
    return {
        DESCRIPTION: {
            "version": VERSION,
            "model_quant_type": config["model_quant_type"],
            "group_size": config["group_size"],
            **{key: config[key] for key in KEYS if key in config},
            **{name: kinds.get(name, FLOAT) for name in sorted(named)},
        }
    }
