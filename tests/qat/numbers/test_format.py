"""What quantization is, as eight properties that hold for every format of the catalogue. Read this file first.

To quantize is to replace each number of a block by the nearest point of a small grid, and the grid by one scale:

    code  = encode(round(x / scale))          stored: a few bits per number, and one scale per block
    value = decode(code) * scale              what the served model multiplies with

Fake quantization computes `value` directly, so that training sees the numbers that will be served. The properties:

1. fake quantization equals storing and loading        5. zero stays zero, and a block of zeros is harmless
2. values lie on the stored grid                       6. negating the input negates the output
3. what is on the grid stays there                     7. a NaN spoils its own block, loudly, and no other
4. order within a block is kept                        8. the promised bits per weight are the bits stored
"""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat.errors import FormatError
from qat.init.scales import initial_scales
from qat.numbers.catalog import CATALOG
from qat.numbers.format import Format
from qat.numbers.numerics import Scales, fake_quantize, find_scales, quantize, to_blocks
from qat.numbers.scale import E8M0, F16, ScaleType, WholeScale


def with_formats(wanted: Callable[[Format], bool]) -> pytest.MarkDecorator:
    """Run a test once for each format that fits."""
    return pytest.mark.parametrize("fmt", [*filter(wanted, CATALOG.values())], ids=lambda fmt: fmt.name)


every_format = with_formats(lambda fmt: True)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers with a few outliers, as weights and activations have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.01, 20 * x, x)


def samples(fmt: Format) -> list[Tensor]:
    """Ordinary and awkward tensors; rows are odd, and 2-D blocks overhang."""
    width = 200 if fmt.block[0] > 1 else 2 * (fmt.super_block or fmt.group or 128)
    x = random(5, width)
    return [
        x,
        random(2, 3, width),  # three dimensions
        random(width),  # one row
        random(131, width) if fmt.block[0] > 1 else x[:1],  # more rows than a block
        (x * 4).round() / 4,  # full of ties
        x.sign(),  # one magnitude
        x.abs(),  # one sign
        torch.where(torch.arange(width) % 7 == 0, x, 0.0),  # mostly zeros
        x * 1e30,
        x * 1e-30,
        x * torch.logspace(-20, 20, width),  # no scale suits a whole block
    ]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, where NaN equals NaN (and -0 equals 0)."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@every_format
def test_1_fake_quantization_equals_storing_and_loading(fmt: Format) -> None:
    for x in samples(fmt):
        stored = quantize(x, fmt)
        assert same(fake_quantize(x, fmt), stored.dequantize())
        assert stored.codes.dtype == torch.uint8 and stored.shape == x.shape
        assert stored.scales.stored.dtype == fmt.scale.storage


@every_format
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_1_holds_for_any_shape_size_and_given_scales(fmt: Format, data: st.DataObject) -> None:
    unit = fmt.unit
    width = unit * data.draw(st.integers(1, 3 if unit > 1 else 300), label="width")
    leading = data.draw(st.lists(st.integers(1, 3), max_size=3), label="leading dimensions")
    exponent = data.draw(st.integers(-40, 40), label="exponent")
    x = random(*leading, width, seed=data.draw(st.integers(0, 99))) * 2.0**exponent
    other = find_scales(random(*leading, width, seed=100) * 2.0**exponent, fmt)
    for scales in (None, find_scales(x, fmt), other):  # the last belongs to different data: many values saturate
        assert same(fake_quantize(x, fmt, scales), quantize(x, fmt, scales).dequantize())


@every_format
def test_2_values_lie_on_the_stored_grid(fmt: Format) -> None:
    x = samples(fmt)[0]
    scales = quantize(x, fmt).scales
    values = to_blocks(fake_quantize(x, fmt), fmt)
    rows, columns = scales.stored.shape
    assert (rows, columns) == fmt.grid_shape(*x.shape)
    for row in range(rows):
        for column in range(columns):
            allowed = allowed_values(fmt, scales, row, column) * scales.effective()[row, column]
            if scales.minimum is not None:
                allowed -= scales.minimum.effective()[row, column]
            assert torch.isin(values[row, :, column, :], allowed).all()


