"""Run by test_distill_rows.py: compile the kernel ahead of time for every architecture, without a GPU.

Asserts that nothing spills, that registers leave room for several programs per processor, and that logits are read and
written 16 bytes at a time.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from compile_packed_linear import spills
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qat.kernels.distill_rows.triton import constants, distill_rows_kernel, warps
from qat.rows import KINDS

ALIGNED = ("student", "teacher", "losses", "targets", "V", "stride_student", "stride_teacher")


def compiled(kind: str, capability: int, dtype: str, vocabulary: int) -> triton.compiler.CompiledKernel:
    fixed = constants(kind, vocabulary)
    plain = kind == "cross_entropy"
    signature = {
        "student": dtype,
        "teacher": "constexpr" if plain else dtype,
        "targets": "*i64" if plain else "constexpr",
        "losses": "*fp32",
        **dict.fromkeys(("V", "stride_student", "stride_teacher"), "i32"),
        **dict.fromkeys(("temperature", "beta", "log_b", "log_rest", "scale"), "fp32"),
        **dict.fromkeys(fixed, "constexpr"),
    }
    names = distill_rows_kernel.arg_names
    given = {(names.index(name),): value for name, value in fixed.items()}
    given[(names.index("teacher" if plain else "targets"),)] = None
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED if signature[name] != "constexpr"}
    source = ASTSource(distill_rows_kernel, signature, given, hints)
    options = {"num_warps": warps(fixed["BLOCK"])}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def registers(kernel: triton.compiler.CompiledKernel) -> int:
    """Per thread, from the compiled binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(count) for count in re.findall(r"REG:(\d+)", text))


def main() -> None:
    cases = [(kind, 90, "*bf16") for kind in KINDS]
    cases += [("jsd", capability, "*bf16") for capability in (80, 89, 100, 120)]
    cases += [("forward_kl", capability, dtype) for capability, dtype in ((80, "*bf16"), (90, "*fp16"), (90, "*fp32"))]
    for kind, capability, dtype in cases:
        kernel = compiled(kind, capability, dtype, vocabulary=128256)
        what = f"{kind} {dtype[1:]} sm_{capability}"
        assert spills(kernel) == 0, f"{what}: spills"
        assert registers(kernel) <= 128, f"{what}: {registers(kernel)} registers; two programs per processor at most"
        wide = len(re.findall(r"ld\.global\S*\.v4\.b32", kernel.asm["ptx"]))
        assert wide, f"{what}: logits are not read 16 bytes at a time"
        assert re.search(r"st\.global\S*\.v4\.b32", kernel.asm["ptx"]), f"{what}: nor written"
        print(f"{what}: {registers(kernel)} registers, {kernel.metadata.shared} bytes of shared memory, "
              f"{wide} wide loads, no spills")  # fmt: skip
    print("all compiled")


if __name__ == "__main__":
    sys.exit(main())
