"""The operators that experts with MX weights run on Ascend 950, in torch: products of MX operands with one matrix for
each group of rows, and the gate between two of them. Written from CANN's documents; that the gate's result is rounded
to BF16 before it becomes codes again, and that ties go to even, the source of its kernels says. See `qat.serving.npu`,
whose caveats hold here, and `qat.serving.npu_experts`, whose order of rows does.

Stacks of weights are float32 values (experts, k, n), what `npu.mx_values` makes of codes and scales.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.serving import npu


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    *,
    pertoken_scale: Tensor,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`npu_grouped_matmul` of MX operands with group_type 0: x[rows of e] @ weight[e].

    Args:
        x: codes (m, k) or (m, k / 2), as `npu.dynamic_mx_quant` makes them.
        weight: values (experts, k, n).
        sizes: rows of each expert, together m.
        pertoken_scale: uint8 (m, k / 64, 2).
    """
    groups = zip(x.split(list(sizes)), pertoken_scale.split(list(sizes)), weight, strict=True)
    return torch.cat(
        [npu.mx_matmul(rows, own, None, pertoken_scale=each, output_dtype=output_dtype) for rows, each, own in groups]
    )


def grouped_matmul_swiglu_quant(
    x: Tensor, weight: Tensor, sizes: Sequence[int], bits: int, *, pertoken_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`npu_grouped_matmul_swiglu_quant_v2` with dequant_mode and quant_mode 2: the product in float32, gated, as codes
    of `bits` (m, n / 2) or two to a byte, and their scales. Other arguments as in `grouped_matmul`."""
    wide = grouped_matmul(x, weight, sizes, pertoken_scale=pertoken_scale, output_dtype=torch.float32)
    return swiglu_group_quant(wide, bits)


def swiglu_group_quant(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """`npu_swiglu_group_quant` (vllm-ascend's own) with quant_mode 2: silu of the first half of x (m, n) times the
    second, in float32, rounded to BF16, as MX codes and scales."""
    gate, up = x.float().chunk(2, dim=-1)
    return npu.dynamic_mx_quant((gate * torch.sigmoid(gate) * up).to(torch.bfloat16), bits)
