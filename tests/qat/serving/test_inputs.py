"""Quantized inputs as codes and scales: what training simulated, bit for bit, in the layout that products read."""

import pytest
import torch
from torch import Tensor

from qat.checkpoints.layouts.compressed_tensors.engines import ROWS
from qat.checkpoints.layouts.support import pairs
from qat.errors import FormatError, UnsupportedError
from qat.numbers.catalog import CATALOG, lookup
from qat.serving.inputs import (
    dequantize_input,
    needs_static,
    problem,
    quantize_input,
    rms_norm_quantize,
    silu_mul_quantize,
)
from qat.training.activations import fake_quantize_input, static_part

NAMES = [name for name, fmt in CATALOG.items() if problem(fmt) is None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def static_of(name: str, amax: float = 3.0) -> Tensor | None:
    return static_part(lookup(name), torch.tensor(amax))


def adversarial() -> Tensor:
    x = normal(2, 8, 256) * torch.exp2(torch.arange(-8, 8.0)).view(2, 8, 1)
    x[0, 0], x[0, 1, 40:200], x[0, 2, 3] = 0, 0, 1e4
    x[1, 0, 7], x[1, 1, 9] = torch.nan, torch.inf
    x[1, 2], x[1, 3] = 1e-40, -3e-45
    x[1, 4] = torch.arange(-128, 128) / 2
    return x


def test_every_input_format_of_a_target_has_codes() -> None:
    assert {name for _, name in pairs(ROWS) if name} <= set(NAMES)
    for name in NAMES:
        assert needs_static(lookup(name)) == (static_of(name) is not None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_mean_what_training_simulated(name: str, dtype: torch.dtype) -> None:
    fmt, x = lookup(name), adversarial().to(dtype)
    for amax in (3.0, 1e-3):
        static = static_of(name, amax)
        found = dequantize_input(*quantize_input(x, name, static), static, name, dtype)
        expected = fake_quantize_input(x, fmt, "vllm", "ste", static)
        silent = x.isnan() if fmt.block == (0, 0) and fmt.element.kind == "integer" else torch.zeros_like(x).bool()
        assert found.dtype == dtype and torch.equal(found.isnan(), expected.isnan() & ~silent)
        assert torch.equal(found.nan_to_num(7.0)[~silent], expected.nan_to_num(7.0)[~silent])
        assert not found[silent].any()  # integers under a static scale cannot say NaN
        flat = quantize_input(x.flatten(0, 1), name, static)
        assert torch.equal(
            flat.codes.view(torch.uint8), quantize_input(x, name, static).codes.flatten(0, 1).view(torch.uint8)
        )


def test_the_layout_by_hand() -> None:
    x = torch.zeros(2, 32)
    x[1, :4] = torch.tensor([6.0, -0.5, 3.0, 0.0])  # codes 7, 9, 5, 0
    codes, scales = quantize_input(x, "mxfp4")
    assert codes.dtype == torch.uint8 and codes[1, :3].tolist() == [0x97, 0x05, 0] and scales.tolist() == [[0], [127]]
    codes, scales = quantize_input(x, "nvfp4", torch.tensor([448.0]))
    assert codes.shape == (2, 16) and codes[1, :3].tolist() == [0x97, 0x05, 0]
    assert scales.dtype == torch.uint8 and scales.tolist() == [[0x7E, 0x7E], [0x7E, 0x7E]]
    codes, scales = quantize_input(x * 127 / 6, "int8_token")
    assert codes.dtype == torch.int8 and codes[1, :3].tolist() == [127, -11, 64] and scales.shape == (2, 1)
    codes, scales = quantize_input(x * 448 / 6, "fp8_tensor", torch.tensor([0.5]))
    assert codes.dtype == torch.float8_e4m3fn and codes[1, :3].float().tolist() == [448, -72, 448]
    assert scales.dtype == torch.float32 and scales.tolist() == [0.5]
    codes, scales = quantize_input(normal(3, 256), "fp8_g128")
    assert codes.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32 and scales.shape == (3, 2)


def test_a_nan_stays_in_its_token() -> None:
    x = normal(3, 64)
    x[1, 5] = torch.nan
    for name in ("int8_token", "fp8_token"):
        found = dequantize_input(*quantize_input(x, name), None, name)
        assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
    found = dequantize_input(*quantize_input(x, "fp8_tensor", torch.ones(1)), None, "fp8_tensor")
    assert found[1, 5].isnan() and int(found.isnan().sum()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_empty_inputs(name: str) -> None:
    codes, scales = quantize_input(normal(0, 256), name, static_of(name))
    assert codes.shape[0] == 0 and dequantize_input(codes, scales, static_of(name), name).shape == (0, 256)


def test_what_cannot_be_quantized_is_refused() -> None:
    x = normal(2, 72)
    for name in ("nf4_g64", "int8_channel_asym", "if4", "fp8_b128", "mxfp6", "ternary_channel", "int4_g32"):
        with pytest.raises(UnsupportedError, match=f"inputs cannot be quantized to {name}"):
            quantize_input(x, name)
    with pytest.raises(FormatError, match="groups of 32 do not divide a width of 72"):
        quantize_input(x, "mxfp4")
    with pytest.raises(FormatError, match="static_part"):
        quantize_input(x, "fp8_tensor")
    with pytest.raises(FormatError, match="weight"):
        rms_norm_quantize(x, None, normal(64), 1e-5, "int8_token")
    with pytest.raises(FormatError, match="residual"):
        rms_norm_quantize(x, x.bfloat16(), normal(72), 1e-5, "int8_token")
    with pytest.raises(FormatError, match="up projection"):
        silu_mul_quantize(x, x[:1], "int8_token")


@pytest.mark.parametrize("name", ["int8_token", "fp8_g128", "fp8_tensor", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_operators_are_transformers_modules_and_then_the_quantizer(name: str, dtype: torch.dtype) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, residual, static = normal(2, 3, 128).to(dtype), normal(2, 3, 128, seed=1).to(dtype), static_of(name)
    norm = llama.LlamaRMSNorm(128, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.1 * normal(128, seed=2))
        for added in (residual, None):
            summed = x if added is None else x + added
            found, new = rms_norm_quantize(x, added, norm.weight, 1e-5, name, static)
            _same(found, quantize_input(norm(summed), name, static))
            assert torch.equal(new, summed)
    config = llama.LlamaConfig(hidden_size=8, intermediate_size=128, num_attention_heads=1)
    mlp = llama.LlamaMLP(config).to(dtype)
    seen: list[Tensor] = []
    mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    hidden = normal(2, 3, 8, seed=3).to(dtype)
    mlp(hidden)
    found = silu_mul_quantize(mlp.gate_proj(hidden).detach(), mlp.up_proj(hidden).detach(), name, static)
    _same(found, quantize_input(seen[0], name, static))


def _same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("name", ["int8_token", "int8_tensor", "fp8_g128", "nvfp4", "mxfp4"])
def test_opcheck(name: str) -> None:
    x, static, ops = normal(2, 3, 128), static_of(name), torch.ops.qat
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(ops.quantize_input.default, (x, static, name), test_utils=checks)
    for given, residual in ((x, normal(2, 3, 128, seed=1)), (x.transpose(0, 1), normal(3, 2, 128, seed=1)), (x, None)):
        arguments = (given, residual, normal(128, seed=2), static, 1e-5, name)
        torch.library.opcheck(ops.rms_norm_quantize.default, arguments, test_utils=checks)
    torch.library.opcheck(ops.silu_mul_quantize.default, (x, x * 2, static, name), test_utils=checks)
