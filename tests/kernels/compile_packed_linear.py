"""Run by test_packed_linear.py: compile the kernel ahead of time for every architecture, without a GPU.

Asserts that nothing spills, that sm_90 multiplies with wgmma whose decoded operand comes from registers, and how many
instructions a weight in panels costs a thread there: what decides whether memory or decoding is waited for.
"""

import itertools
import re
import sys

import triton.language as tl
from triton.compiler import CompiledKernel

from qat.kernels.packed_linear.choose import PanelTiles, Tiles, choose, choose_panels
from qat.kernels.packed_linear.dense import triton as dense_kernels
from qat.kernels.packed_linear.panels import triton as panel_kernels
from qat.kernels.packed_linear.triton import constants, packed_linear_kernel
from qat.numbers.catalog import lookup
from qat.serving.panels import tile as panel_tile
from qat.serving.words import tile
from tests.kernels.ahead import build, instructions, longest_loop, resources

# Instructions of a thread per weight at 16 and at 64 tokens, by Triton 3.6 to 3.9 and a few to spare.
COSTS = {"nvfp4": (4.2, 4.8), "int4_g128": (2.9, 3.5), "int4_g32": (4.7, 6.0), "mxfp4": (5.2, 6.5)}
DENSE = {"int4_g128": 6.7, "nvfp4": 9.0, "mxfp4": 9.5}  # the same of decoding alone: 10 are as slow as an H100's memory
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


def compiled_panels(name: str, capability: int, tiles: PanelTiles, dtype: tl.dtype = tl.bfloat16) -> CompiledKernel:
    fmt = lookup(name)
    fixed = panel_kernels.constants(fmt, 8192, bias=False, dtype=dtype, assembly=dtype == tl.bfloat16, tiles=tiles)
    value = "*fp32" if dtype == tl.float32 else "*bf16"
    types = {
        "x": value,
        "words": "*i16",
        "scales": POINTERS[fmt.scale.name],
        "out": value,
        "sums": "*fp32",
        **dict.fromkeys(("M", "N", "K", "stride_x", "share"), "i32"),
        "global_scale": "fp32",
    }
    given = {"num_warps": tiles.warps}
    return build(
        panel_kernels.panels_kernel,
        types,
        fixed | {"bias": None},
        capability,
        unaligned=("M", "share"),
        **given,
    )


def check_panels() -> None:
    for (name, costs), index in itertools.product(COSTS.items(), (0, 1)):
        tiles = choose_panels((16, 64)[index], 8192, 8192, panel_tile(lookup(name)), 132)
        kernel = compiled_panels(name, 90, tiles)
        what = f"{name} in panels, {tiles.block_n}x{tiles.block_m}"
        registers, spilled = resources(kernel)
        assert spilled == 0, f"{what}: spills"
        products = [line for line in kernel.asm["ptx"].splitlines() if "wgmma.mma_async" in line or "mma.sync" in line]
        assert products and all(re.search(r"mma.*\}, *\{ *%r", line) for line in products), f"{what}: {products[:1]}"
        weights = panel_tile(lookup(name)) * tiles.block_n / (32 * tiles.warps)
        cost = len(longest_loop(kernel)) / weights
        assert cost <= costs[index], f"{what}: {cost:.2f} instructions per weight, {costs[index]} allowed"
        print(
            f"{what}: {cost:.2f} instructions per weight, {registers} registers, {kernel.metadata.shared} bytes shared"
        )
    few = choose_panels(16, 8192, 8192, 256, 132)
    for name, capability in itertools.product(("int4_g128", "nvfp4"), (80, 89, 100, 120)):
        assert resources(compiled_panels(name, capability, few))[1] == 0, f"{name} in panels on sm_{capability}: spills"
    assert "tf32" not in compiled_panels("nvfp4", 90, few, tl.float32).asm["ptx"]


def compiled_dense(name: str, capability: int, panelled: bool) -> CompiledKernel:
    """What decodes for prompts."""
    fmt = lookup(name)
    launch = dense_kernels._launch(name, 8192, panelled)
    fixed = {key: value for key, value in launch.fixed.items() if key in launch.kernel.arg_names}
    types = {"packed": "*i16", "scales": POINTERS[fmt.scale.name], "zeros": "*i8", "dense": "*bf16",
             **dict.fromkeys(("rows", "N", "K", "width"), "i32")}  # fmt: skip
    if not panelled and not fmt.zero_point:
        fixed["zeros"] = None
    return build(launch.kernel, types, fixed, capability, num_warps=launch.fixed["num_warps"])


def check_dense() -> None:
    for name, capability in itertools.product(DENSE, (80, 89, 90, 100, 120)):
        kernel = compiled_dense(name, capability, True)
        registers, spilled = resources(kernel)
        assert spilled == 0, f"{name} dense on sm_{capability}: spills"
        if capability == 90:
            found = instructions(kernel)
            moved = [line for line in found if re.search(r"\b(?:STG|LDG)\.E\S*\.128", line)]
            codes = panel_tile(lookup(name)) * 64 // 128  # of a thread; eight words in, eight numbers out at a time
            assert len(moved) == codes * 5 // 32, f"{name} dense: {len(moved)} accesses of 16 bytes"
            cost = len(found) / codes
            assert cost <= DENSE[name], f"{name} dense: {cost:.2f} instructions per weight, {DENSE[name]} allowed"
            print(f"{name} in panels to dense rows: {cost:.2f} instructions per weight, {registers} registers")
    for name in ("int4_g64_asym", "int8_channel", "nvfp4", "mxfp8"):
        assert resources(compiled_dense(name, 90, False))[1] == 0, f"{name} dense from words: spills"


def main() -> None:
    check_panels()
    check_dense()
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
