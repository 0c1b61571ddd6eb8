"""The GPU that a tensor lies on: what kernels ask of it, and launching there, not on the process's current one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Device:
    """What rules for tiles ask of a GPU: compute capability (90 is 9.0), processors, shared bytes of a block."""

    capability: int
    processors: int
    shared: int


INTERPRETED = Device(capability=90, processors=1, shared=2**17)  # what Triton's interpreter plays: a small Hopper


def device_of(tensor: Tensor) -> Device:
    """Of the tensor's GPU; a tensor on the CPU means that Triton interprets."""
    return _device(tensor.device) if tensor.is_cuda else INTERPRETED


@cache
def _device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # missing from torch's stubs
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count, shared)


def on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, with the GPU of its first tensor as the current one: Triton launches on whichever is current, where
    pointers of another GPU mean nothing (`cuda:1`, models spread by `device_map`)."""

    @wraps(kernel)
    def launch(*arguments: Any) -> Any:
        for given in arguments:
            if isinstance(given, Tensor):
                break
        device = given.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return kernel(*arguments)
        with torch.cuda.device(device):
            return kernel(*arguments)

    return launch
