"""A few queries per sequence attend to a quantized cache: `qat::cached_attention` (`qat/serving/attention.py`), split
over the tokens.

**What bounds it.** Every byte of the cache is read once, so decoding waits for memory as long as a thread spends fewer
than some eight instructions per code (132 processors of 128 lanes at 1.7 GHz against 3 TB/s, 4 bits). Hence:

* The query heads of a head of keys, times the queries, are the rows of one product: up to 32 read each key once.
* Rows of the cache are loaded as 16-bit words, the size of what is multiplied: matrix loads bring two neighbours of
  whichever dimension a product sums over into one register, and decoding leaves them there. The columns of a word lie
  in different *parts* (words of 8-bit codes have two, of 4-bit codes four), each multiplied with its columns of the
  query and summed into its columns of the result, so that nothing is ever put back in order before the end.
* Codes become FP16, which holds every one exactly: two at a time in assembly, or one by one (`part`) where there is no
  assembly. Queries are multiplied with a power of two per row that brings them into FP16's range; float32 queries are
  multiplied as float32.
* A scale per tensor or per row acts on scores and on probabilities, not on codes. Those of 16 columns act on codes,
  where E2M1 or INT4 times E4M3 stays exact.

Each program takes a piece of a sequence's tokens for one head, with its own maximum and sum; pieces are merged in their
order by a second kernel. Nothing behind the last token is read.
"""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.cached_attention.choose import WORD, Tiles, choose, problem, scale_place
from qat.kernels.cached_attention.decode.triton import factors, parts
from qat.kernels.cached_attention.merge.triton import merge
from qat.kernels.device import Device, device_of
from qat.kernels.launch import Launch
from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.numbers.scale import TINY as SMALLEST
from qat.serving.attention import RowLayout, reference

TINY = tl.constexpr(SMALLEST)
HALF_BIAS = 15  # of FP16


@triton.jit
def constant(static, PLACE: tl.constexpr, GLOBAL: tl.constexpr, UNDO: tl.constexpr):
    """What all values of a tensor are multiplied with."""
    if PLACE == "tensor":
        return tl.load(static) * UNDO
    elif GLOBAL:
        return UNDO / tl.load(static)
    else:
        return UNDO


