"""What the catalogue says about formats among each other."""

import gguf
import pytest
import torch

from qat.errors import FormatError
from qat.numbers.catalog import CATALOG, lookup, widened
from qat.numbers.element import integer
from qat.numbers.format import Format
from qat.numbers.numerics import Scales, fake_quantize, qsnr, quantize
from qat.numbers.scale import F16


def test_siblings_differ_in_their_width_alone() -> None:
    pairs = {(fmt.name, bits): widened(fmt, bits) for fmt in CATALOG.values() for bits in (8, 4, 3)}
    found = {pair: fmt.name for pair, fmt in pairs.items() if fmt is not None}
    assert found["int2_g64_asym", 4] == "int4_g64_asym" and found["int2_channel", 3] == "int3_channel"
    assert found["ternary_g64", 4] == "int4_g64" and found["int4_token", 8] == "int8_token"
    assert found["mxint4", 8] == "mxint8"
    for (name, bits), wide in found.items():
        narrow, wide_format = lookup(name), lookup(wide)
        assert narrow.element.bits < bits == wide_format.element.bits
        assert (narrow.block, narrow.scale, narrow.zero_point) == (
            wide_format.block,
            wide_format.scale,
            wide_format.zero_point,
        )
    for name in ("nvfp4", "if4", "nf4_g64", "fp8_channel", "nvint4", "int4_g64"):
        assert (name, 4) not in found and (name, 3) not in found


def test_three_stretched_levels_are_int2_under_another_scale() -> None:
    """ParetoQ's SEQ for ternary weights: a / 1.5 * round(clip(w / a, -0.99, 0.99) * 1.5)."""
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    a = 1.5 * 2.0 ** torch.randint(-3, 2, (8, 2), generator=torch.Generator().manual_seed(1))
    scales = Scales((a / 1.5).to(torch.bfloat16))
    alpha = a.repeat_interleave(64, dim=1)
    stretched = alpha / 1.5 * ((weight / alpha).clamp(-0.99, 0.99) * 1.5).round()
    torch.testing.assert_close(fake_quantize(weight, lookup("int2_g64"), scales), stretched, rtol=1e-6, atol=0)


def test_what_llama_cpp_has_and_nothing_writes_is_refused_by_name() -> None:
    for name, bits in (("q2_k", "two"), ("q3_k", "three")):
        with pytest.raises(FormatError, match=f"{name} of llama.cpp cannot be trained yet: .*{bits} bits; use q4_0 or"):
            lookup(name)


@pytest.mark.parametrize(("name", "half", "gain", "same"), [("q4_0", 8, 0.9, 0.98), ("q5_0", 16, 0.3, 0.95)])
def test_scales_of_either_sign_are_what_llama_cpp_chooses(name: str, half: int, gain: float, same: float) -> None:
    """Its rule: the number of largest magnitude, with its sign, is the lowest code, so that the scale may be
    negative."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    ours, blocks = quantize(weight, lookup(name)), weight.reshape(-1, 32)
    extreme = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scale = (extreme / -half).half().float()
    chosen = ours.scales.choice
    assert chosen is not None
    assert torch.equal(ours.scales.effective().reshape(-1, 1), scale.abs())
    mirrored = chosen.reshape(-1, 1) == 1
    assert float((mirrored == (scale < 0)).float().mean()) > same  # the better of the two, where the other end is near
    theirs = (blocks / scale).round().clamp(-half, half - 1) * scale
    same = (mirrored == (scale < 0)).squeeze(1)
    found = ours.dequantize().reshape(-1, 32)
    assert torch.equal(found[same], theirs[same])
    lost = (found - blocks).square().sum(1), (theirs - blocks).square().sum(1)
    assert bool((lost[0] <= lost[1]).all())
    plain = integer(half.bit_length())
    symmetric = fake_quantize(weight, Format(name="symmetric", elements=(plain,), block=(1, 32), scale=F16))
    assert qsnr(weight, ours.dequantize()) > qsnr(weight, symmetric) + gain


def test_q8_0_is_llama_cpps_own() -> None:
    """Against the `gguf` package, up to a code where it divides by a scale that was not rounded yet."""
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    ours = quantize(weight, lookup("q8_0"))
    blocks = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0).reshape(-1, 34)
    assert torch.equal(ours.scales.stored.reshape(-1), torch.from_numpy(blocks[:, :2].copy()).view(torch.float16)[:, 0])
    codes = torch.from_numpy(blocks[:, 2:].copy()).view(torch.int8)
    apart = (ours.codes.view(torch.int8).reshape(-1, 32).int() - codes.int()).abs()
    assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 0.02
