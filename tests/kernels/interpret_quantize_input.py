"""Run by test_quantize_input.py under TRITON_INTERPRET=1: the kernel's source, executed on the CPU, against the
reference. Codes and scales are equal, bit for bit; behind a norm or an activation, equal but for rare neighbours."""

import itertools
import sys

import torch
import triton
import triton.language as tl

from qat.kernels.quantize_input import choose
from qat.kernels.quantize_input import triton as kernel
from qat.kernels.quantize_input.codes import triton as codes
from qat.numbers.catalog import CATALOG, lookup
from qat.serving.inputs import QuantizedInput, problem
from qat.training.activations import static_part
from tests.kernels.interpreted import mend

NAMES = [name for name, fmt in CATALOG.items() if problem(fmt) is None]
SHARED = ("int8_token", "int4_token", "fp8_token", "fp8_g128", "fp8_tensor", "nvfp4", "mxfp4", "mxfp8")
GENERATOR = torch.Generator().manual_seed(0)
ops = torch.ops.qat


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def static_of(name: str, amax: float = 3.0) -> torch.Tensor | None:
    return static_part(lookup(name), torch.tensor(amax))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, any NaN being as good as another."""
    if a.dtype == torch.float32:
        return a.shape == b.shape and torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check(what: str, name: str, x: torch.Tensor, static: torch.Tensor | None) -> None:
    found, expected = kernel.quantize_input(x, static, name), ops.quantize_input(x, static, name)
    for part, a, b in zip(QuantizedInput._fields, found, expected, strict=True):
        assert same(a, b), f"{name} {what} {tuple(x.shape)} {x.dtype}: other {part}"


def adversarial(columns: int) -> torch.Tensor:
    """Rows of all sizes, with an outlier, a NaN, infinities, zeros, subnormals, ties, and what overflows a quotient."""
    x = normal(16, columns) * torch.exp2(torch.arange(-8, 8.0))[:, None]
    x[0, 3] = 1e4
    x[1, 5], x[2, 7], x[3, -1] = torch.nan, torch.inf, -torch.inf
    x[4], x[5, : columns // 2] = 0, 0
    x[6] *= 2.0**-120
    x[7] *= 2.0**-140
    x[8] *= 2.0**-15
    x[9] = torch.randint(-24, 25, (columns,), generator=GENERATOR) / 4
    x[10] = torch.randint(-255, 256, (columns,), generator=GENERATOR) / 2
    x[11], x[12, 0] = 3e-45, 3e38
    x[13, ::2] = -0.0
    x[14] = torch.exp2(torch.randint(-24, 16, (columns,), generator=GENERATOR).float()) * 1.75
    return x


def every_half() -> torch.Tensor:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return torch.where(torch.isfinite(values), values, 0).view(64, 1024)


def quantizers() -> None:
    tile, choose.TILE = choose.TILE, 1 << 15  # few programs: each costs the interpreter the same
    for name, dtype in itertools.product(NAMES, (torch.float32, torch.float16)):
        for amax in (3.0, 1e-3) if static_of(name) is not None else (3.0,):
            width = 384 if lookup(name).divides(384) else 512
            check("adversarial", name, adversarial(width).to(dtype), static_of(name, amax))
        check("every half", name, every_half().to(dtype), static_of(name))
    choose.TILE = tile
    for name in SHARED:
        check("sorted", name, every_half().flatten().sort()[0].view(64, 1024), static_of(name))
        static = static_of(name)
        check("one column", name, normal(3, 1), static) if lookup(name).divides(1) else None
        check("one row", name, normal(1, 640), static)
        check("no row", name, normal(0, 640), static)
        check("one dimension", name, normal(128), static)
        check("four dimensions", name, normal(2, 3, 1, 128).half(), static)
        check("rows apart", name, normal(5, 1024)[:, 256:640], static)
        check("columns apart", name, normal(5, 768)[:, ::2], static)
        check("wide", name, normal(2, 2048 + 128).half(), static)
        check("float64", name, normal(2, 128).double(), static)
    check("long scale", "int8_tensor", every_half(), torch.tensor([0.25 + 2.0**-11]))  # a server stores it in BF16
    ties = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]).repeat(2)
    for divisor in 100 + 900 * torch.rand(8, 1, generator=GENERATOR):  # of another tool: no power of two
        x = ties * (448 * divisor.reciprocal())
        check("divisor", "nvfp4", x.view(1, 16), divisor)
        check("divisor", "nvfp4", adversarial(384).half(), divisor)


def steps() -> None:
    """Rows that no program can hold are walked."""
    choose.WIDEST, choose.STEP = 256, 128
    for name in ("int8_token", "fp8_token", "int4_token"):
        for dtype in (torch.float32, torch.float16):
            check("walked", name, adversarial(720).to(dtype), None)
    for name in SHARED:
        norms(name, torch.float16, 640)
        activations(name, torch.float32, 640)


def ordered(codes: torch.Tensor, name: str) -> torch.Tensor:
    """Codes as integers, neighbouring values one apart."""
    element = lookup(name).element
    if codes.dtype == torch.int8:
        return codes.int()
    raw = codes.view(torch.uint8).int()
    if element.bits == 4:
        raw = torch.stack((raw & 15, raw >> 4), dim=-1).flatten(-2)
    half = 2 ** (element.bits - 1)
    return torch.where(raw >= half, half - raw, raw)


def close(what: str, name: str, found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    apart = (ordered(found[0], name) - ordered(expected[0], name)).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3, (
        f"{name} {what}: {apart.max()} {apart.float().mean()}"
    )
    if found[1].dtype == torch.uint8:
        assert same(found[1], expected[1]), f"{name} {what}: other scales"
    torch.testing.assert_close(found[1], expected[1], rtol=2.0**-10, atol=0, equal_nan=True)


def norms(name: str, dtype: torch.dtype, columns: int) -> None:
    x, residual = normal(5, columns).to(dtype), normal(5, columns).to(dtype) * 3
    x[1, -2:], x[2] = torch.nan, residual[2].neg()  # a row of zeros
    weight = (1 + 0.1 * normal(columns)).to(dtype)
    wide = torch.stack((x, x), dim=1).flatten(1)[:, :columns]
    static = static_of(name)
    for given, added in ((x, residual), (x, None), (wide, residual)):
        arguments = (given, added, weight, static, 1e-5, name)
        found, expected = kernel.rms_norm_quantize(*arguments), ops.rms_norm_quantize(*arguments)
        close("norm", name, found, expected)
        assert torch.equal(found[2].nan_to_num(9.0), expected[2].nan_to_num(9.0)), f"{name}: another residual"


def activations(name: str, dtype: torch.dtype, columns: int) -> None:
    both = (normal(5, 2 * columns) * 3).to(dtype)
    both[1, -2:], both[2] = torch.nan, 0
    both[3, :9] = torch.tensor([-500.0, -90, -80, -20, 0, 20, 80, 90, 500])
    gate, up = both.split(columns, dim=1)  # views: rows apart
    arguments = (gate, up, static_of(name), name)
    close("activation", name, kernel.silu_mul_quantize(*arguments), ops.silu_mul_quantize(*arguments))


@triton.jit
def divide(a, b, out, unit, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    divided = tl.load(a + tl.arange(0, SIZE))[:, None] * tl.load(unit + tl.program_id(0))
    by = tl.load(b + at)[None, :]
    power, near, inverse = codes.divisor(by)
    q = codes.quotient(divided, by, power, near, inverse, tl.float16)
    tl.store(out + at[None, :] + tl.arange(0, SIZE)[:, None] * SIZE * tl.num_programs(0), q)


def quotients() -> None:
    """Every significand of 11 bits over a few thousand of 24, in all binades."""
    a, unit = 1 + torch.arange(1024) / 1024, torch.exp2(torch.arange(-126, 128, 84.0))
    b = (2 - torch.rand(4, 1024, generator=GENERATOR)) * unit[:, None]
    out = torch.full((1024, 4, 1024), torch.nan)
    divide[(4,)](a, b, out, unit, 1024)
    assert torch.equal(out, (a[:, None] * unit)[:, :, None] / b), "quotients"


def main() -> None:
    mend()
    quotients()
    quantizers()
    norms("int8_token", torch.float32, 1)
    for name, dtype in itertools.product(SHARED, (torch.float32, torch.float16)):
        norms(name, dtype, 384)
        activations(name, dtype, 384)
    steps()
    print("all equal")


if __name__ == "__main__":
    sys.exit(main())