@triton.jit
def query_part(at, PART: tl.constexpr, PARTS: tl.constexpr, inside, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    """The columns of a query that one part of a word is multiplied with, float32."""
    column = tl.arange(0, WORDS) * PARTS + PART
    return tl.load(at[:, None] + column[None, :], mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit(
    do_not_specialize=["T", "piece", "heads", "stride_qb", "stride_qh", "stride_qt", "stride_kb", "stride_kh",
                       "stride_vb", "stride_vh", "stride_mb", "stride_mq", "stride_table"]
)  # fmt: skip
def cached_attention_kernel(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    key_static,
    value_static,
    mask,
    pages,
    lengths,
    out,
    sums,
    ends,
    T,
    piece,
    heads,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_mb,
    stride_mq,
    stride_table,
    scaling,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    PAGE: tl.constexpr,
    DTYPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    K_KIND: tl.constexpr,
    K_BITS: tl.constexpr,
    K_MANTISSA: tl.constexpr,
    K_BIAS: tl.constexpr,
    K_WIDTH: tl.constexpr,
    K_WORDS: tl.constexpr,
    K_ROW: tl.constexpr,
    K_PLACE: tl.constexpr,
    K_SCALE_BYTES: tl.constexpr,
    K_GLOBAL: tl.constexpr,
    K_UNDO: tl.constexpr,
    V_KIND: tl.constexpr,
    V_BITS: tl.constexpr,
    V_MANTISSA: tl.constexpr,
    V_BIAS: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_WORDS: tl.constexpr,
    V_ROW: tl.constexpr,
    V_PLACE: tl.constexpr,
    V_SCALE_BYTES: tl.constexpr,
    V_GLOBAL: tl.constexpr,
    V_UNDO: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out (batch * heads * ROWS, V_WIDTH), or where SPLIT its unmerged pieces: sums (rows, pieces, V_WIDTH), and ends
    (2, rows, pieces), their maxima and totals. Words of keys and values are int16, strides count rows of the cache.
    *_WORDS are the words of a row's codes, filled up; *_ROW all of a row's. PAGE: tokens of a page; keys and values
    then hold pages in place of sequences, and `pages` says which are whose; 0 where there are none."""
    K_PARTS: tl.constexpr = 16 // K_BITS
    V_PARTS: tl.constexpr = 16 // V_BITS
    index, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    in_r = r < ROWS
    own = r % QUERIES  # which query; heads lie above each other
    q_at = query + sequence * stride_qb + (head * (ROWS // QUERIES) + r // QUERIES) * stride_qh + own * stride_qt
    key_row = (0 if PAGE else sequence) * stride_kb + head * stride_kh.to(tl.int64)
    value_row = (0 if PAGE else sequence) * stride_vb + head * stride_vh.to(tl.int64)
    if PAGE:
        T = tl.load(lengths + sequence)
    keys += key_row * K_ROW
    values += value_row * V_ROW
    j, i = tl.arange(0, K_WORDS), tl.arange(0, V_WORDS)

    # Queries: by part, in the range of FP16.
    q0 = query_part(q_at, 0, K_PARTS, in_r, K_WIDTH, K_WORDS)
    q1 = query_part(q_at, 1, K_PARTS, in_r, K_WIDTH, K_WORDS)
    largest = tl.maximum(tl.max(tl.abs(q0), 1), tl.max(tl.abs(q1), 1))
    if K_PARTS == 4:
        q2 = query_part(q_at, 2, K_PARTS, in_r, K_WIDTH, K_WORDS)
        q3 = query_part(q_at, 3, K_PARTS, in_r, K_WIDTH, K_WORDS)
        largest = tl.maximum(largest, tl.maximum(tl.max(tl.abs(q2), 1), tl.max(tl.abs(q3), 1)))
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 1), 253)
    less = ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    q0, q1 = (q0 * less).to(DTYPE), (q1 * less).to(DTYPE)
    if K_PARTS == 4:
        q2, q3 = (q2 * less).to(DTYPE), (q3 * less).to(DTYPE)
    by_row = (exponent << 23).to(tl.float32, bitcast=True) * (scaling * constant(key_static, K_PLACE, K_GLOBAL, K_UNDO))

    best = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    sum0 = tl.zeros((BLOCK_R, V_WORDS), tl.float32)
    sum1 = tl.zeros((BLOCK_R, V_WORDS), tl.float32)
    sum2 = tl.zeros((BLOCK_R, V_WORDS), tl.float32)
    sum3 = tl.zeros((BLOCK_R, V_WORDS), tl.float32)
    end = tl.minimum(index * piece + piece, T)
    for first in tl.range(index * piece, end, BLOCK_T, num_stages=STAGES):
        token = first + tl.arange(0, BLOCK_T)
        inside = token < end
        k_at, v_at = token, token
        if PAGE:
            if PAGE % BLOCK_T == 0:
                page = tl.load(pages + sequence * stride_table + first // PAGE).to(tl.int64)
            else:
                page = tl.load(pages + sequence * stride_table + token // PAGE, mask=inside, other=0).to(tl.int64)
            k_at, v_at = page * stride_kb + token % PAGE, page * stride_vb + token % PAGE
        # Scores.
        in_words = (
            inside[:, None] if K_WORDS * K_PARTS == K_WIDTH else inside[:, None] & (j < K_WIDTH // K_PARTS)[None, :]
        )
        word = tl.load(keys + k_at[:, None] * K_ROW + j[None, :], mask=in_words, other=0)
        k = parts(word, K_KIND, K_BITS, K_MANTISSA, K_BIAS, DTYPE, ASSEMBLY)
        if K_PLACE == "group":
            at = key_scales + key_row * (2 * K_ROW)
            by = factors(at, k_at, inside, K_ROW, K_WIDTH, K_WORDS, K_BITS, DTYPE, ASSEMBLY)
            scores = tl.dot(q0, tl.trans(k[0] * by), input_precision="ieee")
            scores = tl.dot(q1, tl.trans(k[1] * by), scores, input_precision="ieee")
            if K_PARTS == 4:
                scores = tl.dot(q2, tl.trans(k[2] * by), scores, input_precision="ieee")
                scores = tl.dot(q3, tl.trans(k[3] * by), scores, input_precision="ieee")
        else:
            scores = tl.dot(q0, tl.trans(k[0]), input_precision="ieee")
            scores = tl.dot(q1, tl.trans(k[1]), scores, input_precision="ieee")
            if K_PARTS == 4:
                scores = tl.dot(q2, tl.trans(k[2]), scores, input_precision="ieee")
                scores = tl.dot(q3, tl.trans(k[3]), scores, input_precision="ieee")
        scores *= by_row[:, None]
        if K_PLACE == "row":
            at = key_scales + (key_row + k_at) * (2 * K_ROW // K_SCALE_BYTES) + K_WIDTH * K_BITS // 8 // K_SCALE_BYTES
            scores *= tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
        seen = inside[None, :] & in_r[:, None]
        if CAUSAL:
            seen = seen & (token[None, :] <= (T - QUERIES + own)[:, None])
        if MASKED:
            at = mask + sequence * stride_mb + own[:, None] * stride_mq + token[None, :]
            seen = seen & (tl.load(at, mask=seen, other=0) != 0)
        scores = tl.where(seen, scores, -float("inf"))
        # Weights.
        top = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(top == -float("inf"), 0.0, top)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(best - base)
        best = top
        total = total * fade + tl.sum(weights, 1)
        # Values.
        in_words = (
            inside[:, None] if V_WORDS * V_PARTS == V_WIDTH else inside[:, None] & (i < V_WIDTH // V_PARTS)[None, :]
        )
        word = tl.load(values + v_at[:, None] * V_ROW + i[None, :], mask=in_words, other=0)
        v = parts(word, V_KIND, V_BITS, V_MANTISSA, V_BIAS, DTYPE, ASSEMBLY)
        if V_PLACE == "row":  # in the range of FP16: relative to the largest of the step
            at = value_scales + (value_row + v_at) * (2 * V_ROW // V_SCALE_BYTES)
            at += V_WIDTH * V_BITS // 8 // V_SCALE_BYTES
            by_token = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            unit = tl.maximum(tl.max(by_token, 0), TINY)
            weights = (weights * (by_token / unit)[None, :]).to(DTYPE)
            fade, more = fade[:, None], unit
            sum0 = sum0 * fade + tl.dot(weights, v[0], input_precision="ieee") * more
            sum1 = sum1 * fade + tl.dot(weights, v[1], input_precision="ieee") * more
            if V_PARTS == 4:
                sum2 = sum2 * fade + tl.dot(weights, v[2], input_precision="ieee") * more
                sum3 = sum3 * fade + tl.dot(weights, v[3], input_precision="ieee") * more
        else:
            weights, fade = weights.to(DTYPE), fade[:, None]
            if V_PLACE == "group":
                at = value_scales + value_row * (2 * V_ROW)
                by = factors(at, v_at, inside, V_ROW, V_WIDTH, V_WORDS, V_BITS, DTYPE, ASSEMBLY)
                sum0 = tl.dot(weights, v[0] * by, sum0 * fade, input_precision="ieee")
                sum1 = tl.dot(weights, v[1] * by, sum1 * fade, input_precision="ieee")
                if V_PARTS == 4:
                    sum2 = tl.dot(weights, v[2] * by, sum2 * fade, input_precision="ieee")
                    sum3 = tl.dot(weights, v[3] * by, sum3 * fade, input_precision="ieee")
            else:
                sum0 = tl.dot(weights, v[0], sum0 * fade, input_precision="ieee")
                sum1 = tl.dot(weights, v[1], sum1 * fade, input_precision="ieee")
                if V_PARTS == 4:
                    sum2 = tl.dot(weights, v[2], sum2 * fade, input_precision="ieee")
                    sum3 = tl.dot(weights, v[3], sum3 * fade, input_precision="ieee")

    by_tensor = constant(value_static, V_PLACE, V_GLOBAL, V_UNDO)
    row = (sequence * heads + head) * ROWS + r
    keep = in_r[:, None] & (i < V_WIDTH // V_PARTS)[None, :]
    if SPLIT:
        at = row * tl.num_programs(0) + index
        tl.store(ends + at, best, mask=in_r)
        tl.store(ends + tl.num_programs(2) * heads * ROWS * tl.num_programs(0) + at, total, mask=in_r)
        target = sums + at[:, None] * V_WIDTH + i[None, :] * V_PARTS
        by = tl.full((BLOCK_R,), 1.0, tl.float32)[:, None] * by_tensor
    else:
        target = out + row[:, None] * V_WIDTH + i[None, :] * V_PARTS
        by = (by_tensor / tl.where(total == 0.0, 1.0, total))[:, None]
    tl.store(target, (sum0 * by).to(target.dtype.element_ty), mask=keep)
    tl.store(target + 1, (sum1 * by).to(target.dtype.element_ty), mask=keep)
    if V_PARTS == 4:
        tl.store(target + 2, (sum2 * by).to(target.dtype.element_ty), mask=keep)
        tl.store(target + 3, (sum3 * by).to(target.dtype.element_ty), mask=keep)


def side(prefix: str, fmt: Format, width: int, *, assembly: bool) -> dict[str, Any]:
    """Compile-time arguments for keys ("K") or values ("V") of `fmt`."""
    layout, element = RowLayout(fmt, width), fmt.element
    shifted = assembly and element.is_minifloat and element.bits == 4
    given = {
        "KIND": element.kind,
        "BITS": element.bits,
        "MANTISSA": element.mantissa_bits,
        "BIAS": element.exponent_bias,
        "WIDTH": width,
        "WORDS": max(16, triton.next_power_of_2(width * element.bits // WORD)),
        "ROW": layout.bytes // 2,
        "PLACE": scale_place(fmt, width),
        "SCALE_BYTES": fmt.scale.storage.itemsize,
        "GLOBAL": fmt.global_scale,
        "UNDO": 2.0 ** (HALF_BIAS - element.exponent_bias) if shifted else 1.0,
    }
    return {f"{prefix}_{name}": value for name, value in given.items()}


def assembles(query: Tensor, device: Device) -> bool:
    """Whether codes are decoded by assembly: the GPUs that have E4M3, and queries that FP16 is enough for."""
    return query.is_cuda and torch.version.hip is None and device.capability >= 89 and query.dtype != torch.float32


def scales_of(rows: Tensor, fmt: Format) -> Tensor:
    """The same memory in the type of a scale."""
    return rows if fmt.scale.is_bytes else rows.view(fmt.scale.storage)


@cache
def _launch(
    key: str,
    value: str,
    sizes: tuple[int, int, int, int],
    told: tuple[bool, bool, bool, bool, bool],
    page: int,
    tiles: Tiles,
) -> Launch:
    (queries, rows, width, value_width), (causal, masked, exact, assembly, split) = sizes, told
    of_keys = side("K", lookup(key), width, assembly=assembly)
    of_values = side("V", lookup(value), value_width, assembly=assembly)
    return Launch(
        cached_attention_kernel, QUERIES=queries, ROWS=rows, CAUSAL=causal, MASKED=masked, PAGE=page, SPLIT=split,
        DTYPE=tl.float32 if exact else tl.float16, ASSEMBLY=assembly, BLOCK_R=tiles.block_r,
        BLOCK_T=tiles.block_t, STAGES=tiles.stages, num_warps=tiles.warps, **of_keys, **of_values,
    )  # fmt: skip


def cached_attention(
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
    """The operator `qat::cached_attention` on a device that runs Triton."""
    key, value = lookup(key_format), lookup(value_format)
    batch, query_heads, queries, width = query.shape
    heads, tokens = keys.shape[1:3]
    rows = query_heads // heads * queries
    page = 0 if pages is None else tokens
    if problem(key, value, (width, value_width), rows) is not None or (page and (mask is not None or lengths is None)):
        return reference(query, keys, values, mask, key_static, value_static, value_width, scaling, causal,
                         key_format, value_format, pages, lengths)  # fmt: skip
    tokens = tokens if pages is None else pages.shape[1] * page
    out = query.new_empty(batch, query_heads, queries, value_width)
    if out.numel() == 0:
        return out
    if tokens == 0:
        return out.zero_()
    query = query if query.stride(-1) == 1 else query.contiguous()
    keys, values = (t if _by_rows(t) else t.contiguous() for t in (keys, values))
    if mask is not None:
        mask = mask.expand(batch, 1, queries, tokens).view(torch.uint8)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    exact = query.dtype == torch.float32
    device = device_of(query)
    tiles = choose(tokens, heads, rows, device.processors, exact=exact)
    pieces = triton.cdiv(tokens, tiles.piece)
    split, assembly = pieces > 1, assembles(query, device)
    sums = query.new_empty(batch * heads * rows, pieces, value_width, dtype=torch.float32) if split else None
    ends = query.new_empty(2, batch * heads * rows, pieces, dtype=torch.float32) if split else None
    sizes = queries, rows, width, value_width
    told = causal, mask is not None, exact, assembly, split
    launch = _launch(key_format, value_format, sizes, told, page, replace(tiles, piece=0))
    call = launch.at(
        (pieces, heads, batch),
        tokens,
        tiles.piece,
        heads,
        *query.stride()[:3],
        *(stride // keys.shape[-1] for stride in keys.stride()[:2]),
        *(stride // values.shape[-1] for stride in values.stride()[:2]),
        *((0, 0) if mask is None else (mask.stride(0), mask.stride(2))),
        0 if pages is None else pages.shape[1],
    )
    table = (None, None) if pages is None or lengths is None else (_int32(pages), _int32(lengths))
    held = keys.view(torch.int16), values.view(torch.int16), scales_of(keys, key), scales_of(values, value)
    call((query, *held, key_static, value_static, mask, *table, out, sums, ends), scaling * math.log2(math.e))
    if split:
        count = batch * heads * rows
        merge(value_width).at((count,), count, pieces)((sums, ends, out))
    return out


def _int32(table: Tensor) -> Tensor:
    return table.to(torch.int32).contiguous()


def _by_rows(cached: Tensor) -> bool:
    """Whether tokens follow each other in memory, whatever lies between heads and sequences."""
    size = cached.shape[-1]
    whole = all(stride % size == 0 for stride in cached.stride()[:2])
    return cached.stride(-1) == 1 and cached.stride(-2) == size and whole and cached.storage_offset() % size == 0
