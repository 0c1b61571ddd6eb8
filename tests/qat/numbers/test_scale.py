"""Scale types: what each stores, and that a new one needs nothing but its object and the format that uses it."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from qat.errors import FormatError
from qat.init.scales import initial_scales
from qat.kernels.fake_quantize.choose import input_problem
from qat.kernels.packed_linear import choose as packed_choose
from qat.kernels.packed_linear.cpu import problem as cpu_problem
from qat.kernels.quantized_matmul import choose as matmul_choose
from qat.numbers import scale as numbers
from qat.numbers.catalog import CATALOG, E4M3, INT4, INT8, lookup, register
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales, fake_quantize, find_scales, quantize
from qat.numbers.scale import (
    BF16,
    E8M0,
    F16,
    F32,
    S8,
    U6,
    U6_MINIMUM,
    UE4M3,
    ScaleType,
    WholeScale,
    broken,
    select,
    type_of,
)
from qat.quantizer import WeightQuantizer
from qat.serving.inputs import problem as inputs_problem
from qat.serving.packed import pack, unpack

TYPES = tuple(value for value in vars(numbers).values() if isinstance(value, ScaleType))
every_type = pytest.mark.parametrize("scale", TYPES, ids=str)


@dataclass(frozen=True, eq=False)
class EighthsOfAnOctave(ScaleType):
    """The byte b is 2^((b - 128) / 8), 0 is NaN: a scale type that nobody has heard of."""

    def encode(self, scale: Tensor) -> Tensor:
        byte = (torch.log2(scale.clamp(self.smallest, self.largest)) * 8).round() + 128
        return byte.nan_to_num(0.0).to(torch.uint8)

    def decode(self, stored: Tensor) -> Tensor:
        value = torch.exp2((stored.to(torch.float32) - 128) / 8)
        return torch.where(stored == 0, torch.nan, value)


LOG8 = EighthsOfAnOctave("log8", torch.uint8, 24, 2.0 ** (-127 / 8), 2.0 ** (127 / 8), (-2, -1, 1, 2))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.fixture(params=["int8_g32_f16", "int4_g32_log8", "e4m3_g64_f16", "int4_g16_f16_global", "int4_g16_log8_global"])
def new_format(request: pytest.FixtureRequest) -> Iterator[Format]:
    """Formats that only the test's catalogue has, under scale types that no format of the project uses."""
    literals = [
        Format(name="int8_g32_f16", elements=(INT8,), block=(1, 32), scale=F16),
        Format(name="int4_g32_log8", elements=(INT4,), block=(1, 32), scale=LOG8),
        Format(name="e4m3_g64_f16", elements=(E4M3,), block=(1, 64), scale=F16),
        Format(name="int4_g16_f16_global", elements=(INT4,), block=(1, 16), scale=F16, global_scale=True),
        Format(name="int4_g16_log8_global", elements=(INT4,), block=(1, 16), scale=LOG8, global_scale=True),
    ]
    fmt = register(next(fmt for fmt in literals if fmt.name == request.param))
    yield fmt
    del CATALOG[fmt.name]


# --- the types ----------------------------------------------------------------------------------------------------


def test_f32_bf16_and_f16_are_their_dtypes() -> None:
    x = torch.rand(1000) * 10
    for scale, dtype in ((F32, torch.float32), (BF16, torch.bfloat16), (F16, torch.float16)):
        assert torch.equal(scale.store(x), x.to(dtype)) and scale.store(x).dtype == scale.storage
        assert torch.equal(scale.decode(scale.store(x)), x.to(dtype).float())


@every_type
def test_every_stored_number_decodes_to_itself(scale: ScaleType) -> None:
    if scale.storage.itemsize == 4:
        stored = torch.rand(1000)
    else:
        patterns = torch.arange(2 ** (8 * scale.storage.itemsize), dtype=torch.int32)
        stored = patterns.to(torch.int16 if scale.storage.itemsize == 2 else torch.uint8).view(scale.storage)
    values = scale.decode(stored)
    usable = (values >= scale.smallest) & (values <= scale.largest)
    assert usable.any()
    assert torch.equal(scale.decode(scale.store(values[usable])), values[usable])
    assert scale.decode(scale.store(torch.tensor([math.nan, math.inf, -math.inf]))).isnan().all()


@every_type
def test_the_smallest_stands_in_for_nothing(scale: ScaleType) -> None:
    tiny = scale.decode(scale.store(torch.zeros(3)))
    assert (tiny == scale.smallest).all() and (scale.smallest > 0 or scale is U6_MINIMUM)
    assert scale.decode(scale.store(torch.tensor([scale.largest]))).item() == scale.largest
    beyond = torch.tensor([min(4 * scale.largest, torch.finfo(torch.float32).max)])
    assert scale.decode(scale.store(beyond)).item() == scale.largest


