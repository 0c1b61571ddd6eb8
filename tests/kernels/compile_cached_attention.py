"""Run by test_cached_attention.py: compile the kernels ahead of time for every architecture, without a GPU.

Asserts that nothing spills (a little where 32 rows or products of float32 are asked for), that sm_90 copies the cache
asynchronously into shared memory, brings it from there by matrix loads and multiplies with tensor cores, and how many
instructions a code costs a thread there: what decides whether memory or decoding is waited for.
"""

import re
import sys

import triton.language as tl
from triton.compiler import CompiledKernel

from qat.kernels.cached_attention.choose import choose
from qat.kernels.cached_attention.merge.triton import MERGED, merge_pieces_kernel
from qat.kernels.cached_attention.triton import cached_attention_kernel, side
from qat.numbers.catalog import lookup
from tests.kernels.ahead import build, longest_loop, resources

WIDTH, HEADS, TOKENS, PROCESSORS = 128, 8, 32768, 132
SCALES = {"f32": "*fp32", "bf16": "*bf16", "e4m3": "*u8"}
# Instructions of a thread per code, by Triton 3.6 to 3.9 and a few to spare.
COSTS = {"fp8_tensor": 2.8, "int8_tensor": 3.3, "fp8_token": 5.6, "int8_token": 6.1, "int4_token": 5.3, "nvfp4": 5.7}
PAGED = 2.5  # more where tokens lie in pages
INTEGERS = [name for name in cached_attention_kernel.arg_names if name in (
    "T", "piece", "heads", "stride_qb", "stride_qh", "stride_qt", "stride_kb", "stride_kh", "stride_vb", "stride_vh",
    "stride_mb", "stride_mq", "stride_table")]  # fmt: skip


def compiled(name: str, capability: int, dtype: str = "*bf16", rows: int = 4, masked: bool = False,
             page: int = 0) -> CompiledKernel:  # fmt: skip
    fmt, exact = lookup(name), dtype == "*fp32"
    tiles = choose(TOKENS, HEADS, rows, PROCESSORS, exact=exact)
    assembly = capability >= 89 and not exact
    scales = SCALES[fmt.scale.name] if not fmt.is_static else "*u8"
    types = {
        "query": dtype, "keys": "*i16", "values": "*i16", "key_scales": scales, "value_scales": scales, "out": dtype,
        "key_static": "*fp32", "value_static": "*fp32", "mask": "*u8", "pages": "*i32", "lengths": "*i32",
        "sums": "*fp32", "ends": "*fp32", "scaling": "fp32", **dict.fromkeys(INTEGERS, "i32"),
    }  # fmt: skip
    fixed = {
        "QUERIES": 1, "ROWS": rows, "CAUSAL": False, "MASKED": masked, "PAGE": page, "ASSEMBLY": assembly,
        "DTYPE": tl.float32 if exact else tl.float16, **side("K", fmt, WIDTH, assembly=assembly),
        **side("V", fmt, WIDTH, assembly=assembly), "SPLIT": True, "BLOCK_R": tiles.block_r, "BLOCK_T": tiles.block_t,
        "STAGES": tiles.stages,
    }  # fmt: skip
    if not masked:
        fixed["mask"] = None
    if not page:
        fixed |= {"pages": None, "lengths": None}
    if not fmt.is_static and not fmt.global_scale:
        fixed |= {"key_static": None, "value_static": None}
    kernel = build(cached_attention_kernel, types, fixed, capability, unaligned=INTEGERS, num_warps=tiles.warps)
    registers, spilled = resources(kernel)
    what = f"{name} {dtype[1:]} {rows} rows{f', pages of {page}' if page else ''} sm_{capability}"
    assert spilled <= (0 if rows == 4 and not exact else 256), f"{what}: spills {spilled} bytes"
    print(
        f"{what}: {registers} registers, {spilled} bytes spilled, {kernel.metadata.shared} bytes of shared memory",
        end="",
    )
    return kernel


def main() -> None:
    for name, limit in COSTS.items():
        kernel = compiled(name, 90)
        loop, ptx = longest_loop(kernel), kernel.asm["ptx"]
        per = len(loop) / (2 * WIDTH * choose(TOKENS, HEADS, 4, PROCESSORS, exact=False).block_t / 128)
        print(f", {per:.1f} instructions per code")
        assert per <= limit, f"{name}: {per:.1f} instructions per code, at most {limit}"
        assert "ldmatrix" in ptx and "mma" in ptx, f"{name}: no matrix loads or products"
        copies = {int(size, 16) for size in re.findall(r"cp\.async\S* \[[^\]]*\], \[[^\]]*\], (0x\w+)", ptx)}
        assert copies, f"{name}: the cache is not copied ahead"
        assert not lookup(name).is_static or 16 in copies, f"{name}: copies of {copies} bytes"
    for name in ("fp8_tensor", "int8_token", "int4_token", "nvfp4"):
        for capability in (80, 89, 100, 120):
            compiled(name, capability, "*fp16")
            print()
        for dtype, rows, masked in (("*bf16", 32, True), ("*fp32", 4, False)):
            compiled(name, 90, dtype, rows, masked)
            print()
    for name in COSTS:
        for page in (16, 64):
            kernel = compiled(name, 90, page=page)
            per = len(longest_loop(kernel)) / (
                2 * WIDTH * choose(TOKENS, HEADS, 4, PROCESSORS, exact=False).block_t / 128
            )
            print(f", {per:.1f} instructions per code")
            assert per <= COSTS[name] + PAGED, f"{name} in pages of {page}: {per:.1f} instructions per code"
    types = {"sums": "*fp32", "ends": "*fp32", "out": "*bf16", "rows": "i32", "pieces": "i32"}
    merge = build(merge_pieces_kernel, types, {"WIDTH": WIDTH, "BLOCK_D": WIDTH, "BLOCK_P": MERGED}, 90)
    assert resources(merge)[1] == 0
    print("all compiled")


if __name__ == "__main__":
    sys.exit(main())
