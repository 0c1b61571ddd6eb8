"""Run by test_quantized_matmul.py: compile the kernels ahead of time for every architecture, without a GPU.

Asserts that nothing spills and that the tensor cores multiply in the type that was meant; on sm_90 a decoded 4-bit
weight reaches them from registers. `--all` compiles what `kernels/README.md` tells of; it takes minutes.
"""

import re
import sys
from typing import Any

import torch
from triton.compiler import CompiledKernel

from qat.kernels.quantized_matmul.block_scaled.triton import block_scaled_kernel
from qat.kernels.quantized_matmul.block_scaled.triton import constants as block_scaled_constants
from qat.kernels.quantized_matmul.choose import Device, Tiles, choose, constants, sum_dtype
from qat.kernels.quantized_matmul.triton import quantized_matmul_kernel
from qat.numbers.catalog import lookup
from tests.kernels.ahead import build, resources

DEVICES = {
    80: Device(80, 108, 163 * 1024),
    89: Device(89, 142, 99 * 1024),
    90: Device(90, 132, 227 * 1024),
    100: Device(100, 148, 227 * 1024),
    120: Device(120, 170, 99 * 1024),
}
SIZES = ("M", "N", "K", "stride_x", "stride_xs", "stride_w", "stride_ws")
SCALES = {"bf16": "*bf16", "f32": "*fp32", "e4m3": "*u8", "e8m0": "*u8"}
PRODUCTS = {
    "wgmma": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k\d+\.(\S+)",
    "tcgen05": r"tcgen05\.mma\.cta_group::1\.(kind::\w+)",
    "mma": r"mma\.sync\.aligned\.m\d+n\d+k\d+\.row\.col(?:\.satfinite)?\.(kind::\w+|\w+\.\w+\.\w+)",
}
FEW, MANY = 16, 4096
# input, weight, architecture, tokens, rows, what multiplies
CASES = (
    ("int8_token", "int8_channel", 90, MANY, 4096, "wgmma s32.s8.s8"),
    ("int8_token", "int4_g128", 90, FEW, 4096, "wgmma s32.s8.s8 from registers"),
    ("fp8_token", "mxfp4", 90, FEW, 16384, "wgmma f32.e4m3.e4m3 from registers"),
    ("fp8_token", "int4_channel", 90, FEW, 4096, "wgmma f32.e4m3.e4m3 from registers"),
    ("fp8_g128", "fp8_b128", 90, FEW, 4096, "wgmma f32.e4m3.e4m3"),
    ("nvfp4", "nvfp4", 90, FEW, 4096, "wgmma f32.f16.f16 from registers"),
    ("mxfp4", "mxfp4", 90, MANY, 4096, "wgmma f32.e4m3.e4m3 from registers"),
    ("int8_token", "int4_g128", 80, FEW, 4096, "mma s32.s8.s8"),
    ("fp8_token", "mxfp4", 80, FEW, 4096, "mma f32.f16.f16"),
    ("fp8_token", "mxfp4", 89, FEW, 4096, "mma f32.e4m3.e4m3"),
    ("fp8_token", "int4_g128", 100, FEW, 4096, "tcgen05 kind::f8f6f4"),
    ("fp8_token", "int4_g128", 120, FEW, 4096, "mma f32.e4m3.e4m3"),
)
BLOCK_SCALED_CASES = (
    ("mxfp4", "mxfp4", 100, "tcgen05 kind::mxf4"),
    ("nvfp4", "nvfp4", 100, "tcgen05 kind::mxf4nvf4"),
    ("nvfp4", "nvfp4", 120, "mma kind::mxf4nvf4"),
)


def compile_either(
    kernel: Any, fixed: dict[str, Any], pointers: dict[str, str], capability: int, **options: int
) -> CompiledKernel:
    types = {**pointers, **dict.fromkeys(SIZES, "i32"), "global_scale": "fp32"}
    return build(kernel, types, {**fixed, "bias": None}, capability, unaligned=("M", "stride_xs"), **options)