@every_type
def test_significant_bits(scale: ScaleType) -> None:
    """Numbers of so many bits are exact, and the next one is not."""
    top = 2.0 ** (scale.significant_bits - 1)
    for value, exact in ((2 * top - 1, True), (2 * top + 1, False)):
        assert (scale.decode(scale.store(torch.tensor([value]))).item() == value) is exact or scale is F32


def test_whole_numbers_are_multiples_of_what_is_above_them() -> None:
    x, above = torch.tensor([0.0, 0.2, 0.4, 1.26, 31.4, 40.0, math.inf, math.nan]), torch.full((8,), 0.5)
    expected = {
        U6: [1, 1, 1, 3, 63, 63, 255, 255],
        U6_MINIMUM: [0, 0, 1, 3, 63, 63, 255, 255],
        S8: [1, 1, 1, 3, 63, 80, 255, 255],
    }
    for scale, codes in expected.items():
        stored = scale.store(x, above)
        assert stored.tolist() == codes
        values = Scales(stored, above, type=scale).effective()
        assert same(values, torch.tensor([math.nan if code == 255 else code / 2 for code in codes]))
    assert (U6.bits, U6_MINIMUM.bits, S8.bits, F16.bits, E8M0.bits) == (6, 6, 8, 16, 8)


@pytest.mark.parametrize("scale", [scale for scale in TYPES if not isinstance(scale, WholeScale)], ids=str)
def test_a_global_scale_divides_what_is_stored(scale: ScaleType) -> None:
    x = 2.0 ** torch.arange(-6, 6).float()
    above = torch.tensor(4.0)
    assert torch.equal(Scales(scale.store(x, above), above, type=scale).effective(), x)
    assert torch.equal(scale.store(x, above).float(), scale.store(x / 4).float())


@pytest.mark.parametrize(("scale", "reach"), [(UE4M3, 8), (E8M0, 2)], ids=str)
def test_neighbours_are_the_next_numbers_and_saturate(scale: ScaleType, reach: int) -> None:
    stored = scale.store(torch.tensor([1.0, scale.smallest, scale.largest]))
    rows = torch.stack([scale.decode(candidate) for candidate in scale.neighbours(stored)])
    assert len(rows) == len(scale.sweep) and -min(scale.sweep) == reach
    assert (rows[:, 0].diff() > 0).all() and 1.0 in rows[:, 0]
    assert rows[:, 1].min() == scale.smallest and rows[:, 2].max() == scale.largest and rows.isfinite().all()


def test_types_without_neighbours_are_not_swept() -> None:
    assert not any(scale.sweep for scale in (F32, BF16, F16))
    with pytest.raises(FormatError, match="stores bf16 scales, too many to sweep"):
        initial_scales(normal(2, 64), lookup("int4_g64"), "sweep")


@every_type
def test_bytes_are_the_stored_bits(scale: ScaleType) -> None:
    stored = scale.store(torch.rand(4, 6) + 0.1)
    raw = scale.to_bytes(stored)
    assert raw.dtype == (torch.uint8 if scale.is_bytes else scale.storage)
    assert torch.equal(scale.from_bytes(raw).float(), stored.float()) and scale.from_bytes(raw).dtype == stored.dtype


@every_type
def test_spoiled_scales_are_nan_and_broken(scale: ScaleType) -> None:
    stored = scale.store(torch.rand(4) + 0.6)
    bad = scale.spoil(stored, torch.tensor([True, False, False, True]))
    assert scale.decode(bad).isnan().tolist() == [True, False, False, True]
    assert broken(bad, scale) == broken(bad) == 2 and broken(stored) == 0
    assert torch.equal(scale.decode(select(torch.tensor([True, True, False, False]), stored, bad))[:2],
                       scale.decode(stored)[:2])  # fmt: skip


def test_broken_scales_are_counted() -> None:
    assert broken(torch.tensor([1.0, 0.0, -1.0, math.nan, math.inf])) == 4
    assert broken(torch.tensor([0, 254, 255], dtype=torch.uint8)) == 1  # E8M0's byte 0 is 2^-127


@every_type
def test_copies_are_the_same_object(scale: ScaleType) -> None:
    fmt = Format(name="x", elements=(INT4,), block=(1, 32), scale=scale)
    assert copy.deepcopy(fmt).scale is scale and vars(numbers)[scale.__reduce__()] is scale
    assert copy.deepcopy(LOG8) is LOG8 and str(scale) == scale.name
    assert type_of(scale.store(torch.ones(1))) is scale or isinstance(scale, WholeScale)  # whose bytes say nothing


# --- a new one ----------------------------------------------------------------------------------------------------


