"""Rows of bytes and attention to them: both ways for every format, and the definition by torch's own attention."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import quantize
from qat.serving.attention import RowLayout, attention, cached_attention
from qat.training.activations import static_part, vllm_scales

FORMATS = [
    name
    for name, fmt in CATALOG.items()
    if (fmt.block[0] == 1 and fmt.divides(64)) or (fmt.block == (0, 0) and not fmt.zero_point)
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_split_as_they_were_joined(name: str) -> None:
    fmt, x = lookup(name), normal(2, 3, 5, 64)
    layout, static = RowLayout(fmt, 64), static_part(fmt, x.abs().amax())
    q = quantize(x, fmt, vllm_scales(x, fmt, static))
    rows = layout.join(q)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 3, 5, layout.bytes) and sum(layout.parts) == layout.bytes
    back = layout.split(rows, static)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.dequantize(), q.dequantize())
    if 8 % fmt.element.bits == 0 and not fmt.zero_point and fmt.is_single:
        assert layout.bytes * 8 == fmt.bits_per_row(64)


def caches(name: str, tokens: int, width: int, seed: int) -> tuple[Tensor, Tensor | None, Tensor]:
    fmt, x = lookup(name), normal(2, 2, tokens, width, seed=seed)
    static = static_part(fmt, x.abs().amax())
    q = quantize(x, fmt, vllm_scales(x, fmt, static))
    return RowLayout(fmt, width).join(q), static, q.dequantize()


@pytest.mark.parametrize("pair", [("fp8_tensor", "fp8_tensor"), ("nvfp4", "int8_token"), ("int4_g32_asym", "mxfp4")])
@pytest.mark.parametrize("queries", [1, 4])
def test_the_operator_is_attention_to_dequantized_rows(pair: tuple[str, str], queries: int) -> None:
    (keys, key_static, k), (values, value_static, v) = caches(pair[0], 9, 64, 1), caches(pair[1], 9, 32, 2)
    query, mask = normal(2, 6, queries, 64), torch.rand(2, 1, queries, 9) < 0.5
    mask[..., 0] = True
    causal = torch.ones(queries, 9, dtype=torch.bool).tril(9 - queries)[None, None]

    def both(given: Tensor | None, is_causal: bool, truth: Tensor | None) -> tuple[Any, Any]:
        more = (key_static, value_static, 32, 0.2, is_causal, *pair)
        found = cached_attention(query, keys, values, given, *more)
        dense = (t.double().repeat_interleave(3, dim=1) for t in (k, v))
        return found, functional.scaled_dot_product_attention(query.double(), *dense, attn_mask=truth, scale=0.2)

    for given in ((None, False, None), (mask, False, mask), (None, True, causal), (mask, True, mask & causal)):
        found, truth = both(*given)
        seen = torch.ones(2, 1, queries, 1) if given[2] is None else given[2].any(-1, keepdim=True)
        torch.testing.assert_close(found, torch.where(seen.bool(), truth, 0).float(), rtol=1e-5, atol=1e-6)
    half = cached_attention(query.half(), keys, values, None, key_static, value_static, 32, 0.2, False, *pair)
    assert half.dtype == torch.float16 and half.shape == (2, 6, queries, 32)


@pytest.mark.parametrize("causal", [False, True])
def test_pages_are_the_cache_in_another_order(causal: bool) -> None:
    """Sequences of 7 and of 3 tokens in pages of 3, against each of them alone; other bytes would be NaN."""
    rows, static, _ = caches("fp8_tensor", 7, 32, 1)
    query, room = normal(2, 4, 2, 32), torch.full((9, rows.shape[1], 3, rows.shape[-1]), 0x7F, dtype=torch.uint8)
    pages, lengths = torch.tensor([[5, 0, 7], [2, 10**6, 10**6]]), torch.tensor([7, 3])
    for sequence, length in enumerate(lengths.tolist()):
        for token in range(length):
            room[pages[sequence, token // 3], :, token % 3] = rows[sequence, :, token]
    more = (static, static, 32, 0.2, causal, "fp8_tensor", "fp8_tensor")
    found = cached_attention(query, room, room, None, *more, pages, lengths)
    for sequence, length in enumerate(lengths.tolist()):
        own = slice(sequence, sequence + 1)
        alone = cached_attention(query[own], rows[own, :, :length], rows[own, :, :length], None, *more)
        torch.testing.assert_close(found[own], alone)


def test_it_is_an_operator_that_compilers_know() -> None:
    keys, static, _ = caches("fp8_tensor", 5, 32, 1)
    query = normal(2, 4, 1, 32)
    given = (query, keys, keys, None, static, static, 32, 0.2, False, "fp8_tensor", "fp8_tensor")
    torch.library.opcheck(cached_attention, given, test_utils=("test_schema", "test_faketensor"))


def test_a_query_that_sees_nothing_gives_zeros_and_what_is_no_number_is_seen() -> None:
    k, v, query = normal(1, 1, 6, 8), normal(1, 1, 6, 8, seed=1), normal(1, 2, 1, 8, seed=2)
    mask = torch.zeros(1, 1, 1, 6, dtype=torch.bool)
    assert not attention(query, k, v, mask, 1.0, False).any()
    for spoiled in (k, v):
        kept = spoiled[0, 0, 2, 3].clone()
        spoiled[0, 0, 2, 3] = torch.nan
        assert attention(query, k, v, None, 1.0, False).isnan().any()
        spoiled[0, 0, 2, 3] = kept
    huge = attention(1e30 * query, k, v, None, 1.0, False)
    assert huge.isfinite().all() and torch.equal(huge[0, 0, 0], v[0, 0, (k[0, 0] @ query[0, 0, 0]).argmax()])
