"""Ranges of an FP16 model's inputs: their scale times any weight's is a number that the hardware reads whole. That is
written here a second time, in whole numbers: 11 significant bits, the rest cut off."""

import math
from fractions import Fraction

import pytest
import torch

from qat.errors import FormatError, UnsupportedError
from qat.init.calibration import calibrate
from qat.numbers.catalog import lookup
from qat.scheme import Scheme
from qat.surgery import apply
from qat.training import half, npu
from qat.training.activations import dynamic_fake_quantize, fake_quantize_input, held_range, static_part
from tests.qat.test_surgery import build

STATIC = ["int8_tensor", "int8_tensor_asym"]


def read(value: Fraction) -> Fraction:
    """What the hardware makes of a positive number: its first 11 binary digits."""
    exponent = math.frexp(float(value))[1] - 11  # of the last digit; `value` is a float32 number, so this is exact
    return Fraction(value // Fraction(2) ** exponent) * Fraction(2) ** exponent


def significant(value: float) -> int:
    """Binary digits of a number, without zeros at its end."""
    whole = Fraction(value).numerator * Fraction(value).denominator  # a power of two is one of them
    return (whole // (whole & -whole)).bit_length()


def ranges(count: int = 400) -> torch.Tensor:
    """Largest magnitudes from 0.02 to 1000, and what a scale of three bits is exactly."""
    exact = torch.tensor([127 * 0.75, 127 * 2.0**-9, 127 * 5.0])
    generator = torch.Generator().manual_seed(0)
    return torch.cat([exact, 10 ** (torch.rand(count, generator=generator) * 4.7 - 1.7)])


def test_the_second_reading() -> None:
    assert read(Fraction(1)) == 1 and read(Fraction(2047)) == 2047
    assert read(Fraction(4095)) == 4094 and read(Fraction(4095, 2**30)) == Fraction(4094, 2**30)
    assert significant(0.75) == 2 and significant(1.0) == 1 and significant(7.0) == 3 and significant(9.0) == 4


def test_every_product_is_read_whole() -> None:
    """All significands of a weight's scale (8 bits) times all of an input's (3): nothing is cut; one bit more is."""
    cut = 0
    for weight in range(128, 256):
        assert all(read(Fraction(weight * each)) == weight * each for each in range(4, 8))
        cut += sum(read(Fraction(weight * each)) != weight * each for each in range(8, 16))
    assert half.SCALE_BITS == 3 and half.READ_BITS == 11 and cut > 100


@pytest.mark.parametrize("name", STATIC)
def test_scales_have_three_bits_and_clip_nothing_more(name: str) -> None:
    fmt, ratios = lookup(name), []
    for amax in ranges().tolist():
        found = torch.tensor([-0.3 * amax, amax]) if fmt.zero_point else torch.tensor(amax)
        held = half.held_range(found, fmt)
        wanted, static = static_part(fmt, found), static_part(fmt, held)
        assert wanted is not None and static is not None and held.shape == found.shape
        exact = float(found[1] - found[0]) / 255 if fmt.zero_point else amax / 127
        assert significant(float(static[0])) <= 3 and exact <= float(static[0]) < 1.2501 * exact
        assert torch.equal(half.held_range(held, fmt), held)
        if fmt.zero_point:
            low, high = held.tolist()
            assert int(static[1]) == round(-128 - low / float(static[0]))
            assert low <= found[0] + static[0] / 2 and high >= found[1] - static[0] / 2
        else:
            assert held >= found
        ratios.append(float(static[0]) / exact)
    mean = sum(math.log2(ratio) for ratio in ratios) / len(ratios)
    assert 0.08 < mean < 0.16  # a step about 10% larger: log2(1.1) is 0.138


@pytest.mark.parametrize(
    ("name", "range", "scale", "zero"),
    [
        ("int8_tensor", [127.0], 1.0, 0),
        ("int8_tensor", [128.0], 1.25, 0),
        ("int8_tensor_asym", [0.0, 255.0], 1.0, -128),
        ("int8_tensor_asym", [-100.0, 160.0], 1.25, -48),
        ("int8_tensor_asym", [-255.0, 0.0], 1.0, 127),
        ("int8_tensor_asym", [3.0, 255.0], 1.0, -128),  # a range holds zero
    ],
)
def test_ranges_by_hand(name: str, range: list[float], scale: float, zero: int) -> None:
    fmt = lookup(name)
    given = torch.tensor(range) if fmt.zero_point else torch.tensor(range[0])
    static = static_part(fmt, half.held_range(given, fmt))
    assert static is not None and static.tolist() == ([scale, zero] if fmt.zero_point else [scale])


def test_other_formats_and_rules_keep_their_range() -> None:
    amax = torch.tensor(2.9)
    assert half.held_range(amax, lookup("int8_token")) is amax
    assert held_range(amax, lookup("int8_tensor"), "ascend") is amax
    assert not torch.equal(held_range(amax, lookup("int8_tensor"), half.RULE), amax)


def test_nothing_is_left_nothing() -> None:
    for name, empty in (("int8_tensor", torch.tensor(0.0)), ("int8_tensor_asym", torch.zeros(2))):
        assert not half.held_range(empty, lookup(name)).any()


@pytest.mark.parametrize(
    ("name", "range", "message"),
    [
        ("int8_tensor", [70000.0], "beyond FP16, whose largest number is 65504"),
        ("int8_tensor_asym", [-70000.0, 1.0], "beyond FP16"),
        ("int8_tensor", [1e-3], "below FP16's normal numbers .*use int8_token"),
        ("int8_tensor_asym", [0.0, 1e-3], "below FP16's normal numbers"),
    ],
)
def test_ranges_beyond_fp16_are_refused(name: str, range: list[float], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        half.held_range(torch.tensor(range).squeeze(), lookup(name))


@pytest.mark.parametrize("name", STATIC)
def test_inputs_are_multiplied_by_a_reciprocal_in_fp16(name: str) -> None:
    fmt = lookup(name)
    amax = torch.tensor([-1.3, 2.9]) if fmt.zero_point else torch.tensor(2.9)
    static = static_part(fmt, half.held_range(amax, fmt))
    assert static is not None
    scale, offset = static[:1].half(), int(npu.offset_of(static))
    assert float(scale) == float(static[0]) and (offset != 0) == fmt.zero_point
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = torch.where(torch.isfinite(patterns), patterns, 0)[None].float()
    codes = torch.round(x * (1 / scale).float() + offset).clamp(-128, 127)  # 1 / scale in FP16, as at loading
    assert torch.equal(fake_quantize_input(x, fmt, half.RULE, "ste", static), (codes - offset) * scale.float())
    other = torch.round(x * (1 / scale.bfloat16()).float() + offset).clamp(-128, 127)
    assert not torch.equal(codes, other)  # so that the type of the reciprocal is seen


def test_integers_per_token_are_those_of_every_engine() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).half().float()
    args = (lookup("int8_token"), "ste", torch.tensor(1.0))
    ours, others = (dynamic_fake_quantize(x, args[0], rule, args[1], args[2]) for rule in (half.RULE, "vllm"))  # type: ignore[arg-type]  # an estimator
    assert torch.equal(ours, others)


@pytest.mark.parametrize("name", ["int4_token", "mxfp8", "fp8_token", "int4_tensor"])
def test_what_a_310p_has_no_operator_for(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"no operator for {name} inputs"):
        dynamic_fake_quantize(torch.ones(2, 64), lookup(name), half.RULE, "ste", torch.tensor(1.0))


def test_calibration_ends_in_such_ranges_and_names_what_has_none() -> None:
    rules = [{"match": "*mlp*", "weight": "int8_channel", "input": "int8_tensor_asym"}, {"match": "*", "skip": "rest"}]
    scheme = Scheme(rules=rules, learn="none", init=(), activation_rule=half.RULE, round_bf16=False)
    model = apply(build(), scheme)
    ids = torch.arange(32).remainder(60)[None]
    calibrate(model, [{"input_ids": ids}], scheme)
    found = [m.static() for m in model.modules() if getattr(m, "rule", "") == half.RULE]
    assert found and all(significant(float(each[0])) <= 3 for each in found)
    broken = apply(build(), scheme)
    with torch.no_grad():
        next(p for name, p in broken.named_parameters() if name.endswith("up_proj.weight")).mul_(1e6)
    with pytest.raises(FormatError, match=r"input of .*down_proj.*beyond FP16"):
        calibrate(broken, [{"input_ids": ids}], scheme)
