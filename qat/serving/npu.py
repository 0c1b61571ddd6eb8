"""The operators of Ascend NPUs that quantized layers run, in torch, written from CANN's and torch_npu's documents.

What they compute is documented; with which precision inside, in part: sums of integers are exact here, everything else
is float32, rounded once to the output's type. Nothing here was compared with an NPU. It shares no arithmetic with the
fake quantization of training (`qat.training.npu`), so that agreement of the two means something.

Matrices lie as engines hold them after loading: inputs (m, k), weights (k, n), scales of MX paired along k.
"""

from typing import Literal

import torch
from torch import Tensor

from qat.numbers.element import EXPONENT_BIAS

_EXACT = 1 << 24  # whole numbers up to here are exact in float32
_PAIR = 2  # MX scales that lie side by side
_BLOCK = 32
_BIAS = EXPONENT_BIAS  # of E8M0
_INT8 = torch.iinfo(torch.int8)
_FP8 = torch.finfo(torch.float8_e4m3fn)
E2M1_EXPONENT, E4M3_EXPONENT = 2, 8  # of the largest normal number


# --- inputs ---------------------------------------------------------------------------------------


def quantize(x: Tensor, reciprocal: Tensor, offset: Tensor) -> Tensor:
    """`npu_quantize` with div_mode False: int8 codes of x (..., k), round(x * reciprocal + offset), saturating; ties to
    even. The other two are vectors (k,) or one number, in the model's type."""
    wide = torch.addcmul(offset.float(), x.float(), reciprocal.float())
    return torch.round(wide).clamp(_INT8.min, _INT8.max).to(torch.int8)


def dynamic_quant(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """`npu_dynamic_quant`: int8 codes of x (..., k) and a float32 scale per token, amax / 127 (or / 7 with 4 bits)."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1) / (2 ** (bits - 1) - 1)
    codes = torch.round(wide / scale.where(scale > 0, 1.0)[..., None])
    return codes.to(torch.int8), scale


def dynamic_mx_quant(x: Tensor, bits: int, round_mode: Literal["round", "rint"] = "rint") -> tuple[Tensor, Tensor]:
    """`npu_dynamic_mx_quant` with scale_alg 0: codes of x (m, k) and E8M0 scales in pairs, uint8 (m, k / 64, 2), padded
    with zero. 4 bits: two E2M1 codes to a byte along k, the first low, ties away from zero ("round") or to even
    ("rint"). 8 bits: float8_e4m3fn, ties to even in either mode. Both saturate."""
    top = E2M1_EXPONENT if bits == 4 else E4M3_EXPONENT
    blocks = x.float().unflatten(-1, (-1, _BLOCK))
    amax = blocks.abs().amax(dim=-1)
    exponent = torch.where(amax > 0, torch.frexp(amax).exponent - 1 - top, -_BIAS).clamp(-_BIAS, _BIAS)
    relative = torch.ldexp(blocks, -exponent[..., None]).flatten(-2)
    if bits == 4:
        codes = _e2m1(relative, round_mode)
        packed = codes[..., ::2] | codes[..., 1::2] << 4
    else:
        packed = relative.clamp(_FP8.min, _FP8.max).to(torch.float8_e4m3fn)
    return packed, pair_scales((exponent + _BIAS).to(torch.uint8))


def _e2m1(x: Tensor, round_mode: str) -> Tensor:
    """Codes: the step is 1/2 below 2, 1 below 4, and 2 above."""
    size = x.abs().clamp_max(6)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    size = (torch.round(size / step) if round_mode == "rint" else torch.floor(size / step + 0.5)) * step
    code = torch.where(size < 2, size * 2, torch.where(size < 4, size + 2, size / 2 + 4))
    return (code.to(torch.uint8) | (x < 0).to(torch.uint8) << 3).to(torch.uint8)


def pair_scales(scales: Tensor) -> Tensor:
    """(m, k / 32) -> (m, k / 64, 2), padded with 0."""
    odd = scales.shape[-1] % _PAIR
    return torch.nn.functional.pad(scales, (0, odd)).unflatten(-1, (-1, _PAIR))


# --- products -------------------------------------------------------------------------------------


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (m, k) times weight (k, n), whole numbers of 8 bits (the weight may be float32 ones): exact, as float64."""
    step = _EXACT // _INT8.min**2
    total = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[1], step):
        part = slice(start, start + step)
        total += x[:, part].float() @ weight[part].float()
    return total


