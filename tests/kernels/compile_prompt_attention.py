"""Run by test_prompt_attention.py: compile the kernel ahead of time for every architecture, without a GPU.

Asserts that next to nothing spills under the limit of registers that lets a processor hold two blocks, nothing where
there is no such limit, that scores are
integer products and values are multiplied in FP16 by tensor cores, and on sm_90 how many instructions a score costs a
thread: what decides whether tensor cores wait.
"""

import sys

from triton.compiler import CompiledKernel

from qat.kernels.prompt_attention.triton import WARPS, constants, options, prompt_attention_kernel
from qat.serving.prompt_attention import KEYS, QUERIES
from tests.kernels.ahead import build, loops, resources
from tests.kernels.compile_quantized_matmul import products

INTEGERS = ("Q", "T", "heads", "query_blocks", "key_blocks")
LIMITS = {64: 13.0, 128: 16.0}  # instructions of a thread per score of whole tiles, and a few to spare
SPILLED = 40  # bytes, outside the loops of sm_90
CASES = [(width, 90, causal, values) for width in (64, 128) for causal in (False, True) for values in ("*fp16", "*i8")]
CASES += [(128, capability, True, "*fp16") for capability in (80, 89, 100, 120)]


def compiled(width: int, capability: int, causal: bool, values: str) -> CompiledKernel:
    types = {
        "query": "*i8", "keys": "*i8", "values": values, "query_scales": "*fp32", "key_scales": "*fp32",
        "value_scales": "*fp32", "out": "*bf16", "scaling": "fp32", **dict.fromkeys(INTEGERS, "i32"),
    }  # fmt: skip
    fixed = constants(width, width, 4, causal=causal, blocks=values == "*fp16")
    return build(prompt_attention_kernel, types, fixed, capability, unaligned=INTEGERS, **options(capability))


def main() -> None:
    for width, capability, causal, values in CASES:
        kernel = compiled(width, capability, causal, values)
        registers, spilled = resources(kernel)
        what = f"{width} columns, values {values[1:]}{', causal' if causal else ''}, sm_{capability}"
        found = products(kernel)
        each = min(len(loop) for loop in loops(kernel)) * 32 * WARPS / (QUERIES * KEYS)
        print(f"{what}: {registers} registers, {spilled} bytes spilled, {kernel.metadata.shared} bytes shared, "
              f"{each:.1f} instructions per score, {sorted(found)}")  # fmt: skip
        assert spilled <= (SPILLED if capability == 90 else 0), f"{what}: spills {spilled} bytes"
        kinds = " ".join(found)
        assert ("s8" in kinds or "i8" in kinds) and "f16" in kinds, f"{what}: {found}"
        assert capability != 90 or each <= LIMITS[width], f"{what}: {each:.1f} instructions per score"
    print("all compiled")


if __name__ == "__main__":
    sys.exit(main())
