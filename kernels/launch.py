"""Launches of Triton kernels that cost the host a few microseconds.

Triton's own launch binds some thirty arguments by name, compile-time ones among them, and looks all of them up again at
every call: 40 us and more, longer than a small kernel runs. What decides between compiled kernels is little: of a
tensor its type and whether 16 divides its address, of an integer whether it is 1, whether 16 divides it and whether 32
bits hold it. So the first launch of each kind is Triton's own, which compiles, and others go straight to the kernel
that it gave back.
"""

from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

KNOWN = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)  # whose launchers are alike
_ALIGNED, _WIDE = 16, 1 << 31


class Launch:
    """A kernel with its compile-time arguments and options. Make one per set of them, and keep it.

    Args:
        kernel: a `triton.jit` function that takes tensors, integers, floats and compile-time arguments, in this order.
        fixed: its compile-time arguments, and options of the compiler.
    """

    def __init__(self, kernel: Any, **fixed: Any) -> None:
        self.kernel, self.fixed = kernel, fixed
        self.compiled: dict[Any, tuple[Any, ...]] = {}  # what launches a kernel, by the kinds of its arguments
        compile_time = [parameter.is_constexpr for parameter in getattr(kernel, "params", ())]
        self.ignored = (None,) * sum(compile_time)  # what launchers are given in place of what is compiled in
        self._direct = KNOWN and compile_time == sorted(compile_time)

    def at(self, grid: tuple[int, ...], *integers: int) -> "Call":
        """The launch on a grid, with these integers; keep it where the shape stays the same."""
        return Call(self, grid, integers)

    def watched(self) -> bool:
        """Whether somebody, a profiler say, wants to hear of launches: Triton tells them."""
        runtime = knobs.runtime
        try:
            return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or self.kernel.pre_run_hooks)
        except AttributeError:  # a hook of another kind
            return True

    def by_triton(self, key: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """Launch, and remember what was compiled."""
        compiled = self.kernel[grid](*arguments, **self.fixed)
        # The interpreter gives nothing back, hooks may have kept it from compiling; other vendors know more kinds.
        if self._direct and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
            self.compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, compiled


class Call:
    """A launch but for tensors and floats; their GPU has to be the current one (see `device.on_its_device`)."""

    def __init__(self, launch: Launch, grid: tuple[int, ...], integers: tuple[int, ...]) -> None:
        self.launch, self._integers = launch, integers
        self._grid: tuple[int, ...] = (*grid, 1, 1)[:3]
        self._kinds = tuple(kind(integer) for integer in integers)

    def __call__(self, tensors: tuple[Tensor | None, ...], *floats: float) -> None:
        """Launch on the current stream."""
        addresses: list[int | None] = []
        kinds: list[Any] = [self._kinds, *map(type, floats)]
        device = -1
        for tensor in tensors:
            if tensor is None:
                addresses.append(None)
                kinds.append(None)
            else:
                address, device = tensor.data_ptr(), tensor.get_device()
                addresses.append(address)
                kinds += (tensor.dtype, device, address % _ALIGNED == 0)
        key, launch = tuple(kinds), self.launch
        found = launch.compiled.get(key)
        if found is None or launch.watched():
            launch.by_triton(key, self._grid, (*tensors, *self._integers, *floats))
            return
        run, function, metadata, _ = found
        stream = driver.active.get_current_stream(device)
        run(*self._grid, stream, function, metadata, None, None, None, *addresses, *self._integers, *floats,
            *launch.ignored)  # fmt: skip


def kind(integer: int) -> Any:
    """What Triton specialises an integer on; told apart more finely than Triton does where a kernel forbids it."""
    return 1 if integer == 1 else (integer % _ALIGNED == 0, -_WIDE <= integer < _WIDE)
