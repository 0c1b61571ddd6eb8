"""Which kernels there are: registers them on the operators of `qat`, and says what would run and why.

Importing it changes nothing until `load` is called. QAT_KERNELS=0 in the environment keeps the reference
implementations.
"""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from qat.catalog import CATALOG, lookup
from qat.kernels.fake_quantize.choose import input_problem
from qat.kernels.fake_quantize.choose import problem as training_problem
from qat.kernels.packed_linear.choose import choose
from qat.layouts import tile
from qat.packed import problem

# operator, and the folder whose triton.py holds a function of the operator's name
TRITON = {
    "packed_linear": "packed_linear",
    "fake_quantize": "fake_quantize",
    "fake_quantize_backward": "fake_quantize",
    "quantized_linear": "fake_quantize",
    "fake_quantize_input": "fake_quantize_input",
    "quantize_pack": "quantize_pack",
}

_loaded: set[str] = set()


def available() -> bool:
    """Whether Triton is installed, a GPU that it supports is here, and nobody switched the kernels off."""
    return os.environ.get("QAT_KERNELS") != "0" and find_spec("triton") is not None and torch.cuda.is_available()


def load(device: str = "cuda") -> bool:
    """Put the kernels under the operators, once; returns whether there are any to put.

    Args:
        device: which dispatch key they get; "cpu" is for Triton's interpreter in tests.
    """
    if device == "cuda" and not available():
        return False
    for operator, folder in TRITON.items():
        if operator not in _loaded:
            kernel = getattr(import_module(f"qat.kernels.{folder}.triton"), operator)
            torch.library.register_kernel(f"qat::{operator}", device, kernel)
            _loaded.add(operator)
    return True


def load_for_training() -> None:
    """`load` where there is a GPU, and one line on stderr that says what training will run."""
    if not torch.cuda.is_available():
        return
    if load():
        what = f"Triton kernels for {', '.join(operator for operator in TRITON if operator in _loaded)}"
    else:
        why = "QAT_KERNELS=0" if os.environ.get("QAT_KERNELS") == "0" else "Triton is not installed"
        what = f"no kernels ({why}): fake quantization runs its reference implementation, several passes over memory"
    print(f"qat: {what}", file=sys.stderr)


def explain_training(format: str) -> dict[str, dict[str, str]]:
    """Per operator of training, what would run it for `format` on this machine after `load`, and why.

    Raises:
        FormatError: no such format.
    """
    fmt = lookup(format)
    problems = {
        "qat::fake_quantize": (training_problem(fmt), "one pass over memory"),
        "qat::fake_quantize_backward": (training_problem(fmt), "one pass over memory, sums in a fixed order"),
        "qat::quantized_linear": (training_problem(fmt), "one pass over the weight, then the library's product"),
        "qat::fake_quantize_input": (input_problem(fmt), "maximum, scale and rounding in one pass over memory"),
        "qat::quantize_pack": (problem(fmt), "one pass over memory"),
    }
    missing = None if available() else "no GPU with Triton here, or QAT_KERNELS=0"
    told = {}
    for operator, (reason, how) in problems.items():
        why = reason or missing
        told[operator] = {"kernel": "triton" if why is None else "reference", "why": why or how}
    return told


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
