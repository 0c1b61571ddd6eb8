"""What the catalogue says about formats among each other."""

import torch

from qat.numbers.catalog import CATALOG, lookup, widened
from qat.numbers.numerics import Scales, fake_quantize


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
