"""Experts with MX weights through simulated grouped operators: what was trained, one expert at a time."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from qat.checkpoints import simulated_experts
from qat.checkpoints.layouts import TARGETS, open_export
from qat.checkpoints.layouts.ascend.simulate_experts import SimulatedExperts
from qat.checkpoints.layouts.ascend.types import find_type
from qat.checkpoints.layouts.ascend.write import tensors_of
from qat.checkpoints.simulated import check_engine, load_simulated
from qat.checkpoints.simulated_experts import Matrix, simulated_and_trained
from qat.cli import main
from qat.numbers.catalog import lookup
from qat.training.activations import fake_quantize_input
from tests.checkpoints.exports import Pair
from tests.checkpoints.test_simulated_experts import EXPERTS, NAMES, PLACES, apart, export_experts, routed, tiny

FP8: Pair = ("mxfp8", "mxfp8")
FP4: Pair = ("mxfp4", "mxfp4")
MIXED: Pair = ("mxfp4", "mxfp8")
NIBBLES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def dense(tensors: dict[str, Tensor]) -> Tensor:
    """float32 values of a stored matrix, by a table of the sixteen codes."""
    codes = tensors["weight"]
    if codes.dtype == torch.uint8:
        table = torch.cat((NIBBLES, -NIBBLES))
        codes = table[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).long()]
    return codes.float() * torch.exp2(tensors["weight_scale"].float() - 127).repeat_interleave(32, dim=1)


def one_by_one(folder: Path, name: str, x: Tensor, chosen: Tensor, shares: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """Fake quantization of each expert's own values in float32, and the sizes of what was added up. Between its
    products numbers are of BF16 where an operator makes them so: after the gate; before it where inputs have more bits
    than weights."""
    exported, input = open_export(folder), lookup(pair[1] or "")

    def read(x: Tensor) -> Tensor:
        return fake_quantize_input(x, input, "ascend", "ste", None, "experts")

    def between(x: Tensor) -> Tensor:
        return x.bfloat16().float() if pair == MIXED else x

    first, gated, second = NAMES[name]
    total, added = torch.zeros(x.shape), torch.zeros(x.shape)
    for expert in range(int(chosen.max()) + 1):
        path = f"{PLACES[name]}.{expert}"
        weights = [dense(dict(exported.layer(f"{path}.{each}"))) for each in (first, gated, second)]
        for row, choice in (chosen == expert).nonzero().tolist():
            inner = read(x[row : row + 1].float())
            wide, one = (between(inner @ each.t()) for each in weights[:2])
            y = shares[row, choice].float() * (read((silu(wide) * one).bfloat16().float()) @ weights[2].t())[0]
            total[row], added[row] = total[row] + y, added[row] + y.abs()
    return total, added


CASES = [("qwen3_moe", FP8), ("qwen3_moe", FP4), ("qwen3_moe", MIXED), ("mixtral", MIXED), ("deepseek_v3", FP4)]


@pytest.mark.parametrize(("kind", "pair"), CASES)
def test_experts_compute_what_was_trained(kind: str, pair: Pair, tmp_path: Path, capsys: Any) -> None:
    source, out = tiny(kind, tmp_path), tmp_path / "out"
    export_experts(source, out, pair)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_simulated(out)
    (module,) = (each for each in model.modules() if isinstance(each, SimulatedExperts))
    width = int(module.get_buffer("down_proj_weight").shape[-1])
    given = routed(module.num_experts, width)
    y = module(*given)
    far = apart(y, *one_by_one(out, kind, *given, pair))
    assert y.dtype == torch.bfloat16 and far <= 1, far
    assert main(["verify", str(out), "--engine", "vllm-ascend", "--json"]) == 0, capsys.readouterr().out


DAMAGE: dict[str, Any] = {
    "gates and what they gate": ("gate_up_proj", lambda t: t.roll(t.shape[-1] // 2, dims=-1)),
    "experts in another order": ("down_proj", lambda t: t.flip(0)),
    "columns as of swapped nibbles": (
        "down_proj",
        lambda t: t.unflatten(1, (-1, 2)).flip(2).flatten(1, 2),
    ),
    "neighbouring groups": ("gate_up_proj", lambda t: t.roll(32, dims=1)),
}


@pytest.mark.parametrize("pair", [FP8, FP4, MIXED])
def test_damage_is_seen(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_experts(tiny("qwen3_moe", tmp_path), out, pair)
    experts: Any = load_simulated(out).get_submodule(EXPERTS)
    given = routed(experts.num_experts, 128)
    truth = one_by_one(out, "qwen3_moe", *given, pair)
    assert apart(experts(*given), *truth) <= 1
    for what, (stack, change) in DAMAGE.items():
        kept = experts.get_buffer(f"{stack}_weight").clone()
        experts.get_buffer(f"{stack}_weight").copy_(change(kept))
        assert apart(experts(*given), *truth) > 10, what
        experts.get_buffer(f"{stack}_weight").copy_(kept)


def test_ties_of_fp4_go_to_even(tmp_path: Path) -> None:
    """Inputs of which every other is halfway between two codes: by the rule of layers, experts are far off."""
    out = tmp_path / "out"
    export_experts(tiny("qwen3_moe", tmp_path), out, FP4)
    experts: Any = load_simulated(out).get_submodule(EXPERTS)
    _, chosen, shares = routed(experts.num_experts, 128)
    x = torch.randint(-12, 13, (24, 128), generator=torch.Generator().manual_seed(5)).bfloat16() / 4
    x[:, ::32] = 4.0  # the scale of every group is 1
    truth, added = one_by_one(out, "qwen3_moe", x, chosen, shares, FP4)
    assert apart(experts(x, chosen, shares), truth, added) <= 1
    away = fake_quantize_input(x.float(), lookup("mxfp4"), "ascend", "ste", None)
    assert apart(experts(away.bfloat16(), chosen, shares), truth, added) > 10


@pytest.mark.parametrize(("target", "pair"), [("ascend", MIXED), ("compressed-tensors", FP4), ("modelopt", FP8)])
def test_verify_compares_whole_experts(target: str, pair: Pair, tmp_path: Path) -> None:
    """Whatever the layout. Gates exchanged with what they gate, and experts with each other, are far off."""
    out, weight, input = tmp_path / "out", lookup(pair[0]), lookup(pair[1] or "")
    export_experts(tiny("qwen3_moe", tmp_path), out, pair, target)
    exported = open_export(out)
    assert "of the bound" in check_engine(exported, "vllm-ascend")
    ((owner, few),) = simulated_experts.lists(exported.modules).items()
    assert owner == EXPERTS and few[1] == tuple(f"{EXPERTS}.1.{name}" for name in NAMES["qwen3_moe"])
    kind = find_type(weight, input)
    assert kind is not None and simulated_experts.lists(["a.experts.0.gate_proj", "a.b"]) == {}
    unpack = TARGETS[target].unpack
    given = [[(unpack(exported.modules[p], exported.layer(p)), exported.multiplied(p)) for p in one] for one in few]
    experts = [[Matrix(tensors_of(kind, q, None), dense) for q, dense in one] for one in given]
    found, *truth = simulated_and_trained(kind, input, "ascend", experts)
    assert apart(found, truth[0], truth[1]) <= 1
    for change in (lambda one: [one[1], one[0], one[2]], lambda one: [*experts[0][:2], one[2]]):
        wrong = [[Matrix(a.tensors, b.dense) for a, b in zip(one, change(one), strict=True)] for one in experts]
        found, *truth = simulated_and_trained(kind, input, "ascend", wrong)
        assert apart(found, truth[0], truth[1]) > 10
