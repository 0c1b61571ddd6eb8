"""Operators of torch_npu on INT8 caches as their documents describe them, like `operators.py`: a second reading, which
shares nothing with `qat`. Pages are in FRACTAL_NZ, (pages, heads, width / 32, tokens of a page, 32)."""

from typing import Any

import torch
from torch import Tensor


def npu_scatter_pa_kv_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Each token (heads, width) into its slot, which counts through the pages."""
    for tokens, pages in ((key, key_cache), (value, value_cache)):
        size = pages.shape[3]
        for token, slot in zip(tokens, slot_mapping.tolist(), strict=True):
            pages[slot // size, :, :, slot % size] = token.unflatten(-1, (-1, pages.shape[-1]))


def npu_fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, *, input_layout: str, **named: Any
) -> tuple[Tensor, Tensor]:
    """One token of each sequence against its pages ("BNSD"), or tokens of sequences one behind the other ("TND")."""
    attend = {"BNSD": _paged, "TND": _dense}[input_layout]
    return attend(query, key, value, **named).to(query.dtype), torch.empty(0)


def _paged(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
    assert named["sparse_mode"] == named["key_antiquant_mode"] == named["value_antiquant_mode"] == 0
    assert "key_antiquant_offset" not in named and "value_antiquant_offset" not in named, "what was added comes off"
    heads = named["num_key_value_heads"]
    rows = []
    for one, table, length in zip(query, named["block_table"], named["actual_seq_lengths_kv"], strict=True):
        sides = []
        for pages, scale in ((key, named["key_antiquant_scale"]), (value, named["value_antiquant_scale"])):
            assert scale.shape == (heads, 1, one.shape[-1]), "one for each channel"
            held = pages[table.long()].permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)[:, :length]
            sides.append((held.to(scale.dtype) * scale).repeat_interleave(named["num_heads"] // heads, dim=0))
        rows.append(_attended(one, sides[0], sides[1], named["scale"], None))
    return torch.stack(rows)


def _dense(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
    assert named["block_table"] is None and named["sparse_mode"] == 3, "each token and those before it"
    parts, first, before = [], 0, 0
    group = named["num_heads"] // named["num_key_value_heads"]
    ends = zip(named["actual_seq_lengths"], torch.as_tensor(named["actual_seq_lengths_kv"]).tolist(), strict=True)
    for end, last in ends:
        own, of_keys = slice(first, end), slice(before, last)
        hidden = torch.ones(end - first, last - before, dtype=torch.bool).triu(1 + last - before - (end - first))
        sides = [side[of_keys].transpose(0, 1).repeat_interleave(group, dim=0) for side in (key, value)]
        parts.append(_attended(query[own].transpose(0, 1), sides[0], sides[1], named["scale"], hidden).transpose(0, 1))
        first, before = end, last
    return torch.cat(parts)


def _attended(query: Tensor, key: Tensor, value: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    """(heads, tokens, width), in float32."""
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(dim=-1) @ value.float()


OPERATORS = {each.__name__: each for each in (npu_scatter_pa_kv_cache, npu_fused_infer_attention_score)}
