"""Run by test_launch.py: every kernel compiled exactly as its host code launches it, without a GPU.

The operators run on small tensors of the CPU, on a GPU that is played (`played.py`): Triton specialises what it is
called with (an integer of 1 becomes a constant, one that 16 divides and a pointer to such an address are told so) and
compiles for an H100, which the host code believes to have. So a kernel that cannot take one token, one row or one
column, or a host that passes what a kernel does not take, fails here. Every launch is made three times: by Triton
itself, then twice by `Launch`, the second time past Triton; all three must be the same.
"""

import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.jit import JITFunction

from qat.kernels import device
from qat.kernels.cached_attention import triton as attention_kernels
from qat.kernels.distill_rows import triton as rows_kernels
from qat.kernels.effective_scales import triton as scale_kernels
from qat.kernels.fake_quantize import triton as fake_kernels
from qat.kernels.fake_quantize_input import triton as input_kernels
from qat.kernels.launch import Call, Launch
from qat.kernels.packed_linear import triton as packed_kernels
from qat.kernels.packed_linear.dense import triton as dense_kernels
from qat.kernels.packed_linear.panels import triton as panel_kernels
from qat.kernels.prompt_attention import triton as prompt_kernels
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
from qat.serving.prompt_attention import by_blocks, by_heads
from qat.training.activations import static_part, vllm_scales
from qat.training.rows import KINDS
from tests.kernels.played import SHARED, Launcher, Noted, play

MODULES = (rows_kernels, fake_kernels, scale_kernels, input_kernels, packed_kernels, dense_kernels, panel_kernels,
           code_kernels, pack_kernels, matmul_kernels, block_scaled_kernels,
           attention_kernels, prompt_kernels)  # fmt: skip
H100 = device.Device(capability=90, processors=132, shared=SHARED)
GENERATOR = torch.Generator().manual_seed(0)
CALLS = 55  # of functions, Python's and C's, in a product of one token: some 10 us


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR).bfloat16()


def static_of(name: str) -> torch.Tensor | None:
    return static_part(lookup(name), torch.tensor(4.0))


def linear_layers() -> None:
    """One token of a weight whose K is cut into pieces, several of a narrow one, and a weight of one number."""
    cases = (("int4_g32_asym", 4096, 4096, 1), ("int4_g32_asym", 100, 640, 17), ("nvfp4", 100, 640, 1),
             ("int8_channel", 1, 1, 1), ("nvfp4", 4096, 4096, 1), ("int4_g128", 192, 768, 17),
             ("nvfp4", 192, 768, 200), ("int8_channel", 100, 640, 200), ("int4_g32_asym", 1, 32, 200))  # fmt: skip
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
        kinds = [(one, (True, True, True)), (None, (True, False, False))]
        if lookup(name).group:  # a divisor to each half of a group
            kinds.append((one.repeat_interleave(2, dim=1), (True, True, True)))
            fake_kernels.fake_quantize(x, kinds[-1][0], one, scales.zero_point, None, name, "ste", True)
        for divisor, needs in kinds:
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


def prompts() -> None:
    """One token, and several blocks of it with other heads."""
    for batch, heads, groups, queries, tokens, width in ((1, 1, 1, 1, 1, 16), (2, 2, 4, 130, 700, 128)):
        x = [normal(batch, h, t, width) for h, t in ((heads * groups, queries), (heads, tokens), (heads, tokens))]
        for codes, causal in ((by_blocks(*x), True), (by_heads(*x, *(torch.ones(t.shape[1]) for t in x)), False)):
            given = (codes.query, codes.keys, codes.values, codes.query_scales, codes.key_scales, codes.value_scales)
            prompt_kernels.prompt_attention(*given, 0.1, causal, torch.bfloat16)


class Bound(Exception):
    """Triton was asked to bind arguments."""


def compared(noted: list[Noted], names: Counter[str]) -> Callable[..., None]:
    """`Call.__call__`, with Triton's own launch before it and one past Triton after it."""
    launch, run = Call.__call__, JITFunction.run

    def thrice(self: Call, tensors: tuple[Any, ...], *floats: float) -> None:
        del noted[:]
        self.launch.kernel[self._grid](*tensors, *self._integers, *floats, **self.launch.fixed)
        launch(self, tensors, *floats)
        JITFunction.run = forbidden
        launch(self, tensors, *floats)
        JITFunction.run = run
        first, second, third = noted
        assert first == second == third, f"{first}\n{third}"
        assert all(0 < size < 2**31 for size in first.grid) and all(size < 2**16 for size in first.grid[1:]), first
        names[first.name] += 1

    return thrice


