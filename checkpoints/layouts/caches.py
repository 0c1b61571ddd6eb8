"""Caches of keys and values in checkpoints, as far as layouts agree: one format for all layers, said in the words of
compressed-tensors (`kv_cache_scheme`), and a scale for the keys and one for the values of each attention layer, or for
each of their channels.

Only scales that were calibrated need to be stored. Where they follow the data, engines take the format from a flag, and
the record of an export keeps it for ours.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from qat.checkpoints.layouts.kinds import ROW, TENSOR, fp8_input, int_columns, int_input, nvfp4
from qat.checkpoints.layouts.npu import Npu
from qat.errors import CheckpointError, UnsupportedError
from qat.numbers.catalog import CATALOG
from qat.numbers.format import Format

_KEYS, _OF_CACHES = ("kv_cache_scheme", "kv_cache_quant_algo"), ("k_scale", "v_scale")


@dataclass(frozen=True)
class TargetCache:
    """The cache of one attention layer: its name in the checkpoint, those of its projections (None if they are merged
    with others), the formats of keys and values, how wide their heads are, and how its attention differs from plain
    attention to all tokens before ("" where it does not)."""

    path: str
    projections: tuple[str, str] | None
    key: Format
    value: Format
    widths: tuple[int, int] = (0, 0)
    special: str = ""


def no_offsets(cache: TargetCache) -> tuple[str, ...]:
    """Of layouts that store scales alone."""
    return ()


@dataclass(frozen=True)
class CacheLayout:
    """How the layout of a target describes caches.

    Attributes:
        config: what `quantization_config` says of caches in a format, None where it cannot.
        note: what engines are known to do with them.
        scales: names of the scales of keys and values; raises UnsupportedError where there are none.
        stored: a float32 scale, [1] or one of each channel, as it is stored.
        offsets: names of the zero points that are stored beside the scales, zeros of their type and shape.
        scheme, npu: what engines on NPUs call such caches, and which of them read them.
    """

    config: Callable[[Format], dict[str, Any] | None]
    note: Callable[[Format], str]
    scales: Callable[[TargetCache], tuple[str, str]]
    stored: Callable[[Tensor], Tensor]
    offsets: Callable[[TargetCache], tuple[str, ...]] = no_offsets
    scheme: str = ""
    npu: tuple[Npu, ...] = ()

    def holds(self) -> list[str]:
        """Names of the formats."""
        return [fmt.name for fmt in CATALOG.values() if self.config(fmt) is not None]


@dataclass(frozen=True)
class StoredCache:
    """The cache of one attention layer as a checkpoint describes it: QuantizationArgs, and the names of its scales and
    zero points."""

    path: str
    args: dict[str, Any]
    scales: tuple[str, str]
    offsets: tuple[str, ...] = ()


def cache_args(fmt: Format) -> dict[str, Any] | None:
    """QuantizationArgs of caches with calibrated scales, or None where none mean this format."""
    kind = "float" if fp8_input(fmt, TENSOR) else "int" if int_input(fmt, TENSOR, 8) or int_columns(fmt, 8) else None
    strategy = "channel" if fmt.is_columnwise else "tensor"
    args = {"num_bits": fmt.element.bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False}
    return args if kind else None


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
    if fp8_input(fmt, ROW):
        return "fp8_per_token_head"
    if int_input(fmt, ROW, 8, 4):
        return f"int{fmt.element.bits}_per_token_head"
    return fmt.name if nvfp4(fmt) else None


# --- reading ----------------------------------------------------------------------------------------


class ReadsCaches(ABC):
    """What a reader of exported folders says of caches. A layout that has them overrides `_cache_args`."""

    CACHE_SCALES: ClassVar[tuple[str, str]] = _OF_CACHES  # of keys and values, below the path of an attention layer
    CACHE_OFFSETS: ClassVar[tuple[str, ...]] = ()  # zero points, likewise

    folder: Path
    where: str
    quantization: dict[str, Any]
    names: Any  # every stored tensor

    @abstractmethod
    def _sound_value(self, name: str) -> Tensor:
        """A stored scale that is one number, float32 [1]."""

    def _cache_args(self) -> dict[str, Any] | None:
        """QuantizationArgs of cached keys and values, None where they are not quantized."""
        refuse_unread(self.quantization, self.where, dict.fromkeys(_KEYS, "a quantized KV cache"))
        return None

    @cached_property
    def caches(self) -> dict[str, StoredCache]:
        """Quantized caches by the path of their attention layer: those with a stored scale."""
        args, (key, value) = self._cache_args(), self.CACHE_SCALES
        if args is None:
            return {}
        paths = sorted(name.removesuffix(f".{key}") for name in self.names if name.endswith(f".{key}"))
        offsets = {path: tuple(f"{path}.{name}" for name in self.CACHE_OFFSETS) for path in paths}
        return {path: StoredCache(path, args, (f"{path}.{key}", f"{path}.{value}"), offsets[path]) for path in paths}

    @cached_property
    def cache_names(self) -> frozenset[str]:
        """Scales and zero points of quantized caches, stored or missing."""
        return frozenset(name for cache in self.caches.values() for name in (*cache.scales, *cache.offsets))

    def cache_scales(self, path: str) -> tuple[Tensor, Tensor]:
        """The scales of keys and values of an attention layer, float32: [1] each, or one for each channel of each head.

        Raises:
            CheckpointError: one is missing, is not as many numbers, or is zero, negative or not finite.
        """
        for name in (*self.caches[path].scales, *self.caches[path].offsets):
            if name not in self.names:
                raise CheckpointError(f"{self.folder}: {name} is missing")
        key, value = map(self._cache_scale, self.caches[path].scales)
        return key, value

    def _cache_scale(self, name: str) -> Tensor:
        """One of the scales of a cache, float32."""
        return self._sound_value(name)

    def _check_caches(self) -> None:
        """Scales and configuration ask for the same."""
        if self._cache_args() is not None and not self.caches:
            raise CheckpointError(
                f"{self.where} asks for quantized caches, but no {self.CACHE_SCALES[0]} is stored; engines would take "
                "1.0, which nobody calibrated"
            )
        own = {name.rpartition(".")[2] for name in (*_OF_CACHES, *self.CACHE_SCALES, *self.CACHE_OFFSETS)}
        for name in sorted(self.names - self.cache_names):
            if name.rpartition(".")[2] in own:
                raise CheckpointError(f"{self.folder}: {name} scales a cache that {self.where} does not describe")


def refuse_unread(configuration: dict[str, Any], where: str, unread: Mapping[str, str]) -> None:
    """Raise UnsupportedError where a configuration asks for something that changes results and is not implemented.

    Args:
        unread: what it would ask for, by key.
    """
    for key, what in unread.items():
        if not says_nothing(configuration.get(key)):
            raise UnsupportedError(f"{where}: {key} asks for {what}, which is not implemented; readable: null")


def says_nothing(value: Any) -> bool:
    """null, or a table with nothing in it at any depth."""
    return not value or (isinstance(value, dict) and all(map(says_nothing, value.values())))
