"""transformers' attention over caches that hold bytes: while decoding it reads them where they lie.

A layer of the cache answers a step with `Held`: to whoever computes with it, the dequantized keys or values; to
`attend`, which takes the place of transformers' "sdpa" in its registry of attention functions, the bytes. Attention
that does not go there (eager, FlashAttention), or that `qat::cached_attention` has no kernel for, meets dense numbers,
those of fake quantization, bit for bit.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qat.kernels.cached_attention.choose import format_problem, problem
from qat.kernels.load import registered
from qat.numbers.format import Format
from qat.serving.attention import cached_attention

FEW = 16  # new tokens of a step: more are a prompt, whose attention is a product of large matrices
REPLACED = "sdpa"  # what transformers computes attention with unless told otherwise
THROUGH = (REPLACED, "qat_int8")  # names whose calls reach `attend`


class Rows(Protocol):
    """What `Held` asks of the rows of one role, see `qat.engines.cache.Rows`."""

    format: Format
    width: int

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The values that bytes stand for."""

    def static(self, device: torch.device) -> Tensor | None:
        """What of their scales does not follow the data."""


class Held(Tensor):
    """Keys or values (batch, heads, tokens, width) that a cache has `stored` as bytes; any operation on them sees them
    dequantized."""

    stored: Tensor
    rows: Rows
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own subclasses do

    @staticmethod
    def __new__(cls, stored: Tensor, rows: Rows, dtype: torch.dtype) -> "Held":
        """A tensor without memory of its own."""
        shape = (*stored.shape[:-1], rows.width)
        held: Held = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=stored.device)
        held.stored, held.rows = stored, rows
        return held

    def __init__(self, *given: Any) -> None:
        super().__init__()

    def dense(self) -> Tensor:
        """The numbers."""
        return self.rows.decode(self.stored, self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # a classmethod, as torch documents it
        args, kwargs = tree_map(lambda each: each.dense() if isinstance(each, Held) else each, (args, kwargs or {}))
        return func(*args, **kwargs)


def reads(device: torch.device, *sides: Rows) -> bool:
    """Whether there is a kernel for caches of these formats on this device."""
    known = all(format_problem(side.format, side.width) is None for side in sides)
    return known and registered("cached_attention", device.type)


def how_read(model: Any, sides: Iterable[Rows]) -> str:
    """What a user should know of how decoding reads a cache of this model; nothing where there is no kernel at all."""
    if not registered("cached_attention", model.device.type):
        return ""
    own = model.config._attn_implementation
    problems = [f"attn_implementation is {own!r}, not {REPLACED!r}"] if own not in THROUGH else []
    problems += [problem for side in sides if (problem := format_problem(side.format, side.width)) is not None]
    return f"; decoding dequantizes it: {problems[0]}" if problems else "; decoding reads it as it lies"


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' "sdpa", or for keys and values that are `Held`, attention to their bytes."""
    if isinstance(key, Held) and isinstance(value, Held):
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and query.shape[2] > 1 and attention_mask is None
        if unusual(query, key, attention_mask, causal, dropout, kwargs) is None and _problem(query, key, value) is None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            statics = key.rows.static(query.device), value.rows.static(query.device)
            names = key.rows.format.name, value.rows.format.name
            given = (attention_mask, *statics, value.rows.width, scale, causal, *names)
            return cached_attention(query, key.stored, value.stored, *given).transpose(1, 2).contiguous(), None
        key, value = key.dense(), value.dense()
    before = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    return _before[REPLACED](module, query, key, value, attention_mask, **before)


def _problem(query: Tensor, key: Held, value: Held) -> str | None:
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    return problem(key.rows.format, value.rows.format, (key.rows.width, value.rows.width), rows)


def unusual(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, dropout: float, more: dict[str, Any]
) -> str | None:
    """What of a call the operator does not know, or None."""
    batch, _, queries, _ = query.shape
    tokens = key.shape[2]
    for name in ("position_bias", "softcap", "s_aux", "cache", "output_attentions"):
        if more.get(name) is not None and more[name] is not False:
            return name
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        return "training"
    if query.shape[0] != key.shape[0] or query.dtype != key.dtype:
        return "queries of another batch or type"
    if causal and queries != tokens:
        return "a causal mask that begins with the cache"
    if mask is not None and (
        mask.dtype != torch.bool or mask.shape not in ((batch, 1, queries, tokens), (1, 1, queries, tokens))
    ):
        return "a mask that is no plain one"
    return None


_before: dict[str, Callable[..., Any]] = {}


def install() -> None:
    """Put `attend` in front of transformers' function, once; nothing changes for other tensors than `Held`."""
    if _before.setdefault(REPLACED, ALL_ATTENTION_FUNCTIONS[REPLACED]) is ALL_ATTENTION_FUNCTIONS[REPLACED]:
        AttentionInterface.register(REPLACED, attend)