def pointer(name: str, operand: str, *, words: bool = False) -> str:
    element = lookup(name).element
    if element.kind == "integer":
        return "*i16" if words else "*i8"
    if element.bits < 8:
        return "*i16" if words else "*u8"
    return "*u8" if operand == "float16" else "*fp8e4nv"


def compiled(x: str, w: str, device: Device, tiles: Tiles) -> CompiledKernel:
    x_format, w_format = lookup(x), lookup(w)
    fixed = constants(x_format, w_format, 4096, bias=False, tiles=tiles)
    sums = {torch.int32: "*i32", torch.float32: "*fp32"}[sum_dtype(tiles)]
    pointers = {
        "x": pointer(x, tiles.operand),
        "x_scales": "*fp32" if x_format.block == (0, 0) else SCALES[x_format.scale.name],
        "w": pointer(w, tiles.operand, words=w_format.element.bits < 8),
        "w_scales": SCALES[w_format.scale.name],
        "out": sums if tiles.parallel else "*bf16",
    }
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return compile_either(quantized_matmul_kernel, fixed, pointers, device.capability, **options)


def block_scaled(x: str, w: str, capability: int) -> CompiledKernel:
    fixed = block_scaled_constants(lookup(x), lookup(w), MANY, bias=False)
    weight = "*i16" if lookup(w).element.bits < 8 else "*u8"
    pointers = {"x": "*u8", "x_scales": "*u8", "w": weight, "w_scales": "*u8", "out": "*bf16"}
    return compile_either(block_scaled_kernel, fixed, pointers, capability, num_warps=4, num_stages=3)


def products(kernel: CompiledKernel) -> set[str]:
    """What multiplies, by instruction and types; from registers, where the left operand is not a descriptor."""
    found = set()
    for line in kernel.asm["ptx"].splitlines():
        for name, pattern in PRODUCTS.items():
            match = re.search(pattern, line)
            if match:
                source = " from registers" if name == "wgmma" and re.search(r"\}, \{%r", line) else ""
                found.add(f"{name} {match[1]}{source}")
    return found


def tell(what: str, kernel: CompiledKernel, expected: str | None) -> None:
    found = products(kernel)
    registers, spilled = resources(kernel)
    numbers = f"{registers} registers, {kernel.metadata.shared} bytes shared, {' + '.join(sorted(found))}"
    print(f"{what}: {numbers}", flush=True)
    # Among every case, ptxas now and then spends up to 40 bytes of stack to stay at 128 registers.
    assert spilled <= (0 if expected else 64), f"{what}: spills"
    assert found == {expected} if expected else found, f"{what}: {found or 'nothing multiplies'} instead of {expected}"


def main(*, everything: bool) -> None:
    cases: tuple[tuple[str, str, int, int, int, str | None], ...] = CASES
    if everything:
        others = (("mxfp8", "mxfp8"), ("fp8_token", "fp8_channel"), ("int4_token", "int4_channel"))
        pairs = dict.fromkeys((*((x, w) for x, w, *_ in CASES), *others))
        sizes = [(tokens, rows) for tokens in (FEW, 64, MANY) for rows in (4096, 16384)]
        cases = tuple((*pair, capability, *size, None) for pair in pairs for capability in DEVICES for size in sizes)
    for x, w, capability, tokens, rows, expected in cases:
        tiles = choose(tokens, rows, 4096, lookup(x), lookup(w), DEVICES[capability])
        what = f"{x} x {w} sm_{capability} {tiles.block_n}x{tiles.block_m} {tiles.warps} warps {tiles.stages} stages"
        tell(what, compiled(x, w, DEVICES[capability], tiles), expected)
    for x, w, capability, expected in BLOCK_SCALED_CASES:
        tell(f"{x} x {w} sm_{capability} block-scaled", block_scaled(x, w, capability), expected)
    print("all compiled")


if __name__ == "__main__":
    main(everything="--all" in sys.argv)
