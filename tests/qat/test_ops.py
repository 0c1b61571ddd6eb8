"""The operator `qat::fake_quantize` as PyTorch sees it: schema, shapes, autograd, checkpointing, dtypes."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qat import numerics
from qat.catalog import CATALOG, lookup, register
from qat.element import minifloat
from qat.errors import FormatError
from qat.format import Format
from qat.numerics import Scales, find_scales
from qat.ops import fake_quantize

every_format = pytest.mark.parametrize("fmt", CATALOG.values(), ids=lambda fmt: fmt.name)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(fmt: Format) -> Tensor:
    return normal(3, 200) if fmt.block[0] > 1 else normal(3, 2 * (fmt.group or 64))


@every_format
def test_the_op_computes_the_reference(fmt: Format) -> None:
    x = sample(fmt)
    scales = find_scales(x, fmt)
    expected = numerics.fake_quantize(x, fmt, scales)
    assert torch.equal(fake_quantize(x, fmt.name, scales), expected)
    split = dataclasses.replace(scales, divisor=scales.effective() * 0.9)
    found = fake_quantize(x, fmt.name, scales, divisor=split.divisor)
    assert torch.equal(found, numerics.fake_quantize(x, fmt, split))
    assert torch.equal(fake_quantize(x, fmt.name, scales, round_bf16=True), expected.bfloat16().float())


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_have_the_dtype_of_the_input(fmt: Format, dtype: torch.dtype) -> None:
    x = sample(fmt).to(dtype)
    scales = find_scales(x, fmt)
    y = fake_quantize(x, fmt.name, scales)
    assert y.dtype == dtype
    assert torch.equal(y, numerics.fake_quantize(x.float(), fmt, scales).to(dtype))


# a zero point, two elements, and an overhanging 2-D block, whose result is cut out of a larger one
@pytest.mark.parametrize(("name", "estimator"), [("int4_g32_asym", "clipped"), ("if4", "ste"), ("fp8_b128", "clipped")])
def test_opcheck(name: str, estimator: str) -> None:
    fmt = lookup(name)
    for x in (sample(fmt), sample(fmt).bfloat16().T.contiguous().T):
        scales = find_scales(x, fmt)
        multiplier = scales.effective().clone().requires_grad_()
        divisor = (scales.effective() * 0.8).requires_grad_()
        arguments = (x.requires_grad_(), divisor, multiplier, scales.zero_point, scales.choice, name, estimator, True)
        torch.library.opcheck(torch.ops.qat.fake_quantize.default, arguments)


def test_results_own_their_memory() -> None:
    """A view of a larger buffer, or of x, would break autograd's and the compiler's assumptions."""
    for name in ("fp8_b128", "int4_g32", "mxfp4"):
        x = sample(lookup(name))
        before = x.clone()
        y = fake_quantize(x, name, find_scales(x, lookup(name)))
        assert y.is_contiguous() and y.untyped_storage().nbytes() == y.numel() * 4
        y.add_(1)
        assert torch.equal(x, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    fmt = lookup("nvfp4")
    linear = nn.Linear(64, 64)
    log_scale = nn.Parameter(0.01 * normal(64, 4))
    scales = find_scales(linear.weight, fmt)

    def block(x: Tensor) -> Tensor:
        multiplier = scales.effective() * log_scale.exp()
        weight = fake_quantize(linear.weight, fmt.name, scales, multiplier=multiplier)
        inputs = fake_quantize(x, fmt.name, find_scales(x, fmt), estimator="clipped")
        return torch.tanh(inputs @ weight.T)

    found = []
    for wrapped in (False, True):
        x = normal(5, 64, seed=1).requires_grad_()
        y = checkpoint(block, x, use_reentrant=reentrant) if wrapped else block(x)
        y.square().sum().backward()
        leaves = (x, linear.weight, log_scale)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
        for leaf in leaves:
            leaf.grad = None
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed) and plain.any()


def test_no_gradient_is_made_for_what_needs_none() -> None:
    x = normal(2, 64)
    scales = find_scales(x, lookup("int4_g32"))
    assert not fake_quantize(x, "int4_g32", scales).requires_grad
    multiplier = scales.effective().requires_grad_()
    y = fake_quantize(x, "int4_g32", scales, multiplier=multiplier)
    y.sum().backward()
    assert multiplier.grad is not None and x.grad is None


@pytest.mark.parametrize("name", ["int8_g32", "mxfp4", "nvfp4", "nf4_g64"])
def test_nan_elements_stay_nan_under_given_scales(name: str) -> None:
    x = normal(2, 64)
    scales = find_scales(x, lookup(name))
    x[0, 5] = torch.nan
    y = fake_quantize(x, name, scales)
    assert y[0, 5].isnan() and y.isnan().sum() == 1


def test_unknown_formats_name_the_nearest() -> None:
    scales = Scales(torch.ones(1, 1))
    with pytest.raises(FormatError, match=r"no format called 'nvpf4'; nearest: nvfp4, nvint4, nf4_g64"):
        fake_quantize(torch.ones(1, 16), "nvpf4", scales)


def test_registered_formats_cross_the_op_boundary_by_name() -> None:
    fmt = Format(name="test_e3m2_g8", elements=(minifloat(3, 2),), block=(1, 8), scale="bf16")
    assert register(fmt) is fmt and register(fmt) is fmt
    try:
        x = normal(2, 16)
        assert torch.equal(fake_quantize(x, fmt.name, find_scales(x, fmt)), numerics.fake_quantize(x, fmt))
        with pytest.raises(FormatError, match="a different format called 'test_e3m2_g8'"):
            register(dataclasses.replace(fmt, block=(1, 4)))
    finally:
        del CATALOG[fmt.name]


def test_the_shape_function_needs_no_data() -> None:
    x = torch.empty(4, 64, device="meta", dtype=torch.bfloat16)
    scale = torch.empty(4, 2, device="meta")
    y = torch.ops.qat.fake_quantize(x, scale, scale, None, None, "int4_g32", "ste", False)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")
