"""Which kernels there are, and how they get under the operators of `qat`.

Importing it changes nothing until `load` is called. QAT_KERNELS=0 in the environment keeps the reference
implementations. `explain.py` says what would run and why.
"""

import os
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

# Operator -> file below kernels/ by device type; the file holds a function of the operator's name.
KERNELS: dict[str, dict[str, str]] = {
    "packed_linear": {"cuda": "packed_linear/triton", "cpu": "packed_linear/cpu"},
    "fake_quantize": {"cuda": "fake_quantize/triton"},
    "fake_quantize_backward": {"cuda": "fake_quantize/triton"},
    "quantized_linear": {"cuda": "fake_quantize/triton"},
    "fake_quantize_input": {"cuda": "fake_quantize_input/triton", "cpu": "fake_quantize_input/cpu"},
    "quantize_pack": {"cuda": "quantize_pack/triton"},
    "distill_rows": {"cuda": "distill_rows/triton"},
    "quantize_input": {"cuda": "quantize_input/triton"},
    "rms_norm_quantize": {"cuda": "quantize_input/triton"},
    "silu_mul_quantize": {"cuda": "quantize_input/triton"},
    "quantized_matmul": {"cuda": "quantized_matmul/triton"},
}
_loaded: set[tuple[str, str]] = set()


def switched_off() -> bool:
    """Whether the user wants the reference implementations."""
    return os.environ.get("QAT_KERNELS") == "0"


def available() -> bool:
    """Whether Triton is installed, a GPU that it supports is here, and nobody switched the kernels off."""
    return not switched_off() and find_spec("triton") is not None and torch.cuda.is_available()


@cache
def _cannot_compile() -> str | None:
    from qat.kernels.fake_quantize_input import cpu as inputs
    from qat.kernels.packed_linear import cpu as packed

    try:
        packed.library(), inputs.library()
    except OSError as error:
        return str(error)
    return None


def cpu_problem() -> str | None:
    """Why the C kernels cannot run here, or None."""
    return "QAT_KERNELS=0" if switched_off() else _cannot_compile()


def load() -> list[str]:
    """Put the kernels under the operators, once; returns the device types that have some now."""
    devices = [device for device, there in (("cuda", available()), ("cpu", cpu_problem() is None)) if there]
    for device in devices:
        for operator, files in KERNELS.items():
            if device in files:
                register(operator, device, files[device])
    return devices


def register(operator: str, device: str, file: str) -> None:
    """Put one kernel under an operator for a dispatch key; tests put Triton's interpreter under "cpu"."""
    if (operator, device) not in _loaded:
        kernel = getattr(import_module(f"qat.kernels.{file.replace('/', '.')}"), operator)
        torch.library.register_kernel(f"qat::{operator}", device, kernel)
        _loaded.add((operator, device))


def load_for_training() -> None:
    """`load`, and one line on stderr that says what training will run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device in load():
        names = [operator for operator, files in KERNELS.items() if device in files and operator in _TRAINING]
        what = f"{'Triton' if device == 'cuda' else 'C'} kernels for {', '.join(names)}"
    else:
        why = "Triton is not installed" if device == "cuda" and not switched_off() else cpu_problem()
        what = f"no kernels ({why}): fake quantization runs its reference implementation, several passes over memory"
    print(f"qat: {what}", file=sys.stderr)


_TRAINING = ("fake_quantize", "fake_quantize_backward", "quantized_linear", "fake_quantize_input", "distill_rows")
