"""The modes of a whole model: unquantized, as served, and what remains afterwards."""

import pytest
import torch

from qat.modes import dense, served
from qat.quantizer import WeightQuantizer
from qat.surgery import apply
from tests.qat.test_surgery import build, logits, usual


def test_dense_is_the_original_model_and_ends_cleanly() -> None:
    original = logits(build())
    model = apply(build(), usual("int3_g64"))
    quantized = logits(model)
    with dense(model):
        assert torch.equal(logits(model), original)
        with dense(model):  # calibration inside a measurement
            assert torch.equal(logits(model), original)
        assert torch.equal(logits(model), original)
    assert torch.equal(logits(model), quantized)
    with pytest.raises(RuntimeError, match="inside"), dense(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), quantized) and not torch.equal(quantized, original)
    assert all(m.mode == "quantized" for m in model.modules() if isinstance(m, WeightQuantizer))


def test_one_half_is_dense_and_stays_so_when_served() -> None:
    """On a CPU `served` rounds weights once: not those that are dense."""
    original, both = build(), apply(build(), usual("int3_g64", "int4_token"))
    plain = logits(original)
    with dense(both, inputs=True), served(both):
        dense_as_served = logits(both)
    with served(original):
        assert not torch.equal(logits(original), plain)  # it rounds to BF16
    for parameter, other in zip(original.parameters(), build().parameters(), strict=True):
        assert torch.equal(parameter, other)
    only_weights = logits(apply(build(), usual("int3_g64")))
    with dense(both, inputs=True, weights=False):
        assert torch.equal(logits(both), only_weights)
    with dense(both):
        assert not torch.equal(logits(both), plain) and not torch.equal(logits(both), only_weights)
    with torch.no_grad():
        assert (dense_as_served - plain).abs().max() < 0.1 * (only_weights - plain).abs().max()


def test_served_rounds_what_is_stored_in_bf16_and_restores_it() -> None:
    model = apply(build(), usual("nvfp4"))
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    plain = logits(model)
    with served(model):
        for name, parameter in model.named_parameters():
            quantized = ".weight_quantizer." in name or "_proj" in name
            expected = before[name][1] if quantized else before[name][1].bfloat16().float()
            assert torch.equal(parameter, expected), name
        assert not torch.equal(logits(model), plain)
    with pytest.raises(RuntimeError, match="inside"), served(model):
        raise RuntimeError("inside")
    for name, parameter in model.named_parameters():
        assert (parameter.data_ptr(), True) == (before[name][0], torch.equal(parameter, before[name][1]))
    assert torch.equal(logits(model), plain)


def test_served_rounds_a_weight_once_and_nested_modes_return() -> None:
    model = apply(build(), usual("int3_g64"))
    with served(model):
        first = logits(model)
        with dense(model):
            assert not torch.equal(logits(model), first)
        assert torch.equal(logits(model), first)
        assert any(m._value is not None for m in model.modules() if isinstance(m, WeightQuantizer))
    assert all(m._value is None for m in model.modules() if isinstance(m, WeightQuantizer))
