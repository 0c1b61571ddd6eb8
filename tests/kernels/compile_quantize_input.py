"""Run by test_quantize_input.py: compile the input quantizers ahead of time for every architecture, without a GPU.

Asserts that nothing spills, that inputs and codes move in vectors, and that quotients are IEEE divisions.
"""

import re
import sys

import triton.language as tl
from triton.compiler import CompiledKernel

from qat.kernels.quantize_input.choose import Tiles, choose
from qat.kernels.quantize_input.triton import constants, quantize_input_kernel, shares_rows
from qat.numbers.catalog import lookup
from qat.numbers.scale import BF16, F32, UE4M3
from tests.kernels.ahead import build, resources


def compiled(
    name: str, capability: int, source: str, norm: bool, tiles: Tiles, dtype: tl.dtype = tl.bfloat16
) -> CompiledKernel:
    fmt = lookup(name)
    fixed = constants(fmt, source, norm, dtype, tiles)
    value = f"*{dtype.name}".replace("float", "fp").replace("bfp", "bf")
    used = {
        "x": value,
        "other": value if source != "plain" else None,
        "weight": value if norm else None,
        "static": "*fp32" if fmt.scale.is_one_of(UE4M3, BF16) else None,
        "codes": "*i8" if fmt.element.kind == "integer" else "*u8",
        "scales": "*fp32" if fmt.scale.is_one_of(F32, BF16) else "*u8",
        "sums": value,
    }
    types = {
        **{pointer: kind for pointer, kind in used.items() if kind is not None},
        **dict.fromkeys(("M", "K", "width", "groups", "stride_x", "stride_other"), "i32"),
        "eps": "fp32",
    }
    fixed |= {pointer: None for pointer, kind in used.items() if kind is None}
    options = {"num_warps": tiles.warps, "enable_fp_fusion": False}
    return build(quantize_input_kernel, types, fixed, capability, unaligned=("M", "static"), **options)


CASES = [
    *((name, 90, "plain", False, 4096) for name in
      ("int8_token", "int4_token", "fp8_token", "fp8_g128", "fp8_tensor", "nvfp4", "mxfp4", "mxfp8")),
    *((name, 90, "sum", True, 4096) for name in ("int8_token", "fp8_tensor", "nvfp4")),
    *((name, 90, "silu_mul", False, 14336) for name in ("fp8_token", "nvfp4")),
    ("int8_token", 90, "plain", True, 576),  # several rows to a program
    ("int8_token", 90, "sum", True, 20480),  # walked
    *((name, capability, source, source == "sum", 4096) for capability in (80, 89, 100, 120)
      for name, source in (("nvfp4", "plain"), ("fp8_token", "sum"), ("int8_token", "silu_mul"))),
]  # fmt: skip


def main() -> None:
    for name, capability, source, norm, columns in CASES:
        tiles = choose(8192, columns, shares_rows(lookup(name), norm), 132)
        kernel = compiled(name, capability, source, norm, tiles)
        ptx = kernel.asm["ptx"]
        what = f"{name} {source}{' norm' if norm else ''} sm_{capability} {tiles}"
        registers, local = resources(kernel)
        assert local == 0, f"{what}: spills"
        loads = re.findall(r"ld\.global[\w.:]*", ptx)
        stores = re.findall(r"st\.global[\w.:]*", ptx)
        narrow = [op for op in loads if ".v4" not in op]
        assert len(loads) > len(narrow) <= 1, f"{what}: scalar loads of more than the static scale: {loads}"
        wide = [op for op in stores if ".v4" in op or ".v2.b32" in op]
        assert wide and len(stores) - len(wide) <= 1, f"{what}: scalar stores of more than the scales: {stores}"
        assert ("div.full" in ptx) == (source == "silu_mul"), f"{what}: approximate quotients"
        assert ".ftz" not in ptx, f"{what}: subnormals are flushed"
        print(f"{what}: {registers} registers, {kernel.metadata.shared} bytes of shared memory, no spills")
    print("all compiled")


if __name__ == "__main__":
    sys.exit(main())
