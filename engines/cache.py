"""transformers' cache for models whose keys and values are quantized: it holds the bytes of their formats.

Each token and head is one row of bytes: its packed codes, then the scales that belong to it. To transformers such rows
are keys and values like others, which it crops, reorders, repeats and slides; only `update` knows what they mean.
Attention gets them back dequantized: the numbers that fake quantization gives, bit for bit.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qat.adapters import candidates
from qat.errors import UnsupportedError
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales, quantize
from qat.quantizer import InputQuantizer
from qat.sites import CACHED, sites
from qat.training.activations import vllm_scales

_RULE = "vllm"  # whose arithmetic the rows follow
_BYTE, _BF16 = 8, 2  # bits; bytes


class Rows:
    """One role of one layer: tensors (batch, heads, tokens, width) to bytes (batch, heads, tokens, bytes) and back."""

    def __init__(self, quantizer: InputQuantizer, width: int) -> None:
        self.quantizer, self.format, self.width = quantizer, quantizer.format, width
        static = quantizer.static()
        self._static = None if static is None else static.detach()
        blocks = self.format.grid_shape(1, width)[1] if self.format.is_rowwise else 0
        extra = self.format.zero_point + (not self.format.is_single)
        self.parts = [width // _per_byte(self.format, width), blocks * self.format.scale.storage.itemsize]
        self.parts += [blocks] * extra

    @property
    def bytes(self) -> int:
        """Of one token and head."""
        return sum(self.parts)

    def encode(self, x: Tensor) -> Tensor:
        """Codes and scales of x as bytes."""
        x = self.quantizer.transformed(x)
        q = quantize(x, self.format, vllm_scales(x, self.format, self._on(x.device)))
        parts = [_packed(q.codes, _per_byte(self.format, self.width))]
        if self.format.is_rowwise:
            given = [tensor for name, tensor in q.parameters.items() if name != "global_scale"]
            parts += [tensor.contiguous().view(torch.uint8).view(*x.shape[:-1], -1) for tensor in given]
        return torch.cat(parts, dim=-1)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The values that the bytes stand for."""
        codes, stored, *more = rows.split(self.parts, dim=-1)
        codes = _unpacked(codes, _per_byte(self.format, self.width))
        static, fmt = self._on(rows.device), self.format
        if not fmt.is_rowwise:
            assert static is not None
            return QTensor(fmt, codes, Scales(static.view(1, 1))).dequantize(dtype)
        scale = stored.contiguous().view(fmt.scale.storage).flatten(0, -2)
        above = static.reciprocal().view(()) if fmt.global_scale and static is not None else None
        zero = more[0].contiguous().view(torch.int8).flatten(0, -2) if fmt.zero_point else None
        choice = more[-1].flatten(0, -2) if not fmt.is_single else None
        return QTensor(fmt, codes, Scales(scale, above, zero, choice)).dequantize(dtype)

    def _on(self, device: torch.device) -> Tensor | None:
        if self._static is not None and self._static.device != device:
            self._static = self._static.to(device)
        return self._static


def _per_byte(fmt: Format, width: int) -> int:
    """How many codes share a byte: those of 3 or 6 bits do not."""
    count = _BYTE // fmt.element.bits if _BYTE % fmt.element.bits == 0 else 1
    return count if width % count == 0 else 1


def _packed(codes: Tensor, per_byte: int) -> Tensor:
    """Neighbours in one byte, the first in the lowest bits."""
    bits, packed = _BYTE // per_byte, torch.zeros_like(codes[..., ::per_byte])
    for place in range(per_byte):
        packed |= codes[..., place::per_byte] << place * bits
    return packed


def _unpacked(packed: Tensor, per_byte: int) -> Tensor:
    bits = _BYTE // per_byte
    fields = [packed >> place * bits & (1 << bits) - 1 for place in range(per_byte)]
    return torch.stack(fields, dim=-1).flatten(-2)


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
        return self.key.decode(rows[0], key_states.dtype), self.value.decode(rows[1], value_states.dtype)


class QuantizedLayer(_ByRows, DynamicLayer):
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
