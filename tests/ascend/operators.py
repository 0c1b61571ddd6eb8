"""Operators of torch_npu as their documents describe them, in torch on a CPU: over these the engine's own code runs. A
second reading of the documents, which shares nothing with `qat`. Layouts of device memory are not seen here (a cast to
FRACTAL_NZ gives the tensor back), nor is anything that only a device does."""

from typing import Any

import torch
from torch import Tensor

FP4, E8M0 = 296, 293  # numbers by which torch_npu knows types that torch lacks
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP19 = ~0x1FFF  # what of a 64-bit scale's float the hardware reads
EIGHTS = torch.arange(0, 32, 4)


def npu_format_cast(tensor: Tensor, *given: Any, **named: Any) -> Tensor:
    """The same numbers."""
    return tensor.contiguous()


def npu_quantize(x: Tensor, scales: Tensor, zero_points: Tensor, dtype: Any, axis: int, div_mode: bool) -> Tensor:
    """int8 of x times `scales` (their reciprocals, as `div_mode` is false) plus the zero point."""
    assert not div_mode and dtype == torch.qint8 and axis == -1
    return (x.float() * scales.float() + zero_points.float()).round().clamp(-128, 127).to(torch.int8)


def npu_dynamic_quant(x: Tensor, dst_type: Any = torch.int8, **named: Any) -> tuple[Tensor, Tensor]:
    """Integers with a scale per token: int8, or eight 4-bit codes in an int32."""
    assert not named, named
    largest = 127 if dst_type == torch.int8 else 7
    scale = x.float().abs().amax(-1) / largest
    codes = (x.float() / scale[..., None]).nan_to_num(0.0).round()
    return (codes.to(torch.int8) if largest == 127 else pack(codes.to(torch.int32))), scale


def npu_dynamic_mx_quant(
    x: Tensor, dst_type: Any, round_mode: str = "rint", scale_alg: int = 0, **named: Any
) -> tuple[Tensor, Tensor]:
    """Codes in groups of 32 under powers of two by OCP's rule, floor(log2 amax) less the largest exponent; and their
    bytes in pairs, (..., groups / 2, 2)."""
    assert scale_alg == 0 and not named, (scale_alg, named)
    groups = x.float().unflatten(-1, (-1, 32))
    largest = 2 if dst_type == FP4 else 8
    exponent = torch.frexp(groups.abs().amax(-1)).exponent - 1 - largest
    exponent = torch.where(groups.abs().amax(-1) > 0, exponent, -127).clamp(-127, 127)
    value = groups * torch.exp2(-exponent.float())[..., None]
    raw = (exponent + 127).to(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, raw.shape[-1] % 2)).unflatten(-1, (-1, 2))
    if dst_type != FP4:
        assert dst_type == torch.float8_e4m3fn and round_mode == "rint"
        return value.clamp(-448, 448).flatten(-2).to(torch.float8_e4m3fn), raw
    assert round_mode in ("round", "rint")
    middles = (VALUES[1:] + VALUES[:-1]) / 2
    codes = torch.bucketize(value.abs().contiguous(), middles, right=True)  # halves away from zero
    if round_mode == "rint":
        tied = codes - torch.bucketize(value.abs().contiguous(), middles)
        codes -= tied * (codes % 2)  # or to the even code
    codes = (codes + 8 * (value < 0)).flatten(-2).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, raw


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: Any = None,
    x1_dtype: Any = None,
    x2_dtype: Any = None,
    pertoken_scale_dtype: Any = None,
    scale_dtype: Any = None,
    group_sizes: list[int] | None = None,
) -> Tensor:
    """(x1 @ x2 + integer bias) * scale * scale per token + other bias; with `group_sizes`, MX numbers, groups of 32."""
    assert offset is None
    if group_sizes is not None:
        assert group_sizes[-1] == 32 and scale_dtype == pertoken_scale_dtype == E8M0 and pertoken_scale is not None
        left = mx_values(x1, pertoken_scale, x1_dtype)
        right = mx_values(x2.transpose(0, 1), scale.transpose(0, 1), x2_dtype)
        out = left.double() @ right.double().t()
        return (out if bias is None else out + bias.double()).to(output_dtype)
    left, right = (unpack(x1), unpack(x2.transpose(-1, -2)).t()) if x1.dtype == torch.int32 else (x1, x2)
    assert left.dtype == right.dtype == torch.int8, (left.dtype, right.dtype)
    sums = left.long() @ right.long()
    if bias is not None and bias.dtype == torch.int32:
        sums, bias = sums + bias.long(), None
    factor = scale.float() if scale.dtype != torch.int64 else (scale.int() & FP19).view(torch.float32)
    out = sums.float() * factor
    if pertoken_scale is not None:
        out = out * pertoken_scale.float().reshape(-1, 1)
    return (out if bias is None else out + bias.float()).to(output_dtype)


def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
) -> Tensor:
    """x @ ((weight + offset) * scale) + bias; weight int8 (k, n), or int32 (k, n / 8) of eight 4-bit codes; scale and
    offset (n,), or (k / group, n)."""
    weight = unpack(weight) if weight.dtype == torch.int32 else weight
    assert weight.dtype == torch.int8 and antiquant_scale.dtype == x.dtype
    each = [t.float() for t in (antiquant_offset, antiquant_scale)]
    if antiquant_group_size:
        assert len(each[0]) == len(each[1]) == weight.shape[0] // antiquant_group_size
        each = [t[torch.arange(weight.shape[0]) // antiquant_group_size] for t in each]
    dense = (weight.float() + each[0]) * each[1]
    out = x.float() @ dense
    return (out if bias is None else out + bias.float()).to(x.dtype)


def npu_convert_weight_to_int4pack(weight: Tensor) -> Tensor:
    """Eight neighbours of a row in an int32, the first in the lowest bits."""
    assert weight.dtype == torch.int32 and weight.min() >= -8 and weight.max() <= 7
    return pack(weight)


def pack(codes: Tensor) -> Tensor:
    """int32 codes -> eight in one."""
    return ((codes.long() & 15).unflatten(-1, (-1, 8)) << EIGHTS).sum(-1).to(torch.int32)


def unpack(words: Tensor) -> Tensor:
    """Undo `pack`, to int8."""
    codes = (words[..., None] >> EIGHTS.int() & 15).flatten(-2)
    return torch.where(codes > 7, codes - 16, codes).to(torch.int8)


def mx_values(codes: Tensor, pairs: Tensor, dtype: Any) -> Tensor:
    """float32 (rows, k) of MX codes (rows, k, or k / 2 bytes of FP4) and their scales (rows, groups / 2, 2)."""
    if dtype == FP4:
        assert codes.dtype == torch.uint8
        nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        value = VALUES[(nibbles & 7).long()] * torch.where(nibbles > 7, -1.0, 1.0)
    else:
        assert codes.dtype == torch.float8_e4m3fn, codes.dtype
        value = codes.float()
    scales = torch.exp2(pairs.flatten(-2).float() - 127)[:, : value.shape[-1] // 32]
    return (value.unflatten(-1, (-1, 32)) * scales[..., None]).flatten(-2)


OPERATORS: dict[str, Any] = {
    operator.__name__: operator
    for operator in (
        npu_format_cast,
        npu_quantize,
        npu_dynamic_quant,
        npu_dynamic_mx_quant,
        npu_quant_matmul,
        npu_weight_quant_batchmatmul,
        npu_convert_weight_to_int4pack,
    )
} | {"float4_e2m1fn_x2": FP4, "float8_e8m0fnu": E8M0}
