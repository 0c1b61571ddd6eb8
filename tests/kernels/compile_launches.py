"""Run by test_device.py: every kernel compiled exactly as its host code launches it, without a GPU.

The operators run on small tensors of the CPU while a recorder stands in each kernel's place. What it is called with is
specialised as Triton's JIT specialises a launch (an integer of 1 becomes a constant, one that 16 divides and a pointer
to such an address are told so) and compiled for an H100, which the host code believes to have. So a kernel that cannot
take one token, one row or one column, or a host that passes what a kernel does not, fails here.
"""

import itertools
import sys
import types
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qat.kernels import device
from qat.kernels.cached_attention import triton as attention_kernels
from qat.kernels.distill_rows import triton as rows_kernels
from qat.kernels.effective_scales import triton as scale_kernels
from qat.kernels.fake_quantize import triton as fake_kernels
from qat.kernels.fake_quantize_input import triton as input_kernels
from qat.kernels.packed_linear import triton as packed_kernels
from qat.kernels.packed_linear.panels import triton as panel_kernels
from qat.kernels.quantize_input import triton as code_kernels
from qat.kernels.quantize_pack import triton as pack_kernels
from qat.kernels.quantized_matmul import triton as matmul_kernels
from qat.kernels.quantized_matmul.block_scaled import triton as block_scaled_kernels
from qat.numbers.catalog import lookup
from qat.numbers.numerics import find_scales, quantize
from qat.serving.attention import RowLayout
from qat.serving.inputs import quantize_input
from qat.serving.matmul import hold
from qat.serving.packed import ordered, pack
from qat.training.activations import static_part, vllm_scales
from qat.training.rows import KINDS

MODULES = (rows_kernels, fake_kernels, scale_kernels, input_kernels, packed_kernels, panel_kernels, code_kernels,
           pack_kernels, matmul_kernels, block_scaled_kernels, attention_kernels)  # fmt: skip
H100 = device.Device(capability=90, processors=132, shared=227 * 1024)
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int8: "i8",
         torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv"}  # fmt: skip
GENERATOR = torch.Generator().manual_seed(0)


class Recorder:
    """Stands in a kernel's place in its module; compiles what it is called with, once per specialisation."""

    compiled: ClassVar[dict[tuple[Any, ...], str]] = {}

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arg_names = kernel.arg_names  # host code asks for them

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < size < 2**31 for size in grid) and all(size < 2**16 for size in grid[1:]), grid
        return self.launch

    def launch(self, *arguments: Any, **named: Any) -> None:
        parameters = {p.name: p for p in self.kernel.params}
        options = {name: value for name, value in named.items() if name not in parameters}
        given = dict(zip(parameters, arguments, strict=False)) | {n: v for n, v in named.items() if n in parameters}
        assert given.keys() == parameters.keys(), given.keys() ^ parameters.keys()
        types_of, fixed, divisible = {}, {}, []
        for name, value in given.items():
            kind, by_16 = specialised(value, parameters[name].do_not_specialize)
            if parameters[name].is_constexpr or kind == "constexpr":
                kind, fixed[name] = "constexpr", value
            elif by_16:
                divisible.append(name)
            types_of[name] = kind
        key = (self.kernel.__name__, *types_of.items(), *divisible, *map(str, fixed.items()), *options.items())
        if key not in self.compiled:
            at = self.kernel.arg_names.index
            source = ASTSource(
                self.kernel, types_of, {(at(name),): value for name, value in fixed.items()},
                {(at(name),): [["tt.divisibility", 16]] for name in divisible},
            )  # fmt: skip
            triton.compile(source, target=GPUTarget("cuda", H100.capability, 32), options=options)
            self.compiled[key] = self.kernel.__name__


def specialised(value: Any, plainly: bool) -> tuple[str, bool]:
    """Triton's type of an argument ("constexpr" for what is compiled in), and whether it is told that 16 divides it."""
    if value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}", not plainly and value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if isinstance(value, int) and not isinstance(value, bool):
        if value == 1 and not plainly:
            return "constexpr", False
        return "i32", not plainly and value % 16 == 0
    return "constexpr", False


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR).bfloat16()


def static_of(name: str) -> torch.Tensor | None:
    return static_part(lookup(name), torch.tensor(4.0))


def linear_layers() -> None:
    """One token of a weight whose K is cut into pieces, several of a narrow one, and a weight of one number."""
    cases = (("int4_g32_asym", 4096, 4096, 1), ("int4_g32_asym", 100, 640, 17), ("nvfp4", 100, 640, 1),
             ("int8_channel", 1, 1, 1), ("nvfp4", 4096, 4096, 1), ("int4_g128", 192, 768, 17))  # fmt: skip
    for name, rows, columns, tokens in cases:
        held = ordered(pack(quantize(normal(rows, columns), lookup(name))), "cuda")
        bias = normal(rows) if tokens > 1 else None
        arguments = (held.words, held.scales, held.zeros, bias, held.global_scale, name)
        packed_kernels.packed_linear(normal(tokens, columns), *arguments)


