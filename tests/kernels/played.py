"""A GPU that is played: Triton specialises and compiles for it as for a real one, and launches are noted, not run."""

from typing import Any, NamedTuple

from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

SHARED = 227 * 1024  # bytes of a block, an H100's


class Noted(NamedTuple):
    """A launch: the compiled kernel's handle and name, its grid, and what is not compiled in, tensors as addresses."""

    function: int
    name: str
    grid: tuple[int, int, int]
    stream: int
    metadata: Any
    arguments: tuple[Any, ...]


class Launcher:
    """Called by Triton to launch one compiled kernel."""

    noted: list[Noted]
    hooks: list[Any]

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name, self.types = source.fn.__name__, list(source.signature.values())

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: int,
        metadata: Any,
        told: Any,
        enter: Any,
        leave: Any,
        *given: Any,
    ) -> None:
        assert len(given) == len(self.types), (self.name, len(given), len(self.types))
        kept = [value for value, kind in zip(given, self.types, strict=True) if kind != "constexpr"]
        addresses = tuple(value.data_ptr() if isinstance(value, Tensor) else value for value in kept)
        Launcher.noted.append(Noted(function, self.name, (x, y, z), stream, metadata, addresses))
        Launcher.hooks += [hook for hook in (enter, leave) if getattr(hook, "calls", hook)]


class Utils:
    """What Triton asks of CUDA."""

    loaded = 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED}

    def load_binary(self, *_: Any) -> tuple[object, int, int, int, int]:
        Utils.loaded += 1
        return object(), Utils.loaded, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        """Nothing was loaded."""


class Driver:
    """Triton's driver for one H100."""

    launcher_cls = Launcher
    utils = Utils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 77

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def play() -> list[Noted]:
    """Put the GPU there; the list fills with launches."""
    Launcher.noted, Launcher.hooks = [], []
    driver.set_active(Driver())
    return Launcher.noted
