"""Simulated NPU operators against their documents' formulas, in plain loops and exact fractions."""

import itertools
import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from qat.serving import npu

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def test_sums_are_exact() -> None:
    """The largest numbers everywhere, in more columns than float32 can add up."""
    x, weight = torch.full((1, 5000), -128, dtype=torch.int8), torch.full((5000, 1), 127, dtype=torch.int8)
    weight[-1] = 126
    assert int(npu.integer_product(x, weight)) == -128 * 127 * 4999 - 128 * 126
    x, weight = codes(3, 1500), codes(1500, 4, seed=2)
    assert torch.equal(npu.integer_product(x, weight).long(), x.long() @ weight.long())


def test_static_codes() -> None:
    x = torch.tensor([[0.5, 1.5, -0.5, 100.0, -100.0, 0.25]])
    found = npu.quantize(x, torch.tensor(1.0), torch.tensor(3.0))
    assert found.tolist() == [[4, 4, 2, 103, -97, 3]]  # ties to even, after the offset
    assert npu.quantize(x, torch.tensor(2.0), torch.tensor(-3.0)).tolist() == [[-2, 0, -4, 127, -128, -2]]


def test_dynamic_codes() -> None:
    x = normal(4, 32)
    x[2] = 0
    for bits, top in ((8, 127), (4, 7)):
        found, scale = npu.dynamic_quant(x, bits)
        for row, got, one in zip(x.tolist(), found.tolist(), scale.tolist(), strict=True):
            amax = max(map(abs, row))
            assert math.isclose(one, amax / top, rel_tol=1e-6)
            assert got == [round(value / one) if amax else 0 for value in row]


def test_every_mx_code_is_read() -> None:
    bytes_ = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(4, 64)
    scales = npu.pair_scales(torch.full((4, 4), 127, dtype=torch.uint8))
    found = npu.mx_values(bytes_, scales).view(-1, 2)
    for byte, (low, high) in enumerate(found.tolist()):
        expected = [(-1.0 if nibble & 8 else 1.0) * E2M1[nibble & 7] for nibble in (byte & 15, byte >> 4)]
        assert [low, high] == expected


def nearest(value: Fraction, mode: str) -> float:
    """Of E2M1; of two that are as near the larger one ("round") or that with an even code ("rint")."""
    order = sorted(range(8), key=lambda code: code % 2 if mode == "rint" else -code)
    return min((E2M1[code] for code in order), key=lambda each: abs(Fraction(each) - value))


def test_mx_inputs() -> None:
    """Exponents by the floor rule; ties as the mode says (4 bits) or to even (8 bits); scales in pairs, padded."""
    x = normal(6, 96) * torch.exp2(torch.arange(96) % 7 - 3)
    x[0, :32] = torch.arange(32) / 4 - 4  # ties
    x[1, 32:64] = 0
    modes: list[tuple[int, int, Any]] = [(4, 2, "round"), (4, 2, "rint"), (8, 8, "rint")]
    for bits, top, mode in modes:
        packed, scales = npu.dynamic_mx_quant(x, bits, mode)
        assert scales.shape == (6, 2, 2) and int(scales[:, 1, 1].count_nonzero()) == 0
        values = npu.mx_values(packed, scales)
        for row, block in itertools.product(range(6), range(3)):
            part, got = (t[row, 32 * block : 32 * block + 32].tolist() for t in (x, values))
            amax = max(map(abs, part))
            if not amax:
                assert got == [0.0] * 32
                continue
            scale = Fraction(2) ** (math.frexp(amax)[1] - 1 - top)
            assert int(scales[row].flatten()[block]) == 127 + math.frexp(amax)[1] - 1 - top
            for value, rounded in zip(part, got, strict=True):
                exact, size = Fraction(value) / scale, abs(Fraction(rounded) / scale)
                if bits == 4:
                    assert size == nearest(abs(exact), mode)
                else:
                    assert abs(size - min(abs(exact), 448)) <= Fraction(2) ** (math.frexp(float(size))[1] - 5)
                assert rounded * value >= 0


def test_products() -> None:
    x, weight, scale = codes(3, 64), codes(64, 5, seed=2), normal(5).abs() + 0.01
    bias, per_token = torch.arange(5, dtype=torch.int32) - 2, normal(3, seed=3).abs()
    sums = (x.long() @ weight.long() + bias.long()).double()
    found = npu.quant_matmul(x, weight, scale, bias=bias, pertoken_scale=per_token, output_dtype=torch.float32)
    assert torch.allclose(found.double(), sums * scale.double() * per_token.double()[:, None], rtol=1e-6)
    added = npu.quant_matmul(x, weight, scale, bias=normal(5), output_dtype=torch.float32)
    plain = npu.quant_matmul(x, weight, scale, output_dtype=torch.float32)
    assert torch.equal(added, plain + normal(5))


def test_int64_scales_are_truncated() -> None:
    """The low 32 bits are a float32, of which the hardware reads 19."""
    scale = torch.tensor([0.0123456, 1.0])
    coded = scale.view(torch.int32).to(torch.int64)
    kept = (scale.view(torch.int32) & -8192).view(torch.float32)
    assert not torch.equal(kept, scale) and kept[1] == 1
    x, weight = codes(2, 8), codes(8, 2, seed=2)
    found = npu.quant_matmul(x, weight, coded, output_dtype=torch.float32)
    assert torch.equal(found, npu.quant_matmul(x, weight, kept, output_dtype=torch.float32))


def test_mx_products() -> None:
    x, weight = normal(3, 96), normal(5, 96, seed=1)
    for bits in (4, 8):
        (left, of_x), (right, of_w) = npu.dynamic_mx_quant(x, bits), npu.dynamic_mx_quant(weight, 8)
        values = npu.mx_values(left, of_x).double() @ npu.mx_values(right, of_w).double().t()
        found = npu.mx_matmul(left, right.t(), of_w.transpose(0, 1), pertoken_scale=of_x, output_dtype=torch.float32)
        assert torch.allclose(found.double(), values, rtol=1e-5, atol=1e-6)


def test_weight_only_products_round_the_weight() -> None:
    x, weight = normal(3, 64).bfloat16(), codes(64, 5)
    scale, offset = normal(5).abs().bfloat16(), torch.tensor([0.0, 1.0, -2.0, 0.0, 3.0]).bfloat16()
    dense = ((weight.float() + offset.float()) * scale.float()).bfloat16()
    expected = (x.float() @ dense.float()).bfloat16()
    assert torch.equal(npu.weight_quant_matmul(x, weight, scale, offset), expected)
    grouped = npu.weight_quant_matmul(x, weight, torch.stack([scale, 2 * scale]), torch.zeros(2, 5))
    halves = torch.cat([weight[:32].float() * scale.float(), weight[32:].float() * 2 * scale.float()]).bfloat16()
    assert torch.equal(grouped, (x.float() @ halves.float()).bfloat16())
