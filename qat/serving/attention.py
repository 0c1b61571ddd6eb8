"""Attention that reads quantized keys and values as a cache holds them: the bytes of a row, and the operator on them.

A row is one token of one head: its packed codes, then the scales that belong to it (`RowLayout`). Device kernels
register on `qat::cached_attention`; this file is its meaning and what runs where no kernel does: softmax of the scores
with the dequantized keys, times the dequantized values, all in float32.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales
from qat.training.ops import operator

_BYTE = 8  # bits


@dataclass(frozen=True)
class RowLayout:
    """Where the numbers of a row of `width` values lie."""

    format: Format
    width: int

    @property
    def per_byte(self) -> int:
        """How many codes share a byte: those of 3 or 6 bits do not."""
        bits = self.format.element.bits
        count = _BYTE // bits if _BYTE % bits == 0 else 1
        return count if self.width % count == 0 else 1

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """Bytes of the codes, of the scales, and of zero points and choices where there are any."""
        fmt = self.format
        blocks = fmt.grid_shape(1, self.width)[1] if fmt.is_rowwise else 0
        extra = fmt.zero_point + (not fmt.is_single)
        return (self.width // self.per_byte, blocks * fmt.scale.storage.itemsize, *[blocks] * extra)

    @property
    def bytes(self) -> int:
        """Of one token and head."""
        return sum(self.parts)

    def join(self, q: QTensor) -> Tensor:
        """The rows (..., bytes) of a quantized tensor (..., width)."""
        parts = [_packed(q.codes, self.per_byte)]
        if self.format.is_rowwise:
            given = [tensor for name, tensor in q.parameters.items() if name != "global_scale"]
            parts += [tensor.contiguous().view(torch.uint8).view(*q.shape[:-1], -1) for tensor in given]
        return torch.cat(parts, dim=-1)

    def split(self, rows: Tensor, static: Tensor | None) -> QTensor:
        """Undo `join`; `static` as `qat.training.activations.static_part` returns it."""
        codes, stored, *more = rows.split(self.parts, dim=-1)
        codes, fmt = _unpacked(codes, self.per_byte), self.format
        if not fmt.is_rowwise:
            assert static is not None
            return QTensor(fmt, codes, Scales(static.view(1, 1)))
        scale = stored.contiguous().view(fmt.scale.storage).flatten(0, -2)
        above = static.reciprocal().view(()) if fmt.global_scale and static is not None else None
        zero = more[0].contiguous().view(torch.int8).flatten(0, -2) if fmt.zero_point else None
        choice = more[-1].flatten(0, -2) if not fmt.is_single else None
        return QTensor(fmt, codes, Scales(scale, above, zero, choice))


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


def reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    key_static: Tensor | None,
    value_static: Tensor | None,
    value_width: int,
    scaling: float,
    causal: bool,
    key_format: str,
    value_format: str,
    pages: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """What `qat::cached_attention` means: (batch, query heads, queries, value_width) in the dtype of the query.

    Args:
        query: (batch, query heads, queries, width); consecutive query heads share a head of keys and values.
        keys, values: uint8 (batch, heads, tokens, bytes) as `RowLayout` says.
        mask: bool (batch or 1, 1, queries, tokens), true where a query sees a token; None is everywhere. A query that
            sees nothing gives zeros.
        key_static, value_static: float32 [1], see `qat.training.activations.static_part`; None where there is none.
        value_width: columns of a value.
        scaling: of the scores.
        causal: whether the queries are the last tokens, each of which sees itself and what came before.
        key_format, value_format: names in the catalogue.
        pages: integers (batch, pages of a sequence); then keys and values are (pages, heads, tokens of a page, bytes),
            and token t of a sequence lies in page t // tokens of it. Only those before its length are looked up.
        lengths: integers (batch,), tokens of each sequence, with `pages` only; `causal` counts from its own end.
    """
    key_layout, value_layout = (
        RowLayout(lookup(key_format), query.shape[-1]),
        RowLayout(lookup(value_format), value_width),
    )
    if pages is not None and lengths is not None:
        keys, values = (_in_order(rows, pages, lengths) for rows in (keys, values))
        seen = _seen(lengths, query.shape[2], keys.shape[2], causal)
        mask, causal = seen if mask is None else seen & mask, False
    dense = key_layout.split(keys, key_static).dequantize(), value_layout.split(values, value_static).dequantize()
    return attention(query, *dense, mask, scaling, causal).to(query.dtype)


def _in_order(rows: Tensor, pages: Tensor, lengths: Tensor) -> Tensor:
    """Rows of every sequence (batch, heads, tokens, bytes) from where its pages lie, zeros behind its length."""
    each = rows.shape[2]
    used = torch.arange(pages.shape[1], device=rows.device) * each < lengths[:, None]
    found = rows[torch.where(used, pages, 0).long()].transpose(1, 2).flatten(2, 3)
    behind = torch.arange(found.shape[2], device=rows.device) >= lengths[:, None]
    return found.masked_fill(behind[:, None, :, None], 0)


def _seen(lengths: Tensor, queries: int, tokens: int, causal: bool) -> Tensor:
    """Which tokens (batch, 1, queries, tokens) each query sees."""
    place = torch.arange(queries, device=lengths.device) + 1 - queries if causal else lengths.new_zeros(queries)
    last = lengths[:, None] + place
    return torch.arange(tokens, device=lengths.device) < last[:, None, :, None]


def attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, causal: bool) -> Tensor:
    """The same of dense keys and values, computed in their dtype."""
    groups = query.shape[1] // keys.shape[1]
    grouped = query.to(keys.dtype).unflatten(1, (-1, groups))
    scores = grouped @ keys[:, :, None].mT * scaling
    queries, tokens = scores.shape[-2:]
    if causal:
        last = torch.arange(tokens - queries, tokens, device=keys.device)
        seen = torch.arange(tokens, device=keys.device) <= last[:, None]
        scores = scores.masked_fill(~seen, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    top = scores.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weights = (scores - top).exp()
    total = weights.sum(dim=-1, keepdim=True)
    return ((weights @ values[:, :, None]) / torch.where(total == 0, 1, total)).flatten(1, 2)


@operator("cached_attention", reference)
def _(query: Tensor, keys: Tensor, values: Tensor, mask: Any, key_static: Any, value_static: Any, value_width: int,
      *args: Any) -> Tensor:  # fmt: skip
    return query.new_empty(*query.shape[:-1], value_width)


cached_attention = torch.ops.qat.cached_attention.default
