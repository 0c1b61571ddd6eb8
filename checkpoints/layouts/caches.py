"""Caches of keys and values in checkpoints, as far as layouts agree: one format for all layers, said in the words of
compressed-tensors (`kv_cache_scheme`), and a scale for the keys and one for the values of each attention layer.

Only scales that were calibrated need to be stored. Where they follow the data, engines take the format from a flag, and
the record of an export keeps it for ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qat.errors import UnsupportedError
from qat.numbers.catalog import CATALOG, E2M1, E4M3, INT4, INT8
from qat.numbers.format import Format

_TENSOR, _ROW = (0, 0), (1, 0)
_STATIC = {E4M3: "float", INT8: "int"}
_DYNAMIC = {E4M3: "fp8_per_token_head", INT8: "int8_per_token_head", INT4: "int4_per_token_head"}


@dataclass(frozen=True)
class TargetCache:
    """The cache of one attention layer: its name in the checkpoint, those of its projections, None where they are merged
    with others, and the formats of keys and values."""

    path: str
    projections: tuple[str, str] | None
    key: Format
    value: Format


@dataclass(frozen=True)
class CacheLayout:
    """How the layout of a target describes caches.

    Attributes:
        config: what `quantization_config` says of caches in a format, None where it cannot.
        note: what engines are known to do with them.
        scales: names of the scales of keys and values; raises UnsupportedError where there are none.
        stored: a float32 [1] scale as it is stored.
    """

    config: Callable[[Format], dict[str, Any] | None]
    note: Callable[[Format], str]
    scales: Callable[[TargetCache], tuple[str, str]]
    stored: Callable[[Tensor], Tensor]

    def holds(self) -> list[str]:
        """Names of the formats."""
        return [fmt.name for fmt in CATALOG.values() if self.config(fmt) is not None]


@dataclass(frozen=True)
class StoredCache:
    """The cache of one attention layer as a checkpoint describes it: QuantizationArgs, and the names of its scales."""

    path: str
    args: dict[str, Any]
    scales: tuple[str, str]


def cache_args(fmt: Format) -> dict[str, Any] | None:
    """QuantizationArgs of caches with calibrated scales, or None where none mean this format."""
    if fmt.block != _TENSOR or fmt.zero_point or fmt.elements[1:] or fmt.element not in _STATIC:
        return None
    kind = _STATIC[fmt.element]
    return {"num_bits": fmt.element.bits, "type": kind, "symmetric": True, "strategy": "tensor", "dynamic": False}


def cache_format(args: Mapping[str, Any]) -> Format:
    """The catalogue's format for QuantizationArgs of caches.

    Raises:
        UnsupportedError: there is none.
    """
    for fmt in CATALOG.values():
        own = cache_args(fmt)
        if own is not None and own == {key: args.get(key) or False for key in own}:
            return fmt
    readable = [fmt.name for fmt in CATALOG.values() if cache_args(fmt)]
    raise UnsupportedError(f"caches quantized as {dict(args)} are not implemented; readable: {', '.join(readable)}")


def engine_flag(fmt: Format) -> str | None:
    """vLLM's `--kv-cache-dtype` for caches whose scales follow the data, or None where it has none."""
    if fmt.global_scale and fmt.elements == (E2M1,) and fmt.scale == "e4m3":
        return fmt.name
    dynamic = fmt.block == _ROW and fmt.scale == "f32" and not fmt.zero_point and not fmt.elements[1:]
    return _DYNAMIC.get(fmt.element) if dynamic else None
