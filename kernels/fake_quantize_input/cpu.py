"""Dynamic fake quantization of inputs on CPUs, in C with the reference's bits: for training and for serving."""

import ctypes
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.kernels.compiler import load_library
from qat.kernels.fake_quantize.choose import input_problem
from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.numbers.scale import BF16, E8M0, F32, TINY, UE4M3
from qat.training.activations import fake_quantize_input_reference, floors

LANES = 16  # values that cpu.c takes at a time
_SCALES = (F32, BF16, UE4M3, E8M0)  # in the order of cpu.c
_RULES = ("ceil", "even", "floor")


class _Rule(ctypes.Structure):
    """`Rule` of cpu.c."""

    _fields_ = (
        *(
            (name, ctypes.c_float)
            for name in ("max", "inverse_max", "low", "high", "min_normal", "scale_max", "scale_min_normal")
        ),
        *((name, ctypes.c_float) for name in ("amax_floor", "scale_floor", "tiny", "divisor")),
        *((name, ctypes.c_int32) for name in ("mantissa", "scale_mantissa", "max_exponent", "scale", "rule")),
    )


@cache
def library() -> ctypes.CDLL:
    """The compiled kernel.

    Raises:
        OSError: it cannot be compiled here.
    """
    shared = load_library(Path(__file__).with_name("cpu.c"), exact=True)
    pointer, whole, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    shared.fake_quantize_input.argtypes = [pointer, pointer, pointer, pointer, whole, whole, flag, flag]
    return shared


def problem(fmt: Format) -> str | None:
    """Why cpu.c does not quantize inputs of this format, or None."""
    element, reason = fmt.element, input_problem(fmt)
    if reason is not None:
        return reason
    if not (element.is_integer or (element.is_minifloat and element.mantissa_bits in (1, 3))):
        return f"cpu.c has no instance for {element.name}"
    if fmt.scale is UE4M3 and element.is_integer:
        return f"cpu.c has no instance for integers under {fmt.scale} scales"
    return None


@cache
def _block(name: str) -> tuple[int, bool]:
    """Columns of a block (0: the row; -1: a format that cpu.c does not know), and whether a divisor is stored."""
    fmt = lookup(name)
    return (fmt.group or 0) if problem(fmt) is None else -1, fmt.scale is UE4M3


@lru_cache(maxsize=4096)  # a divisor that is trained changes
def _rule(name: str, divisor: float) -> _Rule:
    fmt = lookup(name)  # by name: a Format's hash goes over all its values
    element, (amax_floor, scale_floor) = fmt.element, floors(fmt)
    return _Rule(
        max=element.max,
        inverse_max=1 / element.max,
        low=element.low,
        high=element.high,
        min_normal=element.min_normal,
        scale_max=UE4M3.largest,
        scale_min_normal=UE4M3.element.min_normal,
        amax_floor=amax_floor,
        scale_floor=scale_floor,
        tiny=TINY,
        divisor=divisor,
        mantissa=element.mantissa_bits if element.is_minifloat else -1,
        scale_mantissa=UE4M3.element.mantissa_bits,
        max_exponent=element.max_exponent,
        scale=_SCALES.index(fmt.scale),
        rule=_RULES.index(fmt.scale_rule) if fmt.scale is E8M0 else 0,
    )


def fake_quantize_input(x: Tensor, static: Tensor | None, format: str, estimator: str) -> tuple[Tensor, Tensor]:
    """The operator `qat::fake_quantize_input` on a CPU."""
    columns = x.shape[-1] if x.dim() else 0
    block, split_of_e4m3 = _block(format)
    block = block or columns
    plain = x.dtype in (torch.float32, torch.bfloat16) and columns and x.numel() and columns % block == 0
    static_fits = (static is not None and static.dtype == torch.float32) == split_of_e4m3
    if not plain or not static_fits or block % LANES or block < 0:
        return fake_quantize_input_reference(x, static, format, estimator)
    x = x.contiguous()
    out = torch.empty_like(x)
    many = x.numel() // block
    keep = estimator == "clipped"
    scales = x.new_empty((many // (columns // block), columns // block) if keep else (0,), dtype=torch.float32)
    rule: Any = _rule(format, 1.0 if static is None else float(static))
    status = library().fake_quantize_input(
        ctypes.byref(rule),
        x.data_ptr(),
        out.data_ptr(),
        scales.data_ptr() if keep else None,
        many,
        block,
        x.element_size(),
        torch.get_num_threads(),
    )
    if status:
        raise RuntimeError(f"cpu.c has no instance for {format}: `problem` must say so first")
    return out, scales
