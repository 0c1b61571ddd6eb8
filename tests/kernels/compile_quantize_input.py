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
