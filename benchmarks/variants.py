"""A grid of ways to multiply a few tokens with 4-bit weights on one GPU, each checked and timed (removed once chosen).

    python3 benchmarks/variants.py --out FOLDER [--seconds 58] [--jobs 14]

Kernels are compiled by several processes, then timed by CUDA graph over copies larger than the L2 cache. One line of JSON per
result, flushed; what fails is a line, too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

PANEL = tl.constexpr(64)  # rows of a tile in memory

INT4_ASM = """{
.reg .b32 a, b, c, m;
mov.b32 m, 0xC308C308;
shr.u32 a, $4, 4; shr.u32 b, $4, 8; shr.u32 c, $4, 12;
lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 $1, a, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 $2, b, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 $3, c, 0x000F000F, 0x43004300, 0xEA;
add.rn.bf16x2 $0, $0, m; add.rn.bf16x2 $1, $1, m; add.rn.bf16x2 $2, $2, m; add.rn.bf16x2 $3, $3, m;
}"""
FP4_ASM = """{
.reg .b32 a, b, w;
mov.b32 w, $4;
shl.b32 a, w, 12; and.b32 a, a, 0x80008000; shl.b32 b, w, 6; lop3.b32 b, b, 0x01C001C0, a, 0xEA; mul.bf16x2 $0, b, $5;
shl.b32 a, w, 8; and.b32 a, a, 0x80008000; shl.b32 b, w, 2; lop3.b32 b, b, 0x01C001C0, a, 0xEA; mul.bf16x2 $1, b, $5;
shl.b32 a, w, 4; and.b32 a, a, 0x80008000; shr.u32 b, w, 2; lop3.b32 b, b, 0x01C001C0, a, 0xEA; mul.bf16x2 $2, b, $5;
and.b32 a, w, 0x80008000; shr.u32 b, w, 6; lop3.b32 b, b, 0x01C001C0, a, 0xEA; mul.bf16x2 $3, b, $5;
}"""
TWIDDLED_ASM = """{
.reg .b32 a, b, w;
mov.b32 w, $4;
and.b32 a, w, 0x81C081C0; mul.bf16x2 $0, a, $5;
shl.b32 a, w, 3; and.b32 a, a, 0x81C081C0; mul.bf16x2 $1, a, $5;
shl.b32 a, w, 6; and.b32 a, a, 0x81C081C0; mul.bf16x2 $2, a, $5;
shl.b32 a, w, 1; and.b32 a, a, 0x80008000; shr.u32 b, w, 5; lop3.b32 a, b, 0x01000100, a, 0xEA;
shr.u32 b, w, 4; lop3.b32 a, b, 0x00C000C0, a, 0xEA; mul.bf16x2 $3, a, $5;
}"""
INT4, FP4, TWIDDLED = tl.constexpr(INT4_ASM), tl.constexpr(FP4_ASM), tl.constexpr(TWIDDLED_ASM)


@triton.jit
def int4(word, P: tl.constexpr, DTYPE: tl.constexpr):
    code = (word >> (P * 4)) & 15
    if tl.bfloat16 == DTYPE:
        return (code | 0x4300).to(tl.bfloat16, bitcast=True) - 136
    else:
        return (code.to(tl.int32) - 8).to(tl.float32).to(DTYPE)


@triton.jit
def fp4(word, factor, P: tl.constexpr, TWIST: tl.constexpr, DTYPE: tl.constexpr):
    """Times 2^-16 in BF16 (factor is 2^110 times the scale), as such otherwise (factor is the scale)."""
    if TWIST and P < 3:
        code = ((word << (3 * P)) >> 12) & 8 | ((word << (3 * P)) >> 6) & 7
    elif TWIST:
        code = (word >> 11) & 8 | (word >> 11) & 4 | (word >> 10) & 3
    else:
        code = (word >> (P * 4)) & 15
    if tl.bfloat16 == DTYPE:
        return ((code & 8) << 12 | (code & 7) << 6).to(tl.int16).to(tl.bfloat16, bitcast=True) * factor
    else:
        wide = (code & 8).to(tl.int32) << 28 | (code & 7).to(tl.int32) << 22
        value = wide.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
        return (value * factor.to(tl.float32)).to(DTYPE)


@triton.jit
def four(word, factor, FMT: tl.constexpr, DECODE: tl.constexpr, DTYPE: tl.constexpr):
    """The weights of the four columns in a word."""
    if FMT == "int4":
        if DECODE == "plain":
            return int4(word, 0, DTYPE), int4(word, 1, DTYPE), int4(word, 2, DTYPE), int4(word, 3, DTYPE)
        else:
            return tl.inline_asm_elementwise(
                INT4, "=&r,=&r,=&r,=&r,r", [word],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
            )  # fmt: skip
    elif DECODE == "plain" or DECODE == "plain_twiddled":
        T: tl.constexpr = DECODE != "plain"
        return (fp4(word, factor, 0, T, DTYPE), fp4(word, factor, 1, T, DTYPE),
                fp4(word, factor, 2, T, DTYPE), fp4(word, factor, 3, T, DTYPE))  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            FP4 if DECODE == "asm" else TWIDDLED, "=&r,=&r,=&r,=&r,r,r", [word, factor],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "begin_of", "share"])
def variant_kernel(
    x, words, scales, out, sums, counters, M, N, K, stride_x, begin_of, share, global_scale,
    FMT: tl.constexpr, DECODE: tl.constexpr, SCALES: tl.constexpr, TILED: tl.constexpr, PART: tl.constexpr,
    PIECE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr, LAST: tl.constexpr,
    MASK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """sums float32 (splits, M, N), or out where LAST: the last piece of K to end adds them in their order."""
    TILE: tl.constexpr = 4 * PART
    PER: tl.constexpr = PART // PIECE  # scales of a step's row
    block, split = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, BLOCK_N)
    j = tl.arange(0, PART)
    g = tl.arange(0, PER)
    m = tl.arange(0, BLOCK_M)
    steps = K // TILE
    width = K // 4
    n = block * BLOCK_N + row
    if TILED:
        word_of = (row // PANEL)[:, None] * (PANEL * width) + (row % PANEL)[:, None] * PART + j[None, :]
        factor_of = (row // PANEL)[:, None] * (PANEL * steps * PER) + (row % PANEL)[:, None] * PER + g[None, :]
        WORD_STEP: tl.constexpr = PANEL * PART
        FACTOR_STEP: tl.constexpr = PANEL * PER
    else:
        word_of = row[:, None] * width + j[None, :]
        factor_of = row[:, None] * (steps * PER) + g[None, :]
        WORD_STEP: tl.constexpr = PART
        FACTOR_STEP: tl.constexpr = PER
    top = (block * BLOCK_N // PANEL).to(tl.int64) * PANEL
    inside = block * BLOCK_N % PANEL
    word_base = words + top * width + inside * (PART if TILED else width)
    factor_base = scales + top * (steps * PER) + inside * (PER if TILED else steps * PER)
    column = (j // PIECE) * (4 * PIECE) + j % PIECE
    x_at = x + (m if MASK else tl.minimum(m, M - 1))[None, :] * stride_x + column[:, None]
    in_m = (m < M)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = split * share
    for step in tl.range(first, tl.minimum(first + share, steps), num_stages=STAGES):
        word = tl.load(word_base + step * WORD_STEP + word_of)
        at = x_at + step * TILE
        x0 = tl.load(at, mask=in_m, other=0.0) if MASK else tl.load(at)
        x1 = tl.load(at + PIECE, mask=in_m, other=0.0) if MASK else tl.load(at + PIECE)
        x2 = tl.load(at + 2 * PIECE, mask=in_m, other=0.0) if MASK else tl.load(at + 2 * PIECE)
        x3 = tl.load(at + 3 * PIECE, mask=in_m, other=0.0) if MASK else tl.load(at + 3 * PIECE)
        if FMT == "int4":
            w0, w1, w2, w3 = four(word, 0, FMT, DECODE, DTYPE)
            if PART == 64:  # groups of 128: parts 0 and 1, 2 and 3
                s0 = tl.load(scales + (2 * step) * N + n)
                s1 = tl.load(scales + (2 * step + 1) * N + n)
                partial = tl.dot(w0, x0, input_precision="ieee")
                partial = tl.dot(w1, x1, partial, input_precision="ieee")
                total += partial * s0.to(tl.float32)[:, None]
                partial = tl.dot(w2, x2, input_precision="ieee")
                partial = tl.dot(w3, x3, partial, input_precision="ieee")
                total += partial * s1.to(tl.float32)[:, None]
            else:
                s0 = tl.load(scales + step * N + n)
                partial = tl.dot(w0, x0, input_precision="ieee")
                partial = tl.dot(w1, x1, partial, input_precision="ieee")
                partial = tl.dot(w2, x2, partial, input_precision="ieee")
                partial = tl.dot(w3, x3, partial, input_precision="ieee")
                total += partial * s0.to(tl.float32)[:, None]
        else:
            stored = tl.load(factor_base + step * FACTOR_STEP + factor_of)
            if SCALES == "e5m3":
                stored = ((stored.to(tl.int16) << 4) + 29184).to(tl.bfloat16, bitcast=True)  # 228 << 7
            factor = tl.reshape(tl.broadcast_to(stored[:, :, None], (BLOCK_N, PER, PIECE)), (BLOCK_N, PART))
            w0, w1, w2, w3 = four(word, factor, FMT, DECODE, DTYPE)
            partial = tl.dot(w0, x0, input_precision="ieee")
            partial = tl.dot(w1, x1, partial, input_precision="ieee")
            partial = tl.dot(w2, x2, partial, input_precision="ieee")
            partial = tl.dot(w3, x3, partial, input_precision="ieee")
            total += partial
    total *= global_scale
    splits = tl.num_programs(1)
    if splits == 1:
        tl.store(out + m[None, :] * N + n[:, None], total.to(out.dtype.element_ty), mask=in_m)
    else:
        tl.store(sums + (split * M + m[None, :]) * N + n[:, None], total, mask=in_m)
    if LAST and splits > 1:
        tl.debug_barrier()
        if tl.atomic_add(counters + block, 1, sem="acq_rel") == splits - 1:
            here = m[None, :] * N + n[:, None]
            added = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for piece in range(0, splits):
                added += tl.load(sums + piece * M * N + here, mask=in_m, other=0.0, cache_modifier=".cg")
            tl.store(out + here, added.to(out.dtype.element_ty), mask=in_m)
            tl.store(counters + block, 0)


@triton.jit(do_not_specialize=["size", "splits"])
def add_kernel(sums, out, size, splits, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    added = tl.zeros((BLOCK,), tl.float32)
    for piece in range(0, splits):
        added += tl.load(sums + piece * size + at, mask=at < size, other=0.0)
    tl.store(out + at, added.to(out.dtype.element_ty), mask=at < size)


@dataclass(frozen=True)
class Variant:
    """One way; `splits` is not compiled in."""

    fmt: str
    decode: str
    scales: str  # as they lie in memory: f32, bf16, e5m3
    tiled: bool = True
    part: int = 64
    block_n: int = 64
    block_m: int = 16
    warps: int = 4
    stages: int = 3
    last: bool = False
    mask: bool = True

    @property
    def piece(self) -> int:
        return self.part if self.fmt == "int4" else 4

    @property
    def layout(self) -> tuple[Any, ...]:
        return (self.fmt, "twiddled" in self.decode, self.scales, self.tiled, self.part)

    def constants(self, dtype: Any = tl.bfloat16) -> dict[str, Any]:
        return {"FMT": self.fmt, "DECODE": self.decode, "SCALES": self.scales, "TILED": self.tiled, "PART": self.part,
                "PIECE": self.piece, "BLOCK_N": self.block_n, "BLOCK_M": self.block_m, "STAGES": self.stages,
                "LAST": self.last, "MASK": self.mask, "DTYPE": dtype}  # fmt: skip


def variants() -> list[Variant]:
    """Most wanted first."""
    found = []
    for block_m in (16, 64):
        deep = (3, 4) if block_m == 16 else (2, 3)
        nv = Variant("nvfp4", "twiddled", "e5m3", block_m=block_m, stages=deep[0])
        i4 = Variant("int4", "asm", "f32", block_m=block_m, stages=deep[0])
        found += [nv, i4, replace(nv, stages=deep[1]), replace(i4, stages=deep[1])]
        found += [replace(nv, decode="asm"), replace(nv, scales="bf16"), replace(nv, tiled=False)]
        found += [replace(i4, tiled=False), replace(i4, part=32), replace(i4, part=32, stages=deep[1] + 1)]
        found += [replace(nv, last=True), replace(i4, last=True), replace(i4, scales="bf16")]
        found += [replace(nv, mask=False), replace(i4, mask=False)]
        found += [replace(nv, part=32), replace(nv, part=32, stages=deep[1] + 1)]
        found += [replace(nv, block_n=128, warps=8), replace(i4, block_n=128, warps=8)]
        if block_m == 16:  # mma.sync
            for v in (nv, i4):
                found += [replace(v, block_n=32, warps=2), replace(v, block_n=32, warps=2, stages=4),
                          replace(v, block_n=64, warps=2), replace(v, block_n=16, warps=1, stages=4),
                          replace(v, block_n=32, warps=1), replace(v, block_n=32, warps=2, last=True)]  # fmt: skip
            found += [replace(nv, block_n=128), replace(i4, block_n=128)]
        else:
            found += [replace(v, block_n=128, warps=8, stages=3) for v in (nv, i4)]
            found += [replace(v, block_n=128, warps=8, last=True) for v in (nv, i4)]
        found += [replace(nv, decode="plain"), replace(i4, decode="plain")]
    for base in (Variant("nvfp4", "twiddled", "e5m3", block_m=8), Variant("int4", "asm", "f32", block_m=8)):
        found += [base, replace(base, stages=4), replace(base, warps=2, block_n=32), replace(base, warps=1, block_n=16, stages=4),
                  replace(base, part=32, stages=4), replace(base, warps=8, block_n=128)]  # fmt: skip
    return found


# --- weights -------------------------------------------------------------------------------------------------------


class Weight:
    """Random codes and scales, their dense values, and whatever layout is asked for."""

    def __init__(self, fmt: str, rows: int, columns: int, device: str) -> None:
        self.fmt, self.rows, self.columns = fmt, rows, columns
        generator = torch.Generator(device=device).manual_seed(rows + columns)
        self.codes = torch.randint(0, 16, (rows, columns), device=device, generator=generator, dtype=torch.int32)
        if fmt == "int4":
            self.values = self.codes.float() - 8
            self.group = 128
            self.scale = (torch.rand(rows, columns // 128, device=device, generator=generator) + 0.5).bfloat16().float()
            self.scale /= 64
        else:
            table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=device)
            self.values = table[(self.codes & 7).long()] * torch.where(self.codes >= 8, -1.0, 1.0)
            self.group = 16
            # Every positive E4M3: exponents -9 to 8 with subnormals below -6.
            byte = torch.randint(1, 127, (rows, columns // 16), device=device, generator=generator)
            byte = torch.where(torch.rand(byte.shape, device=device, generator=generator) < 0.9, byte % 24 + 40, byte)
            self.scale = byte.to(torch.uint8).view(torch.float8_e4m3fn).float()

    def dense(self) -> torch.Tensor:
        wide = self.values.view(self.rows, -1, self.group) * self.scale[:, :, None]
        return wide.view(self.rows, self.columns)

    def words(self, v: Variant) -> torch.Tensor:
        """int16, in tiles of 64 rows or row by row."""
        rows, tile = self.rows, 4 * v.part
        c = self.codes.view(rows, self.columns // tile, v.part // v.piece, 4, v.piece)
        c = c.permute(3, 0, 1, 2, 4).reshape(4, rows, self.columns // tile, v.part)
        if "twiddled" in v.decode:
            s, t = c >> 3, c & 7
            spread = s << 15 | t << 6
            last = s[3] << 14 | (t[3] >> 2) << 13 | (t[3] & 3) << 10
            word = spread[0] | spread[1] >> 3 | spread[2] >> 6 | last
        else:
            word = c[0] | c[1] << 4 | c[2] << 8 | c[3] << 12
        word = torch.where(word >= 32768, word - 65536, word).to(torch.int16)
        return self._panels(word) if v.tiled else word.reshape(rows, -1)

    def _panels(self, t: torch.Tensor) -> torch.Tensor:
        return t.view(t.shape[0] // 64, 64, *t.shape[1:]).transpose(1, 2).contiguous()

    def factors(self, v: Variant, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        if self.fmt == "int4":
            scale = self.scale.t().contiguous()
            return scale if v.scales == "f32" else scale.to(dtype)
        s = self.scale.view(self.rows, -1, v.part // v.piece)
        if dtype != torch.bfloat16:
            s = s.to(dtype)
        elif v.scales == "bf16":
            s = (s * 2.0**110).bfloat16()
        else:
            mantissa, exponent = torch.frexp(s)  # s = mantissa * 2^exponent, mantissa in [0.5, 1)
            s = ((exponent - 1 + 9) * 8 + (mantissa * 16 - 8)).to(torch.uint8)
        return self._panels(s) if v.tiled else s.contiguous()


def launch(v: Variant, x: torch.Tensor, words: torch.Tensor, factors: torch.Tensor, rows: int, splits: int,
           sums: torch.Tensor, out: torch.Tensor, counters: torch.Tensor, dtype: Any = tl.bfloat16) -> None:  # fmt: skip
    tokens, columns = x.shape
    share = triton.cdiv(columns // (4 * v.part), splits)
    above = 2.0**16 if v.fmt == "nvfp4" and dtype == tl.bfloat16 else 1.0
    variant_kernel[(rows // v.block_n, splits)](
        x, words, factors, out, sums, counters, tokens, rows, columns, x.stride(0), 0, share, above,
        **v.constants(dtype), num_warps=v.warps,
    )  # fmt: skip
    if splits > 1 and not v.last:
        size = tokens * rows
        add_kernel[(triton.cdiv(size, 512),)](sums, out, size, splits, BLOCK=512, num_warps=4)


POINTERS = {"f32": torch.float32, "bf16": torch.bfloat16, "e5m3": torch.uint8}


def warm(v: Variant) -> Any:
    """Compile what the timings will launch; nothing runs."""
    dtypes = (torch.bfloat16, torch.int16, POINTERS[v.scales], torch.bfloat16)
    return variant_kernel.warmup(
        *dtypes, torch.float32, torch.int32, 3, 8192, 8192, 8192, 0, 8, 65536.0 if v.fmt == "nvfp4" else 1.0,
        **v.constants(), num_warps=v.warps, grid=(1, 1),
    )  # fmt: skip


# --- timing --------------------------------------------------------------------------------------------------------

COLD = 160e6


def timed(makes: list[Any]) -> float:
    for call in makes[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in makes:
            call()
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(makes))
    return statistics.median(times[2:])


def splits_for(v: Variant, rows: int, columns: int, processors: int) -> list[int]:
    blocks, steps = rows // v.block_n, columns // (4 * v.part)
    wanted = [1] if blocks >= processors * 0.9 else []
    for per in (2, 4, 6, 8):  # blocks per processor
        splits = max(1, round(per * processors / blocks))
        if v.last and per not in (4, 6):
            continue
        if splits <= steps // 2 and splits <= 32 and splits not in wanted:
            wanted.append(splits)
    return wanted or [1]


class Report:
    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / "variants.jsonl").open("w")
        self.rows: list[dict[str, Any]] = []

    def say(self, **row: Any) -> None:
        self.rows.append(row)
        line = json.dumps(row)
        self.file.write(line + "\n")
        self.file.flush()
        print(line, flush=True)


def resources(v: Variant) -> dict[str, int]:
    kernel = warm(v)
    try:
        kernel._init_handles()
        return {"regs": kernel.n_regs, "spills": kernel.n_spills, "smem": kernel.metadata.shared}
    except Exception:  # told by the timing
        return {}


def time_shape(report: Report, rows: int, columns: int, all_variants: list[Variant], late: Any, device: str = "cuda") -> None:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    case = f"{rows}x{columns}"
    weights = {fmt: Weight(fmt, rows, columns, device) for fmt in ("nvfp4", "int4")}
    xs = {tokens: torch.randn(tokens, columns, device=device).bfloat16() for tokens in (1, 16, 64)}
    truth = {}
    for fmt, weight in weights.items():
        dense = weight.dense()
        for tokens, x in xs.items():
            truth[fmt, tokens] = x.float() @ dense.t()
    base = {}
    dense16 = [torch.randn(rows, columns, device=device).bfloat16() for _ in range(max(2, int(COLD // (2 * rows * columns)) + 1))]
    for tokens, x in xs.items():
        base[tokens] = timed([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense16])
        report.say(case=case, M=tokens, what="bf16", us=round(base[tokens], 2))
    del dense16, dense

    def error(found: torch.Tensor, fmt: str, tokens: int) -> float:
        exact = truth[fmt, tokens]
        return float((found.float() - exact).norm() / exact.norm())

    held: dict[Any, list[Any]] = {}
    for v in all_variants:
        if late():
            return
        weight = weights[v.fmt]
        try:
            if v.layout not in held:
                if len(held) > 40:
                    held.clear()
                words, factors = weight.words(v), weight.factors(v)
                copies = max(2, int(COLD // (words.nbytes + factors.nbytes)) + 1)
                held[v.layout] = [(words.clone(), factors.clone()) for _ in range(copies)]
            used = resources(v)
        except Exception as problem:
            report.say(case=case, what=asdict(v), error=f"{type(problem).__name__}: {str(problem)[-300:]}")
            continue
        for tokens in (1, 16) if v.block_m == 16 else (1,) if v.block_m == 8 else (64,):
            for splits in splits_for(v, rows, columns, processors):
                if late():
                    return
                try:
                    calls, outs = [], []
                    for words, factors in held[v.layout]:
                        out = torch.full((tokens, rows), float("nan"), device=device, dtype=torch.bfloat16)
                        sums = torch.full((splits, tokens, rows), float("nan"), device=device)
                        counters = torch.zeros(rows // v.block_n, device=device, dtype=torch.int32)
                        arguments = (v, xs[tokens], words, factors, rows, splits, sums, out, counters)
                        calls.append(lambda a=arguments: launch(*a))
                        outs.append(out)
                    us = timed(calls)
                    wrong = max(error(out, v.fmt, tokens) for out in (outs[0], outs[-1]))
                    row = {"us": round(us, 2), "x": round(base[tokens] / us, 3), "err": float(f"{wrong:.2g}")}
                    if not wrong < 4e-3:
                        row["WRONG"] = True
                    report.say(case=case, M=tokens, splits=splits, **row, **used, what=asdict(v))
                except Exception as problem:
                    report.say(case=case, M=tokens, splits=splits, what=asdict(v),
                               error=f"{type(problem).__name__}: {str(problem)[-300:]}")  # fmt: skip


def best(report: Report) -> None:
    kept: dict[Any, list[dict[str, Any]]] = {}
    for row in report.rows:
        if "x" in row and not row.get("WRONG"):
            kept.setdefault((row["case"], row["what"]["fmt"], row["M"]), []).append(row)
    for (case, fmt, tokens), rows in kept.items():
        print(f"== {case} {fmt} M={tokens}")
        for row in sorted(rows, key=lambda r: r["us"])[:5]:
            what = {k: w for k, w in row["what"].items() if k != "fmt"}
            print(f"   {row['us']:7.2f} us {row['x']:5.2f}x splits {row.get('splits')} {what}")
    bad = [row for row in report.rows if "error" in row or row.get("WRONG")]
    print(f"{len(report.rows)} results, {len(bad)} failed or wrong", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seconds", type=float, default=58)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    began = time.perf_counter()
    grid = variants()
    if arguments.share is not None:
        add_kernel.warmup(torch.float32, torch.bfloat16, 3, 3, BLOCK=512, num_warps=4, grid=(1,))
        for v in grid[arguments.share :: arguments.jobs]:
            try:
                warm(v)
            except Exception as problem:
                print(f"not compiled: {v}: {type(problem).__name__}", file=sys.stderr, flush=True)
        return
    command = [sys.executable, __file__, "--jobs", str(arguments.jobs), "--share"]
    workers = [subprocess.Popen([*command, str(i)]) for i in range(arguments.jobs)]
    report = Report(arguments.out)
    properties = torch.cuda.get_device_properties(0)
    report.say(device=properties.name, processors=properties.multi_processor_count, torch=torch.__version__, triton=triton.__version__)
    torch.zeros(1, device="cuda")
    for worker in workers:
        try:
            worker.wait(timeout=max(1, 0.6 * arguments.seconds - (time.perf_counter() - began)))
        except subprocess.TimeoutExpired:
            report.say(slow=True, at=round(time.perf_counter() - began, 1))
    report.say(compiled=round(time.perf_counter() - began, 1))
    shapes = ((8192, 8192), (4096, 4096), (28672, 4096))
    left = arguments.seconds - (time.perf_counter() - began)
    # Earlier shapes may take so much of what is left that later ones keep some.
    until = [time.perf_counter() + left * part for part in (0.5, 0.8, 1.0)]
    try:
        with torch.inference_mode():
            for (rows, columns), end in zip(shapes, until, strict=True):
                try:
                    time_shape(report, rows, columns, grid, lambda end=end: time.perf_counter() > end)
                except Exception as problem:
                    report.say(case=f"{rows}x{columns}", error=f"{type(problem).__name__}: {str(problem)[-500:]}")
                report.say(case=f"{rows}x{columns}", ended=round(time.perf_counter() - began, 1))
                torch.cuda.empty_cache()
    finally:
        best(report)
        for worker in workers:
            if worker.poll() is None:
                worker.kill()


if __name__ == "__main__":
    main()
