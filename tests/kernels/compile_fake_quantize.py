"""Run by test_fake_quantize.py: compile the training kernels ahead of time for every architecture, without a GPU.

Asserts that nothing spills, and that memory is read and written in pieces of 16 bytes (8 BF16 values) per thread.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qat.catalog import lookup
from qat.kernels.fake_quantize import triton as kernels
from qat.kernels.fake_quantize.choose import Plan, plan

FLOATS = ("divisor", "multiplier", "of_divisor", "of_multiplier", "static", "scales")
VALUES = ("x", "y", "out", "grad", "grad_x", "weight")
COUNTS = ("R", "C", "SEGMENT", "scale_columns", "K", "stride_words", "scale_stride")


def compiled(kernel: Any, fixed: dict[str, Any], capability: int, warps: int) -> triton.compiler.CompiledKernel:
    """`kernel` for BF16 tensors; None in `fixed` is an absent tensor."""
    types = {**dict.fromkeys(FLOATS, "*fp32"), **dict.fromkeys(VALUES, "*bf16"), "zeros": "*i8", "words": "*i16"}
    types |= dict.fromkeys(COUNTS, "i32")
    signature = {name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names}
    given = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items()
             if kind != "constexpr"}  # fmt: skip
    source = ASTSource(kernel, signature, given, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def resources(kernel: triton.compiler.CompiledKernel) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, from the compiled binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(sum(map(int, re.findall(rf"(?:{kind}):(\d+)", text))) for kind in ("REG", "LOCAL|STACK"))  # type: ignore[return-value]  # two numbers


def forward(name: str, cut: Plan, capability: int) -> triton.compiler.CompiledKernel:
    fmt = lookup(name)
    fixed = {**kernels._geometry(cut), **kernels.constants(fmt), "ROUND_BF16": not fmt.exact_in_bf16}
    del fixed["scale_columns"]
    fixed |= {} if fmt.zero_point else {"zeros": None}
    return compiled(kernels.fake_quantize_kernel, fixed, capability, cut.warps)


def backward(name: str, cut: Plan, capability: int, estimator: str, needs: str) -> triton.compiler.CompiledKernel:
    fmt = lookup(name)
    fixed = {**kernels._geometry(cut), **kernels.limits(fmt), "ZEROS": fmt.zero_point}
    del fixed["scale_columns"]
    fixed |= {"CLIPPED": estimator == "clipped", "ONE_SCALE": needs == "x", "NEEDS_X": "x" in needs}
    fixed |= {"NEEDS_DIVISOR": "d" in needs, "NEEDS_MULTIPLIER": "m" in needs}
    fixed["WHOLE"] = cut.block_columns == 0 and cut.segments == 1
    fixed["ONE_TILE"] = cut.segment <= cut.tile_columns
    absent = {"zeros": fmt.zero_point, "y": "m" in needs, "grad_x": "x" in needs}
    absent |= {"of_divisor": "d" in needs, "of_multiplier": "m" in needs}
    fixed |= {argument: None for argument, here in absent.items() if not here}
    return compiled(kernels.fake_quantize_backward_kernel, fixed, capability, cut.warps)


def check(what: str, kernel: triton.compiler.CompiledKernel, loads: int, stores: int) -> None:
    registers, local = resources(kernel)
    wide = [len(re.findall(rf"{kind}\.global[\w.:]*\.v4\.b32", kernel.asm["ptx"])) for kind in ("ld", "st")]
    print(f"{what}: {registers} registers, {local} bytes spilled, 16-byte loads {wide[0]}, stores {wide[1]}")
    assert local == 0, f"{what}: spills"
    assert wide[0] >= loads and wide[1] >= stores, f"{what}: {wide} of {(loads, stores)} accesses are 16 bytes wide"
    assert "div.full" not in kernel.asm["ptx"], f"{what}: an approximate division"


def main() -> None:
    names = ("int4_g128", "int4_g32_asym", "int8_channel", "nvfp4", "mxfp8", "fp8_b128", "fp8_tensor", "nf4_g64")
    for name in names:
        for capability in (80, 89, 90, 100, 120) if name in ("int4_g128", "nvfp4") else (90,):
            cut = plan(lookup(name), 4096, 4096, 4096)
            check(f"{name} sm_{capability} forward", forward(name, cut, capability), 4, 4)
            cut = plan(lookup(name), 4096, 4096, 2048, kernels.PROGRAMS)
            for estimator, needs, tensors in (("ste", "xdm", 3), ("ste", "dm", 3), ("clipped", "x", 2)):
                what = f"{name} sm_{capability} backward {estimator} {needs}"
                kernel = backward(name, cut, capability, estimator, needs)
                check(what, kernel, 2 * tensors, 2 * ("x" in needs))
    print("all compiled")


if __name__ == "__main__":
    sys.exit(main())
