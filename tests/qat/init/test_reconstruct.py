"""Reconstruction of blocks: the error falls, weights stay within a step of their grid, and nothing gets worse."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.init.blocks import walk
from qat.init.calibration import calibrate, initialise, observe
from qat.init.gptq import Gptq
from qat.init.reconstruct import Reconstruct, spacing
from qat.init.step import Calibration
from qat.numbers.numerics import fake_quantize
from qat.sites import weights
from qat.surgery import apply
from tests.qat.test_surgery import MOE, batches, build, logits, rules, usual


def begun(weight: str = "int3_g64", input: str | None = None) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A model with scales, and its text."""
    scheme = usual(weight, input)
    model, text = apply(build(), scheme), list(batches(2)) * 4  # what is kept back is learned from too
    calibrate(model, text, scheme)
    return model, text


def reconstructed(model: nn.Module, text: list[dict[str, Tensor]], **settings: Any) -> str | None:
    """What it says."""
    return walk(Calibration(model, text, weights(model), {}), [Reconstruct(**settings)])[0]


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("weight", "input"), [("int3_g64", None), ("nvfp4", "nvfp4"), ("mxfp4", "int8_token")])
def test_outputs_come_closer_to_those_of_the_dense_model(weight: str, input: str | None) -> None:
    wanted, found = logits(build()), []
    for steps in ((), (Reconstruct(steps=40),)):
        model, text = begun(weight, input)
        said = walk(Calibration(model, text, weights(model), {}), [Gptq(sequential=True), *steps])
        found.append(float((logits(model) - wanted).square().mean()))
    assert str(said[-1]).startswith("reconstruct: 2 of 2 blocks improved on the text kept back")
    assert found[1] < 0.95 * found[0]


def test_weights_move_by_one_step_of_their_grid_at_most_and_nothing_else_moves_where_nothing_else_learns() -> None:
    model, text = begun()
    before, units = states(model), {path: spacing(site) for path, site in weights(model).items()}
    reconstructed(model, text, steps=30, lr=0.1, scale_lr=0.0, norm_lr=0.0)
    after = states(model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and changed <= {f"{path}.weight" for path in units}
    for path, unit in units.items():
        assert ((after[f"{path}.weight"] - before[f"{path}.weight"]).abs() <= unit * (1 + 1e-6)).all()


def test_what_gets_worse_on_the_text_kept_back_is_left_alone() -> None:
    model, text = begun()
    before = states(model)
    said = reconstructed(model, text, steps=4, lr=0.0, scale_lr=3.0, norm_lr=3.0)
    assert said == "reconstruct: 0 of 2 blocks improved on the text kept back, to 100% of their error on average"
    assert all(torch.equal(tensor, before[name]) for name, tensor in states(model).items())


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int4_g64", "int4_g32_asym", "int3_g64"])
def test_a_step_of_the_grid_reaches_the_next_value(name: str) -> None:
    model, _ = begun(name)
    site = weights(model)["model.layers.0.mlp.up_proj"]
    fmt, scales = site.format, site.quantizer.scales()
    values = fake_quantize(site.weight, fmt, scales)
    sign = torch.where(values > 0, -1.0, 1.0)  # away from the end of the range
    moved = fake_quantize(site.weight + sign * spacing(site), fmt, scales)
    assert ((moved - values).abs() > 0).float().mean() > 0.95  # where the gap is wider on the other side it may stay
    assert ((moved - values).abs() <= 2.01 * spacing(site)).all()


def test_experts_and_a_single_batch_are_reconstructed_too() -> None:
    scheme = rules(("*_proj", "int3_g32"), ("*", None))
    model = apply(build("qwen3_moe", **MOE), scheme)
    text = list(batches(1))
    observe(model, text)
    said = reconstructed(model, text, steps=20)
    assert said is not None and said.startswith("reconstruct: 1 of 1 blocks improved")


def test_alone_it_begins_at_the_scales_of_round_to_nearest() -> None:
    scheme = usual("int4_g64").model_copy(update={"init": (Reconstruct(steps=2, lr=0.0, norm_lr=0.0),)})
    model, text = apply(build(), scheme), list(batches())
    said = initialise(model, text, scheme, observe(model, text))
    plain = apply(build(), scheme.rtn())
    assert said and all(
        torch.equal(site.quantizer.start, weights(plain)[path].quantizer.start) for path, site in weights(model).items()
    )
