"""Run by test_distill_rows.py: compile the kernel ahead of time for every architecture, without a GPU.

Asserts that nothing spills, that registers leave room for several programs per processor, and that logits are read and
written 16 bytes at a time.
"""

import re
import sys

from triton.compiler import CompiledKernel

from qat.kernels.distill_rows.triton import constants, distill_rows_kernel, warps
from qat.training.rows import KINDS
from tests.kernels.ahead import build, resources


def compiled(kind: str, capability: int, dtype: str, vocabulary: int) -> CompiledKernel:
    fixed = constants(kind, vocabulary)
    types = {
        "student": dtype,
        "teacher": dtype,
        "targets": "*i64",
        "losses": "*fp32",
        **dict.fromkeys(("V", "stride_student", "stride_teacher"), "i32"),
        **dict.fromkeys(("temperature", "beta", "log_b", "log_rest", "scale"), "fp32"),
    }
    absent = "teacher" if kind == "cross_entropy" else "targets"
    return build(distill_rows_kernel, types, {**fixed, absent: None}, capability, num_warps=warps(fixed["BLOCK"]))


def main() -> None:
    cases = [(kind, 90, "*bf16") for kind in KINDS]
    cases += [("jsd", capability, "*bf16") for capability in (80, 89, 100, 120)]
    cases += [("forward_kl", capability, dtype) for capability, dtype in ((80, "*bf16"), (90, "*fp16"), (90, "*fp32"))]
    for kind, capability, dtype in cases:
        kernel = compiled(kind, capability, dtype, vocabulary=128256)
        what = f"{kind} {dtype[1:]} sm_{capability}"
        registers, spilled = resources(kernel)
        assert spilled == 0, f"{what}: spills"
        assert registers <= 128, f"{what}: {registers} registers; two programs per processor at most"
        wide = len(re.findall(r"ld\.global\S*\.v4\.b32", kernel.asm["ptx"]))
        assert wide, f"{what}: logits are not read 16 bytes at a time"
        assert re.search(r"st\.global\S*\.v4\.b32", kernel.asm["ptx"]), f"{what}: nor written"
        print(f"{what}: {registers} registers, {kernel.metadata.shared} bytes of shared memory, "
              f"{wide} wide loads, no spills")  # fmt: skip
    print("all compiled")


if __name__ == "__main__":
    sys.exit(main())
