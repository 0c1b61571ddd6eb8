"""Layer inputs as a server quantizes them on the fly: codes and scales, alone or fused with what comes before a layer.

Three operators that device kernels register on; this file is their meaning and what runs where no kernel does. The
arithmetic is the "vllm" rule of `qat.training.activations`: `dequantize_input` gives back exactly what training
simulated (the sign of a zero aside, and a NaN under a static scale where the codes cannot say NaN: it becomes 0). The
two fused operators round between their steps where transformers' modules do, so their codes are those of the separate
steps.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from qat.errors import FormatError, UnsupportedError
from qat.numbers.catalog import E4M3, lookup
from qat.numbers.element import Element
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales, from_blocks, rounded, to_blocks, width_problem
from qat.numbers.scale import BF16, E8M0, F32, UE4M3
from qat.training.activations import vllm_scales


class QuantizedInput(NamedTuple):
    """A quantized input (..., columns).

    Attributes:
        codes: int8 (..., columns) for integers; float8_e4m3fn (..., columns) for 8-bit floats; uint8 (..., columns / 2)
            for 4-bit floats, the even column in the low nibble.
        scales: float32 (..., 1) per token, (..., columns / group) per group, (1,) where the format is static; the bytes
            of E4M3 and E8M0 scales as uint8 (..., columns / group).
    """

    codes: Tensor
    scales: Tensor


def problem(fmt: Format) -> str | None:
    """Why inputs cannot be quantized to codes of this format, or None."""
    element = fmt.element
    if fmt.needs_table or fmt.zero_point:
        return "tables, fractional steps and zero points have no fast product"
    if element.is_minifloat and element.bits != 4 and element != E4M3:
        return f"no dtype holds {element.name} codes"
    if not fmt.follows_amax:
        return "its scale follows from the mean"
    static = fmt.is_static and fmt.scale is BF16
    dynamic = fmt.is_rowwise and (fmt.scale is F32 or (fmt.group and fmt.scale.is_one_of(UE4M3, E8M0)))
    return None if static or dynamic else f"{fmt.scale} scales of blocks of {fmt.block} are for weights"


def needs_static(fmt: Format) -> bool:
    """Whether a calibrated number belongs to the quantizer, see `qat.training.activations.static_part`."""
    return fmt.is_static or fmt.global_scale


def check(format: str, columns: int, static: Tensor | None) -> Format:
    """The format, if inputs of this width can be quantized with it.

    Raises:
        FormatError: no such format, a width that its groups do not divide, or a missing static part.
        UnsupportedError: a format that inputs are not quantized to.
    """
    return _checked(format, columns, static is None)


@lru_cache(maxsize=4096)  # at every call of a layer
def _checked(format: str, columns: int, without_static: bool) -> Format:
    fmt = lookup(format)
    reason = problem(fmt)
    if reason is not None:
        raise UnsupportedError(f"inputs cannot be quantized to {fmt.name}: {reason}")
    if not fmt.divides(columns):
        raise FormatError(width_problem(fmt, columns))
    if needs_static(fmt) and without_static:
        raise FormatError(
            f"{fmt.name} inputs need a calibrated scale: pass what qat.training.activations.static_part returns"
        )
    return fmt


def empty(x: Tensor, fmt: Format) -> QuantizedInput:
    """Uninitialized codes and scales for x (..., columns)."""
    *rows, columns = x.shape
    width, dtype, groups, scale_dtype = _layout(fmt.name, columns)
    codes = x.new_empty((*rows, width), dtype=dtype)
    return QuantizedInput(codes, x.new_empty((1,) if groups is None else (*rows, groups), dtype=scale_dtype))


@lru_cache(maxsize=4096)
def _layout(format: str, columns: int) -> tuple[int, torch.dtype, int | None, torch.dtype]:
    """Codes of a row and their dtype, scales of a row (None: one for all rows) and theirs."""
    fmt = lookup(format)
    groups = None if fmt.is_static else columns // fmt.group if fmt.group else 1
    scale_dtype = torch.uint8 if fmt.scale.is_bytes and not fmt.is_static else torch.float32
    return columns // (2 if is_paired(fmt) else 1), code_dtype(fmt.element), groups, scale_dtype


def is_paired(fmt: Format) -> bool:
    """Whether two codes of an input share a byte."""
    return fmt.element.is_minifloat and fmt.element.bits == 4


def code_dtype(element: Element) -> torch.dtype:
    """dtype of codes that are stored as they are: one per byte, or two in a uint8."""
    if element.is_integer:
        return torch.int8
    return torch.uint8 if element.bits == 4 else torch.float8_e4m3fn


# --- the operators ----------------------------------------------------------------------------------------------------


def reference(x: Tensor, static: Tensor | None, format: str) -> tuple[Tensor, Tensor]:
    """What `qat::quantize_input` means."""
    fmt = check(format, x.shape[-1], static)
    out = empty(x, fmt)
    if x.numel() == 0 and not fmt.is_static:
        return out.codes, out.scales.zero_()
    scales = vllm_scales(x, fmt, static)
    values = rounded(to_blocks(x.to(torch.float32), fmt), fmt, scales)
    codes = _encode(from_blocks(values, x.shape, fmt), fmt.element)
    stored = fmt.scale.to_bytes(scales.stored) if fmt.scale.is_bytes else scales.stored.to(torch.float32)
    return codes, stored.reshape(out.scales.shape).clone()


def _encode(values: Tensor, element: Element) -> Tensor:
    """Codes of rounded values (..., columns); a NaN stays one where the codes have a NaN."""
    if element.is_integer:
        return values.nan_to_num(0.0).to(torch.int8)
    codes = element.encode(values)
    if element.bits == 4:
        return codes[..., ::2] | (codes[..., 1::2] << 4)
    return codes.masked_fill_(values.isnan(), nan_code(element)).view(torch.float8_e4m3fn)


def nan_code(element: Element) -> int:
    """The code of NaN, or 0 where there is none."""
    return next(iter(element.nan_codes), 0)


_quantize_input = torch.library.custom_op("qat::quantize_input", reference, mutates_args=())


@_quantize_input.register_fake
def _(x: Tensor, static: Tensor | None, format: str) -> tuple[Tensor, Tensor]:
    codes, scales = empty(x, lookup(format))
    return codes, scales


@torch.library.custom_op("qat::rms_norm_quantize", mutates_args=())
def _rms_norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, static: Tensor | None, eps: float, format: str
) -> tuple[Tensor, Tensor, Tensor]:
    new = x.new_empty(0) if residual is None else (x + residual).to(x.dtype).contiguous()
    summed = (x if residual is None else new).to(torch.float32)
    scaled = (summed * torch.rsqrt(summed.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    codes, scales = torch.ops.qat.quantize_input((weight * scaled).to(x.dtype), static, format)
    return codes, scales, new


@_rms_norm_quantize.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, static: Tensor | None, eps: float, format: str
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales = empty(x, lookup(format))
    return codes, scales, x.new_empty(0) if residual is None else x.new_empty(x.shape)


@torch.library.custom_op("qat::silu_mul_quantize", mutates_args=())
def _silu_mul_quantize(gate: Tensor, up: Tensor, static: Tensor | None, format: str) -> tuple[Tensor, Tensor]:
    codes, scales = torch.ops.qat.quantize_input(functional.silu(gate) * up, static, format)
    return codes, scales


@_silu_mul_quantize.register_fake
def _(gate: Tensor, up: Tensor, static: Tensor | None, format: str) -> tuple[Tensor, Tensor]:
    codes, scales = empty(gate, lookup(format))
    return codes, scales


# --- what callers use -------------------------------------------------------------------------------------------------


def quantize_input(x: Tensor, format: str, static: Tensor | None = None) -> QuantizedInput:
    """Codes and scales of x (..., columns), any float dtype.

    Args:
        x: (..., columns).
        format: catalogue name.
        static: what `qat.training.activations.static_part` returns, for formats that have one (`needs_static`).

    Raises:
        FormatError, UnsupportedError: see `check`.
    """
    check(format, x.shape[-1], static)
    return QuantizedInput(*torch.ops.qat.quantize_input(x, static, format))


def rms_norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    format: str,
    static: Tensor | None = None,
) -> tuple[QuantizedInput, Tensor]:
    """`quantize_input(rms_norm(x + residual))`, and the sum, which is the next residual.

    The sum is rounded to x's dtype; the norm is computed in float32 and rounded to x's dtype before the weight
    multiplies it, as transformers' LlamaRMSNorm does. Kernels add the squares in another order than PyTorch: a value
    that lies within an ulp of a tie may then get the neighbouring code.

    Args:
        x: (..., columns).
        residual: shape and dtype of x, or None; the sum is then x itself.
        weight: (columns,).
        eps: added to the mean square.
        format, static: see `quantize_input`.

    Raises:
        FormatError: shapes or dtypes that do not fit each other; see also `check`.
        UnsupportedError: see `check`.
    """
    check(format, x.shape[-1], static)
    if weight.shape != x.shape[-1:]:
        raise FormatError(f"a norm of weight {tuple(weight.shape)} meets an input of width {x.shape[-1]}")
    if residual is not None:
        _check_alike(x, residual, "residual")
    codes, scales, new = torch.ops.qat.rms_norm_quantize(x, residual, weight, static, eps, format)
    return QuantizedInput(codes, scales), x if residual is None else new


def silu_mul_quantize(gate: Tensor, up: Tensor, format: str, static: Tensor | None = None) -> QuantizedInput:
    """`quantize_input(silu(gate) * up)`, both factors and the product rounded to their dtype, as LlamaMLP does.

    Kernels use a fast exponential: a value that lies within an ulp of a tie may get the neighbouring code.

    Args:
        gate, up: (..., columns), of one dtype; views of one wide tensor are fine.
        format, static: see `quantize_input`.

    Raises:
        FormatError: shapes or dtypes that do not fit each other; see also `check`.
        UnsupportedError: see `check`.
    """
    check(format, gate.shape[-1], static)
    _check_alike(gate, up, "up projection")
    return QuantizedInput(*torch.ops.qat.silu_mul_quantize(gate, up, static, format))


def _check_alike(x: Tensor, other: Tensor, what: str) -> None:
    if other.shape != x.shape or other.dtype != x.dtype:
        description = f"{tuple(other.shape)} {other.dtype}"
        raise FormatError(f"a {what} of {description} meets an input of {tuple(x.shape)} {x.dtype}; they must be alike")


def unpack(codes: Tensor, scales: Tensor, static: Tensor | None, format: str) -> QTensor:
    """The quantized tensor (..., columns) of which `quantize_input` returns the layout.

    Args:
        codes, scales: see `QuantizedInput`.
        static: as given to `quantize_input`; without it, the constant above E4M3 scales is left out.
        format: catalogue name.
    """
    fmt = lookup(format)
    if is_paired(fmt):
        patterns = torch.stack((codes & 0x0F, codes >> 4), dim=-1).flatten(-2)
    else:
        patterns = codes.view(torch.uint8) & (2**fmt.element.bits - 1)
    columns = patterns.shape[-1]
    grid = fmt.grid_shape(patterns.numel() // columns if columns else 0, columns)
    stored = fmt.scale.from_bytes(scales)
    stored = stored.reshape(grid) if columns and patterns.numel() else stored.new_empty(grid)
    above = static.reciprocal().reshape(()) if fmt.global_scale and static is not None else None
    return QTensor(fmt, patterns, Scales(stored, above))


def dequantize_input(
    codes: Tensor, scales: Tensor, static: Tensor | None, format: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values (..., columns) that codes and scales stand for, computed in float32 and rounded once to `dtype`."""
    return unpack(codes, scales, static, format).dequantize(dtype)
