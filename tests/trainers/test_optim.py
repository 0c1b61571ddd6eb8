"""The learning rate's curve and the optimizer's groups, against numbers worked out by hand."""

import itertools
import math

import pytest
import torch
from torch import nn

from qat.scheme import Rule, Scheme
from qat.surgery import apply
from qat.trainers.optim import OptimConfig, build, schedule


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


def test_frozen_parameters_are_in_no_group() -> None:
    model = nn.Linear(4, 4)
    model.weight.requires_grad_(False)
    (group,) = build(model, OptimConfig()).param_groups
    assert [p is model.bias for p in group["params"]] == [True]
    assert isinstance(group["params"][0], torch.nn.Parameter)
