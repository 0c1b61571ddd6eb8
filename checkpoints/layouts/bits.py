"""The arithmetic of the independent readers: numpy on the bits of stored tensors, shared with no packer."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qat.errors import UnsupportedError

Array = NDArray[Any]


def raw_rows(tensor: Tensor) -> Array:
    """The bytes of a 2-D tensor, (rows, bytes per row)."""
    flat = tensor.contiguous().view(torch.uint8).numpy()
    return flat.reshape(tensor.shape[0], -1)


def fields(rows: Array, bits: int, count: int) -> Array:
    """The first `count` fields of `bits` bits of each row of bytes, least significant bit first."""
    first = np.arange(count) * bits
    padded = np.pad(rows, ((0, 0), (0, 1))).astype(np.uint16)
    pair = padded[:, first // 8] | padded[:, first // 8 + 1] << 8
    result: Array = (pair >> (first % 8).astype(np.uint16)) & (2**bits - 1)
    return result


def minifloat_values(exponent: int, mantissa: int) -> Array:
    """float32 value of every code of a small float."""
    codes = np.arange(1 << (1 + exponent + mantissa))
    field, fraction = (codes >> mantissa) & ((1 << exponent) - 1), codes & ((1 << mantissa) - 1)
    lowest = 2 - (1 << (exponent - 1)) - mantissa  # exponent of one unit of a subnormal's fraction
    whole = np.where(field == 0, fraction, fraction + (1 << mantissa))
    value = np.ldexp(whole.astype(np.float32), lowest + np.maximum(field, 1) - 1)
    value = np.where(codes >> (exponent + mantissa), -value, value)
    if exponent == 4:  # E4M3: all ones is not a number
        value[(codes & (codes.size // 2 - 1)) == codes.size // 2 - 1] = np.nan
    return value.astype(np.float32)


def float_values(tensor: Tensor) -> Array:
    """float32 values of a stored float tensor, from its bits."""
    if tensor.dtype in (torch.float32, torch.float16):
        return tensor.numpy().astype(np.float32)
    if tensor.dtype == torch.bfloat16:
        return (tensor.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if tensor.dtype == torch.float8_e4m3fn:
        return minifloat_values(4, 3)[tensor.view(torch.uint8).numpy()]
    raise UnsupportedError(f"scales of type {tensor.dtype} are not part of the layout")


def scale_values(tensor: Tensor) -> Array:
    """float32 values of stored scales; uint8 holds E8M0 exponents."""
    if tensor.dtype != torch.uint8:
        return float_values(tensor)
    exponent = tensor.numpy().astype(np.uint32)
    bits = np.where(exponent == 0, 1 << 22, exponent << 23).astype(np.uint32)  # 2^-127 is subnormal
    return bits.view(np.float32)


def bf16_bits(values: Array) -> Array:
    """Round float32 to BF16, half to even, as uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    result: Array = np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
    return result


def bad_scales(scale: Tensor) -> int:
    """How many of a tensor's scales are zero, negative or not finite; uint8 is a biased exponent, 255 no number."""
    if scale.dtype == torch.uint8:
        return int((scale == torch.iinfo(scale.dtype).max).sum())
    values = scale.to(torch.float32)
    return int((~(torch.isfinite(values) & (values > 0))).sum())