def products() -> None:
    cases = (("int8_token", "int4_g128", 4096, 4096, 1), ("int8_token", "int8_channel", 100, 640, 17),
             ("fp8_tensor", "fp8_channel", 100, 640, 1), ("nvfp4", "nvfp4", 100, 640, 1),
             ("int8_token", "int8_channel", 1, 1, 1))  # fmt: skip
    for x_name, w_name, rows, columns, tokens in cases:
        weight, static = hold(quantize(normal(rows, columns), lookup(w_name))), static_of(x_name)
        codes, scales = quantize_input(normal(tokens, columns), x_name, static)
        bias = normal(rows) if tokens > 1 else None
        arguments = (weight.codes, weight.scales, bias, weight.global_scale, x_name, w_name, columns, torch.bfloat16)
        matmul_kernels.quantized_matmul(codes, scales, *arguments)


def inputs() -> None:
    for name, rows, columns in (
        ("nvfp4", 1, 4096),
        ("int8_token", 1, 1),
        ("fp8_g128", 17, 640),
        ("fp8_tensor", 1, 4096),
    ):
        x, static = normal(rows, columns), static_of(name)
        code_kernels.quantize_input(x, static, name)
        if rows == 1:
            code_kernels.rms_norm_quantize(x, x, normal(columns), static, 1e-5, name)
            code_kernels.silu_mul_quantize(x, x, static, name)


def training() -> None:
    for name, rows, columns in (("nvfp4", 1, 4096), ("int4_g32_asym", 100, 640), ("int8_channel", 1, 1)):
        x = normal(rows, columns)
        scales = find_scales(x, lookup(name))
        one = scales.effective()
        fake_kernels.fake_quantize(x, one, one, scales.zero_point, None, name, "ste", True)
        for divisor, needs in ((one, (True, True, True)), (None, (True, False, False))):
            fake_kernels.fake_quantize_backward(x, x, x, divisor, one, scales.zero_point, name, "clipped", needs)
        pack_kernels.quantize_pack(x, one, scales.zero_point, name)
        for logs in ((one, one.repeat_interleave(2, dim=1)), (None, one), (None, None)):
            scale_kernels.effective_scales(one, *logs, scales.global_scale, name)
            scale_kernels.effective_scales_backward(one, logs[1], one, *logs)
    for name, rows, columns in (("fp8_token", 1, 4096), ("int8_token", 1, 1), ("nvfp4", 17, 640)):
        input_kernels.fake_quantize_input(normal(rows, columns), static_of(name), name, "clipped")


def losses() -> None:
    for kind, (rows, vocabulary) in itertools.product(KINDS, ((1, 1), (3, 32001))):
        teacher = None if kind == "cross_entropy" else normal(rows, vocabulary)
        targets = torch.zeros(rows, dtype=torch.long) if kind == "cross_entropy" else None
        rows_kernels.distill_rows(normal(rows, vocabulary), teacher, targets, kind, 1.0, 0.5, 1.0)


def caches() -> None:
    """One sequence of one head and one token, and several with masks, in pieces."""
    for name, batch, heads, groups, queries, tokens, width in (
        ("fp8_tensor", 1, 1, 1, 1, 1, 16), ("int8_token", 2, 2, 4, 1, 700, 128), ("int4_token", 1, 1, 1, 3, 1, 80),
        ("nvfp4", 2, 8, 4, 1, 1000, 128), ("nvfp4", 1, 1, 20, 1, 64, 64),
    ):  # fmt: skip
        layout, static = RowLayout(lookup(name), width), static_of(name)
        x = normal(batch, heads, tokens, width).float()
        rows = layout.join(quantize(x, layout.format, vllm_scales(x, layout.format, static)))
        mask = torch.ones(1, 1, queries, tokens, dtype=torch.bool) if batch > 1 else None
        query = normal(batch, heads * groups, queries, width)
        for own in (query, query.half(), query.float()):
            given = (own, rows, rows, mask, static, static, width, 0.1, queries > 1, name, name)
            attention_kernels.cached_attention(*given)


def recorders() -> Iterator[tuple[types.ModuleType, str]]:
    """Kernels by module and name."""
    for module in MODULES:
        yield from ((module, name) for name, value in vars(module).items()
                    if name.endswith("_kernel") and value.fn.__module__ == module.__name__)  # fmt: skip


def main(groups: list[str]) -> None:
    everything = {
        function.__name__: function for function in (linear_layers, products, inputs, training, losses, caches)
    }
    kernels = list(recorders())
    for module, name in kernels:
        setattr(module, name, Recorder(getattr(module, name)))
    for module in MODULES:
        if "device_of" in vars(module):
            module.device_of = lambda _: H100
    for group in groups or everything:
        everything[group]()
        print(f"{group}: {len(Recorder.compiled)} specialisations compiled so far", flush=True)
    missing = {name for _, name in kernels} - set(Recorder.compiled.values()) - {"block_scaled_kernel"}
    assert groups or not missing, f"never launched: {missing}"
    print("all compiled")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
