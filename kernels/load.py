"""Which kernels there are, and how they get under the operators of `qat`.

Importing it changes nothing until `load` is called. QAT_KERNELS=0 in the environment keeps the reference
implementations. `explain.py` says what would run and why.
"""

import os
import sys
from collections.abc import Collection, Iterable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from qat.kernels.device import on_its_device
from qat.kernels.npu import npu_problem

# Operator -> file below kernels/ by device type; the file holds a function of the operator's name.
KERNELS: dict[str, dict[str, str]] = {
    "packed_linear": {"cuda": "packed_linear/triton", "cpu": "packed_linear/cpu", "npu": "packed_linear/ascend"},
    "cached_attention": {"cuda": "cached_attention/triton"},
    "prompt_attention": {"cuda": "prompt_attention/triton"},
    "fake_quantize": {"cuda": "fake_quantize/triton"},
    "fake_quantize_backward": {"cuda": "fake_quantize/triton"},
    "quantized_linear": {"cuda": "fake_quantize/triton"},
    "effective_scales": {"cuda": "effective_scales/triton"},
    "effective_scales_backward": {"cuda": "effective_scales/triton"},
    "fake_quantize_input": {"cuda": "fake_quantize_input/triton", "cpu": "fake_quantize_input/cpu"},
    "quantize_pack": {"cuda": "quantize_pack/triton"},
    "distill_rows": {"cuda": "distill_rows/triton"},
    "quantize_input": {"cuda": "quantize_input/triton", "npu": "quantize_input/ascend"},
    "rms_norm_quantize": {"cuda": "quantize_input/triton"},
    "silu_mul_quantize": {"cuda": "quantize_input/triton"},
    "quantized_matmul": {"cuda": "quantized_matmul/triton"},
}
PREPARES = {"packed_linear": "prepare_packed"}  # operator -> the one by which its kernel prepares what a layer owns
_loaded: set[tuple[str, str]] = set()


def switched_off() -> bool:
    """Whether the user wants the reference implementations."""
    return os.environ.get("QAT_KERNELS") == "0"


def available() -> bool:
    """Whether Triton is installed, a GPU that it supports is here, and nobody switched the kernels off."""
    return not switched_off() and find_spec("triton") is not None and torch.cuda.is_available()


@cache
def _cannot_compile(file: str) -> str | None:
    try:
        _module(file).library()
    except OSError as error:
        return str(error)
    return None


def cpu_problem(operators: Iterable[str] = KERNELS) -> str | None:
    """Why the C kernels of these operators cannot run here, or None. Compiles them, once per machine."""
    if switched_off():
        return "QAT_KERNELS=0"
    files = [KERNELS[operator]["cpu"] for operator in operators if "cpu" in KERNELS[operator]]
    return next((problem for file in files if (problem := _cannot_compile(file)) is not None), None)


def load(operators: Collection[str] = KERNELS.keys()) -> list[str]:
    """Put the kernels under the operators, once; returns the device types that have some now."""
    there = {"cuda": available(), "cpu": cpu_problem(operators) is None, "npu": npu_problem() is None}
    devices = [device for device, found in there.items() if found]
    for device in devices:
        for operator in operators:
            if device in KERNELS[operator]:
                register(operator, device, KERNELS[operator][device])
    return devices


def _module(file: str) -> Any:
    return import_module(f"qat.kernels.{file.replace('/', '.')}")


def register(operator: str, device: str, file: str) -> None:
    """Put one kernel under an operator for a dispatch key; tests put Triton's interpreter under "cpu"."""
    if (operator, device) not in _loaded:
        module, preparing = _module(file), PREPARES.get(operator, "")
        for name in (operator, preparing) if hasattr(module, preparing) else (operator,):
            torch.library.register_kernel(f"qat::{name}", device, on_its_device(getattr(module, name)))
        _loaded.add((operator, device))


def registered(operator: str, device: str) -> bool:
    """Whether a kernel runs this operator for tensors of this type of device."""
    return (operator, device) in _loaded


def load_for_training() -> None:
    """`load` what training calls, and one line on stderr that says what will run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device in load(_TRAINING):
        names = [operator for operator in _TRAINING if device in KERNELS[operator]]
        what = f"{'Triton' if device == 'cuda' else 'C'} kernels for {', '.join(names)}"
    else:
        why = "Triton is not installed" if device == "cuda" and not switched_off() else cpu_problem(_TRAINING)
        what = f"no kernels ({why}): fake quantization runs its reference implementation, several passes over memory"
    print(f"qat: {what}", file=sys.stderr)


_TRAINING = ("fake_quantize", "fake_quantize_backward", "quantized_linear", "effective_scales",
             "effective_scales_backward", "fake_quantize_input", "distill_rows")  # fmt: skip
