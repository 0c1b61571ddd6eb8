"""Run by test_quantized_matmul.py under TRITON_INTERPRET=1: the kernels' source, executed on the CPU, against float64.

The interpreter takes most of its time per operator, not per number: tiles are large and widths small.
"""

import dataclasses
import itertools
import sys

import torch

from qat.kernels.quantized_matmul import choose as rules
from qat.kernels.quantized_matmul import triton as kernel
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales, quantize
from qat.serving.inputs import code_dtype, dequantize_input, is_paired
from qat.serving.matmul import MatmulWeight, hold, problem
from tests.kernels.interpreted import mend

GENERATOR = torch.Generator().manual_seed(0)
HOPPER, AMPERE = (rules.Device(capability, processors=1, shared=2**17) for capability in (90, 80))
# Inputs and weights, every way through the kernel.
PAIRS = (
    ("int8_token", "int8_channel"),
    ("int8_tensor", "int8_tensor"),
    ("int8_token", "int4_g32"),
    ("int8_token", "int4_g128"),
    ("int8_token", "int4_channel"),
    ("int8_token", "int2_g64"),
    ("int4_token", "int4_g64"),
    ("mxint8", "mxint4"),
    ("fp8_token", "fp8_channel"),
    ("fp8_tensor", "fp8_b128"),
    ("fp8_g128", "fp8_b128"),
    ("fp8_token", "int4_g64"),
    ("fp8_g128", "int4_channel"),
    ("fp8_token", "mxfp4"),
    ("int4_token", "mxfp4"),
    ("mxfp8", "mxfp8"),
    ("mxfp8", "mxfp4"),
    ("mxfp4", "mxfp4"),
    ("mxfp4", "fp8_channel"),
    ("int8_token", "mxfp4"),
    ("nvfp4", "nvfp4"),
    ("fp8_token", "nvfp4"),
    ("nvfp4", "fp8_channel"),
    ("nvint4", "nvint4"),
)


@dataclasses.dataclass
class Input:
    """A quantized input as `qat::quantize_input` returns it, and the constant of its layer."""

    fmt: Format
    codes: torch.Tensor
    scales: torch.Tensor
    constant: float = 1.0

    def double(self) -> torch.Tensor:
        return dequantize_input(self.codes, self.scales, None, self.fmt.name).double() * self.constant

    def rows(self, chosen: slice) -> "Input":
        scales = self.scales if self.fmt.block == (0, 0) else self.scales[chosen]
        return dataclasses.replace(self, codes=self.codes[chosen], scales=scales)


def quantized_input(x: QTensor) -> Input:
    fmt, patterns, stored = x.format, x.codes, x.scales.stored
    if is_paired(fmt):
        codes = patterns[:, 0::2] | (patterns[:, 1::2] << 4)
    elif fmt.element.bits == 8:
        codes = patterns.view(code_dtype(fmt.element))
    else:
        codes = fmt.element.decode(patterns).to(torch.int8)
    scales = fmt.scale.to_bytes(stored)
    if fmt.block == (0, 0):
        scales = stored.float().view(1)
    return Input(fmt, codes, scales, 1.0 if x.scales.global_scale is None else float(x.scales.global_scale))


def run(x: Input, weight: MatmulWeight, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.float32,
        device: rules.Device = HOPPER, **changed: object) -> torch.Tensor:  # fmt: skip
    """The kernel with small tiles; `changed` are fields of `Tiles`."""

    def choose(tokens: int, rows: int, columns: int, x_format: Format, w_format: Format, _: object) -> rules.Tiles:
        tiles = rules.choose(tokens, rows, columns, x_format, w_format, device)
        small = {"block_n": 64, "block_m": 64, "segments": 1, "parallel": False}
        return dataclasses.replace(tiles, **{**small, **changed})  # type: ignore[arg-type]  # fields of several types

    kernel.choose = choose
    return kernel.quantized_matmul(
        x.codes, x.scales, weight.codes, weight.scales, bias, weight.global_scale * x.constant, x.fmt.name,
        weight.format, weight.columns, dtype,
    )  # fmt: skip