def test_a_new_type_stores_and_loads(new_format: Format) -> None:
    for x in (normal(5, 128), normal(5, 128) * 1e-3, normal(2, 3, 64).bfloat16()):
        stored = quantize(x, new_format)
        assert stored.scales.stored.dtype == new_format.scale.storage
        assert same(fake_quantize(x, new_format), stored.dequantize())
        bare = Scales(stored.scales.stored, stored.scales.global_scale)  # as a file's reader makes them
        assert same(QTensor(new_format, stored.codes, bare).dequantize(), stored.dequantize())
        assert same(fake_quantize(x, new_format, bare), stored.dequantize())
    error = (fake_quantize(normal(64, 128), new_format) - normal(64, 128)).square().mean()
    assert error < 0.02
    spoiled = normal(5, 128)
    spoiled[1, 3] = math.nan
    assert fake_quantize(spoiled, new_format, find_scales(normal(5, 128), new_format))[1, :16].isnan().all()


def test_a_new_type_is_initialised(new_format: Format) -> None:
    x = normal(16, 128)
    errors = [
        (fake_quantize(x, new_format, initial_scales(x, new_format, start)) - x).square().sum()
        for start in ("amax", "auto", "mse")
    ]
    assert errors[1] <= errors[0] and errors[2] <= errors[0]
    if new_format.scale.sweep:
        swept = initial_scales(x, new_format, "sweep")
        assert torch.equal(swept.effective(), initial_scales(x, new_format, "auto").effective())


def test_a_new_type_is_learned(new_format: Format) -> None:
    weight = normal(8, 128).requires_grad_()
    quantizer = WeightQuantizer(new_format, initial_scales(weight, new_format), "lsq", round_bf16=False)
    assert quantizer.log_scale is not None
    optimizer = torch.optim.SGD([quantizer.log_scale], lr=1e-2)
    before = quantizer.scales().effective()
    for _ in range(3):
        (quantizer(weight) - weight.detach() * 0.5).square().sum().backward()
        assert weight.grad is not None and quantizer.log_scale.grad is not None
        assert quantizer.log_scale.grad.abs().sum() > 0
        optimizer.step()
    assert not torch.equal(quantizer.scales().effective(), before)
    assert same(quantizer(weight).detach(), quantizer.quantize(weight).dequantize())


def test_a_new_type_is_packed_and_refused_by_kernels_that_do_not_know_it(new_format: Format) -> None:
    q = quantize(normal(8, 128), new_format)
    packed = pack(q)
    assert same(unpack(packed).dequantize(), q.dequantize()) and unpack(packed).scales.type is new_format.scale
    known = new_format.scale is F16  # only because a float is a float
    int8 = lookup("int8_token")
    assert (packed_choose.problem(new_format) is None) == (matmul_choose.problem(int8, new_format) is None) == known
    assert str(new_format.scale) in str(input_problem(new_format))
    assert "are for weights" in str(inputs_problem(new_format))
    reason = cpu_problem(new_format)
    # A byte has a table, and FP16 becomes float32; other two bytes would pass for BF16.
    assert (reason is None) == (new_format.scale.is_bytes or new_format.scale is F16)
    x = normal(3, 128)
    y = torch.ops.qat.packed_linear(x, packed.words, packed.scales, None, None, packed.global_scale, new_format.name)
    assert torch.allclose(y, x @ q.dequantize().t(), atol=1e-4)


# --- several global scales ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nvfp4", "nvint4", "if4"])
def test_a_stack_has_a_global_scale_per_member(name: str) -> None:
    """Experts, flattened to rows: one global scale each, expanded to (block rows, 1)."""
    fmt, parts = lookup(name), [normal(4, 64, seed=n) * 100.0**n for n in range(3)]
    alone = [find_scales(part, fmt) for part in parts]
    above = torch.stack([scales.global_scale for scales in alone if scales.global_scale is not None])
    column = above.repeat_interleave(4)[:, None]
    assert column.unique().numel() > 1
    together = torch.cat(parts)
    for start in ("amax", "auto", "mse"):
        scales = initial_scales(together, fmt, start, column)
        single = [initial_scales(part, fmt, start, one) for part, one in zip(parts, above, strict=True)]
        assert torch.equal(scales.effective(), torch.cat([each.effective() for each in single]))
        values = torch.cat([fake_quantize(part, fmt, each) for part, each in zip(parts, single, strict=True)])
        assert torch.equal(fake_quantize(together, fmt, scales), values)
        assert torch.equal(quantize(together, fmt, scales).dequantize(), values)
    again = fmt.scale.store(scales.effective(), column)
    assert torch.equal(again.float(), scales.stored.float())
    quantizer = WeightQuantizer(fmt, scales, "lsq", round_bf16=False)
    assert torch.equal(quantizer(together), values)
    assert quantize(together, fmt, scales).parameters["global_scale"] is column


def test_parameters_by_name() -> None:
    x = normal(4, 64)
    names = {"int4_g64": {"scale"}, "int4_g64_asym": {"scale", "zero_point"}, "nvfp4": {"scale", "global_scale"},
             "if4": {"scale", "global_scale", "choice"}}  # fmt: skip
    for name, expected in names.items():
        assert quantize(x, lookup(name)).parameters.keys() == expected
    q = quantize(x, lookup("nvfp4"))
    assert replace(q, codes=q.codes).scales.type is UE4M3