def quant_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`npu_quant_matmul` of integers: (x @ weight + bias) * scale * pertoken_scale.

    Args:
        x, weight: int8 (m, k) and (k, n).
        scale: (n,) or one number; float32 or BF16, or int64 whose low 32 bits are a float32 of which 19 are read.
        bias: int32 (n,), added to the sums; a float one is added to the result.
        pertoken_scale: float32 (m,).
    """
    sums = integer_product(x, weight)
    if bias is not None and not bias.is_floating_point():
        sums = sums + bias.double()
    out = sums.float() * _readable(scale)
    if pertoken_scale is not None:
        out = out * pertoken_scale.float()[:, None]
    if bias is not None and bias.is_floating_point():
        out = out + bias.float()
    return out.to(output_dtype)


def _readable(scale: Tensor) -> Tensor:
    if scale.dtype != torch.int64:
        return scale.float()
    return (scale.to(torch.int32) & ~0x1FFF).view(torch.float32)


def mx_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    *,
    pertoken_scale: Tensor,
    bias: Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`npu_quant_matmul` of MX operands, group_sizes [1, 1, 32]: products within a block times both scales, summed.

    Args:
        x: (m, k) float8_e4m3fn, or uint8 (m, k / 2) with two E2M1 codes each, the first low.
        weight: the same, (k, n) or (k / 2, n); or float32, what `mx_values` makes of it and its scales, once.
        scale: uint8 (k / 64, n, 2); None with the values.
        pertoken_scale: uint8 (m, k / 64, 2).
        bias: float32 (n,).
    """
    right = weight if scale is None else mx_values(weight.t(), scale.transpose(0, 1)).t()
    out = mx_values(x, pertoken_scale) @ right
    return (out if bias is None else out + bias.float()).to(output_dtype)


def mx_values(codes: Tensor, scales: Tensor) -> Tensor:
    """Float32 values of rows of E4M3 codes (m, k), or packed E2M1 codes (m, k / 2), under scales (m, k / 64, 2)."""
    values = _decoded(codes)
    exponents = scales.flatten(-2).to(torch.int32) - _BIAS
    each = exponents.repeat_interleave(_BLOCK, dim=-1)[:, : values.shape[-1]]
    return torch.ldexp(values, each)


def _decoded(codes: Tensor) -> Tensor:
    if codes.dtype == torch.float8_e4m3fn:
        return codes.float()
    both = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2).to(torch.int32)
    size = both & 7
    mantissa, exponent = size & 1, size >> 1
    value = torch.where(exponent > 0, torch.ldexp(1 + mantissa / 2, exponent - 1), mantissa / 2)
    return torch.where(both > 7, -value, value)


def weight_quant_matmul(
    x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`npu_weight_quant_batchmatmul`: x @ ((weight + offset) * scale) + bias, of x's type; the weight is rounded to it
    before the product. x (m, k), weight int8 (k, n), scale and offset (n,) or one row for each group of k."""
    groups = scale.shape[0] if scale.dim() > 1 else 1
    rows = weight.shape[0] // groups
    dense = weight.float() if offset is None else weight.float() + _per_row(offset, groups, rows)
    out = x.float() @ (dense * _per_row(scale, groups, rows)).to(x.dtype).float()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _per_row(scale: Tensor, groups: int, rows: int) -> Tensor:
    return scale.float().reshape(groups, -1).repeat_interleave(rows, dim=0)