def every_code(fmt: Format, rows: int, columns: int) -> QTensor:
    """Every code under many scales, scattered over the columns, except the code that rounding never returns."""
    patterns = torch.arange(2**fmt.element.bits, dtype=torch.uint8)
    patterns = patterns[fmt.element.decode(patterns).abs() <= fmt.element.max]
    codes = patterns[(torch.arange(columns)[None, :] + 37 * torch.arange(rows)[:, None]) % len(patterns)]
    return QTensor(fmt, codes, quantize(normal(rows, columns), fmt).scales)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def one_hot(columns: int, picked: range) -> Input:
    """Rows that pick a column of the weight, exactly 1 in the widest row format of integers."""
    codes = torch.zeros(len(picked), columns, dtype=torch.int8)
    codes[torch.arange(len(picked)), torch.tensor(picked)] = 1
    return Input(lookup("int8_token"), codes, torch.ones(len(picked), 1))


def codes_are_exact() -> None:
    """One-hot inputs pick every weight and one-hot weights every input: exactly, whatever the operands are."""
    picked = range(0, 128, 3)
    eye = torch.eye(128)[picked]
    ones = torch.ones(len(picked), 1)
    hot = (Input(lookup("int8_token"), eye.to(torch.int8), ones),
           Input(lookup("fp8_token"), eye.to(torch.float8_e4m3fn), ones))  # fmt: skip
    whole = hold(QTensor(lookup("int8_channel"), eye.to(torch.uint8), Scales(ones.bfloat16())))
    for name, fmt in CATALOG.items():
        for x in hot:
            if problem(x.fmt, fmt) is None:
                weight = every_code(fmt, 16, 128)
                for device in devices(x.fmt, fmt):
                    found = run(x, hold(weight), device=device)
                    assert torch.equal(found, weight.dequantize().T[picked]), f"{x.fmt.name} x {name} {device}"
        if problem(fmt, lookup(whole.format)) is None:
            x = quantized_input(every_code(fmt, 16, 128))
            assert torch.equal(run(x, whole).double(), x.double()[:, picked]), f"{name} inputs"


def devices(x: Format, w: Format) -> list[rules.Device]:
    """Those on which the operands differ."""
    same = rules.operand(x, w, HOPPER.capability) == rules.operand(x, w, AMPERE.capability)
    return [HOPPER] if same else [HOPPER, AMPERE]


def products_are_sums(x_name: str, w_name: str) -> None:
    """Against float64, whole and cut into segments, with tails in every direction."""
    x_format, w_format = lookup(x_name), lookup(w_name)
    # The first widths end inside a tile.
    columns = next(width for width in (170, 176, 192, 256) if x_format.divides(width) and w_format.divides(width))
    weight, bias = quantize(normal(40, columns), w_format), normal(40)
    values = normal(17, columns)
    values[2, 3], values[1] = 1e4, 0.0
    x, held = quantized_input(quantize(values, x_format)), hold(weight)
    dense, exact_x = weight.dequantize().double(), x.double()
    exact, size = exact_x @ dense.T + bias, exact_x.abs() @ dense.abs().T + bias.abs()
    for device in devices(x_format, w_format):
        what = f"{x_name} x {w_name} {device.capability}"
        found = run(x, held, bias, device=device)
        cut = [run(x, held, bias, device=device, segments=2, parallel=parallel) for parallel in (True, False)]
        for y in (found, cut[0]):
            worst = ((y - exact).abs() / (2.0**-20 * size)).max()
            assert worst <= 1.0, f"{what}: {worst} of the bound"
        assert torch.equal(*cut), f"{what}: segments side by side and in turn differ"
        alone = run(x.rows(slice(0, 1)), held, bias, device=device)
        assert torch.equal(alone, found[:1]), f"{what}: the batch changes a row"


def integers_are_exact() -> None:
    """Integer codes under scales of 1 give the integers that integer arithmetic gives, and are rounded once."""
    for x_name, w_name in itertools.product(("int8_token", "int4_token"), ("int8_channel", "int4_channel", "int4_g32")):
        fmt = lookup(w_name)
        weight, x = every_code(fmt, 33, 160), quantized_input(every_code(lookup(x_name), 19, 160))
        ones = hold(QTensor(fmt, weight.codes, Scales(torch.ones_like(weight.scales.stored))))
        x.scales = torch.ones_like(x.scales)
        exact = x.codes.long() @ fmt.element.decode(weight.codes).long().T
        for changed in ({"block_n": 16, "block_m": 16}, {"segments": 2, "parallel": True}):
            assert torch.equal(run(x, ones, **changed).long(), exact), f"{x_name} x {w_name}"
        x.scales = x.scales / 512
        assert torch.equal(run(x, ones, dtype=torch.float16), (exact / 512).half()), f"{x_name} x {w_name}: rounding"


