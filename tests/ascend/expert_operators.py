"""Operators of experts as torch_npu's and CANN's documents describe them: a second reading, which shares nothing with
`qat`. See `operators.py`."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.ascend.operators import E8M0, mx_values, npu_dynamic_mx_quant, npu_dynamic_quant, unpack


def _experts(rows: int, group_list: Tensor, group_list_type: int) -> Tensor:
    """The expert of every row; a group list holds ends (type 0) or counts (type 1)."""
    ends = group_list if group_list_type == 0 else group_list.cumsum(0)
    assert ends.dtype == torch.int64 and int(ends[-1]) == rows, (ends, rows)
    return (torch.arange(rows)[:, None] >= ends[None]).sum(-1)


def _products(x: Tensor, stack: Tensor, scale: Tensor | None, assist: Tensor | None, owner: Tensor) -> Tensor:
    """float32 (rows, n): sums of integers, times the scale of their columns. INT4 weights come eight to an int32; the
    input is then taken apart into 16 times its upper half, and its lower half less 8, and `assist` added."""
    assert x.dtype == torch.int8
    if stack.dtype == torch.int32:
        assert assist is not None and assist.dtype == torch.float32 and scale is not None and scale.dtype == torch.int64
        codes, upper = unpack(stack).double(), torch.floor(x.double() / 16)
        sums = sum(
            factor * torch.einsum("mk,mkn->mn", half, codes[owner])
            for factor, half in ((16.0, upper), (1.0, x.double() - 16 * upper - 8))
        )
        each = scale.int().view(torch.float32).reshape(len(stack), -1)[owner]
        return (sums * each + assist[owner]).float()
    assert stack.dtype == torch.int8 and assist is None
    sums = torch.einsum("mk,mkn->mn", x.double(), stack.double()[owner])
    return sums.float() if scale is None else sums.float() * scale.float().reshape(len(stack), -1)[owner]


def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    scale: list[Tensor] | None,
    bias: list[Tensor] | None = None,
    per_token_scale: list[Tensor],
    split_item: int,
    group_type: int,
    group_list: Tensor,
    group_list_type: int = 0,
    output_dtype: torch.dtype,
    antiquant_scale: list[Tensor] | None = None,
    scale_dtype: Any = None,
    per_token_scale_dtype: Any = None,
    x_dtype: Any = None,
    weight_dtype: Any = None,
) -> list[Tensor]:
    """One matrix for each group of rows, in one tensor. MX operands have scales per token of that type; FP4 weights
    under FP8 inputs have theirs in `antiquant_scale`."""
    assert group_type == 0 and split_item == 2 and output_dtype == torch.bfloat16
    given = scale or antiquant_scale
    assert given is not None and not (scale and antiquant_scale)
    (rows,), (stack,), (own,), (each,) = x, weight, given, per_token_scale
    owner = _experts(len(rows), group_list, group_list_type)
    if per_token_scale_dtype is not None:
        assert per_token_scale_dtype in (E8M0, torch.float8_e8m0fnu) and not bias
        assert scale_dtype == (E8M0 if scale else None) and (x_dtype != weight_dtype) == (scale is None)
        return [_mx_products(rows, stack, own, each, owner, x_dtype, weight_dtype).to(output_dtype)]
    out = _products(rows, stack, own, bias[0] if bias else None, owner)
    return [(out * each.float()[:, None]).to(output_dtype)]


def _gated(wide: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    assert not limit
    half = wide.shape[-1] // 2
    return npu_dynamic_quant(torch.nn.functional.silu(wide[:, :half]) * wide[:, half:])


def grouped_matmul_swiglu_quant_weight_nz(
    x: Tensor, weight: Tensor, *, weight_scale: Tensor, x_scale: Tensor, group_list: Tensor, bias: Any = None,
    swiglu_limit: float = 0.0,
) -> tuple[Tensor, Tensor, None]:  # fmt: skip
    """Product, silu of the left half times the right one, and integers with a scale per token; ends of groups."""
    assert bias is None and weight_scale.dtype == torch.float32
    owner = _experts(len(x), group_list, 0)
    return *_gated(_products(x, weight, weight_scale, None, owner) * x_scale[:, None], swiglu_limit), None


def grouped_matmul_swiglu_quant_v2(
    x: Tensor, weight: list[Tensor], weight_scale: list[Tensor], x_scale: Tensor, group_list: Tensor,
    weight_assist_matrix: list[Tensor], dequant_mode: int, group_list_type: int, swiglu_limit: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same, with INT4 weights."""
    assert dequant_mode == 0
    (stack,), (scale,), (assist,) = weight, weight_scale, weight_assist_matrix
    owner = _experts(len(x), group_list, group_list_type)
    return _gated(_products(x, stack, scale, assist, owner) * x_scale[:, None], swiglu_limit)


