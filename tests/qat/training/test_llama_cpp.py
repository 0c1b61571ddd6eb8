"""llama.cpp's rule for inputs, against ggml's arithmetic written in numpy and the `gguf` package's; inside its compiled
library: `tests/engines/test_llama_cpp.py`."""

import gguf
import numpy as np
import pytest
import torch

from qat.errors import FormatError, UnsupportedError
from qat.numbers.catalog import lookup
from qat.training.activations import fake_quantize_input, llama_cpp_input


def ggml_q8_0(x: np.ndarray) -> np.ndarray:
    """quantize_row_q8_0 and back in numpy, operation by operation as ggml's x86 code does it, in float32."""
    blocks = x.reshape(-1, 32)
    amax = np.abs(blocks).max(axis=1, keepdims=True)
    d = (amax / np.float32(127)).astype(np.float16).astype(np.float32)
    inverse = np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=amax != 0)
    return (np.rint(blocks * inverse) * d).reshape(x.shape)


def test_llama_cpp_rounds_as_ggml_does() -> None:
    """Bit for bit as its x86 code, near ties, too, of which discrete values make many; and against the `gguf` package's
    quantize_row_q8_0, which breaks them otherwise. A block of zeros stays one."""
    fmt = lookup("q8_0")
    seed = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=seed) * torch.logspace(-2, 2, 64)[:, None]
    x[5, 32:64] = 0.0
    near = torch.randint(-127, 128, (512, 256), generator=seed) * torch.rand(512, 1, generator=seed)
    for each in (x, near, near.to(torch.bfloat16).float(), 1e-9 * x):
        found = fake_quantize_input(each, fmt, "llama_cpp", "ste", None)
        assert np.array_equal(found.numpy(), ggml_q8_0(each.numpy()))
    amax = near.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
    divided = (near.unflatten(-1, (-1, 32)) / (amax / 127)).round()
    times = (near.unflatten(-1, (-1, 32)) * (torch.full_like(amax, 127) / amax)).round()
    assert int((divided != times).sum()) > 10  # so that this test can tell them apart
    kind = gguf.GGMLQuantizationType.Q8_0
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind))
    found = fake_quantize_input(x, fmt, "llama_cpp", "ste", None)
    assert float((found == theirs).float().mean()) > 0.9995
    stored = fake_quantize_input(x, fmt, "vllm", "ste", None)  # divides by the FP16 scale, which moves some codes
    assert float((stored == theirs).float().mean()) < 0.9995
    broken = x.clone()
    broken[0, 3], broken[1, 40] = torch.nan, torch.inf
    found = fake_quantize_input(broken, fmt, "llama_cpp", "ste", None)
    bad = found.isnan()
    assert bool(bad[0, :32].all() and bad[1, 32:64].all()) and int(bad.sum()) == 64
    leaf = x.clone().requires_grad_()
    fake_quantize_input(leaf, fmt, "llama_cpp", "ste", None).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.ones_like(x))
    for name in ("int8_token", "mxfp4", "q4_0", "q4_k", "int8_g32", "int8_channel_asym"):
        with pytest.raises(UnsupportedError, match=rf"llama\.cpp does not round inputs to {name}; use another"):
            fake_quantize_input(x, lookup(name), "llama_cpp", "ste", None)


def ggml_q8_k(x: np.ndarray) -> np.ndarray:
    """quantize_row_q8_K_ref and back in numpy, operation by operation, in float32: the sum of a number and 1.5 * 2^23
    is rounded to even, and its low bits are the code."""
    blocks = x.reshape(-1, 256)
    place = np.abs(blocks).argmax(axis=1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.float32(-127) / np.take_along_axis(blocks, place, 1)
        moved = (inverse * blocks + np.float32(12582912)).view(np.int32)
        codes = np.minimum(127, (moved & 0x007FFFFF) - 0x00400000).astype(np.int8)
        values = (np.float32(1) / inverse) * codes.astype(np.float32)
    return np.where(np.take_along_axis(blocks, place, 1) == 0, np.float32(0), values).reshape(x.shape)


def test_llama_cpp_rounds_in_256_as_ggml_does() -> None:
    """Bit for bit, near ties and at sizes whose reciprocal is infinite, too; not as q8_0 would, nor by division."""
    fmt = lookup("q8_k")
    seed = torch.Generator().manual_seed(0)
    x = torch.randn(64, 512, generator=seed) * torch.logspace(-2, 2, 64)[:, None]
    x[5, 256:] = 0.0
    near = torch.randint(-127, 128, (512, 256), generator=seed) * torch.rand(512, 1, generator=seed)
    for each in (x, near, near.to(torch.bfloat16).float(), 1e-9 * x, 1e-35 * x, 1e-38 * x):
        found = fake_quantize_input(each, fmt, "llama_cpp", "ste", None)
        assert np.array_equal(found.numpy(), ggml_q8_k(each.numpy()))
    divided = fake_quantize_input(near, fmt, "vllm", "ste", None)  # by the scale, which is not quite the reciprocal's
    assert float((divided == fake_quantize_input(near, fmt, "llama_cpp", "ste", None)).float().mean()) < 0.9
    broken = x.clone()
    broken[0, 3], broken[1, 300] = torch.nan, torch.inf
    bad = fake_quantize_input(broken, fmt, "llama_cpp", "ste", None).isnan()
    assert bool(bad[0, :256].all() and bad[1, 256:].all()) and int(bad.sum()) == 512
    leaf = x.clone().requires_grad_()
    fake_quantize_input(leaf, fmt, "llama_cpp", "ste", None).sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.ones_like(x))
    with pytest.raises(FormatError, match=r"q8_k: groups of 256 do not divide a width of 320; the nearest group"):
        fake_quantize_input(torch.ones(2, 320), fmt, "llama_cpp", "ste", None)


def test_llama_cpp_has_inputs_of_its_own_for_each_kind_of_weight() -> None:
    names = {"q4_0": "q8_0", "q5_0": "q8_0", "q8_0": "q8_0", "mxfp4": "q8_0"}
    names |= {"q4_k": "q8_k", "q5_k": "q8_k", "q6_k": "q8_k"}
    for weight, input in names.items():
        assert llama_cpp_input(lookup(weight)) == lookup(input)