def bad_rows_stay_alone() -> None:
    """A NaN scale, a NaN code or a huge scale ruins its own row only."""
    for x_name, w_name in (("int8_token", "int4_g128"), ("fp8_g128", "fp8_b128"), ("mxfp4", "mxfp4"),
                           ("nvfp4", "nvfp4")):  # fmt: skip
        x = quantized_input(quantize(normal(5, 256), lookup(x_name)))
        x.scales = x.scales.clone()
        x.scales[1, 0] = {"e8m0": 255, "e4m3": 0x7F, "f32": torch.nan}[x.fmt.scale.name]
        found = run(x, hold(quantize(normal(20, 256), lookup(w_name))))
        assert found[1].isnan().all() and found[[0, 2, 3, 4]].isfinite().all(), f"{x_name} x {w_name}"
    x = quantized_input(quantize(normal(3, 128), lookup("fp8_token")))
    x.codes.view(torch.uint8)[2, 7] = 0xFF
    found = run(x, hold(quantize(normal(20, 128), lookup("fp8_channel"))), device=AMPERE)
    assert found[2].isnan().all() and found[:2].isfinite().all()


def odd_shapes() -> None:
    """Nothing, one token of one dimension, strides, narrow rows."""
    held = hold(quantize(normal(8, 64), lookup("int4_g32")))
    empty = Input(lookup("int8_token"), torch.zeros(0, 64, dtype=torch.int8), torch.zeros(0, 1))
    assert run(empty, held).shape == (0, 8)
    for x_name, w_name, columns in (("nvfp4", "nvfp4", 16), ("mxfp4", "mxfp4", 32), ("fp8_g128", "fp8_b128", 128)):
        x = quantized_input(quantize(normal(3, columns), lookup(x_name)))
        weight = quantize(normal(9, columns), lookup(w_name))
        expected = x.double() @ weight.dequantize().double().T
        torch.testing.assert_close(run(x, hold(weight)).double(), expected, atol=1e-5, rtol=1e-5)
    x = quantized_input(quantize(normal(6, 64), lookup("int8_token")))
    whole = run(x, held)
    wide = torch.empty(6, 128, dtype=torch.int8)[:, ::2].copy_(x.codes)
    assert torch.equal(run(dataclasses.replace(x, codes=wide), held), whole)
    assert torch.equal(run(Input(x.fmt, x.codes.view(2, 3, 64), x.scales.view(2, 3, 1)), held), whole.view(2, 3, 8))
    assert torch.equal(run(Input(x.fmt, x.codes[4], x.scales[4]), held), whole[4])
    assert torch.equal(run(x, held, block_n=16, block_m=32), whole)


def block_scaled_units() -> None:
    """The kernel for units that multiply block scales themselves, with a `tl.dot_scaled` of our own."""
    kernel.device_of = lambda _: rules.Device(100, processors=1, shared=2**17)
    for x_name, w_name in (("mxfp4", "mxfp4"), ("mxfp8", "mxfp8"), ("mxfp8", "mxfp4"), ("nvfp4", "nvfp4")):
        x = quantized_input(quantize(normal(70, 384), lookup(x_name)))
        weight = quantize(normal(140, 384), lookup(w_name))
        assert rules.block_scaled_problem(lookup(x_name), lookup(w_name), 384, 100) is None
        dense, bias = weight.dequantize().double(), normal(140)
        exact, size = x.double() @ dense.T + bias, x.double().abs() @ dense.abs().T + bias.abs()
        worst = ((run(x, hold(weight), bias) - exact).abs() / (2.0**-20 * size)).max()
        assert worst <= 1.0, f"{x_name} x {w_name} block-scaled: {worst} of the bound"


def main() -> None:
    mend()
    codes_are_exact()
    for pair in PAIRS:
        products_are_sums(*pair)
    integers_are_exact()
    bad_rows_stay_alone()
    odd_shapes()
    block_scaled_units()
    print("all equal")


if __name__ == "__main__":
    sys.exit(main())
