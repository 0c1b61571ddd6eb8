"""Scales in detail, against second implementations: E8M0 rules in integers, the global scale, BF16 exactness, and codes
from given scales against compressed-tensors, which is what transformers runs."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from torch import Tensor

from qat.numbers.catalog import CATALOG, E4M3, INT8, lookup
from qat.numbers.element import Element, integer
from qat.numbers.format import Format
from qat.numbers.numerics import (
    Scales,
    fake_quantize,
    find_scales,
    global_scale_for,
    quantize,
    scale_from_amax,
)
from qat.numbers.scale import BF16, E8M0, F16, F32, UE4M3, ScaleType

MX = [fmt for fmt in CATALOG.values() if fmt.scale is E8M0]
NV = [fmt for fmt in CATALOG.values() if fmt.global_scale]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def float32_amaxes() -> list[float]:
    """Maxima where rules could go wrong: just beside m * 2^k for every m on a coarse grid, and random bit patterns."""
    marks = [m * 2.0**k for m in (1, 1.25, 1.5, 1.75, 1.875, 1.9375, 127 / 64, 7 / 4) for k in (-100, -3, 0, 9, 90)]
    beside = [float(np.nextafter(np.float32(m), np.float32(side))) for m in marks for side in (0, np.inf)]
    bits = np.random.default_rng(0).integers(1 << 28, 0x7E000000, 500, dtype=np.int32)
    return [*marks, *beside, *bits.view(np.float32).tolist()]


def floor_log2(value: Fraction) -> int:
    """Exact, by counting doublings."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def oracle_exponent(amax: float, element: Element, rule: str) -> int:
    exact, top = Fraction(amax), Fraction(element.max)
    if rule == "ceil":
        ratio = exact / top
        return floor_log2(ratio) if Fraction(2) ** floor_log2(ratio) == ratio else floor_log2(ratio) + 1
    if rule == "even":  # round the significand to the element's mantissa, half up, before taking the exponent
        unit = Fraction(2) ** (floor_log2(exact) - element.mantissa_bits)
        exact = math.floor(exact / unit + Fraction(1, 2)) * unit
    return floor_log2(exact) - floor_log2(top)


@pytest.mark.parametrize(("fmt", "rule"), [(f, r) for f in MX for r in ("floor", "even", "ceil")], ids=str)
def test_e8m0_rules_equal_exact_arithmetic(fmt: Format, rule: str) -> None:
    variant = dataclasses.replace(fmt, scale_rule=rule)
    amaxes = float32_amaxes()
    stored = scale_from_amax(torch.tensor(amaxes), variant, None)
    expected = [max(-127, min(127, oracle_exponent(a, fmt.element, rule))) + 127 for a in amaxes]
    assert stored.tolist() == expected


@pytest.mark.parametrize("fmt", MX, ids=lambda fmt: fmt.name)
def test_ceil_never_saturates_and_is_smallest(fmt: Format) -> None:
    amax = torch.tensor(float32_amaxes())
    scale = E8M0.decode(scale_from_amax(amax, dataclasses.replace(fmt, scale_rule="ceil"), None))
    assert (amax / scale <= fmt.element.max).all()
    assert (amax / (scale / 2) > fmt.element.max).all()


