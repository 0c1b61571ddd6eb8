"""Run by test_packed_linear.py under TRITON_INTERPRET=1: the kernel's source, executed on the CPU, against float64."""

import itertools
import sys

import torch

from qat.kernels.packed_linear import triton as kernel
from qat.kernels.packed_linear.choose import PanelTiles, Tiles
from qat.kernels.packed_linear.dense import choose as dense_rule
from qat.kernels.packed_linear.dense import triton as dense
from qat.kernels.packed_linear.panels import triton as panels
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import QTensor, Scales, quantize
from qat.numbers.scale import BF16, F32
from qat.serving.packed import PackedWeight, ordered, pack, problem
from qat.serving.panels import in_panels
from qat.serving.panels import problem as panel_problem
from tests.kernels.interpreted import mend

MATMULS = (
    "int4_g32",
    "int4_g64_asym",
    "int4_g128",
    "int4_channel",
    "int8_channel",
    "int8_g128_asym",
    "int2_g64",
    "nvfp4",
    "mxfp4",
    "mxfp8",
)
GENERATOR = torch.Generator().manual_seed(0)


def run(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, splits: int = 1) -> torch.Tensor:
    tiles = Tiles(block_n=16, block_m=16, splits=splits, warps=4, stages=1, why="small, for the interpreter")
    kernel.choose = lambda *_: tiles
    low = PanelTiles(block_n=64 if splits == 1 else 128, block_m=16, pieces=splits, warps=4, stages=1, why="as above")
    panels.choose_panels = lambda *_: low
    kernel.product.cache_clear()
    panels.product.cache_clear()
    y: torch.Tensor = kernel.packed_linear(
        x, weight.words, weight.scales, weight.zeros, bias, weight.global_scale, weight.format
    )
    return y


def check(
    name: str,
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    splits: int = 1,
    held: PackedWeight | None = None,
) -> None:
    found = run(x, held or pack(weight), bias, splits).double()
    dense = weight.dequantize().double()
    exact = x.double() @ dense.T + (0 if bias is None else bias.double())
    unit = 2.0**-10 if x.dtype == torch.float16 else 2.0**-20
    # One rounding of the result in FP16; in FP32 the rounding of several hundred partial sums.
    bound = unit * (x.double().abs() @ dense.abs().T + (0 if bias is None else bias.double().abs())) + 1e-30
    worst = ((found - exact).abs() / bound).max() if found.numel() else 0.0
    assert worst <= 1.0, f"{name} {tuple(x.shape)} {x.dtype} splits {splits}: {worst} of the bound"