def allowed_values(fmt: Format, scales: Scales, row: int, column: int) -> Tensor:
    """Element values that one block may take, before its scale."""
    if scales.zero_point is not None:
        codes = torch.tensor(fmt.element.values)  # asymmetric integers use the full two's-complement range
        return codes - scales.zero_point[row, column]
    chosen = 0 if scales.choice is None else int(scales.choice[row, column])
    return torch.tensor(fmt.elements[chosen].grid)


@every_format
def test_3_what_is_on_the_grid_stays_there(fmt: Format) -> None:
    for x in samples(fmt):
        scales = find_scales(x, fmt)
        once = fake_quantize(x, fmt, scales)
        assert same(fake_quantize(once, fmt, scales), once)
        assert same(quantize(once, fmt, scales).codes, quantize(x, fmt, scales).codes)


def uses_its_largest_number(fmt: Format) -> bool:
    """Whether a block's largest number stays the element's when its scale is rounded up by half a step."""
    rounded = fmt.element.max / (1 + 2.0**-fmt.scale.significant_bits)
    return fmt.scale is E8M0 or fmt.element.round(torch.tensor([rounded])).item() == fmt.element.max


@with_formats(lambda fmt: fmt.follows_amax and uses_its_largest_number(fmt))
def test_3_also_with_scales_found_again(fmt: Format) -> None:
    """Not so for a mean, for a range that was widened to whole steps, or under a coarse scale: they change when taken
    again."""
    x = samples(fmt)[0]
    once = fake_quantize(x, fmt)
    assert same(fake_quantize(once, fmt), once)


@every_format
def test_4_order_within_a_block_is_kept(fmt: Format) -> None:
    for x in samples(fmt)[:7]:
        before = to_blocks(x, fmt).permute(0, 2, 1, 3).flatten(2)
        after = to_blocks(fake_quantize(x, fmt), fmt).permute(0, 2, 1, 3).flatten(2)
        order = before.argsort(dim=-1)
        assert (after.gather(-1, order).diff(dim=-1) >= 0).all()


@every_format
def test_5_zero_stays_zero_and_zero_blocks_are_harmless(fmt: Format) -> None:
    for x in samples(fmt) if fmt.minimum is None else ():  # else one of its values may be near zero, none at it
        assert (fake_quantize(x, fmt)[x == 0] == 0).all()
    zeros = torch.zeros_like(samples(fmt)[0])
    stored = quantize(zeros, fmt)
    assert torch.equal(stored.dequantize(), zeros)
    assert (stored.scales.effective() > 0).all() and stored.scales.effective().isfinite().all()
    for start in ("amax", "auto"):
        assert torch.equal(fake_quantize(zeros, fmt, initial_scales(zeros, fmt, start)), zeros)


@with_formats(lambda fmt: not fmt.zero_point and fmt.element.low == -fmt.element.high and fmt.element.name != "nf4")
def test_6_negation_commutes(fmt: Format) -> None:
    for x in samples(fmt):
        assert same(fake_quantize(-x, fmt), -fake_quantize(x, fmt))


@every_format
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_7_a_nan_spoils_its_own_block_and_no_other(fmt: Format, bad: float) -> None:
    x = 1e6 * (random(131, 200) if fmt.block[0] > 1 else samples(fmt)[0])  # a size that needs its global scale
    x[1, 3] = bad
    blocks = to_blocks(x, fmt)
    spoiled = to_blocks(fake_quantize(x, fmt), fmt)
    block = torch.zeros(blocks.shape, dtype=torch.bool)
    row, _, column, _ = blocks.isfinite().logical_not().nonzero()[0]
    block[row, :, column, :] = True
    assert spoiled[block].isnan().all()
    clean = torch.where(block, 0.0, blocks)
    expected = fake_quantize(from_blocked(clean, x), fmt)
    assert torch.equal(spoiled[~block], to_blocks(expected, fmt)[~block])
    assert same(quantize(x, fmt).dequantize(), fake_quantize(x, fmt))
    given = find_scales(from_blocked(clean, x), fmt)  # scales that were made before the value went bad
    assert to_blocks(quantize(x, fmt, given).dequantize(), fmt)[block].isnan().all()


