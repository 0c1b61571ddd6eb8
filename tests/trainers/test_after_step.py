"""What follows a step: damping by its formula, refits that read Adam's second moment, each tensor once."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qat.adapters.conv1d import QatConv1D
from qat.lora import LoraConfig
from qat.scheme import Scheme
from qat.sites import weights
from qat.surgery import apply
from qat.trainers.after_step import AfterStep
from qat.trainers.optim import OptimConfig, build
from qat.training.refit import refit
from tests.checkpoints.exports import pair_rules
from tests.qat.twins import packed_and_dense


def trained(learn: str, config: OptimConfig, model: nn.Module | None = None) -> tuple[nn.Module, Any]:
    """A model and its optimizer after one step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)) if model is None else model
    rules = ({"match": "0", "weight": "int4_g32"}, {"match": "*", "skip": "stays"})
    apply(model, Scheme.model_validate({"rules": rules, "learn": learn, "init": []}))
    optimizer = build(model, config)
    model(torch.randn(16, 64)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_damping_pulls_quantized_weights_to_their_grid() -> None:
    config = OptimConfig.model_validate({"lr": 1e-3, "cage": {"strength": 50, "begin": 0.5}})
    model, optimizer = trained("lsq", config)
    after = AfterStep(model, config, 10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after(5, optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    after(8, optimizer)
    site = weights(model)["0"]
    grid = site.quantizer(before["0.weight"]).detach()
    expected = before["0.weight"] - 1e-3 * 50 * 0.6 * (before["0.weight"] - grid)
    torch.testing.assert_close(model.get_parameter("0.weight").detach(), expected)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n != "0.weight")


@pytest.mark.parametrize(("step", "due"), [(1, False), (3, True), (4, False), (7, True)])
def test_refits_come_every_few_steps_and_at_the_last(step: int, due: bool) -> None:
    config = OptimConfig(refit_every=3)
    model, optimizer = trained("refit", config)
    quantizer = weights(model)["0"].quantizer
    weight = model.get_parameter("0.weight")
    start = quantizer.start.clone()
    expected = refit(weight, quantizer.format, quantizer.scales(), optimizer.state[weight]["exp_avg_sq"]).effective()
    assert not torch.equal(expected, start)
    AfterStep(model, config, 7)(step, optimizer)
    assert torch.equal(quantizer.start, expected if due else start)


def test_the_moment_lies_as_the_weight_multiplies() -> None:
    """A stored (columns, rows) weight is refitted as its transposed twin is."""
    from transformers.pytorch_utils import Conv1D

    config = OptimConfig(refit_every=1)
    torch.manual_seed(1)
    linear, conv, last = nn.Linear(64, 32), Conv1D(32, 64), nn.Linear(32, 8)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
        conv.bias.copy_(linear.bias)
    found = []
    for first in (linear, conv):
        model, optimizer = trained("refit", config, nn.Sequential(first, nn.Identity(), copy.deepcopy(last)))
        AfterStep(model, config, 5)(1, optimizer)
        found.append(weights(model)["0"].quantizer.start)
    assert isinstance(model[0], QatConv1D)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("match", ["*.self_attn.*_proj", "*.experts.*"])
def test_what_is_held_packed_is_refitted_as_its_dense_twin(match: str, tmp_path: Path) -> None:
    """A frozen weight has no moment; a stack is refitted matrix by matrix."""
    config = LoraConfig(rank=4, targets=match)
    rules = [pair_rules("int4_g32_asym", None, match), {"match": "*", "skip": "the rest"}]
    pair = packed_and_dense(tmp_path, "qwen3_moe", rules, "refit", config)
    for model in pair:
        before = {path: site.quantizer.start.clone() for path, site in weights(model).items()}
        after = AfterStep(model, OptimConfig(refit_every=1), 5)
        after(1, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0))
        assert all(not torch.equal(site.quantizer.start, before[path]) for path, site in weights(model).items())
    for path, site in weights(pair[0]).items():
        assert torch.equal(site.quantizer.start, weights(pair[1])[path].quantizer.start)
        assert torch.equal(site.quantizer.zero_point, weights(pair[1])[path].quantizer.zero_point)


def test_frozen_weights_are_left_alone() -> None:
    config = OptimConfig.model_validate({"cage": {"strength": 1e3, "begin": 0.0}, "refit_every": 1})
    model, optimizer = trained("refit", config)
    model.get_parameter("0.weight").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    AfterStep(model, config, 5)(5, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
