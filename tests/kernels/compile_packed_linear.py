"""Run by test_packed_linear.py: compile the kernel ahead of time for every architecture, without a GPU.

Asserts that nothing spills, and that sm_90 multiplies with wgmma whose decoded operand comes from registers.
"""

import re
import sys

import triton.language as tl
from triton.compiler import CompiledKernel

from qat.kernels.packed_linear.choose import Tiles, choose
from qat.kernels.packed_linear.triton import constants, packed_linear_kernel
from qat.numbers.catalog import lookup
from qat.serving.words import tile
from tests.kernels.ahead import build, resources

POINTERS = {"bf16": "*bf16", "e4m3": "*u8", "e8m0": "*u8", "f32": "*fp32"}


def compiled(
    name: str, capability: int, tiles: Tiles, dtype: tl.dtype = tl.bfloat16, columns: int = 4096
) -> CompiledKernel:
    fmt = lookup(name)
    fixed = constants(fmt, columns, zeros=fmt.zero_point, bias=False, dtype=dtype, tiles=tiles)
    value = "*fp32" if dtype == tl.float32 else "*bf16"
    types = {
        "x": value,
        "words": "*i16",
        "scales": POINTERS[fmt.scale.name],
        "zeros": "*i8",
        "out": value if tiles.splits == 1 else "*fp32",
        **dict.fromkeys(("M", "N", "K", "stride_x", "stride_words"), "i32"),
        "global_scale": "fp32",
    }
    fixed |= {"bias": None} if fmt.zero_point else {"bias": None, "zeros": None}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return build(packed_linear_kernel, types, fixed, capability, unaligned=("M",), **options)


def main() -> None:
    few, many = (choose(tokens, rows, 4096, tile(4), 132) for tokens, rows in ((16, 4096), (64, 16384)))
    cases = [(name, 90, tiles) for name in ("int4_g128", "int4_g32_asym", "nvfp4", "mxfp4", "int8_channel")
             for tiles in (few, many)]  # fmt: skip
    cases += [(name, capability, few) for name in ("int4_g128", "nvfp4") for capability in (80, 89, 100, 120)]
    for name, capability, tiles in cases:
        kernel = compiled(name, capability, tiles)
        ptx = kernel.asm["ptx"]
        what = f"{name} sm_{capability} {tiles.block_n}x{tiles.block_m}"
        assert resources(kernel)[1] == 0, f"{what}: spills"
        products = [
            line for line in ptx.splitlines() if re.search(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\.", line)
        ]
        assert products, f"{what}: no tensor cores"
        if capability == 90:  # accumulators, then the left operand: registers in braces, not a descriptor
            assert all(re.search(r"wgmma\.mma_async.*\}, \{%r", line) for line in products), f"{what}: {products[0]}"
        print(f"{what}: {len(products)} products, {kernel.metadata.shared} bytes of shared memory, no spills")
    whole = compiled("int4_g128", 90, few, tl.float32).asm["ptx"]  # some Tritons spill here: exactness is what counts
    assert "tf32" not in whole and "fma.rn.f32" in whole, "float32 is not multiplied as float32"
    print("all compiled")


if __name__ == "__main__":
    sys.exit(main())
