"""The learning rate's curve and the optimizer's groups, against numbers worked out by hand."""

import itertools
import math

import pytest
import torch
from torch import nn

from qat.errors import ConfigError
from qat.lora import LoraConfig, attach
from qat.scheme import Rule, Scheme
from qat.surgery import apply
from qat.trainers.optim import Cage, OptimConfig, build, freeze, schedule


def test_rate_rises_over_the_warmup_and_falls_on_a_cosine() -> None:
    config = OptimConfig(warmup=0.1, final=0.25)
    rates = [schedule(config, step, 40) for step in range(41)]
    for step in range(4):  # a tenth of 40 steps
        assert rates[step] == pytest.approx((step + 1) / 4 * (0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * step / 40))))
    assert rates[20] == pytest.approx(0.25 + 0.75 / 2)  # half way down the cosine
    assert rates[40] == pytest.approx(0.25)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


def test_first_step_moves_even_without_a_warmup() -> None:
    assert schedule(OptimConfig(warmup=0.0), 0, 10) == 1.0
    assert schedule(OptimConfig(warmup=1.0), 0, 10) == pytest.approx(0.1)


def test_scales_have_their_own_rate_and_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8))
    apply(model, Scheme(rules=(Rule(match="0", weight="int4_g32"),), learn="dual_lsq"))
    optimizer = build(model, OptimConfig(lr=2e-4, scale_lr=3e-3, weight_decay=0.5))
    groups = {group["kind"]: group for group in optimizer.param_groups}
    sizes = {kind: sorted(tuple(p.shape) for p in group["params"]) for kind, group in groups.items()}
    assert sizes == {"weight": [(8, 32)], "flat": [(8,), (8,), (8,)], "scale": [(8, 1), (8, 1)]}
    assert {kind: (group["lr"], group["weight_decay"]) for kind, group in groups.items()} == {
        "weight": (2e-4, 0.5),
        "flat": (2e-4, 0.0),
        "scale": (3e-3, 0.0),
    }


def test_adapters_have_ten_times_the_rate_and_no_decay() -> None:
    model = nn.Sequential(nn.Linear(32, 8))
    apply(model, Scheme(rules=(Rule(match="0", weight="int4_g32"),), learn="none"))
    attach(model, LoraConfig(rank=2, dora=True))
    for given, expected in ((None, 2e-3), (5e-3, 5e-3)):
        (group,) = build(model, OptimConfig(lr=2e-4, lora_lr=given, weight_decay=0.5)).param_groups
        assert group["kind"] == "lora" and group["lr"] == pytest.approx(expected) and group["weight_decay"] == 0.0
        assert [tuple(p.shape) for p in group["params"]] == [(2, 32), (8, 2), (8,)]


def test_frozen_parameters_are_in_no_group() -> None:
    model = nn.Linear(4, 4)
    model.weight.requires_grad_(False)
    (group,) = build(model, OptimConfig()).param_groups
    assert [p is model.bias for p in group["params"]] == [True]
    assert isinstance(group["params"][0], torch.nn.Parameter)


def test_a_line_falls_evenly_to_its_end() -> None:
    config = OptimConfig(warmup=0.0, decay="linear", final=0.0)
    assert [schedule(config, step, 8) for step in (0, 2, 6, 8)] == pytest.approx([1.0, 0.75, 0.25, 0.0])


def test_damping_is_silent_and_then_rises_on_a_line() -> None:
    cage = Cage(strength=10, begin=0.8)
    assert [cage.pull(step, 100) for step in (1, 80, 85, 90, 100)] == pytest.approx([0, 0, 2.5, 5, 10])
    assert Cage().pull(100, 100) == 0.0


def quantized(learn: str = "lsq") -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8))
    rules = ({"match": "0", "weight": "int4_g32", "input": "int8_tensor"},)
    return apply(model, Scheme.model_validate({"rules": rules, "learn": learn, "learn_inputs": learn != "none"}))


@pytest.mark.parametrize(
    ("train", "kinds"),
    [("all", {"weight", "flat", "scale"}), ("scales", {"scale"}), ("scales_and_norms", {"flat", "scale"})],
)
def test_what_is_trained_can_be_scales_alone(train: str, kinds: set[str]) -> None:
    model = quantized()
    config = OptimConfig.model_validate({"train": train, "norm_lr": 7e-4})
    freeze(model, config)
    groups = {group["kind"]: group for group in build(model, config).param_groups}
    assert groups.keys() == kinds
    assert len(groups["scale"]["params"]) == 2  # the weight's, and the range of its input
    assert "flat" not in groups or groups["flat"]["lr"] == 7e-4


def test_scales_alone_need_some_that_learn() -> None:
    with pytest.raises(ConfigError, match=r"optim\.train: scales, but the scheme learns none"):
        freeze(quantized("none"), OptimConfig(train="scales"))


@pytest.mark.parametrize("rate", [0, -1.0, "automatic"])
def test_rates_are_positive_or_auto(rate: object) -> None:
    with pytest.raises(ValueError, match="lr"):
        OptimConfig.model_validate({"lr": rate})
    assert OptimConfig.model_validate({"lr": "auto"}).lr == "auto"
    with pytest.raises(ConfigError, match="is settled by a run"):
        _ = OptimConfig(lr="auto").peak