@pytest.mark.parametrize("fmt", MX, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("rule", ["floor", "even", "ceil"])
def test_a_block_of_zeros_has_the_smallest_scale(fmt: Format, rule: str) -> None:
    assert scale_from_amax(torch.zeros(2), dataclasses.replace(fmt, scale_rule=rule), None).tolist() == [0, 0]


@pytest.mark.parametrize(("name", "bits"), [("mxfp4", 4), ("mxfp6", 6)])
def test_the_even_rule_is_that_of_compressed_tensors(name: str, bits: int) -> None:
    amax = torch.tensor(float32_amaxes()).clamp(1e-30, 1e30)
    assert lookup(name).scale_rule == "even"
    stored = scale_from_amax(amax, lookup(name), None)
    assert torch.equal(stored.float(), generate_mx_scales(amax, bits).round())


def test_e8m0_decodes_as_specified() -> None:
    values = E8M0.decode(torch.arange(256, dtype=torch.uint8))
    assert values[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert values[255].isnan()


@pytest.mark.parametrize("fmt", CATALOG.values(), ids=lambda fmt: fmt.name)
def test_storing_a_stored_scale_changes_nothing(fmt: Format) -> None:
    x = torch.cat([normal(6, 256), torch.zeros(2, 256), normal(2, 256) * 1e-25])
    x[0, 0] = math.nan
    scales = find_scales(x, fmt)
    again = fmt.scale.store(scales.effective(), scales.global_scale)
    as_bytes = [s.contiguous().view(torch.uint8) for s in (again, scales.stored)]
    assert torch.equal(*as_bytes)


def test_storing_rounds_to_the_nearest_number_of_its_dtype() -> None:
    latent = torch.tensor([0.7, 1.0, 1.5, 1e-9, 1e9, math.inf, math.nan])
    mx = E8M0.decode(E8M0.store(latent))
    assert mx[:3].tolist() == [0.5, 1.0, 2.0]  # nearest in the exponent; log2(1.5) = 0.58
    nv = UE4M3.store(latent, torch.tensor(2.0)).float()
    assert nv[:5].tolist() == [E4M3.round(torch.tensor(0.35)).item(), 0.5, 0.75, 2.0**-9, 448.0]
    assert mx[-2:].isnan().all() and nv[-2:].isnan().all()
    assert BF16.store(torch.tensor(0.1)).item() == torch.tensor(0.1, dtype=torch.bfloat16).item()
    assert F32.store(torch.tensor(0.1)).item() == torch.tensor(0.1).item()


@pytest.mark.parametrize("fmt", NV, ids=lambda fmt: fmt.name)
def test_the_global_scale_is_the_smallest_power_of_two_that_fits(fmt: Format) -> None:
    limit = Fraction(fmt.element.max) * Fraction(fmt.scale.largest)
    for amax in [1.0, 6.0, 2688.0, 2688.001, 1e30, 1e-30, 3.0e38, *float32_amaxes()[:80]]:
        scale = global_scale_for(torch.tensor(amax), fmt)
        mantissa, _ = math.frexp(scale.item())
        assert mantissa == 0.5 and scale.dtype == torch.float32
        exact = Fraction(torch.tensor(amax).item())
        assert Fraction(scale.item()) / 2 * limit < exact <= Fraction(scale.item()) * limit
    assert global_scale_for(torch.tensor(0.0), fmt) == 1.0


@pytest.mark.parametrize("fmt", CATALOG.values(), ids=lambda fmt: fmt.name)
def test_exact_in_bf16_is_true_iff_bf16_changes_nothing(fmt: Format) -> None:
    changed = False
    for seed in range(10):
        x = normal(64, 256, seed=seed) * torch.logspace(-3, 3, 64)[:, None]
        values = fake_quantize(x if seed % 2 else x.abs(), fmt)  # one sign: asymmetric formats use their whole width
        changed |= not torch.equal(values.bfloat16().float(), values)
    assert fmt.exact_in_bf16 is not changed


@pytest.mark.parametrize(("bits", "scale"), [(b, s) for b in range(2, 9) for s in (BF16, F16, UE4M3, E8M0, F32)])
@pytest.mark.parametrize("zero_point", [False, True])
def test_exact_in_bf16_never_claims_too_much(bits: int, scale: ScaleType, zero_point: bool) -> None:
    """All code x scale products of research formats, whose scale is any number of its dtype."""
    fmt = Format(name="x", elements=(integer(bits),), block=(1, 16), scale=scale, zero_point=zero_point)
    top = 2**bits - 1 if zero_point else 2 ** (bits - 1) - 1
    scales = {
        BF16: torch.arange(128, 256).float(),
        F16: torch.arange(1024, 2048, 7).float(),
        UE4M3: torch.tensor([v for v in E4M3.grid if v > 0]),
        E8M0: torch.tensor([0.25, 1.0, 8.0]),
        F32: 1 + torch.rand(100, generator=torch.Generator().manual_seed(0)),
    }[scale]
    products = torch.arange(-top, top + 1).float()[:, None] * scales
    exact = torch.equal(products.bfloat16().float(), products)
    assert exact or not fmt.exact_in_bf16


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "nvint4", "mxfp8", "mxint8", "mxint4", "mxfp6"])
def test_formats_for_bf16_servers_are_exact_there(name: str) -> None:
    assert lookup(name).exact_in_bf16


CT_CASES: dict[str, dict[str, object]] = {
    "int8_channel": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "int8_tensor": {"num_bits": 8, "type": "int", "strategy": "tensor"},
    "int4_g32": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    "int4_g128": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
    "int3_g64": {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 64},
    "int4_g64_asym": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False},
    "int8_channel_asym": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
    "fp8_channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8_b128": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    "mxfp6": {"num_bits": 6, "type": "float", "strategy": "group", "group_size": 32},
    "mxfp8": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32},
}


@pytest.mark.parametrize("name", CT_CASES)
def test_codes_from_given_scales_equal_those_of_compressed_tensors(name: str) -> None:
    fmt, args = lookup(name), QuantizationArgs(**CT_CASES[name])
    x = normal(130, 256) * torch.logspace(-4, 4, 256)
    if not fmt.zero_point:  # on a tie an odd zero point decides differently there; elsewhere ties must agree
        x[:, ::2] = (x[:, ::2] * 4).round() / 4
    stored = quantize(x, fmt)
    scale, divisor = fmt.scale.decode(stored.scales.stored), stored.scales.global_scale
    zero = torch.zeros_like(scale) if stored.scales.zero_point is None else stored.scales.zero_point.float()
    theirs = ct_quantize(x, scale, zero, args, global_scale=None if divisor is None else 1 / divisor)
    assert torch.equal(fmt.element.decode(stored.codes), theirs.float())


