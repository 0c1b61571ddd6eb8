"""Run by test_fake_quantize.py: compile the training kernels ahead of time for every architecture, without a GPU.

Asserts that nothing spills, that memory is read and written in pieces of 16 bytes (8 BF16 values) per thread, and that
rounding takes no more instructions per value than memory leaves time for.
"""

import re
import sys
from typing import Any

from triton.compiler import CompiledKernel

from qat.kernels.fake_quantize import triton as kernels
from qat.kernels.fake_quantize.choose import Plan, plan
from qat.kernels.fake_quantize_input import triton as dynamic
from qat.kernels.quantize_pack import triton as pack
from qat.numbers.catalog import lookup
from qat.numbers.scale import UE4M3
from qat.serving.packed import problem
from tests.kernels.ahead import build, instructions, resources

FLOATS = ("divisor", "multiplier", "of_divisor", "of_multiplier", "static", "scales")
VALUES = ("x", "y", "out", "grad", "grad_x", "weight")
COUNTS = ("R", "C", "SEGMENT", "scale_columns", "K", "stride_words", "scale_stride")


def compiled(
    kernel: Any, fixed: dict[str, Any], capability: int, warps: int, wide: bool = False, **options: Any
) -> CompiledKernel:
    """`kernel` for BF16 tensors, or `wide` for float32 ones that become BF16; None in `fixed` is an absent tensor."""
    types = {**dict.fromkeys(FLOATS, "*fp32"), **dict.fromkeys(VALUES, "*bf16"), "zeros": "*i8", "words": "*i16"}
    types |= dict.fromkeys(COUNTS, "i32") | ({"x": "*fp32"} if wide else {})
    return build(kernel, types, fixed, capability, num_warps=warps, **options)


def forward(name: str, cut: Plan, capability: int, parts: int = 1, wide: bool = False) -> CompiledKernel:
    fmt = lookup(name)
    fixed = {
        **kernels.geometry(cut),
        **kernels.constants(fmt),
        "PARTS": parts,
        "ROUND_BF16": "",
        "FULL": kernels.is_full(cut),
    }
    fixed |= {} if fmt.zero_point else {"zeros": None}
    return compiled(kernels.fake_quantize_kernel, fixed, capability, cut.warps, wide, enable_fp_fusion=False)


def backward(name: str, cut: Plan, capability: int, estimator: str, needs: str, parts: int = 1) -> CompiledKernel:
    fmt = lookup(name)
    fixed = {**kernels.geometry(cut), "PARTS": parts, **kernels.limits(fmt), "ZEROS": fmt.zero_point}
    fixed |= {"CLIPPED": estimator == "clipped", "ONE_SCALE": needs == "x", "NEEDS_X": "x" in needs}
    fixed |= {"NEEDS_DIVISOR": "d" in needs, "NEEDS_MULTIPLIER": "m" in needs}
    fixed["WHOLE"] = cut.block_columns == 0 and cut.segments == 1
    fixed["ONE_TILE"] = cut.segment <= cut.tile_columns
    absent = {"zeros": fmt.zero_point, "y": "m" in needs, "grad_x": "x" in needs}
    absent |= {"of_divisor": "d" in needs, "of_multiplier": "m" in needs}
    fixed |= {argument: None for argument, here in absent.items() if not here}
    return compiled(kernels.fake_quantize_backward_kernel, fixed, capability, cut.warps)


