"""Which kernels there are: registers them on the operators of `qat`, and says what would run and why.

Importing it changes nothing until `load` is called.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch

from qat.catalog import CATALOG, lookup
from qat.kernels.packed_linear.choose import choose
from qat.layouts import tile
from qat.packed import problem

# Operator -> device type -> module with a function of the operator's name.
KERNELS = {
    "packed_linear": {"cuda": "qat.kernels.packed_linear.triton", "cpu": "qat.kernels.packed_linear.cpu"},
}
_loaded: set[tuple[str, str]] = set()


def available() -> bool:
    """Whether Triton is installed and a GPU that it supports is here."""
    try:
        import triton  # noqa: F401  # looked for, not used
    except ImportError:
        return False
    return torch.cuda.is_available()


@cache
def cpu_problem() -> str | None:
    """Why the C kernels cannot run here, or None."""
    from qat.kernels.packed_linear.cpu import library

    try:
        library()
    except OSError as error:
        return str(error)
    return None


def load() -> list[str]:
    """Put the kernels under the operators, once; returns the device types that have them now."""
    devices = [device for device, there in (("cuda", available()), ("cpu", cpu_problem() is None)) if there]
    for operator, modules in KERNELS.items():
        for device in devices:
            if device in modules and (operator, device) not in _loaded:
                kernel = getattr(import_module(modules[device]), operator)
                torch.library.register_kernel(f"qat::{operator}", device, kernel)
                _loaded.add((operator, device))
    return devices


def explain(format: str, tokens: int, rows: int, columns: int) -> dict[str, Any]:
    """What runs x (tokens, columns) times a packed weight (rows, columns) on this machine after `load`, and why.

    Raises:
        FormatError: no such format.
    """
    fmt = lookup(format)
    told: dict[str, Any] = {"format": format, "operator": "qat::packed_linear", "kernel": "none", "why": problem(fmt)}
    if told["why"] is not None:
        return told
    if not available():
        return {**told, **_explain_cpu(tokens)}
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    tiles = choose(tokens, rows, columns, tile(fmt.element.bits), processors)
    return {**told, "kernel": "triton", "why": tiles.why}


def _explain_cpu(tokens: int) -> dict[str, str]:
    from qat.kernels.packed_linear.cpu import FEW

    reason = cpu_problem()
    if reason is not None:
        return {"kernel": "reference", "why": f"weights are dequantized at every call, slower than BF16: {reason}"}
    few = f"at most {FEW} tokens: codes are decoded in registers"
    many = f"more than {FEW} tokens: slices of dense weights for the library's product"
    return {"kernel": "c", "why": few if tokens <= FEW else many}


def explain_all(tokens: int, rows: int, columns: int) -> list[dict[str, Any]]:
    """`explain` for every format that weights are stored in (float32 scales belong to inputs)."""
    return [explain(name, tokens, rows, columns) for name, fmt in CATALOG.items() if fmt.scale != "f32"]
