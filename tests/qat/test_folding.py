"""A bias in whole numbers: a trained layer computes what an NPU's static integer product does with its tensors."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qat.folding import added_bias
from qat.modes import dense
from qat.numbers.catalog import lookup
from qat.quantizer import InputQuantizer, WeightQuantizer
from qat.scheme import Scheme
from qat.surgery import apply
from qat.training.npu import NPU_RULES

RANGES = {"int8_tensor_asym": [-1.0, 3.0], "int8_tensor": 3.0}


def quantized(input: str, rule: str = "ascend") -> nn.Module:
    """One layer with a bias that is far from multiples of its scales."""
    model = nn.Sequential(nn.Linear(64, 24))
    with torch.no_grad():
        model[0].bias.copy_(torch.linspace(-3, 3, 24))
    rules = [{"match": "*", "weight": "int8_channel", "input": input}]
    apply(model, Scheme(rules=rules, learn="none", init=(), activation_rule=rule))
    layer = model[0]
    assert isinstance(layer.input_quantizer, InputQuantizer)
    if layer.input_quantizer.needs_calibration:
        layer.input_quantizer.amax.copy_(torch.tensor(RANGES[input]))
    return layer


def parts(layer: nn.Module) -> tuple[WeightQuantizer, InputQuantizer]:
    weight, input = layer.weight_quantizer, layer.input_quantizer
    assert isinstance(weight, WeightQuantizer) and isinstance(input, InputQuantizer)
    return weight, input


@pytest.mark.parametrize("input", RANGES)
def test_a_layer_is_a_product_of_whole_numbers(input: str) -> None:
    """npu_quant_matmul: (codes of x times codes of w + quant_bias) * deq_scale, in float64 from Python's integers."""
    layer = quantized(input)
    weight, read = parts(layer)
    static = read.static()
    assert static is not None
    scale, offset = float(static[0]), int(static[1]) if static.numel() > 1 else 0
    reciprocal = float((1 / static[0].bfloat16()).bfloat16())
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    codes = (x.double() * reciprocal + offset).round().clamp(-128, 127).long()
    q = weight.quantize(layer.get_parameter("weight"))
    rows, deq = q.codes.view(torch.int8).long(), q.scales.effective().double().flatten() * scale
    bias = layer.get_parameter("bias").detach()
    quant_bias = (bias.double() / deq).round().long() - offset * rows.sum(dim=1)
    wanted = (codes @ rows.t() + quant_bias) * deq
    with torch.no_grad():
        found = layer(x)
    assert torch.equal(found, found.bfloat16().float())
    assert torch.allclose(found.double(), wanted, rtol=2**-8, atol=1e-6)  # rounded once, to BF16
    added = added_bias(bias, weight, read)
    assert added is not None and not torch.equal(added, bias)
    assert torch.allclose(added.double(), (quant_bias + offset * rows.sum(dim=1)) * deq, rtol=1e-6, atol=0)
    assert ((added - bias).abs() <= deq / 2 * 1.001).all()


@pytest.mark.parametrize(("rule", "type"), NPU_RULES.items())
def test_results_are_numbers_of_the_model(rule: str, type: torch.dtype) -> None:
    """Of both kinds of layers, while they are quantized; gradients are not rounded."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    rules = [{"match": "*", "weight": "int8_channel", "input": "int8_token"}]
    for layer in (nn.Linear(64, 24), Conv1D(24, 64)):
        model = apply(nn.Sequential(layer), Scheme(rules=rules, learn="none", init=(), activation_rule=rule))
        y = model(x)
        assert torch.equal(y, y.to(type).float())
        y.backward(gradient := torch.randn(5, 24))
        assert torch.allclose(model[0].bias.grad, gradient.sum(dim=0), atol=1e-6)
        with dense(model):
            y = model(x)
        assert not torch.equal(y, y.to(type).float())


def test_the_gradient_of_a_bias_passes_the_rounding() -> None:
    layer = quantized("int8_tensor_asym")
    layer(torch.randn(5, 64)).sum().backward()
    assert torch.equal(layer.get_parameter("bias").grad, torch.full((24,), 5.0))


@pytest.mark.parametrize("input", ["int8_token", "int8_tensor"])
def test_a_bias_stays_where_no_engine_folds_it(input: str) -> None:
    layer = quantized(input, "ascend" if input == "int8_token" else "vllm")
    bias = layer.get_parameter("bias")
    assert added_bias(bias, *parts(layer)) is bias and added_bias(None, *parts(layer)) is None
    assert added_bias(bias, parts(layer)[0], None) is bias


def test_a_bias_stays_where_nothing_is_rounded() -> None:
    layer = quantized("int8_tensor")
    bias, (weight, input) = layer.get_parameter("bias"), parts(layer)
    for which in ({}, {"inputs": True, "weights": False}):
        with dense(layer, **which):
            assert added_bias(bias, weight, input) is bias
    input.observe()
    assert added_bias(bias, weight, input) is bias
    input.cancel()
    assert added_bias(bias, weight, input) is not bias
    assert lookup("int8_tensor").is_static
