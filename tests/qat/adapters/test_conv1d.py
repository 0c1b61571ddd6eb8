"""GPT-2's transposed linear layers against nn.Linear with the same weights."""

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qat.adapters.conv1d import QatConv1D
from qat.init.calibration import calibrate
from qat.modes import dense
from qat.scheme import Scheme
from qat.sites import weights
from qat.surgery import apply
from tests.qat.test_surgery import batches, ids, logits


@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (128, 128)])
@pytest.mark.parametrize(("weight", "input"), [("int4_g32", None), ("nvfp4", "nvfp4"), ("fp8_b128", "fp8_g128")])
def test_it_computes_what_a_linear_layer_with_the_transposed_weight_does(
    rows: int, columns: int, weight: str, input: str | None
) -> None:
    torch.manual_seed(0)
    given, linear = Conv1D(rows, columns), nn.Linear(columns, rows)
    with torch.no_grad():
        given.weight.copy_(torch.randn(columns, rows))
        linear.weight.copy_(given.weight.T)
        linear.bias.copy_(given.bias.normal_())
    scheme = Scheme(
        rules=[{"match": "*", "weight": weight, "input": input}], init=["gptq"] if weight != "fp8_b128" else []
    )
    x = torch.randn(2, 16, columns)
    outputs = []
    for layer in (given, linear):
        model = apply(nn.Sequential(layer), scheme)
        calibrate(_Called(model), [{"input": x}] * 2, scheme)
        x_in = x.clone().requires_grad_()
        y = model(x_in)
        y.square().sum().backward()
        outputs.append((y, x_in.grad, next(iter(weights(model).values())).parameter.grad))
    assert isinstance(given, Conv1D)
    torch.testing.assert_close(outputs[0][0], outputs[1][0])
    torch.testing.assert_close(outputs[0][1], outputs[1][1])
    torch.testing.assert_close(outputs[0][2].T, outputs[1][2])


class _Called(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.model(input)


def test_gpt2_is_quantized_trained_and_given_back() -> None:
    config = CONFIG_MAPPING["gpt2"](vocab_size=96, n_embd=128, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    before = logits(model)
    scheme = Scheme(
        rules=[{"match": "*.h.*", "weight": "int4_g32", "input": "int8_token"}, {"match": "*", "skip": "x"}]
    )
    apply(model, scheme)
    calibrate(model, batches(), scheme)
    assert len(weights(model)) == 8 and all(isinstance(site.owner, QatConv1D) for site in weights(model).values())
    assert not torch.equal(logits(model), before)
    with dense(model, inputs=True):
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
