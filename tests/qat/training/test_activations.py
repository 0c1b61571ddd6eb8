"""Activation rules against the engines they are named after: compressed-tensors itself, and vLLM's formulas again.

vLLM's reference functions (version 0.33) are written here a second time, from their source, in plain torch. They may
differ from ours at exact ties only, because some multiply by a reciprocal where we divide.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qat.checkpoints.layouts.arguments import input_args
from qat.checkpoints.layouts.compressed_tensors.engines import ROWS
from qat.checkpoints.layouts.support import pairs
from qat.errors import UnsupportedError
from qat.numbers.catalog import lookup
from qat.numbers.numerics import fake_quantize
from qat.quantizer import InputQuantizer
from qat.training.activations import dynamic_fake_quantize, fake_quantize_input, static_part

BF16 = torch.bfloat16
INPUTS = sorted({name for _, name in pairs(ROWS) if name})
STATIC = [name for name in INPUTS if static_part(lookup(name), torch.tensor(1.0)) is not None]
RANGES = (3.0, 1e-3, 700.0)


def every_bfloat16() -> Tensor:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)
    return torch.where(torch.isfinite(values), values, 0)


def inputs() -> dict[str, Tensor]:
    """BF16 tensors (batch, tokens, columns) with ties, zero and subnormal blocks, saturation and every pattern."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (2, 8, 256), generator=generator).float()

    holes = normal(2, 8, 256)
    holes[:, ::2] = 0
    holes[:, 1, 40:200] = 0
    thresholds = torch.tensor([1.7421875, 1.75, 1.7578125, 1.0, 1.5, 1.9921875])
    sets = {
        "normal": normal(2, 8, 256),
        "one token": normal(1, 1, 256),
        "four dimensions": normal(2, 2, 3, 256),
        "two dimensions": normal(6, 256),
        "outliers": normal(2, 8, 256) * torch.logspace(-12, 6, 256),
        "rows of all sizes": normal(2, 8, 256) * torch.exp(6 * normal(2, 8, 1)),
        "zeros": torch.zeros(1, 3, 256),
        "holes": holes,
        "integer ties": whole(-255, 256) / 2,
        "float ties": whole(-24, 25) / 4 * torch.exp2(whole(-9, 9)[..., :1]),
        "exponent thresholds": thresholds[whole(0, 6).long()] * torch.exp2(whole(-30, 30)[..., :1]),
        "every pattern": every_bfloat16().view(1, 256, 256),
        "every pattern, sorted": every_bfloat16().float().abs().sort()[0].view(1, 256, 256),
    }
    return {name: x.to(BF16) for name, x in sets.items()}


def same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


# --- compressed-tensors ---------------------------------------------------------------------------


