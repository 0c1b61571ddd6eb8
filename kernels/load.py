"""Which kernels there are: registers them on the operators of `qat`, and says what would run and why.

Importing it changes nothing until `load` is called.
"""

from importlib import import_module
from typing import Any

import torch

from qat.catalog import CATALOG, lookup
from qat.kernels.packed_linear.choose import choose
from qat.layouts import tile
from qat.packed import problem

# operator, and the folder whose triton.py holds a function of the operator's name
TRITON = {
    "packed_linear": "packed_linear",
    "quantize_input": "quantize_input",
    "rms_norm_quantize": "quantize_input",
    "silu_mul_quantize": "quantize_input",
}
_loaded: set[str] = set()


def available() -> bool:
    """Whether Triton is installed and a GPU that it supports is here."""
    try:
        import triton  # noqa: F401  # looked for, not used
    except ImportError:
        return False
    return torch.cuda.is_available()


def load() -> bool:
    """Put the kernels under the operators, once; returns whether there are any to put."""
    if not available():
        return False
    for operator, folder in TRITON.items():
        if operator not in _loaded:
            kernel = getattr(import_module(f"qat.kernels.{folder}.triton"), operator)
            torch.library.register_kernel(f"qat::{operator}", "cuda", kernel)
            _loaded.add(operator)
    return True


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
        return {**told, "kernel": "reference", "why": "no GPU with Triton here: weights are dequantized at every call"}
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    tiles = choose(tokens, rows, columns, tile(fmt.element.bits), processors)
    return {**told, "kernel": "triton", "why": tiles.why}


def explain_all(tokens: int, rows: int, columns: int) -> list[dict[str, Any]]:
    """`explain` for every format that weights are stored in (float32 scales belong to inputs)."""
    return [explain(name, tokens, rows, columns) for name, fmt in CATALOG.items() if fmt.scale != "f32"]
