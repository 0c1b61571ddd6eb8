"""Attention of a prompt in INT8: queries and keys as codes, whose scores are whole numbers times two scales.

Two ways to quantize, one operator (`qat::prompt_attention`) that computes:

* `by_blocks`, SageAttention's (arXiv 2410.02367): a scale to 128 queries and to 64 keys of a head, and keys less their
  mean over the tokens. That mean adds the same to all scores of a query, which the softmax takes out again, and holds
  most of the outliers of keys. Values stay 16-bit numbers.
* `by_heads`: one scale, found by calibration, to a head of queries, keys and values, which are INT8 too (msmodelslim
  calls it fa3).

Probabilities are not quantized. Device kernels register on the operator's name; this file is its meaning. It changes
what a model computes, so engines call it where somebody asks (`qat.engines.prompts`); scales of heads have no caller.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.errors import UnsupportedError
from qat.numbers.catalog import INT8
from qat.numbers.scale import TINY
from qat.training.ops import operator

QUERIES, KEYS = 128, 64  # of a block of `by_blocks`
MAX = INT8.max
_ROOM = 2.0**8  # FP16 values stay below it


@dataclass(frozen=True)
class Codes:
    """A quantized prompt.

    Attributes:
        query, keys: int8 (batch, heads, tokens, width); the query may have several heads to one of keys.
        values: int8, or FP16 numbers.
        query_scales, key_scales: float32 (batch, heads, blocks), of `QUERIES` and `KEYS` tokens, or of all where there
            is one.
        value_scales: float32 (batch, heads).
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    query_scales: Tensor
    key_scales: Tensor
    value_scales: Tensor

    def attend(self, scaling: float, *, causal: bool, dtype: torch.dtype) -> Tensor:
        """See `reference`."""
        given = (self.query, self.keys, self.values, self.query_scales, self.key_scales, self.value_scales)
        result: Tensor = torch.ops.qat.prompt_attention(*given, scaling, causal, dtype)
        return result


def by_blocks(query: Tensor, keys: Tensor, values: Tensor) -> Codes:
    """A prompt (batch, heads, tokens, width) under scales of blocks, its keys less their mean."""
    own = keys.to(torch.float32)
    quantized = _blocks(query.to(torch.float32), QUERIES), _blocks(own - own.mean(dim=-2, keepdim=True), KEYS)
    (query_codes, query_scales), (key_codes, key_scales) = quantized
    held, scales = _in_range(values)
    return Codes(query_codes, key_codes, held, query_scales, key_scales, scales)


def by_heads(
    query: Tensor, keys: Tensor, values: Tensor, query_scale: Tensor, key_scale: Tensor, value_scale: Tensor
) -> Codes:
    """A prompt under given scales, float32 (heads,) each."""
    sides = ((query, query_scale), (keys, key_scale), (values, value_scale))
    for x, scale in sides:
        if scale.shape != x.shape[1:2]:
            raise UnsupportedError(
                f"scales {tuple(scale.shape)} for {x.shape[1]} heads: attention by heads wants one each"
            )
    of_query, of_keys, of_values = (_coded(x.to(torch.float32), scale[:, None, None]) for x, scale in sides)
    by_query, by_key, by_value = (scale.to(torch.float32).expand(len(x), -1).contiguous() for x, scale in sides)
    return Codes(of_query, of_keys, of_values, by_query[..., None], by_key[..., None], by_value)


def _blocks(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Codes of float32 x (..., tokens, width) and scales (..., blocks) of so many tokens."""
    tokens = x.shape[-2]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -tokens % size)).unflatten(-2, (-1, size))
    scales = (padded.abs().amax(dim=(-2, -1)) / MAX).clamp_min(TINY)
    return _coded(padded, scales[..., None, None]).flatten(-3, -2)[..., :tokens, :].contiguous(), scales


def _coded(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round_().clamp_(-MAX, MAX).to(torch.int8)


def _in_range(values: Tensor) -> tuple[Tensor, Tensor]:
    """FP16 values, and the power of two per head that they were divided by, so that none is too large for it."""
    top = values.abs().amax(dim=(-2, -1)).to(torch.float32)
    _, exponent = torch.frexp(top / _ROOM)
    scales = torch.ldexp(torch.ones_like(top), exponent.clamp(-100, 100))
    return (values.to(torch.float32) / scales[..., None, None]).to(torch.float16), scales


def reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_scales: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    scaling: float,
    causal: bool,
    dtype: torch.dtype,
) -> Tensor:
    """What `qat::prompt_attention` means, in float32: (batch, query heads, queries, columns of a value) in `dtype`.

    Args:
        query, keys, values, query_scales, key_scales, value_scales: see `Codes`.
        scaling: of the scores.
        causal: whether the queries are the last tokens, each of which sees itself and what came before. A query that
            sees nothing gives zeros.
        dtype: of the result.
    """
    groups = query.shape[1] // keys.shape[1]
    by_query = _per_token(query_scales, query.shape[-2], QUERIES)
    by_key = _per_token(key_scales, keys.shape[-2], KEYS).repeat_interleave(groups, dim=1)
    codes = keys.to(torch.float32).repeat_interleave(groups, dim=1)
    scores = query.to(torch.float32) @ codes.mT * (by_query[..., :, None] * by_key[..., None, :] * scaling)
    if causal:
        rows, tokens = scores.shape[-2:]
        last = torch.arange(tokens - rows, tokens, device=query.device)
        scores = scores.masked_fill(torch.arange(tokens, device=query.device) > last[:, None], -torch.inf)
    top = scores.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weights = (scores - top).exp()
    total = weights.sum(dim=-1, keepdim=True)
    held = (values.to(torch.float32) * value_scales[..., None, None]).repeat_interleave(groups, dim=1)
    return (weights @ held / torch.where(total == 0, 1, total)).to(dtype)


def _per_token(scales: Tensor, tokens: int, size: int) -> Tensor:
    """(..., tokens) of (..., blocks)."""
    if scales.shape[-1] == 1:
        return scales.expand(*scales.shape[:-1], tokens)
    return scales.repeat_interleave(size, dim=-1)[..., :tokens]


@operator("prompt_attention", reference)
def _(query: Tensor, keys: Tensor, values: Tensor, *args: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], values.shape[-1], dtype=args[-1])