def from_blocked(blocked: Tensor, like: Tensor) -> Tensor:
    rows, columns = like.shape
    return blocked.flatten(2).flatten(0, 1)[:rows, :columns].clone()


def sizes(scale: ScaleType) -> range:
    """As many different scales as a type has bits for."""
    if isinstance(scale, WholeScale):  # S8 hides the choice of a mirrored element in its sign
        return range(64 if scale.largest < 64 else 256)
    return range(2 ** (scale.storage.itemsize * 8))


@every_format
def test_8_bits_per_weight_are_the_bits_stored(fmt: Format) -> None:
    for rows, columns in ((5, 256), (130, 384 if fmt.divides(384) else 512)):
        stored = quantize(random(rows, columns), fmt)
        scales = stored.scales
        bits = stored.codes.numel() * math.log2(len(fmt.element.values))
        bits += scales.stored.numel() * math.log2(len(sizes(fmt.scale)))
        if scales.minimum is not None and fmt.minimum is not None:
            bits += scales.minimum.stored.numel() * math.log2(len(sizes(fmt.minimum)))
        if scales.zero_point is not None:
            bits += scales.zero_point.numel() * math.log2(len(fmt.element.values))
        for each in filter(None, (scales, scales.minimum)) if fmt.super_block else ():
            assert each.global_scale is not None
            above = each.global_scale.view(rows, columns // fmt.super_block, -1)  # FP16, one for a super-block
            assert torch.equal(above.half().float(), above) and torch.equal(above, above[..., :1].expand_as(above))
            bits += 16 * above[..., 0].numel()
        if scales.global_scale is not None and not fmt.super_block:
            bits += scales.global_scale.element_size() * 8
        if scales.choice is not None:  # IF4 hides the choice in the sign bit that a positive scale does not need
            assert len(fmt.elements) == 2 and (scales.effective() > 0).all()
        assert fmt.bits_per_weight(rows, columns) == bits / (rows * columns)


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_input_dtype_is_computed_in_float32(fmt: Format, dtype: torch.dtype) -> None:
    x = samples(fmt)[0].to(dtype)
    assert same(fake_quantize(x, fmt), fake_quantize(x.float(), fmt))
    assert torch.equal(quantize(x, fmt).codes, quantize(x.float(), fmt).codes)
    assert same(quantize(x, fmt).dequantize(dtype), fake_quantize(x, fmt).to(dtype))


@every_format
def test_size_does_not_matter(fmt: Format) -> None:
    """Scaled by a power of two, every format gives the same numbers scaled, from 2^-90 to 2^90; with FP16 scales and
    nothing above them, only while those are normal numbers."""
    x = samples(fmt)[0]
    half = (fmt.scale is F16 and not fmt.global_scale) or fmt.super_block
    for exponent in (5 if fmt.super_block else -5, 14) if half else (-90, -30, 30, 90):
        factor = 2.0**exponent
        assert torch.equal(fake_quantize(x * factor, fmt), fake_quantize(x, fmt) * factor)


@every_format
def test_one_element_and_none(fmt: Format) -> None:
    width = fmt.unit
    one = torch.zeros(1, width)
    one[0, 0] = 0.7
    assert same(fake_quantize(one, fmt), quantize(one, fmt).dequantize())
    assert fake_quantize(one, fmt)[0, 0] == pytest.approx(0.7, rel=0.35) or fmt.scale_rule == "mean"
    for shape in ((0, 2 * width), (3, 0), (0,), (0, 4, width)):
        empty = torch.zeros(shape)
        assert fake_quantize(empty, fmt).shape == shape
        assert quantize(empty, fmt).dequantize().shape == shape


@every_format
def test_strided_inputs_give_contiguous_outputs(fmt: Format) -> None:
    x = samples(fmt)[0]
    strided = x.T.contiguous().T
    assert torch.equal(fake_quantize(strided, fmt), fake_quantize(x, fmt))
    assert fake_quantize(strided, fmt).is_contiguous() and quantize(strided, fmt).codes.is_contiguous()


@with_formats(lambda fmt: fmt.group is not None)
def test_a_group_that_does_not_divide_the_row_is_an_error(fmt: Format) -> None:
    assert fmt.group is not None
    what = f"super-blocks of {fmt.super_block}" if fmt.super_block else f"groups of {fmt.group}"
    for width in (fmt.unit - 1, fmt.unit + 1, fmt.unit + 8):
        for call in (fake_quantize, quantize, find_scales):
            with pytest.raises(FormatError, match=rf"{fmt.name}.*{what}.*width of {width}"):
                call(torch.ones(2, width), fmt)


@pytest.mark.parametrize(("width", "nearest"), [(576, 64), (96, 32), (80, 16), (384 + 64, 64)])
def test_the_error_names_the_nearest_group_that_works(width: int, nearest: int) -> None:
    with pytest.raises(FormatError, match=f"nearest group that divides {width} is {nearest},"):
        quantize(torch.ones(1, width), CATALOG["int4_g128"])


def test_the_error_says_when_no_group_works() -> None:
    with pytest.raises(FormatError, match=r"no group of 16 to 256 divides it, or use a channel scale"):
        quantize(torch.ones(1, 100), CATALOG["nvfp4"])


def test_a_number_without_dimensions_is_an_error() -> None:
    with pytest.raises(FormatError, match=r"shape \(1,\)"):
        quantize(torch.tensor(1.0), CATALOG["int8_tensor"])


def test_the_promised_names_are_in_the_catalogue() -> None:
    names = {
        f"int{b}_{s}{z}"
        for b in (8, 4, 3, 2)
        for s in ("tensor", "channel", "g32", "g64", "g128")
        for z in ("", "_asym")
    }
    names |= {f"int{b}_token" for b in (8, 4, 3, 2)} | {"ternary_channel", "ternary_g64"}
    names |= {"fp8_tensor", "fp8_channel", "fp8_token", "fp8_b128", "mxfp8", "mxfp6", "mxfp4", "mxint8", "mxint4"}
    names |= {"nvfp4", "nvint4", "nf4_g64", "if4", "q4_0", "q5_0", "q8_0", "q8_k", "q4_k", "q5_k", "q6_k"}
    assert names <= set(CATALOG)
    assert all(name == fmt.name for name, fmt in CATALOG.items())


def test_published_bits_per_weight() -> None:
    """4096 x 4096: MX and NV formats as their papers count them, the global scale's 32 bits aside."""
    expected = {
        "mxfp8": 8.25,
        "mxfp6": 6.25,
        "mxfp4": 4.25,
        "nvfp4": 4.5,
        "if4": 4.5,
        "int4_g128": 4.125,
        "nf4_g64": 4.25,
        "q4_0": 4.5,
        "q5_0": 5.5,
        "q8_0": 8.5,
        "q8_k": 8.125,
        "q4_k": 4.5,
        "q5_k": 5.5,
        "q6_k": 6.5625,
    }
    for name, bits in expected.items():
        assert CATALOG[name].bits_per_weight(4096, 4096) == pytest.approx(bits, abs=1e-5)


def test_a_format_is_data() -> None:
    changed = dataclasses.replace(CATALOG["mxfp4"], name="mxfp4_floor", scale_rule="floor")
    assert changed != CATALOG["mxfp4"] and hash(changed) != hash(CATALOG["mxfp4"])
