"""QuantizationArgs, the words of compressed-tensors in which the readers of all layouts describe a layer, and the
Format that each means. Which pairs of formats a layout holds is not said here, but in its `engines.py`."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from qat.checkpoints.layouts.kinds import FP8_BLOCK, ROW, TENSOR
from qat.errors import UnsupportedError
from qat.numbers.catalog import CATALOG, E2M1, E2M3, E4M3
from qat.numbers.format import Format
from qat.numbers.scale import BF16, F32

Args = dict[str, Any]

_FLOATS = {4: E2M1, 6: E2M3, 8: E4M3}  # what {"type": "float", "num_bits": n} means


# --- from formats ---------------------------------------------------------------------------------


def weight_args(fmt: Format) -> Args | None:
    """QuantizationArgs of a weight, or None where there are none that mean this format; one scale per tensor is said as
    one per row."""
    base = _base_args(fmt, dynamic=False)
    if base is None or (fmt.zero_point and base["type"] == "float"):
        return None
    if fmt.scale is BF16:
        if fmt.block in (TENSOR, ROW):
            return {**base, "strategy": "channel"}
        if fmt.group and base["type"] == "int":
            return {**base, "strategy": "group", "group_size": fmt.group}
        if fmt.block == FP8_BLOCK and fmt.element == E4M3:
            return {**base, "strategy": "block", "block_structure": list(fmt.block)}
    return _small_float_args(fmt, base)


def input_args(fmt: Format) -> Args | None:
    """QuantizationArgs of a layer's input, or None where there are none that mean this format."""
    base = _base_args(fmt, dynamic=True)
    if base is not None and fmt.zero_point and fmt.is_static and fmt.scale is BF16:
        prompts = {"prompt": "token"} if fmt.prompt else {}  # ours: compressed-tensors has no such inputs
        return {**base, "strategy": "tensor", "dynamic": False, **prompts}
    if base is None or fmt.zero_point:
        return None
    if fmt.scale is F32 and fmt.block == ROW and base["num_bits"] in (4, 8):
        return {**base, "strategy": "token"}
    if fmt.scale is F32 and fmt.group == FP8_BLOCK[1] and fmt.element == E4M3:
        return {**base, "strategy": "group", "group_size": fmt.group}
    if fmt.scale is BF16 and fmt.block == TENSOR and base["num_bits"] == E4M3.bits:
        return {**base, "strategy": "tensor", "dynamic": False}
    args = _small_float_args(fmt, base) if fmt.element != E2M3 else None
    return {**args, "dynamic": "local", "observer": "static_minmax"} if args and fmt.global_scale else args


def _base_args(fmt: Format, dynamic: bool) -> Args | None:
    element = fmt.element
    integer = element.is_integer
    if not fmt.is_single or not (integer or element == _FLOATS.get(element.bits)):
        return None
    kind = "int" if integer else "float"
    return {"num_bits": element.bits, "type": kind, "symmetric": not fmt.zero_point, "dynamic": dynamic}


def _small_float_args(fmt: Format, base: Args) -> Args | None:
    """NVFP4 and the MX floats: blocks inside a row with 8-bit scales."""
    if base["type"] != "float" or not fmt.scale.is_bytes or not fmt.group:
        return None
    strategy = "tensor_group" if fmt.global_scale else "group"
    return {**base, "strategy": strategy, "group_size": fmt.group, "scale_dtype": str(fmt.scale.storage)}


# --- to formats -----------------------------------------------------------------------------------


def weight_format(args: Mapping[str, Any]) -> Format:
    """The catalogue's format for QuantizationArgs of a weight; one scale per tensor is held once per row.

    Raises:
        UnsupportedError: there is none.
    """
    if args.get("strategy") == "tensor":
        args = {**args, "strategy": "channel"}
    return _matching(args, _weights(), "weights")


def input_format(args: Mapping[str, Any]) -> Format:
    """The catalogue's format for QuantizationArgs of an input.

    Raises:
        UnsupportedError: there is none.
    """
    return _matching(args, _inputs(), "inputs")


def _matching(args: Mapping[str, Any], formats: Mapping[tuple[Any, ...], Format], what: str) -> Format:
    try:
        return formats[_essence(args)]
    except KeyError:
        raise UnsupportedError(
            f"{what} quantized as {dict(args)} are not in the catalogue (see `qat formats`)"
        ) from None


@cache
def _weights() -> dict[tuple[Any, ...], Format]:
    return _by_meaning((fmt, weight_args(fmt)) for fmt in CATALOG.values() if fmt.block != TENSOR)


@cache
def _inputs() -> dict[tuple[Any, ...], Format]:
    return _by_meaning((fmt, input_args(fmt)) for fmt in CATALOG.values())


def _by_meaning(said: Iterable[tuple[Format, Args | None]]) -> dict[tuple[Any, ...], Format]:
    """Where several formats mean the same, the first of the catalogue."""
    formats: dict[tuple[Any, ...], Format] = {}
    for fmt, args in said:
        if args is not None:
            formats.setdefault(_essence(args), fmt)
    return formats


def _essence(args: Mapping[str, Any]) -> tuple[Any, ...]:
    """The part of QuantizationArgs that decides values; other tools write defaults out, or leave some away."""
    strategy = args["strategy"]
    scale = args.get("scale_dtype") if strategy == "group" else None
    size = args.get("group_size") if strategy in ("group", "tensor_group") else args.get("block_structure")
    keys = ("num_bits", "type", "symmetric", "strategy", "prompt")
    return (*(args.get(key) for key in keys), args.get("dynamic") or False, repr(size), scale)