def forbidden(self: Any, *_: Any, **__: Any) -> None:
    raise Bound(self)


@triton.jit(do_not_specialize=["plain"])
def any_kernel(first, second, number, plain, real, SIZE: tl.constexpr):
    """Takes one of each kind."""
    tl.store(first, number + plain + real + SIZE)
    if second is not None:
        tl.store(second, number)


def kinds(noted: list[Noted]) -> None:
    """The compiled kernel is the one that Triton would take, for every kind of argument."""
    launch, wide = Launch(any_kernel, SIZE=3, num_warps=1), torch.zeros(64)
    tensors = [wide, wide[1:], wide[4:], wide.int(), wide.half()[8:], wide.double()[1:]]
    integers = [0, 1, 2, 16, 17, -16, -1, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), 2**40, 2**40 + 1]
    whole = [(tensor, None, 5, 5, 0.5) for tensor in tensors]
    whole += [(wide, second, number, 3, 1.0) for second in (wide, wide[1:], None) for number in integers]
    whole += [(wide, None, 3, plain, real) for plain in integers for real in (0.0, 1.0, 16.0)]
    for _ in range(2):
        for arguments in whole:
            del noted[:]
            any_kernel[(1,)](*arguments, SIZE=3, num_warps=1)
            launch.at((1,), *arguments[2:4])(arguments[:2], *arguments[4:])
            assert noted[0] == noted[1], f"{arguments}: {noted}"
    assert len({function for _, function, *_ in launch.compiled.values()}) >= 15, "Triton told these apart"
    told = []
    knobs.runtime.launch_enter_hook.add(told.append)
    call = launch.at((1,), 5, 5)
    call((wide, None), 0.5)
    assert Launcher.hooks, "a hook was not told of a launch"
    knobs.runtime.launch_enter_hook.remove(told.append)
    any_kernel.add_pre_run_hook(lambda *_, **__: told.append("before"))
    call((wide, None), 0.5)
    assert told == ["before"]
    any_kernel.pre_run_hooks.clear()


def lean() -> None:
    """A product of one token costs the host little: how many functions it calls, once everything is compiled."""
    launcher, Launcher.__call__ = Launcher.__call__, lambda *_: None
    for name in ("int4_g128", "nvfp4", "int4_g64_asym"):
        held = ordered(pack(quantize(normal(256, 512), lookup(name))), "cuda")
        x = normal(1, 1, 512)
        given = (x, held.words, held.scales, held.zeros, None, held.global_scale, name, None)
        call = device.on_its_device(packed_kernels.packed_linear)
        for _ in range(3):
            call(*given)
        calls: Counter[str] = Counter()
        sys.setprofile(lambda frame, event, what, calls=calls: calls.update([event] * event.endswith("call")))
        call(*given)
        sys.setprofile(None)
        began = time.perf_counter()
        for _ in range(1000):
            call(*given)
        took = 1e3 * (time.perf_counter() - began)
        print(f"packed_linear {name}: {dict(calls)}, {took:.1f} us without the dispatcher and the driver")
        assert calls.total() <= CALLS, f"{name}: {calls}"
    Launcher.__call__ = launcher


def main(groups: list[str]) -> None:
    everything = {
        function.__name__: function for function in (linear_layers, products, inputs, training, losses, caches, prompts)
    }
    noted, names = play(), Counter[str]()
    kernels = {name for module in MODULES for name, value in vars(module).items()
               if name.endswith("_kernel") and value.fn.__module__ == module.__name__}  # fmt: skip
    for module in MODULES:
        if "device_of" in vars(module):
            module.device_of = lambda _: H100
    if not groups:
        kinds(noted)
        lean()
    Call.__call__ = compared(noted, names)
    for group in groups or everything:
        everything[group]()
        print(f"{group}: {dict(names)}", flush=True)
    missing = kernels - set(names) - {"block_scaled_kernel"}
    assert groups or not missing, f"never launched: {missing}"
    print("all compiled")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
