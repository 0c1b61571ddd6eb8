"""Run by test_packed_linear.py: compile the kernel ahead of time for every architecture, without a GPU.

Asserts that nothing spills, and that sm_90 multiplies with wgmma whose decoded operand comes from registers.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qat.catalog import lookup
from qat.kernels.packed_linear.choose import Tiles, choose
from qat.kernels.packed_linear.triton import constants, packed_linear_kernel
from qat.layouts import tile

POINTERS = {"bf16": "*bf16", "e4m3": "*u8", "e8m0": "*u8", "f32": "*fp32"}
PRODUCT = re.compile(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\.")
ALIGNED = ("x", "words", "scales", "zeros", "out", "N", "K", "stride_x", "stride_words")


def compiled(name: str, capability: int, tiles: Tiles, columns: int = 4096) -> triton.compiler.CompiledKernel:
    fmt = lookup(name)
    fixed = constants(fmt, columns, zeros=fmt.zero_point, bias=False, dtype=tl.bfloat16, tiles=tiles)
    signature = {
        "x": "*bf16",
        "words": "*i16",
        "scales": POINTERS[fmt.scale],
        "zeros": "*i8" if fmt.zero_point else "constexpr",
        "bias": "constexpr",
        "out": "*bf16" if tiles.splits == 1 else "*fp32",
        **dict.fromkeys(("M", "N", "K", "stride_x", "stride_words"), "i32"),
        "global_scale": "fp32",
        **dict.fromkeys(fixed, "constexpr"),
    }
    given = {(packed_linear_kernel.arg_names.index(k),): v for k, v in fixed.items()}
    given |= {
        (packed_linear_kernel.arg_names.index(k),): None for k in ("zeros", "bias") if signature[k] == "constexpr"
    }
    sixteen = [["tt.divisibility", 16]]
    hints = {(packed_linear_kernel.arg_names.index(k),): sixteen for k in ALIGNED if signature[k] != "constexpr"}
    source = ASTSource(packed_linear_kernel, signature, given, hints)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spills(kernel: triton.compiler.CompiledKernel) -> int:
    """Bytes of local memory per thread, from the compiled binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(int(stack) for stack in re.findall(r"(?:LOCAL|STACK):(\d+)", text))


def main() -> None:
    few, many = (choose(tokens, rows, 4096, tile(4), 132) for tokens, rows in ((16, 4096), (64, 16384)))
    cases = [(name, 90, tiles) for name in ("int4_g128", "int4_g32_asym", "nvfp4", "mxfp4", "int8_channel")
             for tiles in (few, many)]  # fmt: skip
    cases += [(name, capability, few) for name in ("int4_g128", "nvfp4") for capability in (80, 89, 100, 120)]
    for name, capability, tiles in cases:
        kernel = compiled(name, capability, tiles)
        ptx = kernel.asm["ptx"]
        what = f"{name} sm_{capability} {tiles.block_n}x{tiles.block_m}"
        assert spills(kernel) == 0, f"{what}: spills"
        products = [
            line for line in ptx.splitlines() if re.search(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\.", line)
        ]
        assert products, f"{what}: no tensor cores"
        if capability == 90:  # accumulators, then the left operand: registers in braces, not a descriptor
            assert all(re.search(r"wgmma\.mma_async.*\}, \{%r", line) for line in products), f"{what}: {products[0]}"
        print(f"{what}: {len(products)} products, {kernel.metadata.shared} bytes of shared memory, no spills")
    print("all compiled")


if __name__ == "__main__":
    sys.exit(main())
