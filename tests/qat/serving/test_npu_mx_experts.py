"""Grouped MX operators against products and the gate in float64, an expert at a time."""

import pytest
import torch
from torch import Tensor

from qat.serving import npu
from qat.serving.npu_mx_experts import grouped_matmul, grouped_matmul_swiglu_quant, swiglu_group_quant

SIZES = [3, 0, 5, 1]
M, K, N = sum(SIZES), 128, 192


def operands(bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of rows and their scales, and values of stacks that are MX numbers."""
    generator = torch.Generator().manual_seed(bits)
    codes, scales = npu.dynamic_mx_quant(torch.randn(M, K, generator=generator), bits)
    weight = torch.randn(len(SIZES) * N, K, generator=generator) / 8
    values = npu.mx_values(*npu.dynamic_mx_quant(weight, 8)).view(len(SIZES), N, K).transpose(1, 2)
    return codes, scales, values


def expected(codes: Tensor, scales: Tensor, weight: Tensor) -> Tensor:
    """float64 (m, n)."""
    owner = [expert for expert, size in enumerate(SIZES) for _ in range(size)]
    return torch.einsum("mk,mkn->mn", npu.mx_values(codes, scales).double(), weight.double()[owner])


@pytest.mark.parametrize("bits", [8, 4])
def test_each_group_has_its_matrix(bits: int) -> None:
    codes, scales, weight = operands(bits)
    truth = expected(codes, scales, weight)
    found = grouped_matmul(codes, weight, SIZES, pertoken_scale=scales, output_dtype=torch.float32)
    assert found.shape == (M, N) and float((found - truth).abs().max() / truth.abs().max()) < 1e-6
    rounded = grouped_matmul(codes, weight, SIZES, pertoken_scale=scales)
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, found.bfloat16())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_gate_is_quantized_in_groups(bits: int) -> None:
    """Of 96 columns, whose three scales are padded to four; each is half a step off at most, and half of BF16."""
    codes, scales, weight = operands(bits)
    left, right = expected(codes, scales, weight).chunk(2, dim=-1)
    gated = left / (1 + torch.exp(-left)) * right
    found, pairs = grouped_matmul_swiglu_quant(codes, weight, SIZES, bits, pertoken_scale=scales)
    assert found.shape == (M, N // 2 if bits == 8 else N // 4) and pairs.shape == (M, 2, 2)
    values, groups = npu.mx_values(found, pairs).double().view(M, 3, 32), gated.view(M, 3, 32)
    unit = torch.exp2(pairs.flatten(1)[:, :3].double() - 127)[..., None]
    half = (
        unit * (groups / unit).abs().log2().floor().clamp_min(0 if bits == 4 else -6).exp2() / (4 if bits == 4 else 16)
    )
    inside = groups.abs() <= unit * (6 if bits == 4 else 448)
    assert bool(((values - groups).abs() <= half + groups.abs() * 2.0**-8)[inside].all())
    assert float(inside.float().mean()) > 0.9
    ends = groups.abs().amax(dim=-1).bfloat16().double()
    assert torch.equal(unit[..., 0].log2(), ends.log2().floor() - (2 if bits == 4 else 8))


def test_the_gate_is_bf16_before_it_is_codes() -> None:
    """A result between two BF16 numbers that straddles a tie of FP4: rounded first, it goes to even."""
    x = torch.zeros(1, 128)
    x[0, :64], x[0, 64:] = 50.0, 4.0 / 50  # silu(50) is 50
    x[0, 65] = 5 * (1 + 2.0**-10) / 50
    codes, scales = swiglu_group_quant(x, bits=4)
    values = npu.mx_values(codes, scales)
    assert values[0, 0] == 4 and values[0, 1] == 4  # not 6, the nearer of the exact number
