"""Panels: a permutation of codes and a renaming of scales, the ones that were meant, and undone on the way back."""

import pytest
import torch

from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import quantize
from qat.numbers.scale import UE4M3
from qat.serving import panels
from qat.serving.packed import PackedLinear, ordered, pack, reference, unpack
from qat.serving.packed import problem as packing_problem

TAKEN = ["int4_channel", "int4_g32", "int4_g64", "int4_g128", "int4_token", "mxfp4", "mxint4", "nvfp4", "nvint4"]
GENERATOR = torch.Generator().manual_seed(0)


def random_codes(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 16, (rows, columns), generator=GENERATOR, dtype=torch.uint8)


def test_which_weights_lie_in_panels() -> None:
    packed = [name for name, fmt in CATALOG.items() if packing_problem(fmt) is None]
    assert [name for name in packed if panels.problem(lookup(name), 128, 512) is None] == sorted(
        TAKEN, key=list(CATALOG).index
    )
    for name, rows, columns in (("nvfp4", 96, 512), ("nvfp4", 64, 384), ("mxfp4", 64, 192), ("nvfp4", 0, 256)):
        reason = panels.problem(lookup(name), rows, columns)
        assert reason is not None and reason.startswith(f"{rows} x {columns} is no whole number of panels of 64 rows")
    assert panels.problem(lookup("mxfp4"), 64, 384) is None  # tiles of 128 columns
    assert "zero points" in str(panels.problem(lookup("int4_g64_asym"), 64, 512))


@pytest.mark.parametrize("name", TAKEN)
def test_panels_lose_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "CHUNK", 1 << 15)  # three panels are moved one by one
    fmt, codes = lookup(name), random_codes(192, 512)
    words = panels.to_panels(codes, fmt)
    assert words.dtype == torch.int16 and words.shape == (3, 512 // panels.tile(fmt), 64, panels.part(fmt))
    assert panels.in_panels(words) and panels.rows_of(words) == 192 and panels.rows_of(codes) == 192
    assert torch.equal(panels.from_panels(words, fmt), codes)


def test_where_columns_lie() -> None:
    """By hand: row 65 is the second of the second panel, column 256 begins the second tile."""
    places = {(1, 1, 1, 0): (0, 64, 128, 192), (1, 1, 1, 63): (63, 127, 191, 255)}
    for name in ("int4_g128", "nvfp4"):
        fmt, zero = lookup(name), 0
        codes = torch.full((128, 512), 8 if fmt.element.is_integer else zero, dtype=torch.uint8)
        for columns in places.values():
            for code, column in zip((1, 2, 7, 4), columns, strict=True):
                codes[65, 256 + column] = code
        words = panels.to_panels(codes, fmt)
        for place in places:
            expected = 0x4721 ^ 0x8888 if fmt.element.is_integer else 1 << 6 | 2 << 3 | 7 | 1 << 13
            assert int(words[place]) & 0xFFFF == expected
        assert int((words != 0).sum()) == len(places)


def test_every_sign_and_magnitude_of_e2m1_is_a_shift_away() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(64, 16)
    words = panels.to_panels(codes, lookup("nvfp4")).to(torch.int32) & 0xFFFF
    columns = codes.view(1, 64, 1, 4, 64).permute(3, 0, 2, 1, 4)
    for shift, column in zip((0, 3, 6), columns, strict=False):
        bf16 = (words << shift & 0x81C0).to(torch.int16).view(torch.bfloat16).double() * 2.0**126
        assert torch.equal(bf16.float(), lookup("nvfp4").element.decode(column))


def test_scales_beside_their_words() -> None:
    """Every positive E4M3, subnormal ones too, from the byte as kernels make BF16 of it."""
    fmt = lookup("nvfp4")
    stored = torch.arange(1, 127, dtype=torch.uint8).repeat(17)[: 32 * 64].view(32, 64)  # two tiles of a panel
    beside = panels.scales_to_panels(stored, fmt)
    assert beside.shape == (1, 2, 64, 16)
    assert torch.equal(panels.scales_from_panels(beside, fmt), stored)
    value = fmt.scale.decode(UE4M3.from_bytes(stored.t().reshape(64, 2, 16).transpose(0, 1).contiguous()))
    for exponent in (0, 110):
        bits = (beside[0].to(torch.int16) << 4) + panels.wide_offset(exponent)
        assert torch.equal(bits.view(torch.bfloat16).double(), value.double() * 2.0**exponent)
    plain = torch.rand(4, 128, generator=GENERATOR).bfloat16()
    assert panels.scales_to_panels(plain, lookup("int4_g128")) is plain


@pytest.mark.parametrize("name", TAKEN)
def test_a_weight_goes_to_a_gpu_and_back(name: str) -> None:
    weight = quantize(torch.randn(128, 512, generator=GENERATOR), lookup(name))
    packed = pack(weight)
    there = ordered(packed, "cuda")
    assert panels.in_panels(there.words) and there.nbytes == packed.nbytes
    assert ordered(there, "cuda") == there and ordered(packed, "meta") == packed
    assert torch.equal(unpack(there).dequantize(), weight.dequantize())
    back = ordered(there, "cpu")
    assert torch.equal(back.words, packed.words) and torch.equal(back.scales, packed.scales)
    assert back.scales.stride() == packed.scales.stride()
    x = torch.randn(3, 512, generator=GENERATOR)
    asked, wanted = ((w.words, w.scales, None, None, w.global_scale, name) for w in (there, packed))
    assert torch.equal(reference(x, *asked), reference(x, *wanted))  # a CPU's kernel reads no panels
    layer = PackedLinear(there)
    assert layer.out_features == 128 and layer.double().words.dim() == 2  # a CPU's again
    assert torch.ops.qat.packed_linear(x.to("meta"), *(t.to("meta") for t in (there.words, there.scales)), None, None,
                                       1.0, name).shape == (3, 128)  # fmt: skip
