"""What follows a step follows any optimizer that moves the model, counts on after a resume, and ends with the model."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from qat.errors import ConfigError
from qat.scheme import Scheme
from qat.sites import weights
from qat.surgery import apply
from qat.trainers.after_step import AfterStep
from qat.trainers.optim import OptimConfig, build, parameter_groups
from qat.trainers.step_hook import StepHook

RULES = ({"match": "0", "weight": "int4_g32"}, {"match": "*", "skip": "stays"})


def model(learn: str = "refit") -> nn.Module:
    torch.manual_seed(0)
    built = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    return apply(built, Scheme.model_validate({"rules": RULES, "learn": learn, "init": []}))


def step(trained: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    trained(torch.randn(16, 64)).square().sum().backward()
    optimizer.step()


def values(trained: nn.Module) -> list[torch.Tensor]:
    return [t.detach().clone() for t in trained.state_dict().values()]


def curves(config: OptimConfig, learn: str, hooked: bool, steps: int = 6) -> list[torch.Tensor]:
    """A few steps, with the hook or with the trainer's own calls."""
    trained = model(learn)
    optimizer = build(trained, config)
    if hooked:
        StepHook(trained, config, steps)
    after = AfterStep(trained, config, steps)
    torch.manual_seed(1)
    for number in range(1, steps + 1):
        step(trained, optimizer)
        if not hooked:
            after(number, optimizer)
    return values(trained)


def test_it_does_what_our_own_trainer_does() -> None:
    plain = OptimConfig(lr=1e-2, refit_every=100)
    for learn, config in (
        ("refit", OptimConfig(lr=1e-2, refit_every=4)),
        ("lsq", OptimConfig.model_validate({"lr": 1e-2, "cage": {"strength": 30, "begin": 0.5}})),
    ):
        own, hooked = curves(config, learn, False), curves(config, learn, True)
        assert all(map(torch.equal, own, hooked))
        assert not all(map(torch.equal, hooked, curves(plain, learn, True, steps=6)))


def test_damping_has_the_rate_of_the_weight_whatever_the_groups_are_called() -> None:
    config = OptimConfig.model_validate({"lr": 1e-2, "cage": {"strength": 30, "begin": 0.0}})
    found = []
    for named in (True, False):
        trained = model("lsq")
        groups: list[dict[str, Any]] = parameter_groups(trained, config)
        if not named:
            groups = [{key: value for key, value in group.items() if key in ("params", "lr")} for group in groups]
        optimizer = torch.optim.SGD(groups)
        StepHook(trained, config, 3)
        torch.manual_seed(1)
        for _ in range(2):
            step(trained, optimizer)
        found.append(values(trained))
    assert all(map(torch.equal, *found))


def test_damping_wants_one_rate() -> None:
    trained = apply(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)), _both())
    groups = [{"params": [layer.weight], "lr": rate} for layer, rate in zip(trained, (0.1, 0.2), strict=True)]
    config = OptimConfig.model_validate({"cage": {"strength": 1, "begin": 0.0}})
    StepHook(trained, config, 3)
    with pytest.raises(ConfigError, match=r"several \(0\.1, 0\.2\)"):
        step(trained, torch.optim.SGD(groups))


def _both() -> Scheme:
    return Scheme.model_validate({"rules": [{"match": "*", "weight": "int4_g32"}], "init": []})


def test_a_resumed_optimizer_counts_on() -> None:
    config = OptimConfig(lr=1e-2, refit_every=5)
    trained = model()
    optimizer = build(trained, config)
    for _ in range(3):
        step(trained, optimizer)
    other = model()
    other.load_state_dict(trained.state_dict())
    resumed = build(other, config)
    resumed.load_state_dict(optimizer.state_dict())
    StepHook(other, config, None)
    starts = []
    for _ in range(3):
        step(other, resumed)
        starts.append(weights(other)["0"].quantizer.start.clone())
    assert not torch.equal(starts[0], starts[1]) and torch.equal(starts[1], starts[2])  # steps 4, 5 and 6


def test_other_optimizers_are_left_alone_and_nothing_outlives_the_model() -> None:
    gc.collect()
    hooks = len(_global_optimizer_post_hooks)
    trained, stranger = model(), nn.Linear(4, 4)
    StepHook(trained, OptimConfig(refit_every=1), None)
    before = values(trained)
    other = torch.optim.SGD(stranger.parameters(), lr=0.1)
    stranger(torch.ones(1, 4)).sum().backward()
    other.step()
    assert all(map(torch.equal, before, values(trained)))
    optimizer = build(trained, OptimConfig())
    step(trained, optimizer)
    assert not all(map(torch.equal, before, values(trained)))
    assert len(_global_optimizer_post_hooks) == hooks + 1
    gone = weakref.ref(trained)
    del trained, optimizer
    gc.collect()
    assert gone() is None and len(_global_optimizer_post_hooks) == hooks
