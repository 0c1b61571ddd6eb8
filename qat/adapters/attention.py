"""Attention: the keys, after their rotation, and the values that it caches.

transformers' attention hands both to `past_key_values.update` and computes with what that returns. The module stays
what it is, an instance of a subclass made for its class, which puts a `_Gate` in front of the cache, or where there is
none (training, evaluation): what comes back is on the grid, and what a cache keeps was quantized once, when it came.
"""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from qat.errors import UnsupportedError
from qat.quantizer import InputQuantizer
from qat.sites import CACHED, Quantized, Quantizers, Slot

_CACHES = ("past_key_values", "past_key_value", "layer_past")  # what the argument is called
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "W_pack", "Wqkv", "qkv")
_LATENT = ("kv_b_proj", "kv_a_proj_with_mqa")
_WIDTHS = ("head_dim", "head_size")
_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")


class _Gate:
    """Stands where attention expects its cache: quantizes what is updated, then asks the cache, if there is one. One
    that `QUANTIZES` keeps codes and does it itself."""

    def __init__(self, module: "QatAttention", cache: Any) -> None:
        self._module, self._cache, self.passed = module, cache, False

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values to attend to, (batch, heads, tokens, width)."""
        self.passed = True
        own = key, value
        if not getattr(self._cache, "QUANTIZES", False):
            key, value = by_row(self._module.key_quantizer, key), by_row(self._module.value_quantizer, value)
        if self._cache is None:
            return key, value
        cached: tuple[Tensor, Tensor] = self._cache.update(key, value, *args, **kwargs)
        alone = cached[0].shape[-2] == key.shape[-2]  # nothing was cached before
        return own if alone and self._module.first_unrounded else cached

    def __getattr__(self, name: str) -> Any:
        if self._cache is None:
            raise AttributeError(f"there is no cache here, and attention asks for its {name}")
        return getattr(self._cache, name)


def by_row(quantizer: InputQuantizer, x: Tensor) -> Tensor:
    """x (batch, heads, tokens, width) on its grid, a row for each token and head; for each token where a scale belongs
    to a channel of a head."""
    tokens_first = x.transpose(1, 2)
    rows: Tensor = quantizer(tokens_first.flatten(2) if quantizer.format.is_columnwise else tokens_first.flatten(0, 1))
    return rows.view(tokens_first.shape).transpose(1, 2)


class QatAttention(Quantized):
    """What is added to a class of attention, `KIND`.

    Where `first_unrounded`, tokens with nothing cached before them attend to what is not rounded on its way into the
    cache (simulations of engines that do so).
    """

    KIND: Any
    first_unrounded = False
    key_quantizer: InputQuantizer
    value_quantizer: InputQuantizer

    def quantizers(self) -> dict[str, Quantizers]:
        """By slot."""
        return {"key": Quantizers(self.key_quantizer), "value": Quantizers(self.value_quantizer)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class computes, with quantized keys and values."""
        place, name = _argument(self.KIND)
        if place < len(args):
            gate = _Gate(self, args[place])
            args = (*args[:place], gate, *args[place + 1 :])
        else:
            gate = _Gate(self, kwargs.get(name))
            kwargs[name] = gate
        result = super().forward(*args, **kwargs)
        if not gate.passed:
            raise UnsupportedError(
                f"{self.KIND.__name__} did not hand its keys and values to a cache, so they cannot be "
                "quantized; leave `key` and `value` out of the rule that matches it"
            )
        return result


@cache
def _argument(kind: Any) -> tuple[int, str]:
    """Place and name of the cache among the arguments of `forward`; an empty name where it takes none."""
    names = list(inspect.signature(kind.forward).parameters)[1:]
    return next(((place, name) for place, name in enumerate(names) if name in _CACHES), (len(names), ""))


@cache
def _quantized_class(kind: Any) -> Any:
    return type(f"Qat{kind.__name__}", (QatAttention, kind), {"KIND": kind})


def _value(module: Any, names: tuple[str, ...]) -> int:
    """The first of these attributes that module or its config has, or 0."""
    holders = (module, getattr(module, "config", None))
    values = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)


def _shapes(module: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """(heads, width) of keys and of values."""
    heads, width = _value(module, _HEADS), _value(module, _WIDTHS)
    if isinstance(getattr(module, "k_proj", None), nn.Linear):
        rows = module.k_proj.out_features, module.v_proj.out_features
        heads = rows[0] // width if width else heads
        return (heads, rows[0] // heads), (heads, rows[1] // heads)
    heads = heads or _value(module, ("num_heads", "num_attention_heads"))
    return (heads, width), (heads, width)


class AttentionAdapter:
    """See `qat.sites.Adapter`. Attention is known by its layer number, its cache and its projections."""

    def takes(self, module: nn.Module) -> bool:
        """Attention of a decoder."""
        kind: Any = module.KIND if isinstance(module, QatAttention) else type(module)
        known = any(name in module._modules for name in ("k_proj", *_FUSED, *_LATENT))
        return known and hasattr(module, "layer_idx") and bool(_argument(kind)[1])

    def slots(self, module: Any) -> list[Slot]:
        """Its keys and its values."""
        refused = ""
        if any(name in module._modules for name in _LATENT):
            refused = "caches of latent attention (MLA) hold neither keys nor values, and no engine quantizes them so"
        elif getattr(module, "is_kv_shared_layer", False):
            refused = "this layer attends to the keys and values that another one caches"
        elif 0 in (shapes := _shapes(module))[0]:
            refused = f"the heads of {type(module).__name__} and their width are not known"
        both = ((0, 0), (0, 0)) if refused else shapes
        return [Slot(role, role, shape, refused=refused) for role, shape in zip(CACHED, both, strict=True)]

    def attach(self, module: nn.Module, quantizers: Mapping[str, Quantizers]) -> nn.Module:
        """The module itself, which becomes an instance of a quantized subclass of its class."""
        kind: Any = type(module)
        module.__class__ = _quantized_class(kind)
        for role in CACHED:
            module.add_module(f"{role}_quantizer", quantizers[role].own)
        return module


ADAPTER = AttentionAdapter()