@pytest.mark.parametrize("name", ["int8_channel", "nvfp4", "mxfp4", "nf4_g64"])
def test_a_separate_divisor_decides_the_codes_and_the_stored_scale_the_values(name: str) -> None:
    fmt, x = lookup(name), normal(4, 128)
    scales = find_scales(x, fmt)
    split = dataclasses.replace(scales, divisor=scales.effective() * 1.3)
    codes = quantize(x, fmt, dataclasses.replace(scales, stored=scales.stored)).codes
    split_codes = quantize(x, fmt, split).codes
    assert not torch.equal(codes, split_codes)
    group = fmt.block_for(*x.shape)[1]
    steps = fmt.element.round(x.unflatten(-1, (-1, group)) / split.divisor.unsqueeze(-1)).flatten(1)
    assert torch.equal(fmt.element.decode(split_codes), steps)
    expected = (steps.unflatten(-1, (-1, group)) * scales.effective().unsqueeze(-1)).flatten(1)
    assert torch.equal(fake_quantize(x, fmt, split), expected)


def test_asymmetric_ranges_hold_zero_and_both_ends() -> None:
    fmt = lookup("int4_g64_asym")
    x = torch.linspace(2.0, 5.0, 64).view(1, 64)  # zero lies outside the data and must still be exact
    stored = quantize(x, fmt)
    assert stored.scales.zero_point is not None and stored.scales.zero_point.item() == -8
    assert (stored.dequantize() - x).abs().max() <= stored.scales.effective().item() / 2 * 1.02
    assert stored.codes.unique().numel() <= 16


def test_mean_rule_is_bitnet() -> None:
    x = normal(3, 128)
    gamma = x.abs().mean(dim=1, keepdim=True).bfloat16().float()
    assert torch.equal(fake_quantize(x, lookup("ternary_channel")), (x / gamma).round().clamp(-1, 1) * gamma)


def test_nvfp4_by_hand() -> None:
    """One block worked out: amax 6 -> global 2^-8 (6/2688 rounded up), block scale E4M3(1 / 2^-8) = 256."""
    x = torch.zeros(1, 16)
    x[0, :5] = torch.tensor([6.0, -5.0, 2.5, -0.25, 0.26])
    stored = quantize(x, lookup("nvfp4"))
    assert stored.scales.global_scale == 2.0**-8
    assert stored.scales.stored.float().item() == 256.0
    assert stored.codes[0, :6].tolist() == [7, 8 + 6, 4, 0, 1, 0]
    assert stored.dequantize()[0, :6].tolist() == [6.0, -4.0, 2.0, 0.0, 0.5, 0.0]


def test_choice_takes_the_element_with_the_smaller_error() -> None:
    fmt = lookup("if4")
    evenly = torch.arange(-7, 9).clamp_max(7).float().view(1, 16)  # the integer grid itself
    powers = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6, 0] * 2).view(1, 16)  # E2M1's own grid
    x = torch.cat([evenly, powers * (448 / 6)], dim=1)
    scales = find_scales(x, fmt)
    assert scales.choice is not None and scales.choice.tolist() == [[1, 0]]
    for index in (0, 1):
        forced = Scales(scales.stored, scales.global_scale, choice=torch.full_like(scales.choice, index))
        error = (fake_quantize(x, fmt, forced) - x).square().unflatten(1, (2, 16)).sum(-1)
        best = (fake_quantize(x, fmt, scales) - x).square().unflatten(1, (2, 16)).sum(-1)
        assert (best <= error).all()


def test_int8_never_uses_minus_128() -> None:
    x = normal(64, 128)
    assert INT8.decode(quantize(x, lookup("int8_g32")).codes).min() >= -127
    scales = find_scales(x * 0.5, lookup("int8_g32"))  # saturating scales too
    assert INT8.decode(quantize(x, lookup("int8_g32"), scales).codes).min() == -127


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int4_g32_asym", "int4_channel", "if4"])
def test_scales_of_matrices_below_each_other_are_those_of_each(name: str) -> None:
    """Joined, and taken apart again where another row begins."""
    fmt, matrices = lookup(name), [normal(4, 64), 50 * normal(2, 64, seed=1), 0.01 * normal(6, 64, seed=2)]
    each = [find_scales(matrix, fmt) for matrix in matrices]
    whole, tall = Scales.joined(each), torch.cat(matrices)
    expected = torch.cat([fake_quantize(matrix, fmt, own) for matrix, own in zip(matrices, each, strict=True)])
    assert torch.equal(fake_quantize(tall, fmt, whole), expected)
    if fmt.global_scale:
        assert len({float(own.global_scale) for own in each if own.global_scale is not None}) > 1
    for part in (slice(3, 7), slice(0, 12)):
        assert torch.equal(fake_quantize(tall[part], fmt, whole.rows(part)), expected[part])
