"""What the interpreters of the supported Tritons do not do as a GPU does, made good through public names only; the
interpret_*.py scripts, which run under TRITON_INTERPRET=1, call `mend` first.

    Triton 3.6           loop bounds that come from tensors fail under NumPy 2.4 and later
    Triton 3.6 to 3.8    `tl.fma` rounds twice
    any                  `tl.dot_scaled` is missing, or reads no E4M3 scales
"""

import sys
from importlib import import_module
from typing import Any

import torch
import triton
import triton.language as tl

from qat.kernels.load import KERNELS
from qat.kernels.packed_linear.decode.triton import decode, decode_scale
from qat.numbers.catalog import lookup
from qat.numbers.scale import UE4M3

E2M1 = lookup("mxfp4").element
SCALE_MANTISSA, SCALE_BIAS = (
    tl.constexpr(value) for value in (UE4M3.element.mantissa_bits, UE4M3.element.exponent_bias)
)
E2M1_MANTISSA, E2M1_BIAS = (tl.constexpr(value) for value in (E2M1.mantissa_bits, E2M1.exponent_bias))


def mend() -> None:
    """Make the loops of kernels, `tl.fma` and `tl.dot_scaled` mean what they mean on a GPU."""
    files = {by_device[device] for by_device in KERNELS.values() for device in ("cuda", "npu") if device in by_device}
    for file in sorted(files):
        import_module(f"qat.kernels.{file.replace('/', '.')}")
    for name, module in list(sys.modules.items()):
        if name.startswith("qat.kernels.") and name.endswith((".triton", ".ascend")):
            vars(module)["range"] = lambda *bounds: range(*map(whole, bounds))  # in front of the builtin
    if not fma_rounds_once():
        tl.fma = fma
    tl.dot_scaled = dot_scaled


def whole(bound: Any) -> int:
    """A loop's bound; a tensor of one element prints as that."""
    return int(str(bound).strip("[]")) if isinstance(bound, tl.tensor) else int(bound)


@triton.jit
def probe(x, out):
    tl.store(out, tl.fma(tl.load(x), tl.load(x), tl.load(x + 1)))


def fma_rounds_once() -> bool:
    """(1 + e)^2 - (1 + 2 e) is e^2, which a product rounded by itself loses."""
    epsilon = 2.0**-23
    x, out = torch.tensor([1 + epsilon, -(1 + 2 * epsilon)]), torch.zeros(1)
    probe[(1,)](x, out)
    return out.item() == epsilon**2


@triton.jit
def fma(x, y, z):
    """float32, by way of float64: exact but for sums that end beside a tie of float32, which quotients do not."""
    return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)


@triton.jit
def values(codes, scales, NAME: tl.constexpr):
    """float32 (rows, K) of codes (rows, K), or (rows, K / 2) where two E2M1 share a byte, and scales (rows, groups)."""
    if NAME == "e2m1":
        wide = codes.to(tl.int16)
        nibbles = tl.reshape(tl.join(wide & 0xF, wide >> 4), (codes.shape[0], codes.shape[1] * 2))
        value = decode(nibbles, "minifloat", 4, E2M1_MANTISSA, E2M1_BIAS, tl.float32)
    else:
        wide = codes.to(tl.uint8, bitcast=True).to(tl.int16)
        value = decode(wide, "minifloat", 8, SCALE_MANTISSA, SCALE_BIAS, tl.float32)
    if scales.dtype == tl.float8e4nv:
        factor = decode_scale(scales.to(tl.uint8, bitcast=True), "e4m3", SCALE_MANTISSA, SCALE_BIAS, NAN=True)
    else:
        factor = decode_scale(scales, "e8m0", SCALE_MANTISSA, SCALE_BIAS, NAN=True)
    grouped = tl.reshape(value, (value.shape[0], scales.shape[1], value.shape[1] // scales.shape[1]))
    return tl.reshape(grouped * factor[:, :, None], (value.shape[0], value.shape[1]))


@triton.jit
def dot_scaled(left, left_scales, LEFT: tl.constexpr, right, right_scales, RIGHT: tl.constexpr, total):
    """`tl.dot_scaled` on E2M1 and E4M3: left (N, K), right (K, M), scales (N, groups) and (M, groups)."""
    rows, columns = values(left, left_scales, LEFT), values(tl.trans(right), right_scales, RIGHT)
    return tl.dot(rows, tl.trans(columns), total, input_precision="ieee")