def by_compressed_tensors(x: Tensor, name: str, static: Tensor | None) -> Tensor:
    """What the library computes for a layer whose input is quantized as the exporter says."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    module = torch.nn.Module()
    module.quantization_status = quantization.QuantizationStatus.DECOMPRESSED
    if static is not None and lookup(name).global_scale:
        module.input_global_scale = static
    elif static is not None:
        module.input_scale = static.to(BF16)
    with torch.no_grad():
        return forward.forward_quantize(module, x, "input", quantization.QuantizationArgs(**input_args(lookup(name))))


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("kind", inputs())
def test_compressed_tensors_rule_is_bit_exact(name: str, kind: str) -> None:
    x, fmt = inputs()[kind], lookup(name)
    for amax in RANGES if name in STATIC else RANGES[:1]:
        static = static_part(fmt, torch.tensor(amax))
        expected = by_compressed_tensors(x, name, static)
        ours = dynamic_fake_quantize(x, fmt, "compressed_tensors", "ste", torch.tensor(amax))
        assert ours.dtype == BF16 and same(ours, expected).all()


def test_a_divisor_of_another_tool_is_used_as_it_is() -> None:
    x, divisor = inputs()["normal"], torch.tensor([2688 / 4.7])
    ours = fake_quantize_input(x, lookup("nvfp4"), "compressed_tensors", "ste", divisor)
    assert torch.equal(ours, by_compressed_tensors(x, "nvfp4", divisor))


@pytest.mark.parametrize("name", INPUTS)
def test_float32_inputs_count_as_bfloat16(name: str) -> None:
    x = torch.randn(2, 4, 256, generator=torch.Generator().manual_seed(1))
    amax = torch.tensor(3.0)
    ours = dynamic_fake_quantize(x, lookup(name), "compressed_tensors", "ste", amax)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, dynamic_fake_quantize(x.to(BF16), lookup(name), "compressed_tensors", "ste", amax).float())


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("rule", ["vllm", "compressed_tensors"])
def test_gradient_passes_straight_and_stops_at_the_clip(name: str, rule: str) -> None:
    fmt = lookup(name)
    x = (torch.randn(1, 4, 256, generator=torch.Generator().manual_seed(2)) * 2).to(BF16).float()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    gradients = {}
    for estimator in ("ste", "clipped"):
        leaf = x.clone().requires_grad_()
        y = dynamic_fake_quantize(leaf, fmt, rule, estimator, torch.tensor(1.0))
        assert torch.equal(y, dynamic_fake_quantize(x, fmt, rule, estimator, torch.tensor(1.0)))
        y.backward(upstream)
        gradients[estimator] = leaf.grad
    assert torch.equal(gradients["ste"], upstream)
    stopped = gradients["clipped"] != upstream
    assert (gradients["clipped"][stopped] == 0).all()
    if fmt.block == (0, 0):  # everything beyond the calibrated range, and nothing else
        limit = float(static_part(fmt, torch.tensor(1.0))) * fmt.element.max
        assert torch.equal(stopped[x.abs() < 0.99 * limit], torch.zeros_like(stopped)[x.abs() < 0.99 * limit])
        assert stopped[x.abs() > 1.01 * limit].all()


@pytest.mark.parametrize("name", ["nf4_g64", "int8_channel_asym", "mxint8", "if4", "fp8_b128"])
def test_formats_that_it_cannot_simulate_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        dynamic_fake_quantize(torch.ones(1, 2, 256), lookup(name), "compressed_tensors", "ste", torch.tensor(1.0))


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="vllm, compressed_tensors"):
        dynamic_fake_quantize(torch.ones(1, 2, 32), lookup("mxfp4"), "sglang", "ste", torch.tensor(1.0))


# --- vLLM -----------------------------------------------------------------------------------------


def e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def e2m1(x: Tensor) -> Tensor:
    """Nearest of the eight magnitudes, to the even code on a tie."""
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    distance = (x.abs()[..., None].double() - grid.double()).abs()
    distance[..., 1::2] += 1e-13  # an even code wins a tie
    return grid[distance.argmin(-1)] * x.sign()


def per_token_int8(x: Tensor) -> Tensor:
    amax = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(amax == 0, 0.0, 127.0 / amax)
    return (x * inverse).round().clamp(-128, 127) * (amax / 127.0)


def per_token_fp8(x: Tensor) -> Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / 448.0).clamp_min(1.0 / (448.0 * 512.0))
    return e4m3(x / scale) * scale


def per_group_fp8(x: Tensor) -> Tensor:
    x = x.unflatten(-1, (-1, 128))
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448.0
    return (e4m3(x * (1.0 / scale)) * scale).flatten(-2)


def static_fp8(x: Tensor, scale: Tensor) -> Tensor:
    return e4m3(x * (1.0 / scale)) * scale


def static_int8(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-128, 127).clamp_min(-127) * scale  # our symmetric range leaves -128 out


def nvfp4(x: Tensor, divisor: Tensor) -> Tensor:
    x = x.unflatten(-1, (-1, 16))
    scale = e4m3(divisor * (x.abs().amax(-1, keepdim=True) * torch.tensor(1 / 6.0)))
    inverse = torch.where(scale == 0, 0.0, divisor / scale)
    return (e2m1((x * inverse).clamp(-6, 6)) * (scale / divisor)).flatten(-2)


def mxfp4(x: Tensor) -> Tensor:
    x = x.unflatten(-1, (-1, 32))
    exponent = ((x.abs().amax(-1, keepdim=True).view(torch.int32) + (1 << 21)) >> 23) - 2
    scale = torch.exp2(exponent.clamp(0, 254).float() - 127)
    return (e2m1((x / scale).clamp(-6, 6)) * scale).flatten(-2)


def mxfp8(x: Tensor) -> Tensor:
    x = x.unflatten(-1, (-1, 32))
    amax = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448.0)).clamp_min(-127))
    return (e4m3(x / scale) * scale).flatten(-2)


DYNAMIC: dict[str, Callable[[Tensor], Tensor]] = {
    "int8_token": per_token_int8,
    "fp8_token": per_token_fp8,
    "fp8_g128": per_group_fp8,
    "mxfp4": mxfp4,
    "mxfp8": mxfp8,
}
CALIBRATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fp8_tensor": static_fp8,
    "int8_tensor": static_int8,
    "nvfp4": nvfp4,
}


@pytest.mark.parametrize("kind", [kind for kind in inputs() if "pattern" not in kind])  # subnormals are not in question
@pytest.mark.parametrize("name", [*DYNAMIC, *CALIBRATED])
def test_vllm_rule_is_vllm_up_to_ties(name: str, kind: str) -> None:
    x, fmt = inputs()[kind].float(), lookup(name)
    for amax in RANGES if name in STATIC else RANGES[:1]:
        static = static_part(fmt, torch.tensor(amax))
        expected = DYNAMIC[name](x) if static is None else CALIBRATED[name](x, static)
        ours = dynamic_fake_quantize(x, fmt, "vllm", "ste", torch.tensor(amax))
        different = ~same(ours, expected)
        assert different.float().mean() <= 0.01
        # Where they differ, x lies midway between the two results.
        midway = (ours + expected) / 2
        assert torch.allclose(midway[different], x[different], rtol=1e-5, atol=0)


def test_tiny_blocks_vanish_where_their_scale_rounds_to_zero() -> None:
    x = torch.full((1, 1, 32), 1e-6)
    x[..., 16:] = 1.0
    y = dynamic_fake_quantize(x, lookup("nvfp4"), "vllm", "ste", torch.tensor(1.0))
    assert (y[..., :16] == 0).all() and (y[..., 16:] > 0.9).all()
    tiny = torch.full((1, 1, 32), 1e-9)
    fp8 = dynamic_fake_quantize(tiny, lookup("fp8_token"), "vllm", "ste", torch.tensor(1.0))
    assert (fp8 == 0).all()  # below half of the smallest step under the smallest scale that vLLM uses


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATIC)
def test_static_part_is_what_a_checkpoint_can_hold(name: str) -> None:
    fmt = lookup(name)
    for amax in (1e-6, 0.3, 1.0, 5.7, 1e5):
        static = static_part(fmt, torch.tensor(amax))
        assert static.dtype == torch.float32 and static.shape == (1,)
        if fmt.global_scale:
            assert torch.frexp(static)[0] == 0.5  # a power of two
            assert 0.5 < amax * float(static) / (6 * 448) <= 1
        else:
            assert torch.equal(static, static.to(fmt.scale.storage).float())
            assert float(static) == pytest.approx(amax / fmt.element.max, rel=2**-8)


@pytest.mark.parametrize("rule", ["vllm", "compressed_tensors"])
@pytest.mark.parametrize("name", INPUTS)
def test_the_module_uses_the_rule(name: str, rule: str) -> None:
    quantizer = InputQuantizer(lookup(name), rule, "ste", "minmax")
    x = inputs()["normal"]
    quantizer.observe()
    quantizer(x)
    quantizer.freeze()
    expected = dynamic_fake_quantize(x, lookup(name), rule, "ste", quantizer.amax)
    assert torch.equal(quantizer(x), expected)


@pytest.mark.parametrize("name", STATIC)
def test_what_is_made_of_a_range_is_made_once_and_again_when_it_changes(name: str) -> None:
    """In place, by other memory, by a loaded state or a moved module."""
    quantizer, x = InputQuantizer(lookup(name), "vllm", "ste", "minmax"), inputs()["normal"]

    def check(amax: float) -> None:
        assert torch.equal(quantizer(x), dynamic_fake_quantize(x, lookup(name), "vllm", "ste", torch.tensor(amax)))
        assert quantizer.static() is quantizer.static()

    quantizer.amax.fill_(3.0)
    check(3.0)
    quantizer.amax.fill_(40.0)
    check(40.0)
    quantizer.amax.data = torch.tensor(500.0)
    check(500.0)
    quantizer.load_state_dict({"amax": torch.tensor(7000.0)})
    check(7000.0)
    quantizer.amax = torch.tensor(2.0)
    check(2.0)


def test_the_gradient_of_a_learned_range_is_that_of_its_scale() -> None:
    """LSQ's: round(v) - v inside, the bound outside, times the scale and LSQ's share."""
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(8, 64, generator=generator)).requires_grad_()
    quantizer = InputQuantizer(lookup("int8_tensor"), "vllm", "clipped", "minmax", learn=True)
    quantizer.amax.fill_(4.0)
    grad = torch.randn(8, 64, generator=generator)
    of_x, of_range = torch.autograd.grad((quantizer(x) * grad).sum(), [x, quantizer.log_range])
    scale = float(quantizer.static())
    v = x.detach().double() / scale
    inside = v.abs() <= 127
    expected = (grad * torch.where(inside, v.round() - v, 127 * v.sign())).sum() * scale / math.sqrt(8 * 64 * 127)
    torch.testing.assert_close(of_range.double(), expected.view(1), rtol=1e-4, atol=1e-6)
    assert torch.equal(of_x, grad * inside)


@pytest.mark.parametrize("name", ["nvfp4", "fp8_tensor"])
@pytest.mark.parametrize("learned", [False, True])
def test_the_operator_of_recorded_graphs_is_the_static_part(name: str, learned: bool) -> None:
    amax, log_range = torch.tensor(3.7), torch.tensor([0.123]) if learned else None
    torch.library.opcheck(torch.ops.qat.static_part.default, (amax, log_range, name))
    expected = static_part(lookup(name), amax * log_range.exp()[0] if log_range is not None else amax)
    assert torch.equal(torch.ops.qat.static_part.default(amax, log_range, name), expected)


@pytest.mark.parametrize("name", ["q4_k", "q5_k", "q6_k", "q4_0"])
def test_inputs_keep_their_minima_and_elements(name: str) -> None:
    x, fmt = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)), lookup(name)
    assert torch.equal(fake_quantize_input(x, fmt, "vllm", "ste", None), fake_quantize(x, fmt))
