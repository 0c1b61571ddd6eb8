"""Run by test_lowering.py in an environment that holds triton-ascend in place of Triton: every kernel of
`kernels/*/ascend.py`, from Python to linalg, as host code would launch it. The last step, to a binary, needs CANN."""

import itertools
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from qat.kernels.packed_linear import ascend as linear
from qat.kernels.quantize_input import ascend as quantizer
from qat.numbers.catalog import CATALOG, lookup

TARGET = GPUTarget("npu", "Ascend910B3", 0)
POINTERS = {tl.bfloat16: "*bf16", tl.float16: "*fp16", tl.float32: "*fp32"}
SCALES = {"f32": "*fp32", "bf16": "*bf16", "f16": "*fp16", "e4m3": "*i8", "e8m0": "*i8"}
SIZES = ("M", "N", "K", "stride_x", "stride_words")


def lower(kernel: object, signature: dict[str, str], constants: dict[str, object]) -> str:
    """The linalg module of one kernel, as text."""
    from triton._C.libtriton import ir

    backend = make_backend(TARGET)
    source = ASTSource(kernel, signature=signature, constants=constants)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    stages: dict[str, object] = {}
    backend.add_stages(stages, options)
    metadata: dict[str, object] = {"hash": "0", "target": TARGET, **options.__dict__}
    for name in ("ttir", "ttadapter"):
        module = stages[name](module, metadata)
    return str(module)


def check(name: str, kernel: object, signature: dict[str, str], constants: dict[str, object], *wanted: str) -> None:
    text = lower(kernel, signature, constants)
    missing = [word for word in ("linalg", "memref", *wanted) if word not in text]
    assert not missing, f"{name}: {missing} not in its linalg"
    assert "ui8" not in text and "ui16" not in text and "f8E" not in text, f"{name}: a type that NPUs lack"
    print(f"lowered {name}: {len(text.splitlines())} lines")


def main() -> None:
    for name, dtype in itertools.product(CATALOG, (tl.bfloat16, tl.float16)):
        fmt = lookup(name)
        if linear.problem(fmt) is not None or (dtype is tl.float16 and name not in ("int4_g128", "mxfp4")):
            continue
        for bias in (False, True):
            pointers = {
                "x": POINTERS[dtype],
                "words": "*i16",
                "scales": SCALES[fmt.scale.name],
                "bias": POINTERS[dtype],
            }
            signature = {**pointers, "out": POINTERS[dtype], **dict.fromkeys(SIZES, "i32"), "global_scale": "fp32"}
            constants = linear.constants(fmt, 4096, bias=bias, dtype=dtype, programs=20)
            if not bias:
                signature.pop("bias")
                constants["bias"] = None
            what = f"packed_linear {name} {dtype}{' with bias' if bias else ''}"
            check(what, linear.packed_linear_kernel, signature, constants, "linalg.matmul")
    for dtype in POINTERS:
        signature = {
            "x": POINTERS[dtype],
            "codes": "*i8",
            "scales": "*fp32",
            **dict.fromkeys(("M", "K", "stride_x"), "i32"),
        }
        fixed = quantizer.constants(lookup("int8_token"), 40)
        check(f"quantize_input int8_token {dtype}", quantizer.quantize_rows_kernel, signature, fixed)
    print("all lowered by triton-ascend", triton.__version__)


if __name__ == "__main__":
    sys.exit(main())
