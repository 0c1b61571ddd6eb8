"""Run by test_cached_attention.py: compile the kernels ahead of time for every architecture, without a GPU.

Asserts that nothing spills, that sm_90 copies the cache asynchronously and multiplies with tensor cores, and how many
instructions a code costs a thread there: what decides whether memory or decoding is waited for.
"""

import re
import sys

import triton.language as tl
from triton.compiler import CompiledKernel

from qat.kernels.cached_attention.choose import choose
from qat.kernels.cached_attention.triton import MERGED, cached_attention_kernel, merge_pieces_kernel, side
from qat.numbers.catalog import lookup
from tests.kernels.ahead import build, longest_loop, resources

WIDTH, HEADS, TOKENS, PROCESSORS = 128, 8, 32768, 132
SCALES = {"f32": "*fp32", "bf16": "*bf16", "e4m3": "*u8"}
# Instructions of a thread per code.
COSTS = {"fp8_tensor": 9, "int8_tensor": 9, "fp8_token": 9, "int8_token": 9, "int4_token": 9, "nvfp4": 9}


def compiled(name: str, capability: int, dtype: str = "*bf16", rows: int = 4, masked: bool = False) -> CompiledKernel:
    fmt, exact = lookup(name), dtype == "*fp32"
    tiles = choose(TOKENS, HEADS, rows, PROCESSORS, exact=exact)
    assembly = capability >= 89 and not exact
    scales = SCALES[fmt.scale.name]
    types = {
        "query": dtype, "keys": "*i16", "values": "*i16", "key_scales": scales, "value_scales": scales, "out": dtype,
        "key_static": "*fp32", "value_static": "*fp32", "mask": "*u8", "sums": "*fp32", "ends": "*fp32",
        "scaling": "fp32", **dict.fromkeys(INTEGERS, "i32"),
    }  # fmt: skip
    fixed = {
        "QUERIES": 1, "ROWS": rows, "CAUSAL": False, "MASKED": masked, "DTYPE": tl.float32 if exact else tl.float16,
        "ASSEMBLY": assembly, **side("K", fmt, WIDTH, assembly=assembly), **side("V", fmt, WIDTH, assembly=assembly),
        "SPLIT": True, "BLOCK_R": tiles.block_r, "BLOCK_T": tiles.block_t, "STAGES": tiles.stages,
    }  # fmt: skip
    if not masked:
        fixed["mask"] = None
    if not fmt.is_static and not fmt.global_scale:
        fixed |= {"key_static": None, "value_static": None}
    return build(cached_attention_kernel, types, fixed, capability, unaligned=INTEGERS, num_warps=tiles.warps)


INTEGERS = [name for name in cached_attention_kernel.arg_names if name in (
    "T", "piece", "heads", "stride_qb", "stride_qh", "stride_qt", "stride_kb", "stride_kh", "stride_vb", "stride_vh",
    "stride_mb", "stride_mq")]  # fmt: skip


def cost(kernel: CompiledKernel, name: str) -> float:
    """Instructions of a thread per code, in the loop over tokens."""
    codes = 2 * WIDTH * 64 / 128
    return len(longest_loop(kernel)) / codes


def main() -> None:
    for name in COSTS:
        kernel = compiled(name, 90)
        registers, spilled = resources(kernel)
        per = cost(kernel, name)
        loop = longest_loop(kernel)
        from collections import Counter
        ops = Counter(line.split()[1 if line.startswith("@") else 0].split(".")[0] for line in loop)
        copies = set(re.findall(r"cp\.async\.\w+\.shared\.global \[[^\]]*\], \[[^\]]*\], (\S+),", kernel.asm["ptx"]))
        print(f"{name}: {per:.1f} instructions per code, {registers} registers, {spilled} spilled, {kernel.metadata.shared} shared, copies {copies}")
        print("   ", ops.most_common(24))


if __name__ == "__main__":
    sys.exit(main())