def every_code(name: str, rows: int = 16) -> QTensor:
    """Every code under many scales, scattered over the columns."""
    fmt = lookup(name)
    codes = torch.arange(2**fmt.element.bits, dtype=torch.uint8).repeat(2 * 256 // 2**fmt.element.bits + 1)[:512]
    if fmt.element.kind == "integer":
        codes = torch.where(codes == 2 ** (fmt.element.bits - 1), 0, codes)
    values = fmt.element.decode(codes).nan_to_num(0.0)
    codes = fmt.element.encode(values).repeat(rows, 1)
    for row in range(rows):
        codes[row] = codes[row].roll(row * 3)
    sample = quantize(torch.randn(rows, 512, generator=GENERATOR), fmt)
    return QTensor(fmt, codes, sample.scales)


def check_panels(name: str) -> None:
    """A weight in panels: every code, two tiles of tokens, pieces of K of unequal length, and one row alone."""
    weight = every_code(name, rows=64)
    for dtype in (torch.float32, torch.float16):
        found = run(torch.eye(512, dtype=dtype)[::37], ordered(pack(weight), "cuda"), None)
        assert torch.equal(found, weight.dequantize().T[::37].to(dtype)), f"{name} {dtype}: other weights in panels"
    weight = quantize(torch.randn(128, 768, generator=GENERATOR), lookup(name))
    held, bias = ordered(pack(weight), "cuda"), torch.randn(128, generator=GENERATOR)
    assert in_panels(held.words), name
    x = torch.randn(17, 1536, generator=GENERATOR)[:, 768:]
    check(f"{name} in panels", x.half(), weight, None, 1, held)
    check(f"{name} in panels", x, weight, bias, 2, held)
    whole = run(x, held, bias, 2)
    assert torch.equal(run(x[-1:], held, bias, 2), whole[-1:]), f"{name} in panels: the batch changes a row"
    before, panels.TOGETHER = panels.TOGETHER, 16
    assert torch.equal(run(x, held, bias, 2), whole), f"{name} in panels: a second launch changes rows"
    panels.TOGETHER = before


def check_dense(name: str) -> None:
    """Rows of a weight decoded for the library: every code, rounded once; then products, in slices and without."""
    weight = every_code(name, rows=192)
    above = weight.scales.global_scale
    alone = QTensor(weight.format, weight.codes, Scales(weight.scales.stored, None if above is None else above**0,
                                                        weight.scales.zero_point))  # fmt: skip
    for held, dtype in itertools.product((pack(weight), ordered(pack(weight), "cuda")), (torch.float32, torch.float16)):
        rows = torch.full((64, 512), torch.nan, dtype=dtype)
        zeros = None if held.zeros is None else held.zeros.contiguous()
        dense.decode_rows(rows, 128, held.words, held.scales.contiguous(), zeros, name, 192)
        assert torch.equal(rows, alone.dequantize(dtype)[128:]), f"{name} {dtype}: other dense rows"


def check_prompts(name: str) -> None:
    """Products of many tokens, whose dense rows come in slices and at once."""
    bias, used = torch.randn(320, generator=GENERATOR), dense_rule.SLICE_BYTES
    for width in (next(width for width in (352, 320, 384) if lookup(name).divides(width)), 512):  # and in panels
        weight = quantize(torch.randn(320, width, generator=GENERATOR), lookup(name))
        held = ordered(pack(weight), "cuda")
        x = torch.randn(193, 2 * width, generator=GENERATOR).half()[:, :width]
        for dense_rule.SLICE_BYTES, given in itertools.product((used, 2 * width * 128), (bias.half(), None)):
            dense.slices.cache_clear()
            assert dense.takes(name, len(x), x.dtype) and not dense.takes(name, len(x), torch.float32)
            found = run(x, held, given).double()
            exact = x.double() @ weight.dequantize().double().T + (0 if given is None else given.double())
            off = float((found - exact).norm() / exact.norm())  # a weight rounded to FP16, then the result
            assert off <= 2**-11, f"{name} {width} columns, dense: {off}"
    dense_rule.SLICE_BYTES = used
    dense.slices.cache_clear()


def main() -> None:
    mend()
    names = [name for name, fmt in CATALOG.items() if problem(fmt) is None]
    for name, dtype in itertools.product(names, (torch.float32, torch.float16)):
        weight = every_code(name)
        one_hot = torch.eye(512, dtype=dtype)[::37]
        found, dense = run(one_hot, pack(weight), None), weight.dequantize()
        picked = dense.T[::37].to(dtype)
        assert torch.equal(found, picked), f"{name} {dtype}: one-hot inputs give other weights"
    tokens = 17
    for name in MATMULS:
        fmt = lookup(name)
        columns = next(width for width in (352, 320, 384) if fmt.divides(width))  # the first two end inside a tile
        weight = quantize(torch.randn(40, columns, generator=GENERATOR), fmt)
        bias = torch.randn(40, generator=GENERATOR)
        x = torch.randn(tokens, columns, generator=GENERATOR)
        x[0, 3] = 1e4
        check(name, x, weight, bias)
        check(name, x.half(), weight, None)
        check(name, x, weight, bias, splits=3)
        wide = torch.randn(tokens, 2 * columns, generator=GENERATOR)[:, ::2]
        check(name, wide, weight, None)  # strided
        single = run(x[-1:], pack(weight), bias)
        assert torch.equal(single, run(x, pack(weight), bias)[-1:]), f"{name}: the batch changes a row"
        whole = torch.randint(-8, 9, (tokens, columns), generator=GENERATOR).float()
        ones = Scales(torch.ones_like(weight.scales.stored.float()).to(fmt.scale.storage), weight.scales.global_scale)
        if fmt.scale.is_one_of(F32, BF16) and not fmt.zero_point:
            integers = QTensor(fmt, weight.codes, ones)
            assert torch.equal(run(whole, pack(integers), None), whole @ integers.dequantize().T), f"{name}: integers"
    for name in (name for name in names if panel_problem(lookup(name), 128, 512) is None):
        check_panels(name)
    for name in names:
        check_dense(name)
    for name in ("int4_g128", "nvfp4", "mxfp4", "int8_g128_asym"):
        check_prompts(name)
    empty = run(torch.zeros(0, 64), pack(quantize(torch.randn(8, 64), lookup("int4_g32"))), None)
    assert empty.shape == (0, 8)
    rows = torch.randn(4, 64, generator=GENERATOR)
    rows[1, 5], rows[2, 0] = torch.nan, torch.inf
    weight = quantize(torch.randn(8, 64, generator=GENERATOR), lookup("nvfp4"), None)
    found = run(rows, pack(weight), None)
    assert found[1].isnan().all() and not found[2].isfinite().any() and found[[0, 3]].isfinite().all()
    print("all equal")


if __name__ == "__main__":
    sys.exit(main())
