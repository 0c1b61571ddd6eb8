"""Run by test_cached_attention.py under TRITON_INTERPRET=1: their source, executed on the CPU, against float64."""

import itertools
import sys
from typing import Any

import torch
from torch import Tensor

from qat.kernels.cached_attention import choose as rules
from qat.kernels.cached_attention import triton as kernel
from qat.numbers.catalog import lookup
from qat.numbers.numerics import quantize
from qat.serving.attention import RowLayout, attention, cached_attention
from qat.training.activations import static_part, vllm_scales
from tests.kernels.interpreted import mend

GENERATOR = torch.Generator().manual_seed(0)
READ = ("fp8_tensor", "fp8_token", "int8_tensor", "int8_token", "int4_token", "int4_tensor", "nvfp4", "nvint4",
        "fp8_g128", "int8_channel")  # fmt: skip
NOT_READ = ("int4_g32", "int4_channel_asym", "mxfp4", "if4", "nf4_g64", "int3_token", "mxfp6", "fp8_b128")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


class Cache:
    """Keys or values as bytes, in the middle of a larger buffer of bytes that stand for NaN or for large numbers."""

    def __init__(self, name: str, batch: int, heads: int, tokens: int, width: int) -> None:
        self.name, self.layout = name, RowLayout(lookup(name), width)
        fmt = self.layout.format
        x = normal(batch, heads, tokens, width) * torch.logspace(-1, 1, tokens)[:, None]
        self.static = static_part(fmt, x.abs().amax())
        rows = self.layout.join(quantize(x, fmt, vllm_scales(x, fmt, self.static)))
        room = torch.full((batch, heads + 1, tokens + 5, self.layout.bytes), 0xFF, dtype=torch.uint8)
        room[:, :heads, :tokens] = rows
        self.rows = room[:, :heads, :tokens]
        self.dense = self.layout.split(rows, self.static).dequantize(torch.float32).double()


def run(query: Tensor, keys: Cache, values: Cache, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    width = values.layout.width
    given: Any = (
        query,
        keys.rows,
        values.rows,
        mask,
        keys.static,
        values.static,
        width,
        query.shape[-1] ** -0.5,
        causal,
    )
    return kernel.cached_attention(*given, keys.name, values.name)


def check(
    what: str, query: Tensor, keys: Cache, values: Cache, mask: Tensor | None = None, causal: bool = False
) -> None:
    found = run(query, keys, values, mask, causal)
    truth = attention(query.double(), keys.dense, values.dense, mask, query.shape[-1] ** -0.5, causal)
    assert found.shape == truth.shape and found.dtype == query.dtype, what
    error = float((found.double() - truth).norm() / truth.norm().clamp_min(1e-30))
    limit = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}[query.dtype]
    assert error <= limit, f"{what}: {error}"


def numbers() -> None:
    """Every format, alone and in pairs, in one piece and in several."""
    for name, dtype in itertools.product(READ, (torch.float16, torch.float32)):
        width = max(32, lookup(name).block[1])
        keys, values = Cache(name, 1, 2, 300, width), Cache(name, 1, 2, 300, width)
        check(f"{name} {dtype}", normal(1, 4, 1, width).to(dtype), keys, values)
    for pair in (("int8_tensor", "int4_token"), ("nvfp4", "fp8_tensor"), ("fp8_token", "nvfp4")):
        keys, values = Cache(pair[0], 2, 1, 65, 64), Cache(pair[1], 2, 1, 65, 32)
        check(f"{pair}", normal(2, 3, 2, 64).half(), keys, values, causal=True)


def shapes() -> None:
    """Odd lengths, heads that are no power of two wide, many query heads, masks."""
    for tokens, heads, groups, queries, width in (
        (1, 1, 1, 1, 16), (63, 2, 3, 1, 48), (64, 1, 5, 3, 80), (257, 1, 6, 5, 64), (31, 1, 7, 1, 256),
    ):  # fmt: skip
        for name in ("fp8_tensor", "int4_token", "nvfp4"):
            keys, values = (Cache(name, 2, heads, tokens, width) for _ in range(2))
            query = normal(2, heads * groups, queries, width).half()
            check(f"{tokens} {groups} {queries} {width} {name}", query, keys, values, causal=queries <= tokens)
            mask = torch.rand(2, 1, queries, tokens, generator=GENERATOR) < 0.6
            mask[..., -1] = True
            check(f"{tokens} {width} {name} masked", query, keys, values, mask)
            check(f"{tokens} {width} {name} one mask", query, keys, values, mask[:1])
    keys, values = (Cache("int8_token", 2, 2, 540, 32) for _ in range(2))
    query, mask = normal(2, 4, 1, 32).half(), torch.ones(2, 1, 1, 540, dtype=torch.bool)
    mask[0, ..., :520] = False  # whole pieces are not seen
    check("left padding", query, keys, values, mask)
    mask[0] = False
    found = run(query, keys, values, mask)
    assert not found[0].any() and found[1].any(), "a query that sees nothing"
    turned = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(turned, keys, values), run(query, keys, values))


