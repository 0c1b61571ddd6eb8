"""The operators that experts run on Ascend NPUs, in torch, written from CANN's and torch_npu's documents: products with
one matrix for each group of rows, and the gate between two of them. See `qat.serving.npu`, whose caveats hold here.

Rows lie as they are sent to experts: those of the first expert, then those of the second, and so on; `sizes` says how
many each has. Stacks of weights are (experts, k, n), scales (experts, n).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from qat.serving import npu

_LOW = 4  # bits of the lower half of an 8-bit input


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    sizes: Sequence[int],
    *,
    pertoken_scale: Tensor,
    assist: Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`npu_grouped_matmul` of integers with group_type 0: x[rows of e] @ weight[e] * scale[e] * pertoken_scale.

    Args:
        x: int8 (m, k).
        weight: int8 codes (experts, k, n), of 8 bits, or of 4 bits where there is an `assist`.
        scale: (experts, n), float32 or BF16.
        sizes: rows of each expert, together m.
        pertoken_scale: float32 (m,).
        assist: float32 (experts, n), 8 times the column sums of the dequantized weight. The operator splits x into
            halves of 4 bits, of which the lower one is read as if it were 8 less; this is what is then missing.
    """
    parts = []
    for expert, (rows, factors) in enumerate(zip(x.split(list(sizes)), pertoken_scale.split(list(sizes)), strict=True)):
        matrix, own = weight[expert], scale[expert]
        if assist is None:
            part = npu.quant_matmul(rows, matrix, own, pertoken_scale=factors, output_dtype=output_dtype)
        else:
            part = _halves(rows, matrix).float() * own.float() + assist[expert]
            part = (part * factors.float()[:, None]).to(output_dtype)
        parts.append(part)
    return torch.cat(parts)


def _halves(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight less 8 times the sums of its columns: the products of the halves, exact, as float64."""
    high = x >> _LOW
    low = x - (high << _LOW) - (1 << _LOW - 1)
    return npu.integer_product(high, weight) * (1 << _LOW) + npu.integer_product(low, weight)


def grouped_matmul_swiglu_quant(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    sizes: Sequence[int],
    *,
    pertoken_scale: Tensor,
    assist: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`npu_grouped_matmul_swiglu_quant`: the product in float32, silu of its first half times the second, and that
    quantized per token: int8 (m, n / 2) and float32 (m,). Arguments as in `grouped_matmul`."""
    wide = grouped_matmul(
        x, weight, scale, sizes, pertoken_scale=pertoken_scale, assist=assist, output_dtype=torch.float32
    )
    gate, up = wide.chunk(2, dim=-1)
    return npu.dynamic_quant(gate * torch.sigmoid(gate) * up)


def quant_grouped_matmul_dequant(x: Tensor, weight: Tensor, scale: Tensor, sizes: Sequence[int]) -> Tensor:
    """`npu_quant_grouped_matmul_dequant` of a 310P with quant_mode "pertoken": x (m, k) is quantized, multiplied as in
    `grouped_matmul`, and of its own type again."""
    codes, each = npu.dynamic_quant(x)
    return grouped_matmul(codes, weight, scale, sizes, pertoken_scale=each, output_dtype=x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """`npu_swiglu`: silu of the first half of x (m, n) times the second, in float32, rounded to x's type."""
    gate, up = x.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def sent(chosen: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """How tokens are sent to experts: the order of the choices (tokens, k), counted row by row, by expert and then by
    token; and how many each expert has. Choices of no expert here (numbers from `experts` on) are left out."""
    ids, order = torch.sort(chosen.reshape(-1), stable=True)
    bounds = torch.searchsorted(ids, torch.arange(experts + 1, device=ids.device)).tolist()
    return order[: bounds[-1]], [end - begin for begin, end in pairwise(bounds)]


def unpermute(y: Tensor, order: Tensor, shares: Tensor) -> Tensor:
    """`npu_moe_token_unpermute`: rows of y, in the order of `sent`, times their shares (tokens, k), summed by token."""
    tokens, choices = shares.shape
    weighted = y.new_zeros(tokens * choices, y.shape[-1], dtype=torch.float32)
    weighted[order] = y.float() * shares.reshape(-1)[order].to(y.dtype).float()[:, None]
    return weighted.view(tokens, choices, -1).sum(dim=1).to(y.dtype)
