"""Run by test_quantized_matmul.py: compile the kernel ahead of time for every architecture, without a GPU.

Asserts that nothing spills and that the tensor cores multiply in the type that was meant. On sm_90 a decoded 4-bit
weight must reach them from registers. Without arguments it prints the table of `kernels/README.md`.
"""

import importlib.util
import re
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qat.catalog import lookup
from qat.kernels.quantized_matmul.choose import Device, Tiles, choose
from qat.kernels.quantized_matmul.triton import constants, quantized_matmul_kernel, sum_dtype
from qat.matmul import is_paired

_spec = importlib.util.spec_from_file_location("packed", Path(__file__).with_name("compile_packed_linear.py"))
packed = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(packed)

DEVICES = {
    80: Device(80, 108, 163 * 1024),
    89: Device(89, 142, 99 * 1024),
    90: Device(90, 132, 227 * 1024),
    100: Device(100, 148, 227 * 1024),
    120: Device(120, 170, 99 * 1024),
}
ALIGNED = ("x", "x_scales", "w", "w_scales", "bias", "out", "N", "K", "stride_x", "stride_w", "stride_ws")
SCALES = {"bf16": "*bf16", "f32": "*fp32", "e4m3": "*u8", "e8m0": "*u8"}


def pointer(name: str, operand: str, *, words: bool) -> str:
    fmt = lookup(name)
    if words:
        return "*i16"
    if fmt.element.kind == "integer":
        return "*i8"
    return "*u8" if operand == "float16" or fmt.element.bits < 8 else "*fp8e4nv"


def compiled(x: str, w: str, device: Device, tiles: Tiles, columns: int = 4096) -> triton.compiler.CompiledKernel:
    fixed = constants(lookup(x), lookup(w), columns, bias=False, tiles=tiles)
    sums = "*i32" if str(sum_dtype(tiles)) == "torch.int32" else "*fp32"
    signature = {
        "x": pointer(x, tiles.operand, words=False),
        "x_scales": "*fp32" if lookup(x).block == (0, 0) else SCALES[lookup(x).scale],
        "w": pointer(w, tiles.operand, words=lookup(w).element.bits < 8),
        "w_scales": SCALES[lookup(w).scale],
        "bias": "constexpr",
        "out": sums if tiles.parallel else "*bf16",
        **dict.fromkeys(("M", "N", "K", "stride_x", "stride_xs", "stride_w", "stride_ws"), "i32"),
        "global_scale": "fp32",
        **dict.fromkeys(fixed, "constexpr"),
    }
    at = quantized_matmul_kernel.arg_names.index
    given = {(at(key),): value for key, value in fixed.items()} | {(at("bias"),): None}
    hints = {(at(key),): [["tt.divisibility", 16]] for key in ALIGNED if signature[key] != "constexpr"}
    source = ASTSource(quantized_matmul_kernel, signature, given, hints)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return triton.compile(source, target=GPUTarget("cuda", device.capability, 32), options=options)


KINDS = {
    "wgmma": re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k\d+\.(\S+)"),
    "tcgen05": re.compile(r"tcgen05\.mma\.cta_group::1\.(kind::\S+)"),
    "mma": re.compile(r"mma\.sync\.aligned\.m\d+n\d+k\d+\.row\.col(?:\.satfinite)?\.(\S+)"),
}


def products(ptx: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in ptx.splitlines():
        for kind, pattern in KINDS.items():
            match = pattern.search(line)
            if match:
                source = " from registers" if kind == "wgmma" and re.search(r"\}, \{%r", line) else ""
                key = f"{kind} {match[1]}{source}"
                found[key] = found.get(key, 0) + 1
    return found


def registers(kernel: triton.compiler.CompiledKernel) -> int:
    import subprocess, tempfile
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(stack) for stack in re.findall(r"REG:(\d+)", text))


def main(cases) -> None:
    for x, w, capability, tokens, rows in cases:
        device = DEVICES[capability]
        tiles = choose(tokens, rows, 4096, lookup(x), lookup(w), device)
        kernel = compiled(x, w, device, tiles)
        print(f"{x} x {w} sm_{capability} {tiles.block_n}x{tiles.block_m} {tiles.warps}w seg{tiles.segments}{'p' if tiles.parallel else ''}:"
              f" REG {registers(kernel)} spill {packed.spills(kernel)} smem {kernel.metadata.shared} {products(kernel.asm['ptx'])}", flush=True)


if __name__ == "__main__":
    caps = [int(c) for c in sys.argv[1].split(",")]
    toks = [int(c) for c in sys.argv[2].split(",")]
    pairs = [p.split(":") for p in sys.argv[3].split(",")]
    main([(x, w, c, t, 4096) for x, w in pairs for c in caps for t in toks])
