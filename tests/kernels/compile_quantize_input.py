"""Run by test_quantize_input.py: compile the input quantizers ahead of time for every architecture, without a GPU.

Asserts that nothing spills, that inputs and codes move in vectors, and that quotients are IEEE divisions.
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
from qat.kernels.quantize_input.choose import Tiles, choose
from qat.kernels.quantize_input.triton import constants, quantize_input_kernel, shares_rows

POINTERS = ("x", "other", "weight", "static", "codes", "scales", "sums")
ALIGNED = ("x", "other", "weight", "codes", "scales", "sums", "K", "width", "groups", "stride_x", "stride_other")


def compiled(
    name: str, capability: int, source: str, norm: bool, tiles: Tiles, dtype: tl.dtype = tl.bfloat16
) -> triton.compiler.CompiledKernel:
    fmt = lookup(name)
    fixed = constants(fmt, source, norm, dtype, tiles)
    value = f"*{dtype.name}".replace("float", "fp").replace("bfp", "bf")
    used = {
        "x": value,
        "other": value if source != "plain" else None,
        "weight": value if norm else None,
        "static": "*fp32" if fmt.scale in ("e4m3", "bf16") else None,
        "codes": "*i8" if fmt.element.kind == "integer" else "*u8",
        "scales": "*fp32" if fmt.scale in ("f32", "bf16") else "*u8",
        "sums": value,
    }
    signature = {
        **{pointer: used[pointer] or "constexpr" for pointer in POINTERS},
        **dict.fromkeys(("M", "K", "width", "groups", "stride_x", "stride_other"), "i32"),
        "eps": "fp32",
        **dict.fromkeys(fixed, "constexpr"),
    }
    position = quantize_input_kernel.arg_names.index
    given = {(position(key),): value for key, value in fixed.items()}
    given |= {(position(key),): None for key in POINTERS if used[key] is None}
    hints = {(position(key),): [["tt.divisibility", 16]] for key in ALIGNED if signature[key] != "constexpr"}
    source_of = ASTSource(quantize_input_kernel, signature, given, hints)
    options = {"num_warps": tiles.warps, "enable_fp_fusion": False}
    return triton.compile(source_of, target=GPUTarget("cuda", capability, 32), options=options)


def usage(kernel: triton.compiler.CompiledKernel) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, from the compiled binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers = max(int(count) for count in re.findall(r"REG:(\d+)", text))
    return registers, sum(int(size) for size in re.findall(r"(?:LOCAL|STACK):(\d+)", text))


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
        registers, local = usage(kernel)
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
