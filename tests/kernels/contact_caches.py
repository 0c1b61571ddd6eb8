"""Checks of first contact for attention to caches that hold bytes, against float64 over what the bytes stand for: in
one piece for each sequence, and in pages that lie anywhere."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qat.numbers.catalog import lookup
from qat.numbers.numerics import quantize
from qat.serving.attention import RowLayout, attention
from qat.training.activations import static_part, vllm_scales
from tests.kernels.holding import ROUNDED, Check, error, normal, same, there

CACHES = (("fp8_tensor",) * 2, ("fp8_token",) * 2, ("int8_tensor",) * 2, ("int8_token",) * 2, ("int4_token",) * 2,
          ("int4_tensor",) * 2, ("nvfp4",) * 2, ("nvint4",) * 2, ("fp8_tensor", "nvfp4"),
          ("int8_token", "int4_token"))  # fmt: skip
ops = torch.ops.qat


def cache_checks(device: str, pair: tuple[str, str], lengths: tuple[int, ...]) -> Iterator[Check]:
    """Five sequences, two heads of keys to eight of queries. Around the rows lie bytes that stand for NaN or for large
    numbers."""

    @cache
    def caches(tokens: int, width: int) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        made = []
        for seed, name in enumerate(pair):
            layout, x = RowLayout(lookup(name), width), normal("cpu", 5, 2, tokens, width, seed=seed)
            x = (x * torch.logspace(-0.5, 0.5, tokens)[:, None]).float()
            static = static_part(layout.format, x.abs().amax())
            rows = layout.join(quantize(x, layout.format, vllm_scales(x, layout.format, static)))
            room = torch.full((5, 3, tokens + 7, layout.bytes), 0xFF, dtype=torch.uint8)
            room[:, :2, :tokens] = rows
            dense = layout.split(rows, static).dequantize().double()
            made.append((room.to(device)[:, :2, :tokens], static, dense))
        return made

    def call(
        query: Tensor, tokens: int, width: int, mask: Any = None, causal: bool = False, part: Any = slice(None)
    ) -> Tensor:
        (keys, k_static, _), (values, v_static, _) = caches(tokens, width)
        statics = there(device, k_static, v_static)
        given = (keys[part], values[part], mask, *statics, width, width**-0.5, causal, *pair)
        result: Tensor = ops.cached_attention(query, *given)
        return result

    def run(
        tokens: int, width: int = 128, queries: int = 1, masked: bool = False, dtype: Any = torch.bfloat16
    ) -> float:
        query, mask = normal(device, 5, 8, queries, width, dtype=dtype, seed=3), None
        if masked:
            mask = torch.rand(5, 1, queries, tokens, generator=torch.Generator().manual_seed(4)) < 0.6
            mask[..., -1] = True
        dense = [made[2] for made in caches(tokens, width)]
        causal = queries > 1 and mask is None
        truth = attention(query.cpu().double(), dense[0], dense[1], mask, width**-0.5, causal)
        return error(call(query, tokens, width, *there(device, mask), causal), truth)

    def alone() -> bool:
        """A sequence's result is the same in any company."""
        query, tokens = normal(device, 5, 8, 1, 128), lengths[-1]
        whole = call(query, tokens, 128)
        parts = (slice(0, 1), slice(2, 4), slice(4, 5))
        return all(same(call(query[part], tokens, 128, part=part), whole[part]) for part in parts)

    what = f"cached_attention {pair[0] if pair[0] == pair[1] else '-'.join(pair)}"
    for tokens in lengths:
        yield Check(f"{what} M={tokens}", ROUNDED, lambda t=tokens: run(t))
    last = lengths[-1]
    yield Check(f"{what} masked", ROUNDED, lambda: run(last, masked=True))
    yield Check(f"{what} three queries", ROUNDED, lambda: run(last, queries=3))
    yield Check(f"{what} 80 columns", ROUNDED, lambda: run(last, width=80))
    yield Check(f"{what} float16", ROUNDED / 4, lambda: run(last, dtype=torch.float16))
    yield Check(f"{what} float32", 1e-5, lambda: run(last, dtype=torch.float32))
    if device != "cpu":
        yield Check(f"{what} alone", None, alone)


def page_checks(device: str, pair: tuple[str, str], lengths: tuple[int, ...]) -> Iterator[Check]:
    """Sequences of all these lengths at once, their pages in a random order among pages of others; all bytes that no
    sequence holds stand for NaN or for large numbers."""
    count, width = len(lengths), 128
    held = torch.tensor(lengths, dtype=torch.int32)

    def run(page: int, queries: int) -> float:
        each = -(-max(lengths) // page)
        order = torch.randperm(count * each + 3, generator=torch.Generator().manual_seed(page))[: count * each]
        pages = order.view(count, each).to(torch.int32)
        rooms, statics, dense = [], [], []
        for seed, name in enumerate(pair):
            layout, x = RowLayout(lookup(name), width), normal("cpu", count, 2, max(lengths), width, seed=seed).float()
            static = static_part(layout.format, x.abs().amax())
            rows = layout.join(quantize(x, layout.format, vllm_scales(x, layout.format, static)))
            room = torch.full((count * each + 3, 2, page, layout.bytes), 0xFF, dtype=torch.uint8)
            for sequence, length in enumerate(lengths):
                for token in range(length):
                    room[pages[sequence, token // page], :, token % page] = rows[sequence, :, token]
            rooms.append(room)
            statics.append(static)
            dense.append(layout.split(rows, static).dequantize().double())
        query, least = normal(device, count, 8, queries, width, seed=3), queries - 1
        given = (*there(device, *rooms), None, *there(device, *statics), width, width**-0.5, True, *pair)
        found = ops.cached_attention(query, *given, *there(device, pages, held))
        truth = [
            attention(query[i : i + 1].cpu().double(), *(side[i : i + 1, :, :n] for side in dense), None,
                      width**-0.5, True)
            for i, n in enumerate(lengths) if n > least
        ]  # fmt: skip
        return error(found[[i for i, n in enumerate(lengths) if n > least]], torch.cat(truth))

    what = f"cached_attention {pair[0] if pair[0] == pair[1] else '-'.join(pair)}"
    yield Check(f"{what} in pages of 64", ROUNDED, lambda: run(64, 3))
    if pair[0] != pair[1]:
        yield Check(f"{what} in pages of 16", ROUNDED, lambda: run(16, 1))
