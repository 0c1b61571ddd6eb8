"""Attention over INT8 caches on Ascend NPUs, in torch, as vllm-ascend calls it for C8: keys and values are rounded on
their way into pages, pages lie in FRACTAL_NZ, and the operator multiplies codes with a scale for each channel of each
head (key_antiquant_scale, value_antiquant_scale; modes 0, without offsets).

Written from vllm-ascend's backend and torch_npu's documents; what is not said there is float32, rounded once to BF16.
Nothing here was compared with an NPU. It shares no arithmetic with the fake quantization of training.
"""

import torch
from torch import Tensor

_INT8 = torch.iinfo(torch.int8)
_MODEL = torch.bfloat16
PAGE_COLUMNS = 32
"""Columns of a head that lie together in a page: 32 bytes."""


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """int8 codes of x (tokens, heads, width) under scales (heads, width): torch operators on the model's BF16 numbers,
    each of which rounds its result."""
    reciprocal = 1.0 / scale.to(_MODEL)
    return torch.round(x.to(_MODEL) * reciprocal).clamp(_INT8.min, _INT8.max).to(torch.int8)


def empty_pages(count: int, size: int, heads: int, width: int) -> Tensor:
    """`count` pages for `size` tokens each, int8 (count, heads, width / 32, size, 32)."""
    return torch.zeros(count, heads, width // PAGE_COLUMNS, size, PAGE_COLUMNS, dtype=torch.int8)


def scatter_pa_kv_cache(codes: Tensor, pages: Tensor, slots: Tensor) -> None:
    """`npu_scatter_pa_kv_cache` for one side: token i of codes (tokens, heads, width) goes into slot slots[i], where
    slots count through the pages."""
    size = pages.shape[3]
    parts = codes.unflatten(-1, (-1, PAGE_COLUMNS))
    pages[torch.div(slots, size, rounding_mode="floor"), :, :, slots % size] = parts


def gathered(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """Codes (length, heads, width) of one sequence, whose pages `table` lists in order."""
    own = pages[table].permute(0, 3, 1, 2, 4)  # (pages, tokens, heads, pieces, 32)
    return own.flatten(3).flatten(0, 1)[:length]


def read(codes: Tensor, scale: Tensor) -> Tensor:
    """BF16 numbers of codes (tokens, heads, width) under scales (heads, width)."""
    return codes.to(_MODEL) * scale.to(_MODEL)


def fused_infer_attention_score(
    query: Tensor,
    pages: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor],
    tables: Tensor,
    lengths: list[int],
    scaling: float,
) -> Tensor:
    """`npu_fused_infer_attention_score` of one token for each sequence ("BNSD"): BF16 (sequences, query heads, width).

    Args:
        query: BF16 (sequences, query heads, width); consecutive ones share a head of keys and values.
        pages, scales: of keys and of values, see above.
        tables: int64 (sequences, pages).
        lengths: tokens of each sequence, the one that asks among them.
        scaling: of the scores.
    """
    rows = []
    for one, table, length in zip(query.float(), tables, lengths, strict=True):
        key, value = (
            read(gathered(side, table, length), scale).float() for side, scale in zip(pages, scales, strict=True)
        )
        grouped = one.view(key.shape[1], -1, one.shape[-1])  # (heads of keys, queries of each, width)
        scores = torch.einsum("hqd,thd->hqt", grouped, key) * scaling
        rows.append(torch.einsum("hqt,thd->hqd", scores.softmax(dim=-1), value).flatten(0, 1))
    return torch.stack(rows).to(_MODEL)
