"""A divided model is the model: outputs, gradients, saved tensors and what follows a step, bit for bit; and its parts
are parts. One process is a group of its own here; `tests/trainers/test_strategy.py` runs two."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qat import sharded
from qat.checkpoints.hf import load_model
from qat.checkpoints.resume import restore_state, restore_student, save_state, student_tensors
from qat.errors import UnsupportedError
from qat.init.calibration import calibrate
from qat.lora import LoraConfig, attach
from qat.modes import served
from qat.scheme import Scheme
from qat.sites import weights
from qat.surgery import apply
from qat.trainers.after_step import AfterStep
from qat.trainers.callbacks import Average
from qat.trainers.optim import OptimConfig, build
from tests.tiny import tiny_model

CPU = torch.device("cpu")
TOKENS = torch.arange(64).view(2, 32) % 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3_moe", tmp_path_factory.mktemp("sharded") / "experts", hidden_size=64)


def student(folder: Path, learn: str = "dual_lsq", weight: str = "nvfp4", input: str | None = "nvfp4") -> Any:
    model = load_model(folder)
    rules = ({"match": "re:.*(_proj|experts.*)", "weight": weight, "input": input}, {"match": "*", "skip": "rest"})
    scheme = Scheme.model_validate({"rules": rules, "learn": learn})
    apply(model, scheme)
    calibrate(model, [{"input_ids": TOKENS}], scheme)
    return model


def loss(model: Any) -> Tensor:
    value: Tensor = model(TOKENS).logits.float().logsumexp(-1).mean()
    return value


def stepped(model: nn.Module, config: OptimConfig) -> Any:
    optimizer = build(model, config)
    loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in student_tensors(model).items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_a_divided_model_is_the_model(folder: Path, one: None, tmp_path: Path) -> None:
    whole, divided = student(folder), student(folder)
    before = snapshot(whole)
    sharded.divide(divided, CPU, 1)
    sharded.divide(divided, CPU, 1)  # which it is already
    assert sharded.is_divided(divided) and not sharded.is_divided(whole) and not sharded.is_divided(None)
    same(student_tensors(divided), before)
    assert student_tensors(divided, keep=False) == {}
    config = OptimConfig(ema=0.5)
    averages = Average(whole, 0.5), Average(divided, 0.5)
    for average in averages:
        average.begin()
    optimizers = [stepped(model, config) for model in (whole, divided)]
    for average in averages:
        average.update(100)
    same(student_tensors(divided), student_tensors(whole))
    assert any(not torch.equal(t, before[n]) for n, t in student_tensors(divided).items())
    with torch.no_grad(), averages[0].applied(), averages[1].applied(), served(whole), served(divided):
        assert sharded.read(divided, lambda: loss(divided)) == loss(whole)
        same(student_tensors(divided), student_tensors(whole))
    same(student_tensors(divided), student_tensors(whole))

    states = []
    for name, model, optimizer, average in zip("ab", (whole, divided), optimizers, averages, strict=True):
        states.append(save_state(tmp_path / name, 1, model, optimizer, average.values, {}))
    for name in ("student", "optimizer", "average"):
        same(*(load_file(state / f"{name}.safetensors") for state in states))
    stepped(divided, config)
    fresh = build(divided, config)
    _, average = restore_state(states[0], divided, fresh)
    same(student_tensors(divided), student_tensors(whole))
    again = save_state(tmp_path / "c", 1, divided, fresh, average, {})
    assert average is not None
    for name in ("student", "optimizer", "average"):
        same(*(load_file(state / f"{name}.safetensors") for state in (states[0], again)))


@pytest.mark.parametrize(("learn", "settings"), [("refit", {"refit_every": 1}), ("lsq", {"cage": {"strength": 100}})])
def test_what_follows_a_step_finds_whole_weights(folder: Path, learn: str, settings: dict[str, Any], one: None) -> None:
    config = OptimConfig.model_validate(settings)
    pair = student(folder, learn, "int4_g32", None), student(folder, learn, "int4_g32", None)
    before = snapshot(pair[0])
    sharded.divide(pair[1], CPU, 1)
    for model in pair:
        AfterStep(model, config, 10)(10, stepped(model, config))
    same(student_tensors(pair[1]), student_tensors(pair[0]))
    moved = {name for name, tensor in student_tensors(pair[1]).items() if not torch.equal(tensor, before[name])}
    assert learn == "lsq" or any(name.endswith(".start") for name in moved)


def test_a_process_holds_its_share(folder: Path, two: None) -> None:
    """Scales, which are buffers otherwise, are divided too; inside a block's and the model's pass tensors are whole."""
    model = student(folder)
    everything = sum(t.numel() for t in student_tensors(model).values())
    shapes = {name: p.shape for name, p in model.named_parameters()}
    sharded.divide(model, CPU, 2)
    own = {name: sharded.share(t).numel() for name, t in model.state_dict(keep_vars=True).items()}
    assert sum(own.values()) < 0.51 * everything
    assert own["model.layers.0.mlp.experts.weight_quantizers.down_proj.start"] > 0
    assert {name: p.shape for name, p in model.named_parameters() if name in shapes} == shapes
    head = model.lm_head
    with sharded.gathered(model):  # before anything ran
        assert all(sharded.share(p).numel() == p.numel() for p in model.parameters())
    assert sharded.read(model, lambda: type(head.weight)) is nn.Parameter
    assert type(head.weight) is not nn.Parameter, "only a share again"
    with sharded.gathered(model):
        assert all(sharded.share(p).numel() == p.numel() for p in model.parameters())
        assert weights(model)["model.layers.0.self_attn.q_proj"].value().shape == (128, 64)


def test_values_are_put_swapped_and_edited(one: None) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]))
    blocks = sharded.blocks(model)
    assert blocks == list(model[1])
    sharded.divide(model, CPU, 1)
    weight = model[0].weight
    values = torch.arange(24.0).view(6, 4)
    sharded.put(weight, values)
    assert torch.equal(sharded.whole(weight), values) and sharded.whole(values) is not None
    with sharded.swapped([(weight, values + 1)]):
        assert torch.equal(sharded.whole(weight), values + 1)
    assert torch.equal(sharded.whole(weight), values)
    inner = blocks[0].weight
    for module in (model, blocks[0], None):
        with sharded.edited(module), torch.no_grad():
            for parameter in (model if module is None else module).parameters():
                if type(parameter) is nn.Parameter:
                    parameter.fill_(7.0)
    assert torch.equal(sharded.whole(inner), torch.full((3, 3), 7.0)) == torch.equal(
        sharded.whole(model[0].weight), torch.full((6, 4), 7.0)
    )
    assert torch.equal(sharded.whole(inner), torch.full((3, 3), 7.0))


def test_adapters_keep_what_they_keep(folder: Path, one: None) -> None:
    """What a run with adapters saves is the same set, though the scales have become parameters."""
    model = load_model(folder)
    rules = ({"match": "*.self_attn.*_proj", "weight": "nvfp4"}, {"match": "*", "skip": "rest"})
    apply(model, Scheme.model_validate({"rules": rules, "learn": "dual_lsq"}))
    attach(model, LoraConfig(rank=2, alpha=4))
    before = snapshot(model)
    assert not any(name.endswith(".start") for name in before)
    sharded.divide(model, CPU, 1)
    same(student_tensors(model), before)
    restore_student(model, {name: tensor + 1 for name, tensor in before.items()})
    same(student_tensors(model), {name: tensor + 1 for name, tensor in before.items()})


def test_models_that_cannot_be_divided() -> None:
    apart = nn.Module()
    apart.layers = nn.ModuleList([nn.Module(), nn.Module()])
    apart.layers[0].experts = nn.ModuleList([nn.Linear(2, 2)])
    assert "each expert as a module of its own" in (sharded.refusal(apart) or "")
    with pytest.raises(UnsupportedError, match="take strategy=ddp"):
        sharded.divide(apart, CPU, 2)
    tied = nn.Module()
    tied.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    tied.layers[1].weight = tied.layers[0].weight
    assert "share weight" in (sharded.refusal(tied) or "")
    assert sharded.refusal(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))) is None