def _mx_products(
    x: Tensor, stack: Tensor, scale: Tensor, each: Tensor, owner: Tensor, x_dtype: Any, weight_dtype: Any
) -> Tensor:
    """float64 (rows, n) of MX numbers; stacks (experts, k, n), their scales (experts, k / 64, n, 2), as views."""
    left = mx_values(x, each, x_dtype).double()
    right = torch.stack([mx_values(w.t(), s.transpose(0, 1), weight_dtype) for w, s in zip(stack, scale, strict=True)])
    return torch.stack([right[expert].double() @ row for expert, row in zip(owner.tolist(), left, strict=True)])


def npu_grouped_matmul_swiglu_quant_v2(
    *, x: Tensor, weight: list[Tensor], group_list: Tensor, weight_scale: list[Tensor], x_scale: Tensor,
    dequant_mode: int, quant_mode: int, dequant_dtype: Any, quant_dtype: Any, x_dtype: Any, weight_dtype: Any,
    weight_scale_dtype: Any, x_scale_dtype: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """MX operands: their product in float32, gated, as MX numbers again; ends of groups. The kernel makes BF16 of what
    comes out of the gate, and rounds to even."""
    assert dequant_mode == quant_mode == 2 and dequant_dtype == torch.float32
    assert weight_scale_dtype == x_scale_dtype == E8M0 and x_dtype == weight_dtype
    (stack,), (scale,) = weight, weight_scale
    owner = _experts(len(x), group_list, 0)
    wide = _mx_products(x, stack, scale, x_scale, owner, x_dtype, weight_dtype).float()
    return _mx_gated(wide, quant_dtype)


def _mx_gated(wide: Tensor, to: Any) -> tuple[Tensor, Tensor]:
    half = wide.shape[-1] // 2
    assert half % 64 == 0, "both operators take widths that 128 divides alone"
    return npu_dynamic_mx_quant((torch.nn.functional.silu(wide[:, :half]) * wide[:, half:]).bfloat16(), to)


def npu_swiglu_group_quant(
    x: Tensor, topk_weight: Any, group_index: Tensor | None, dst_type: Any, quant_mode: int, clamp_value: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gate on a BF16 product, as MXFP8; how many rows count, the sum of `group_index` says."""
    assert x.dtype == torch.bfloat16 and topk_weight is None and quant_mode == 2 and not clamp_value
    assert group_index is None or int(group_index.sum()) == len(x), group_index
    codes, scales = _mx_gated(x.float(), dst_type)
    return codes, scales, x.new_empty(0)


def npu_quant_grouped_matmul_dequant(
    *, x: Tensor, quantized_weight: Tensor, weight_scale: Tensor, group_list: Tensor, quant_mode: str
) -> Tensor:
    """Of a 310P: integers with a scale per token, their products with stacks (experts, n, k), and FP16 again; ends of
    groups."""
    assert quant_mode == "pertoken" and x.dtype == torch.float16 and weight_scale.dtype == torch.float32
    codes, each = npu_dynamic_quant(x)
    owner = _experts(len(x), group_list, 0)
    return (_products(codes, quantized_weight.transpose(1, 2), weight_scale, None, owner) * each[:, None]).half()


def npu_swiglu(x: Tensor) -> Tensor:
    """Silu of the left half times the right one."""
    half = x.shape[-1] // 2
    return (torch.nn.functional.silu(x[:, :half].float()) * x[:, half:].float()).to(x.dtype)


OPERATORS = {
    "npu_quant_grouped_matmul_dequant": npu_quant_grouped_matmul_dequant,
    "npu_swiglu": npu_swiglu,
    "npu_grouped_matmul": npu_grouped_matmul,
    "npu_grouped_matmul_swiglu_quant_v2": npu_grouped_matmul_swiglu_quant_v2,
}
OWN = SimpleNamespace(
    npu_swiglu_group_quant=npu_swiglu_group_quant,
    grouped_matmul_swiglu_quant_weight_nz=grouped_matmul_swiglu_quant_weight_nz,
    grouped_matmul_swiglu_quant_v2=grouped_matmul_swiglu_quant_v2,
)
"""Operators that vllm-ascend itself compiles, as `torch.ops._C_ascend`."""
