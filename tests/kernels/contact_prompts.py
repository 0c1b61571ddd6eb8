"""Checks of first contact for attention of a prompt in INT8, against float64 over its codes: both ways to quantize,
one key and several blocks of them, two query heads to one head of keys, with and without a causal mask."""

from collections.abc import Iterator

import torch

from qat.serving.attention import attention
from qat.serving.prompt_attention import KEYS, QUERIES, Codes, by_blocks, by_heads
from tests.kernels.holding import ROUNDED, Check, error, normal, there


def prompt_checks(device: str, tokens: int) -> Iterator[Check]:
    """For a prompt of so many tokens, whose last 40 (or all) are queries, heads of 64 columns."""

    def quantized(way: str) -> Codes:
        x = [normal("cpu", 2, heads, n, 64, dtype=torch.float32, seed=heads + n)
             for heads, n in ((4, min(tokens, 40)), (2, tokens), (2, tokens))]  # fmt: skip
        if way == "blocks":
            return by_blocks(*x)
        return by_heads(*x, *(each.abs().amax(dim=(0, 2, 3)) / 127 for each in x))

    def run(way: str, causal: bool) -> float:
        codes = quantized(way)
        scales = (codes.query_scales, QUERIES), (codes.key_scales, KEYS)
        query, keys = (
            part.double()
            * each.double().repeat_interleave(size if each.shape[-1] > 1 else part.shape[2], 2)[
                ..., : part.shape[2], None
            ]
            for part, (each, size) in zip((codes.query, codes.keys), scales, strict=True)
        )
        values = codes.values.double() * codes.value_scales.double()[..., None, None]
        truth = attention(query, keys, values, None, 0.125, causal)
        there_codes = Codes(*there(device, *(getattr(codes, name) for name in Codes.__dataclass_fields__)))
        return error(there_codes.attend(0.125, causal=causal, dtype=torch.bfloat16), truth)

    for way in ("blocks", "heads"):
        for causal in (False, True):
            name = f"prompt_attention in {way} M={tokens}{' causal' if causal else ''}"
            yield Check(name, ROUNDED, lambda way=way, causal=causal: run(way, causal))
