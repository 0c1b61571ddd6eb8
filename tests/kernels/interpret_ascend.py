"""Run by test_npu.py under TRITON_INTERPRET=1: the kernels for Ascend NPUs, executed on the CPU, against the reference,
in FP16 and FP32 (Triton's interpreter is wrong in BF16). Every code under every scale also with subnormals flushed."""

import itertools
import sys

import torch
import triton
import triton.language as tl

from qat.kernels.packed_linear import ascend as linear
from qat.kernels.packed_linear.decode.ascend import e2m1, times_scale
from qat.kernels.quantize_input import ascend as quantizer
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import quantize
from qat.serving import inputs
from qat.serving.packed import pack, reference
from tests.kernels.interpreted import mend

GENERATOR = torch.Generator().manual_seed(0)
FORMATS = [name for name, fmt in CATALOG.items() if linear.problem(fmt) is None]
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP MX 1.0


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


@triton.jit
def products(
    codes, scales, out, SCALE: tl.constexpr, SUBNORMALS: tl.constexpr, CODES: tl.constexpr, SIZE: tl.constexpr
):
    code = tl.load(codes + tl.arange(0, CODES)).to(tl.int32)
    stored = tl.load(scales + tl.arange(0, SIZE))
    at = out + tl.arange(0, CODES)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(at, times_scale(e2m1(code, SUBNORMALS)[:, None], stored[None, :], SCALE))


def every_code_and_scale() -> None:
    codes, scales = torch.arange(16, dtype=torch.int8), torch.arange(256, dtype=torch.int16).to(torch.int8)
    values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], dtype=torch.float64)[:, None]
    bytes_ = torch.arange(256, dtype=torch.uint8)
    truth = {
        "e8m0": values * torch.exp2(bytes_.to(torch.float64) - 127),
        "e4m3": values * bytes_.view(torch.float8_e4m3fn).to(torch.float64),
    }
    allowed = {"e8m0": slice(0, 255), "e4m3": slice(0, 127)}  # no NaN, no sign
    for name, keeps, flush in itertools.product(truth, (False, True), (False, True)):
        out = torch.full((16, 256), torch.nan)
        torch.set_flush_denormal(flush)
        products[(1,)](codes, scales, out, name, keeps, 16, 256)
        torch.set_flush_denormal(False)
        expected = truth[name].to(torch.float32)
        if flush:
            expected = torch.where(expected.abs() < 2.0**-126, expected * 0, expected)
            if keeps:  # what the other way is for
                expected = torch.where(values.abs() == 0.5, expected * 0, expected)
        part = allowed[name]
        assert torch.equal(out[:, part], expected[:, part]), f"{name} keeps={keeps} flush={flush}"


def products_of_layers() -> None:
    sizes = ((torch.float16, 130, 640, 17), (torch.float32, 70, 256, 3))
    for name in FORMATS:
        fmt = lookup(name)
        for dtype, rows, columns, tokens in sizes:
            weight = pack(quantize(normal(rows, columns), fmt))
            x, bias = normal(tokens, columns).to(dtype), normal(rows).to(dtype)
            given = (weight.words, weight.scales, None, bias, weight.global_scale, name)
            found, expected = linear.packed_linear(x, *given), reference(x.double().float(), *given)
            bound = 2.0**-9 if dtype == torch.float16 else 2.0**-18
            error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
            assert found.dtype == dtype and error < bound, f"{name} {dtype} {rows} x {columns}: {error}"
    assert linear.packed_linear(normal(0, 256), *given).shape == (0, rows)


def adversarial(columns: int) -> torch.Tensor:
    x = normal(12, columns) * torch.exp2(torch.arange(-6, 6.0))[:, None]
    x[0, 3], x[1, 5], x[2, 7], x[3, -1] = 1e4, torch.nan, torch.inf, -torch.inf
    x[4], x[5] = 0, torch.randint(-255, 256, (columns,), generator=GENERATOR) / 2
    x[6] *= 2.0**-15
    return x


def inputs_of_layers() -> None:
    for name in ("int8_token", "int4_token"):
        assert quantizer.problem(lookup(name)) is None
        for x in (adversarial(96), adversarial(1500).half(), normal(1, 2048), normal(2, 3, 64), normal(5, 200)[:, ::2]):
            found, expected = quantizer.quantize_input(x, None, name), inputs.reference(x, None, name)
            assert torch.equal(found[0], expected[0]), f"{name} {tuple(x.shape)}: other codes"
            assert torch.equal(found[1].nan_to_num(-1), expected[1].nan_to_num(-1)), f"{name}: other scales"
    other = quantizer.quantize_input(normal(4, 64), None, "mxfp4")
    assert other[0].dtype == torch.uint8 and quantizer.quantize_input(normal(0, 8), None, "int8_token")[0].shape == (
        0,
        8,
    )


def main() -> None:
    mend()
    every_code_and_scale()
    inputs_of_layers()
    products_of_layers()
    print("all equal:", " ".join(FORMATS))


if __name__ == "__main__":
    sys.exit(main())
