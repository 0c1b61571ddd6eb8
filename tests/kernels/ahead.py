"""Kernels compiled ahead of time, without a GPU, and what the compiler made of them; for the compile_*.py scripts."""

import re
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel


def build(
    kernel: Any,
    types: dict[str, str],
    fixed: dict[str, Any],
    capability: int,
    *,
    unaligned: Collection[str] = (),
    **options: Any,
) -> CompiledKernel:
    """`kernel` for an NVIDIA architecture.

    Args:
        kernel: a `triton.jit` function.
        types: of the arguments, as Triton spells them ("*bf16", "i32").
        fixed: compile-time arguments; None is an absent tensor.
        capability: 90 is sm_90.
        unaligned: pointers and integers that 16 need not divide.
        options: of the compiler.
    """
    signature = {name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names}
    at = kernel.arg_names.index
    aligned = [name for name, kind in signature.items() if kind.startswith(("*", "i")) and name not in unaligned]
    source = ASTSource(
        kernel,
        signature,
        {(at(name),): value for name, value in fixed.items()},
        {(at(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _tool(kernel: CompiledKernel, *command: str) -> str:
    """What one of the tools that come with Triton says of the compiled binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / command[0]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, *command[1:], file.name], capture_output=True, text=True, check=True).stdout


def resources(kernel: CompiledKernel) -> tuple[int, int]:
    """Registers and bytes of local memory (spills) per thread, from the compiled binary."""
    text = _tool(kernel, "cuobjdump", "-res-usage")
    registers = max(int(count) for count in re.findall(r"REG:(\d+)", text))
    return registers, sum(int(size) for size in re.findall(r"(?:LOCAL|STACK):(\d+)", text))


def instructions(kernel: CompiledKernel) -> list[str]:
    """All of them, up to the end of the kernel."""
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", _tool(kernel, "nvdisasm", "-c"))
    return found[: 1 + max(at for at, line in enumerate(found) if line.strip().endswith("EXIT"))]


def loops(kernel: CompiledKernel) -> list[list[str]]:
    """The instructions of every loop without another inside, as the processor gets them."""
    labels: dict[str, int] = {}
    found: list[str] = []
    spans: list[range] = []
    for line in _tool(kernel, "nvdisasm", "-c").splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(found)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            found.append(instruction.group(1).strip())
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", found[-1])
            if back and back.group(1) in labels:
                span = range(labels[back.group(1)], len(found))
                if len(span) > 1 and not any(inner.start in span for inner in spans):  # what ends a kernel is no loop
                    spans.append(span)
    return [found[span.start : span.stop] for span in spans]


def longest_loop(kernel: CompiledKernel) -> list[str]:
    """The longest of `loops`."""
    return max(loops(kernel), key=len)
