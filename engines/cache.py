"""transformers' cache for models whose keys and values are quantized: it holds the bytes of their formats.

Each token and head is one row of bytes: its packed codes, then the scales that belong to it. To transformers such rows
are keys and values like others, which it crops, reorders, repeats and slides; only `update` knows what they mean.
Attention gets them back dequantized, the numbers that fake quantization gives, bit for bit; or while decoding, where a
kernel reads them, as they are (`attention.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qat.adapters import candidates
from qat.engines.attention import FEW, Held, install, reads
from qat.errors import UnsupportedError
from qat.kernels.load import load
from qat.numbers.numerics import quantize
from qat.quantizer import InputQuantizer
from qat.serving.attention import RowLayout
from qat.sites import CACHED, sites
from qat.training.activations import vllm_scales

_RULE = "vllm"  # whose arithmetic the rows follow
_BF16 = 2  # bytes
_SPARE, _LEAST = 8, 32  # room for an eighth more tokens, and at least so many


class Rows:
    """One role of one layer: tensors (batch, heads, tokens, width) to bytes (batch, heads, tokens, bytes) and back."""

    def __init__(self, quantizer: InputQuantizer, width: int) -> None:
        self.quantizer, self.format, self.width = quantizer, quantizer.format, width
        self.layout = RowLayout(self.format, width)
        static = quantizer.static()
        self._static = None if static is None else static.detach()

    @property
    def bytes(self) -> int:
        """Of one token and head."""
        return self.layout.bytes

    def encode(self, x: Tensor) -> Tensor:
        """Codes and scales of x as bytes."""
        x = self.quantizer.transformed(x)
        return self.layout.join(quantize(x, self.format, vllm_scales(x, self.format, self.static(x.device))))

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The values that the bytes stand for."""
        return self.layout.split(rows, self.static(rows.device)).dequantize(dtype)

    def static(self, device: torch.device) -> Tensor | None:
        """What of the scales does not follow the data."""
        if self._static is not None and self._static.device != device:
            self._static = self._static.to(device)
        return self._static


class _ByRows:
    """What is added to a class of cache layers."""

    key: Rows
    value: Rows

    def __init__(self, layer: Any) -> None:
        vars(self).update(vars(layer))  # an empty layer of transformers, as the model's config describes it

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes new keys and values, gives all that are attended to."""
        grown: Any = super()
        rows = grown.update(self.key.encode(key_states), self.value.encode(value_states), *args, **kwargs)
        dtype = key_states.dtype
        if key_states.shape[-2] <= FEW and reads(key_states.device, self.key, self.value):
            return Held(rows[0], self.key, dtype), Held(rows[1], self.value, dtype)
        return self.key.decode(rows[0], dtype), self.value.decode(rows[1], dtype)


class _Growing(DynamicLayer):
    """transformers' layer, but for room behind the last token: a step writes its own rows, and copies no others."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes new rows, gives all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rooms: dict[str, Tensor] = {}
        self.keys, self.values = self._behind("keys", key_states), self._behind("values", value_states)
        return self.keys, self.values

    def _behind(self, name: str, new: Tensor) -> Tensor:
        """What is held with `new` behind it, in the room that it lies in, or where it lies elsewhere by now (other
        beams, another device) in a new one."""
        held, room = getattr(self, name), self.rooms.get(name)
        first = held.shape[2] if held.dim() == new.dim() else 0
        end = first + new.shape[2]
        if room is None or not _is_begin(held, room) or room.shape[2] < end:
            room = new.new_empty(*new.shape[:2], end + end // _SPARE + _LEAST, new.shape[3])
            if first:
                room[:, :, :first] = held
        room[:, :, first:end] = new
        self.rooms[name] = room
        return room[:, :, :end]


def _is_begin(held: Tensor, room: Tensor) -> bool:
    """Whether these are the first tokens of the room."""
    return (held.data_ptr(), held.stride(), held.shape[:2]) == (room.data_ptr(), room.stride(), room.shape[:2])


class QuantizedLayer(_ByRows, _Growing):
    """A layer that grows."""


class QuantizedSlidingLayer(_ByRows, DynamicSlidingWindowLayer):
    """A layer that keeps the last tokens."""


_LAYERS: dict[Any, Any] = {DynamicLayer: QuantizedLayer, DynamicSlidingWindowLayer: QuantizedSlidingLayer}


class QuantizedCache(DynamicCache):
    """The cache of one model; layers that the scheme leaves alone stay transformers' own.

    Raises:
        UnsupportedError: a layer whose cache is of another kind than growing or sliding.
    """

    QUANTIZES = True  # see `qat.adapters.attention`

    def __init__(self, model: Any) -> None:
        super().__init__(config=model.config)
        load(("cached_attention",))
        install()
        widths = {(c.path, c.role): c.slot.shape[1] for c in candidates(model) if c.role in CACHED}
        for site in sites(model, *CACHED):
            place: Any = site.owner.layer_idx
            layer = self.layers[place]
            if type(layer) in _LAYERS:
                self.layers[place] = layer = _LAYERS[type(layer)](layer)
            elif not isinstance(layer, _ByRows):
                raise UnsupportedError(f"{site.path}: a {type(layer).__name__} cannot hold quantized keys and values")
            setattr(layer, site.role, Rows(site.quantizer, widths[site.path, site.role]))
        total, dense = bytes_per_token(model)
        self.cost = f"the cache takes {total:,} bytes per token ({dense:,} in BF16)"


def quantized_cache(model: nn.Module) -> QuantizedCache | None:
    """An empty cache for `generate(past_key_values=...)`, or None where transformers' own holds the model's numbers:
    nothing is quantized, or by an arithmetic that no server has."""
    quantizers = [site.quantizer for site in sites(model, *CACHED)]
    served = bool(quantizers) and all(q.mode != "dense" and q.rule == _RULE for q in quantizers)
    return QuantizedCache(model) if served else None


def bytes_per_token(model: nn.Module) -> tuple[int, int]:
    """What a token costs in a `QuantizedCache` (or without one, BF16), and what it would in BF16."""
    quantizers = {(site.path, site.role): site.quantizer for site in sites(model, *CACHED)}
    total = dense = 0
    for candidate in candidates(model):
        if candidate.role in CACHED and not candidate.slot.refused:
            heads, width = candidate.slot.shape
            quantizer = quantizers.get((candidate.path, candidate.role))
            total += heads * (Rows(quantizer, width).bytes if quantizer is not None else _BF16 * width)
            dense += heads * _BF16 * width
    return total, dense
