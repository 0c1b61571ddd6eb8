"""Experts through simulated grouped operators: what was trained, one expert at a time; what is left is named."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import open_export
from qat.checkpoints.layouts.ascend.simulate_experts import SimulatedExperts, problem
from qat.checkpoints.simulated import load_simulated
from qat.cli import main
from qat.numbers.catalog import lookup
from qat.training.activations import fake_quantize_input
from tests.checkpoints.exports import Pair, export_pair, ids, pair_rules, quantized, quiet_export
from tests.qat.adapters.test_experts import KINDS
from tests.tiny import tiny_model

INT8: Pair = ("int8_channel", "int8_token")
INT4: Pair = ("int4_channel", "int8_token")
EXPERTS = "model.layers.0.mlp.experts"


def tiny(kind: str, folder: Path) -> Path:
    return tiny_model(kind, folder / "model", **{**KINDS[kind], "num_hidden_layers": 1})


def routed(experts: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """BF16 tokens, two experts for each, one of which no token is sent to, and their shares."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(24, width, generator=generator).bfloat16()
    chosen = torch.stack([torch.randperm(experts - 1, generator=generator)[:2] + 1 for _ in range(24)])
    return x, chosen, torch.rand(24, 2, generator=generator).bfloat16()


def one_by_one(folder: Path, name: str, x: Tensor, chosen: Tensor, shares: Tensor, pair: Pair = INT8) -> Tensor:
    """Fake quantization of each expert, from its own codes and scales, in float32."""
    exported, token = open_export(folder), lookup(pair[1] or "")

    def times(x: Tensor, matrix: str) -> Tensor:
        tensors = exported.layer(matrix)
        read, codes = fake_quantize_input(x, token, "ascend", "ste", None, "second"), tensors["weight"].float()
        if pair[0] == INT4[0]:  # two rows to a byte, the even one low
            codes = torch.stack((codes % 16, (codes / 16).floor()), dim=1).flatten(0, 1)
            codes = codes - 16 * (codes > 7)
        return read @ (codes * tensors["weight_scale"]).t()

    first, gated, second = NAMES[name]
    total, added = torch.zeros(x.shape), torch.zeros(x.shape)
    for row, (picked, share) in enumerate(zip(chosen, shares, strict=True)):
        for expert, part in zip(picked.tolist(), share.float(), strict=True):
            path = f"{PLACES[name]}.{expert}"
            wide, one = times(x[row].float(), f"{path}.{first}"), times(x[row].float(), f"{path}.{gated}")
            y = part * times(torch.nn.functional.silu(wide) * one, f"{path}.{second}")
            total[row], added[row] = total[row] + y, added[row] + y.abs()
    return total, added


def apart(y: Tensor, truth: Tensor, added: Tensor) -> float:
    """The largest difference of an element over 2^-7 of what was added up and 2^-8 of the root mean square."""
    bound = 2.0**-7 * added + 2.0**-8 * truth.square().mean().sqrt()
    return float(((y.float() - truth).abs() / bound).max())


NAMES = {
    "qwen3_moe": ("gate_proj", "up_proj", "down_proj"),
    "mixtral": ("w1", "w3", "w2"),
    "deepseek_v3": ("gate_proj", "up_proj", "down_proj"),
}
PLACES = {kind: "model.layers.0.block_sparse_moe.experts" if kind == "mixtral" else EXPERTS for kind in NAMES}


@pytest.mark.parametrize(("kind", "pair"), [*((kind, INT8) for kind in NAMES), ("qwen3_moe", INT4), ("mixtral", INT4)])
def test_experts_compute_what_was_trained(kind: str, pair: Pair, tmp_path: Path, capsys: Any) -> None:
    source, out = tiny(kind, tmp_path), tmp_path / "out"
    export_experts(source, out, pair)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_simulated(out)
    (module,) = (each for each in model.modules() if isinstance(each, SimulatedExperts))
    width = int(module.get_buffer("down_proj_weight").shape[-1])
    x, chosen, shares = routed(module.num_experts, width)
    y = module(x, chosen, shares)
    assert y.dtype == torch.bfloat16 and apart(y, *one_by_one(out, kind, x, chosen, shares, pair)) <= 1
    assert torch.equal(module(x.float(), chosen, shares), y.float())
    with torch.no_grad():
        found, wanted = model(ids()).logits, load_exported(out)(ids()).logits
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()
    assert main(["verify", str(out), "--engine", "vllm-ascend", "--json"]) == 0, capsys.readouterr().out


def export_experts(source: Path, out: Path, pair: Pair, target: str = "ascend") -> torch.nn.Module:
    """Export experts of one pair, all else dense; returns the model."""
    rules = [pair_rules(*pair, "*.experts.*"), {"match": "*", "skip": "the rest"}]
    model = quantized(source, rules, activation_rule="ascend")
    quiet_export(model, source, out, target)
    return model


def test_damage_is_seen(tmp_path: Path) -> None:
    """Gates and what they gate exchanged, scales of a neighbour, experts in another order."""
    out = tmp_path / "out"
    export_experts(tiny("qwen3_moe", tmp_path), out, INT8)
    model = load_simulated(out)
    experts: Any = model.get_submodule(EXPERTS)
    x, chosen, shares = routed(experts.num_experts, 128)
    truth = one_by_one(out, "qwen3_moe", x, chosen, shares)
    assert apart(experts(x, chosen, shares), *truth) <= 1
    for name, change in {
        "gate_up_proj_weight": lambda t: t.roll(t.shape[-1] // 2, dims=-1),
        "gate_up_proj_scale": lambda t: t.roll(1, dims=0),
        "down_proj_weight": lambda t: t.flip(0),
        "down_proj_scale": lambda t: t.roll(1, dims=1),
    }.items():
        kept = experts.get_buffer(name).clone()
        experts.get_buffer(name).copy_(change(kept))
        assert apart(experts(x, chosen, shares), *truth) > 10, name
        experts.get_buffer(name).copy_(kept)


class Clipped(torch.nn.SiLU):
    """Told apart by large values alone."""

    def forward(self, gate: Tensor) -> Tensor:
        return super().forward(gate.clamp(max=7.0))


def test_what_is_not_simulated_says_why(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_pair(tiny("qwen3_moe", tmp_path), out, INT8, "ascend", activation_rule="ascend")
    experts: Any = load_exported(out, quantize_inputs=False).get_submodule(EXPERTS)
    int8 = {"W8A8_DYNAMIC"}
    both = {"gate_up_proj": int8, "down_proj": int8}
    assert problem(experts, both) == "" and problem(experts, {"down_proj": int8}) == "only down_proj is quantized"
    assert "W8A8, W8A8_DYNAMIC have" in problem(experts, {**both, "down_proj": {"W8A8"}})
    experts.act_fn = torch.nn.GELU()
    assert problem(experts, both).endswith("has another gate than the operator's")
    experts.act_fn = Clipped()
    assert problem(experts, both).endswith("has another gate than the operator's")
    experts.has_bias = True
    assert problem(experts, both).endswith("adds more to its products than a gate")