class Paged(Cache):
    """The same in pages that lie anywhere, some of other sequences, all unused bytes standing for NaN."""

    def __init__(self, name: str, lengths: Tensor, heads: int, page: int, pages: Tensor, width: int) -> None:
        capacity = pages.shape[1] * page
        super().__init__(name, len(lengths), heads, capacity, width)
        room = torch.full((int(pages.max()) + 3, heads, page, self.layout.bytes), 0xFF, dtype=torch.uint8)
        for sequence, length in enumerate(lengths.tolist()):
            for token in range(length):
                at = pages[sequence, token // page], slice(None), token % page
                room[at] = self.rows[sequence, :, token]
        self.rows = room


def in_pages() -> None:
    """Sequences of different lengths, in one piece and in several, against each of them alone in float64."""
    for name, page, capacity in (("int4_token", 16, 48), ("fp8_tensor", 64, 320), ("nvfp4", 16, 32),
                                 ("int8_token", 3, 9)):  # fmt: skip
        for queries in (1, 3):
            tokens = [capacity, queries, 0, capacity - 5]
            lengths, count = torch.tensor(tokens), -(-capacity // page)
            pages = torch.randperm(4 * count + 7, generator=GENERATOR)[: 4 * count].view(4, count)
            keys, values = (Paged(name, lengths, 2, page, pages, 32) for _ in range(2))
            pages = torch.where(torch.arange(count) * page < lengths[:, None], pages, 10**6)  # nobody looks these up
            query = normal(4, 4, queries, 32).half()
            given = (query, keys.rows, values.rows, None, keys.static, values.static, 32, 0.2, True, name, name)
            found = kernel.cached_attention(*given, pages, lengths)
            expected = cached_attention(*given, pages, lengths)
            for sequence, length in enumerate(tokens):
                dense = (cache.dense[sequence : sequence + 1, :, :length] for cache in (keys, values))
                own = query[sequence : sequence + 1].double()
                truth = attention(own, *dense, None, 0.2, True) if length else torch.zeros_like(own)
                for what, result in (("kernel", found), ("reference", expected)):
                    error = float((result[sequence].double() - truth[0]).norm() / truth.norm().clamp_min(1e-30))
                    assert error <= 6e-4, f"{what} {name} in pages of {page}, {length} tokens: {error}"


def ranges() -> None:
    """Queries and scales far from 1, and what is no number."""
    for factor in (1e-30, 1e-4, 300.0, 3e4):
        keys, values = Cache("int8_token", 1, 1, 90, 32), Cache("int8_token", 1, 1, 90, 32)
        check(f"query {factor}", (normal(1, 2, 1, 32) * factor).float(), keys, values)
        if factor > 1e-5:
            check(f"half query {factor}", (normal(1, 2, 1, 32).clamp(-2, 2) * factor).half(), keys, values)
    for scale, dtype in itertools.product((1e-12, 1e8), (torch.float32, torch.bfloat16)):  # of values
        values = Cache("int8_token", 1, 1, 90, 32)
        stored = values.rows[..., 32:].contiguous().view(torch.float32) * scale
        values.rows[..., 32:] = stored.view(torch.uint8)
        values.dense *= scale
        check(f"values {scale}", normal(1, 2, 1, 32).to(dtype), keys, values)
    keys, values = Cache("fp8_tensor", 2, 1, 90, 32), Cache("fp8_tensor", 2, 1, 90, 32)
    query = normal(2, 2, 1, 32).half()
    whole = run(query, keys, values)
    for cache in (keys, values):
        kept = cache.rows[0, 0, 40, 3].clone()
        cache.rows[0, 0, 40, 3] = 0x7F
        found = run(query, keys, values)
        assert found[0].isnan().any() and torch.equal(found[1], whole[1]), "a NaN vanished, or spread"
        cache.rows[0, 0, 40, 3] = kept
    spoiled = query.clone()
    spoiled[1, 0, 0, 5] = float("nan")
    found = run(spoiled, keys, values)
    assert found[1, 0].isnan().all() and torch.equal(found[0], whole[0]) and torch.equal(found[1, 1], whole[1, 1])


def company() -> None:
    """A sequence's result is the same in any batch, to the bit."""
    for name in ("fp8_tensor", "int4_token", "nvfp4"):
        keys, values = (Cache(name, 4, 1, 300, 32) for _ in range(2))
        query = normal(4, 4, 1, 32).half()
        whole = run(query, keys, values)
        for few in (slice(0, 1), slice(2, 4)):
            alone = []
            for cache in (keys, values):
                one = object.__new__(Cache)
                vars(one).update(vars(cache), rows=cache.rows[few])
                alone.append(one)
            assert torch.equal(run(query[few], *alone), whole[few]), name


def refusals() -> None:
    for name in NOT_READ:
        fmt = lookup(name)
        assert rules.problem(fmt, fmt, (128, 128), 4), name
    for name in READ:
        assert rules.problem(lookup(name), lookup(name), (128, 64), 32) is None, name
    fmt = lookup("fp8_tensor")
    assert "33 queries" in str(rules.problem(fmt, fmt, (128, 128), 33))
    assert "256 columns" in str(rules.problem(fmt, fmt, (512, 512), 4))
    keys, values = (Cache("int4_g32", 1, 1, 40, 32) for _ in range(2))
    check("by the reference", normal(1, 2, 1, 32), keys, values)


EMPTY = torch.Tensor.new_empty


def poisoned(*given: Any, **more: Any) -> Tensor:
    made = EMPTY(*given, **more)
    return made.fill_(torch.nan) if made.is_floating_point() else made


def main() -> None:
    mend()
    torch.Tensor.new_empty = poisoned  # type: ignore[method-assign]  # what nothing writes is seen
    for group in (numbers, shapes, in_pages, ranges, company, refusals):
        group()
    print("all equal")


if __name__ == "__main__":
    sys.exit(main())
