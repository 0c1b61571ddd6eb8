"""Attention of a prompt in INT8 (`qat::prompt_attention`, `qat/serving/prompt_attention.py`).

A program takes 128 queries of a head and walks over the keys, 64 at a time: scores are integer products of tensor cores
times two scales, which are one number each for a block, so that they, the logarithm's base and the maximum cost one
instruction per score; probabilities become FP16 and are multiplied with values in FP16, summed in float32. Whole tiles
of keys that every query sees come first, without masks; the few that the diagonal or the end cuts come last.
"""

import math
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.device import device_of
from qat.kernels.launch import Call, Launch
from qat.kernels.prompt_attention.choose import problem
from qat.serving.prompt_attention import KEYS, QUERIES, reference

WARPS = 8
MAGIC = tl.constexpr(1.5 * 2.0**23)  # integers of 22 bits and a sign, added to its bits, are floats added to it
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def walk(
    begin, end, keys, values, key_scales, q, by_query, own, best, total, result, T,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to the tokens from `begin` to `end`; MASKED: not all queries see all of them."""
    n, d, v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        token = first + n
        in_d = (d < WIDTH)[None, :] if BLOCK_D != WIDTH else (d >= 0)[None, :]
        in_v = (v < VALUE_WIDTH)[None, :] if BLOCK_V != VALUE_WIDTH else (v >= 0)[None, :]
        if MASKED:
            in_d, in_v = in_d & (token < T)[:, None], in_v & (token < T)[:, None]
        k = tl.load(keys + token.to(tl.int64)[:, None] * WIDTH + d[None, :], mask=in_d, other=0)
        scale = by_query * tl.load(key_scales + first // BLOCK_N if BLOCKS else key_scales)
        sums = tl.dot(q, tl.trans(k)) + MAGIC_BITS  # whole numbers below 2^22, without a conversion
        scores = sums.to(tl.float32, bitcast=True) - MAGIC
        if MASKED:
            seen = (token < T)[None, :]
            if CAUSAL:
                seen = seen & (token[None, :] <= own[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        top = tl.maximum(best, tl.max(scores, 1) * scale)
        base = tl.where(top == -float("inf"), 0.0, top) if MASKED else top
        weights = tl.exp2(tl.fma(scores, scale, -base[:, None]))
        fade = tl.exp2(best - base)
        total = total * fade + tl.sum(weights, 1)
        held = tl.load(values + token.to(tl.int64)[:, None] * VALUE_WIDTH + v[None, :], mask=in_v, other=0)
        result = tl.dot(weights.to(tl.float16), held.to(tl.float16), result * fade[:, None])
        best = top
    return best, total, result


@triton.jit(do_not_specialize=["Q", "T", "query_blocks", "key_blocks"])
def prompt_attention_kernel(
    query,
    keys,
    values,
    query_scales,
    key_scales,
    value_scales,
    out,
    Q,
    T,
    heads,
    query_blocks,
    key_blocks,
    scaling,
    CAUSAL: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out (batch, heads * GROUPS, Q, VALUE_WIDTH), all contiguous. BLOCKS: scales are those of blocks, else of heads;
    scaling holds the factor that makes exp2 of exp."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    m, d, v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    row = tile * BLOCK_M + m
    own_head = sequence * (heads * GROUPS) + head
    key_head = sequence * heads + head // GROUPS
    at = query + (own_head * Q + row)[:, None] * WIDTH + d[None, :]
    q = tl.load(at, mask=(row < Q)[:, None] & (d < WIDTH)[None, :], other=0)
    by_query = tl.load(query_scales + own_head * query_blocks + (tile if BLOCKS else 0)) * scaling
    keys += key_head * T * WIDTH
    values += key_head * T * VALUE_WIDTH
    key_scales += key_head * key_blocks
    own = T - Q + row  # which token a query is
    best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    whole, end = T // BLOCK_N * BLOCK_N, T
    if CAUSAL:
        first = T - Q + tile * BLOCK_M
        whole = tl.minimum(whole, tl.maximum(first + 1, 0) // BLOCK_N * BLOCK_N)
        end = tl.minimum(T, tl.maximum(first + BLOCK_M, 0))
    best, total, result = walk(
        0, whole, keys, values, key_scales, q, by_query, own, best, total, result, T, False, CAUSAL, BLOCKS, WIDTH,
        VALUE_WIDTH, BLOCK_N, BLOCK_D, BLOCK_V, STAGES,
    )  # fmt: skip
    best, total, result = walk(
        whole, end, keys, values, key_scales, q, by_query, own, best, total, result, T, True, CAUSAL, BLOCKS, WIDTH,
        VALUE_WIDTH, BLOCK_N, BLOCK_D, BLOCK_V, STAGES,
    )  # fmt: skip
    by = tl.load(value_scales + key_head) / tl.where(total == 0.0, 1.0, total)
    at = out + (own_head * Q + row)[:, None] * VALUE_WIDTH + v[None, :]
    inside = (row < Q)[:, None] & (v < VALUE_WIDTH)[None, :]
    tl.store(at, (result * by[:, None]).to(out.dtype.element_ty), mask=inside)


def constants(width: int, value_width: int, groups: int, *, causal: bool, blocks: bool) -> dict[str, int]:
    """Compile-time arguments."""
    sizes = {"WIDTH": width, "VALUE_WIDTH": value_width, "BLOCK_M": QUERIES, "BLOCK_N": KEYS}
    filled = {"BLOCK_D": max(32, triton.next_power_of_2(width)), "BLOCK_V": triton.next_power_of_2(value_width)}
    return {"CAUSAL": causal, "BLOCKS": blocks, "GROUPS": groups, **sizes, **filled, "STAGES": 3}


def options(capability: int) -> dict[str, int]:
    """Of the compiler. On sm_90 a limit of 128 registers lets a processor hold two blocks, and a few bytes spill
    outside the loops; elsewhere it would spill within."""
    return {"num_warps": WARPS} | ({"maxnreg": 128} if capability == 90 else {})


@cache
def _launch(width: int, value_width: int, groups: int, causal: bool, blocks: bool, capability: int) -> Launch:
    fixed = constants(width, value_width, groups, causal=causal, blocks=blocks)
    return Launch(prompt_attention_kernel, **fixed, **options(capability))


@lru_cache(maxsize=1024)
def _call(sizes: tuple[int, ...], causal: bool, blocks: bool, counts: tuple[int, int], capability: int) -> Call:
    batch, query_heads, heads, queries, tokens, width, value_width = sizes
    grid = triton.cdiv(queries, QUERIES), query_heads, batch
    launch = _launch(width, value_width, query_heads // heads, causal, blocks, capability)
    return launch.at(grid, queries, tokens, heads, *counts)


def prompt_attention(
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
    """The operator `qat::prompt_attention` on a device that runs Triton."""
    given = (query, keys, values, query_scales, key_scales, value_scales)
    (batch, query_heads, queries, width), (heads, tokens) = query.shape, keys.shape[1:3]
    out = query.new_empty(*query.shape[:-1], values.shape[-1], dtype=dtype)
    counts = query_scales.shape[-1], key_scales.shape[-1]
    blocks = counts != (1, 1)
    plain = not blocks or counts == (triton.cdiv(queries, QUERIES), triton.cdiv(tokens, KEYS))
    if problem(width, values.shape[-1], query_heads, heads) is not None or dtype == torch.float64 or not plain:
        return reference(*given, scaling, causal, dtype)
    if out.numel() == 0 or tokens == 0:
        return out.zero_()
    sizes = batch, query_heads, heads, queries, tokens, width, values.shape[-1]
    call = _call(sizes, causal, blocks, counts, device_of(query).capability)
    call((*(t.contiguous() for t in given), out), scaling * math.log2(math.e))
    return out
