"""Samples: real inputs of each weight, statistics of all, and the loss of a product against plain arithmetic."""

import torch
from torch import Tensor

from qat.init.calibration import observe
from qat.init.samples import ROWS, TOKENS, Products, portions, samples, some_rows
from qat.numbers.numerics import find_scales, quantize
from qat.sites import weights
from qat.surgery import apply
from tests.qat.init.test_calibration import inputs_of
from tests.qat.test_surgery import batches, build, usual


def test_samples_are_rows_of_what_weights_read() -> None:
    model = apply(build(), usual("nvfp4", "nvfp4"))
    mean_square = observe(model, batches())
    seen = samples(model, batches(), list(weights(model)))
    assert set(seen) == set(weights(model))
    attention = "model.layers.1.self_attn."
    assert seen[attention + "q_proj"] is seen[attention + "v_proj"] is not seen[attention + "o_proj"]
    for path in (attention + "k_proj", "model.layers.0.mlp.down_proj"):
        everything = inputs_of(build(), path)
        assert len(everything) < TOKENS and torch.equal(seen[path].x, everything)  # so little text is taken whole
        assert torch.equal(seen[path].amax, everything.abs().amax(dim=0))
        torch.testing.assert_close(seen[path].mean_square, mean_square[path])


def test_long_text_gives_tokens_at_even_distances() -> None:
    model = apply(build(), usual("int4_g64"))
    text = [{"input_ids": torch.arange(1200).view(2, 600) % 95}]
    path = "model.layers.0.self_attn.q_proj"
    sample = samples(model, text, [path])[path]
    assert sample.x.shape == (TOKENS, 128) and len(sample.x.unique(dim=0)) > 90


def test_what_a_product_loses() -> None:
    model = apply(build(), usual("nvfp4", "mxfp4"))
    path = "model.layers.0.mlp.down_proj"
    site, sample = weights(model)[path], samples(model, batches(), [path])[path]
    x, w = sample.x, site.weight.detach()
    exact = x.double() @ w.double().t()
    got = quantize(x, site.input.format, find_scales(x, site.input.format)).dequantize().double()
    got = got @ quantize(w, site.format, find_scales(w, site.format)).dequantize().double().t()
    expected = float((got - exact).square().sum() / exact.square().sum())

    def same(t: Tensor) -> Tensor:
        return t

    for count in (1, 2):
        total = Products(sample, [site] * count).lost(same, same, sample.amax.amax())
        assert abs(float(total) / expected - count) < 1e-3
    # a power of two changes nothing
    total = Products(sample, [site]).lost(lambda t: t * 2, lambda t: t / 2, sample.amax.amax() / 2)
    assert abs(float(total) / expected - 1) < 1e-3


def test_rows_of_a_stack_and_portions() -> None:
    stack = torch.arange(4 * 300 * 2.0).view(4, 300, 2)
    rows = some_rows(stack)
    assert rows.shape == (ROWS, 2) and rows[-1, 0] > 1000
    model = apply(build(), usual())
    groups = {path: [path] for path in weights(model)}
    assert [list(part) for part in portions(groups, model)] == [list(groups)]
