"""Grouped operators against products of whole numbers and the gate in float64, an expert at a time."""

import pytest
import torch
from torch import Tensor

from qat.serving.npu_experts import (
    grouped_matmul,
    grouped_matmul_swiglu_quant,
    quant_grouped_matmul_dequant,
    sent,
    swiglu,
    unpermute,
)

SIZES = [3, 0, 5, 1]
M, K, N = sum(SIZES), 70, 24


def operands(bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, stacks of codes, scales that are BF16 numbers, and a scale per row."""
    generator = torch.Generator().manual_seed(bits)
    top = 2 ** (bits - 1) - 1
    x = torch.randint(-127, 128, (M, K), generator=generator, dtype=torch.int8)
    x[0, :4] = torch.tensor([-128, 127, -16, 15])
    weight = torch.randint(-top, top + 1, (len(SIZES), K, N), generator=generator, dtype=torch.int8)
    scale = (torch.rand(len(SIZES), N, generator=generator) * 0.01 + 0.001).bfloat16()
    return x, weight, scale, torch.rand(M, generator=generator) * 0.01 + 0.001


def expected(x: Tensor, weight: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """float64 (m, n)."""
    owner = [expert for expert, size in enumerate(SIZES) for _ in range(size)]
    products = [x[i].long() @ weight[expert].long() for i, expert in enumerate(owner)]
    each = torch.stack([scale[expert] for expert in owner]).double()
    return torch.stack(products).double() * each * rows.double()[:, None]


def assist_of(weight: Tensor, scale: Tensor) -> Tensor:
    return 8 * (weight.double() * scale.double()[:, None]).sum(dim=1).float()


@pytest.mark.parametrize("bits", [8, 4])
def test_each_group_has_its_matrix(bits: int) -> None:
    x, weight, scale, rows = operands(bits)
    assist = assist_of(weight, scale) if bits == 4 else None
    truth = expected(x, weight, scale, rows)
    found = grouped_matmul(x, weight, scale, SIZES, pertoken_scale=rows, assist=assist, output_dtype=torch.float32)
    assert found.shape == (M, N) and float((found - truth).abs().max() / truth.abs().max()) < 1e-6
    rounded = grouped_matmul(x, weight, scale, SIZES, pertoken_scale=rows, assist=assist)
    assert torch.equal(rounded, found.bfloat16())


def test_without_its_assist_a_product_of_halves_is_off_by_it() -> None:
    x, weight, scale, rows = operands(4)
    assist = assist_of(weight, scale)
    whole, bare = (
        grouped_matmul(x, weight, scale, SIZES, pertoken_scale=rows, assist=each, output_dtype=torch.float32)
        for each in (assist, torch.zeros_like(assist))
    )
    owner = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    torch.testing.assert_close(whole - bare, assist[owner] * rows[:, None], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_gate_is_quantized_per_token(bits: int) -> None:
    x, weight, scale, rows = operands(bits)
    assist = assist_of(weight, scale) if bits == 4 else None
    codes, scales = grouped_matmul_swiglu_quant(x, weight, scale, SIZES, pertoken_scale=rows, assist=assist)
    left, right = expected(x, weight, scale, rows).chunk(2, dim=-1)
    gated = left / (1 + torch.exp(-left)) * right
    assert codes.dtype == torch.int8 and codes.shape == (M, N // 2)
    torch.testing.assert_close(scales.double(), gated.abs().amax(dim=-1) / 127, rtol=1e-5, atol=0)
    assert float((codes - gated / scales[:, None]).abs().max()) <= 0.5 + 1e-3


def test_products_of_half_models_quantize_their_inputs() -> None:
    _, weight, scale, _ = operands(8)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(3)).half()
    step = x.double().abs().amax(dim=-1) / 127
    codes = (x.double() / step[:, None]).round().to(torch.int8)
    found = quant_grouped_matmul_dequant(x, weight, scale.float(), SIZES)
    truth = expected(codes, weight, scale, step)
    assert found.dtype == torch.float16
    assert bool(((found - truth).abs() <= 2.0**-11 * truth.abs() + 1e-4 * truth.abs().max()).all())
    gated = swiglu(found).double()
    left, right = found.double().chunk(2, dim=-1)
    torch.testing.assert_close(gated, left / (1 + torch.exp(-left)) * right, rtol=2.0**-10, atol=1e-6)
    assert swiglu(found).dtype == torch.float16


def test_tokens_find_their_experts_and_the_way_back() -> None:
    """Choices of experts that are elsewhere (4 and beyond) come to nothing."""
    chosen = torch.tensor([[2, 0], [1, 2], [4, 0], [0, 9]])
    order, sizes = sent(chosen, 4)
    assert sizes == [3, 1, 2, 0] and order.tolist() == [1, 5, 6, 2, 0, 3]
    shares = torch.tensor([[0.5, 0.25], [0.75, 0.125], [3.0, 1.0], [2.0, 5.0]])
    y = torch.arange(6.0)[:, None].bfloat16() + 1
    back = unpermute(y, order, shares)
    assert back.dtype == torch.bfloat16
    assert back.flatten().tolist() == [0.5 * 5 + 0.25 * 1, 0.75 * 4 + 0.125 * 6, 2.0, 2.0 * 3]
    fine = torch.tensor([[1 + 2.0**-9, 1.0]])  # shares are of the model's type, where the first is 1
    assert unpermute(torch.tensor([[1.0], [-1.0]]).bfloat16(), torch.tensor([0, 1]), fine).item() == 0.0