def of_input(name: str, columns: int, capability: int, keep: bool = True) -> CompiledKernel:
    fmt = lookup(name)
    fixed = dynamic.arguments(fmt, 4096 * columns // (fmt.group or columns), fmt.group or columns)
    warps = fixed.pop("num_warps")
    fixed |= {"KEEP": keep, "ROUND_BF16": ""} | ({} if fmt.scale is UE4M3 else {"static": None})
    fixed |= {} if keep else {"scales": None}
    return compiled(dynamic.fake_quantize_input_kernel, fixed, capability, warps, enable_fp_fusion=False)


def packed(name: str, capability: int) -> CompiledKernel:
    fmt = lookup(name)
    fixed = pack.arguments(fmt, 4096, 4096) | ({} if fmt.zero_point else {"zeros": None})
    return compiled(pack.quantize_pack_kernel, fixed, capability, 4)


def check(what: str, kernel: CompiledKernel, loads: int, stores: int) -> None:
    registers, local = resources(kernel)
    wide = [len(re.findall(rf"{kind}\.global[\w.:]*\.v4\.b32", kernel.asm["ptx"])) for kind in ("ld", "st")]
    print(f"{what}: {registers} registers, {local} bytes spilled, 16-byte loads {wide[0]}, stores {wide[1]}")
    assert local == 0, f"{what}: spills"
    assert wide[0] >= loads and wide[1] >= stores, f"{what}: {wide} of {(loads, stores)} accesses are 16 bytes wide"
    assert not re.search(r"div\.(full|approx)|\.ftz", kernel.asm["ptx"]), (
        f"{what}: arithmetic that does not round right"
    )


def check_rounding(name: str, parts: int = 1, wide: bool = False) -> None:
    """At most 20 instructions per value on sm_90: a processor issues 39 in the time that memory takes for a BF16
    value's four bytes (an H100 that moves 3 TB/s), 59 for the six of a float32 value that becomes BF16."""
    cut = plan(lookup(name), 4096, 4096, 4096, parts=parts)
    kernel = forward(name, cut, 90, parts, wide)
    each = len(instructions(kernel)) * 32 * cut.warps / (cut.tile_rows * cut.tile_columns)
    what = f"{name}{f' in {parts} parts' if parts > 1 else ''}{', float32' if wide else ''} sm_90"
    print(f"{what}: {each:.1f} instructions per value")
    assert each <= 20, f"{what}: {each:.1f} instructions per value"


def check_all(name: str, capability: int) -> None:
    """Every kernel of one format on one architecture. 4096 values of a program are four 16-byte accesses per thread."""
    fmt, what = lookup(name), f"{name} sm_{capability}"
    check(f"{what} forward", forward(name, plan(fmt, 4096, 4096, 4096), capability), 4, 4)
    cut = plan(fmt, 4096, 4096, 2048, kernels.PROGRAMS)
    for estimator, needs, tensors in (("ste", "xdm", 3), ("clipped", "x", 2)):
        kernel = backward(name, cut, capability, estimator, needs)
        check(f"{what} backward {estimator} {needs}", kernel, 2 * tensors, 2)
    if problem(fmt) is None:
        check(f"{what} pack", packed(name, capability), 4, 1)


def main() -> None:
    for name in ("int4_g32_asym", "int8_channel", "fp8_b128", "nvfp4"):
        check_all(name, 90)
    for name in ("fp8_tensor", "mxfp8", "nf4_g64"):
        check(f"{name} sm_90 forward", forward(name, plan(lookup(name), 4096, 4096, 4096), 90), 4, 4)
    for name, columns in (("nvfp4", 4096), ("mxfp4", 4096), ("fp8_g128", 4096), ("fp8_token", 4096),
                          ("int8_token", 14336), ("int8_token", 20480)):  # fmt: skip
        check(f"{name} {columns} sm_90 input", of_input(name, columns, 90), 4, 4)
    for name in ("int4_g32", "int4_g128", "int4_g32_asym", "int8_channel", "fp8_b128", "fp8_channel", "mxfp4"):
        check_rounding(name)
    for parts, wide in ((1, False), (1, True), (2, False)):
        check_rounding("nvfp4", parts, wide)
    for name, parts in (("nvfp4", 2), ("int4_g128", 16)):
        cut = plan(lookup(name), 4096, 4096, 4096, parts=parts)
        check(f"{name} sm_90 forward in {parts} parts", forward(name, cut, 90, parts), 4, 4)
        cut = plan(lookup(name), 4096, 4096, 2048, kernels.PROGRAMS, parts)
        check(f"{name} sm_90 backward in {parts} parts", backward(name, cut, 90, "ste", "xdm", parts), 6, 2)
    for capability in (80, 89, 100, 120):
        check_all("nvfp4", capability)
        for name in ("nvfp4", "int8_token"):
            check(f"{name} sm_{capability} input", of_input(name, 4096, capability), 4, 4)
    print("all compiled")


if __name__ == "__main__":
    sys.exit(main())
