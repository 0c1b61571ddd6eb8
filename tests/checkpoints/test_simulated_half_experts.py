"""Experts of FP16 models through simulated operators of a 310P: what was trained, one expert at a time."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from qat.checkpoints.layouts import open_export
from qat.checkpoints.simulated import load_simulated
from qat.cli import main
from qat.numbers.catalog import lookup
from qat.training.activations import fake_quantize_input
from tests.checkpoints.exports import pair_rules, quantized, quiet_export
from tests.checkpoints.test_simulated_experts import EXPERTS, INT8, apart, routed, tiny

FINER = 1 / 8  # of BF16's bound: FP16 has three bits more


def export_half(source: Path, out: Path) -> None:
    """W8A8_DYNAMIC experts of an FP16 model, all else dense."""
    rules = [pair_rules(*INT8, "*.experts.*"), {"match": "*", "skip": "the rest"}]
    quiet_export(quantized(source, rules, activation_rule="ascend_310p", round_bf16=False), source, out, "ascend")


def one_by_one(folder: Path, x: Tensor, chosen: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Fake quantization of each expert, from its own codes and scales, in float32, and the sizes of what was added up;
    each operator ends in FP16."""
    exported, token = open_export(folder), lookup("int8_token")
    total, added = torch.zeros(x.shape), torch.zeros(x.shape)

    def times(x: Tensor, path: str) -> Tensor:
        tensors = exported.layer(path)
        read = fake_quantize_input(x, token, "ascend_310p", "ste", None, "experts")
        return (read @ (tensors["weight"].float() * tensors["weight_scale"]).t()).half().float()

    for expert in range(int(chosen.max()) + 1):
        path = f"{EXPERTS}.{expert}"
        for row, choice in (chosen == expert).nonzero().tolist():
            wide, one = (times(x[row : row + 1].float(), f"{path}.{name}") for name in ("gate_proj", "up_proj"))
            y = times((silu(wide) * one).half().float(), f"{path}.down_proj")[0] * shares[row, choice].float()
            total[row], added[row] = total[row] + y, added[row] + y.abs()
    return total, added


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x, chosen, shares = routed(4, 128)
    return x.half(), chosen, shares.half()


def test_experts_compute_what_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    export_half(tiny("qwen3_moe", tmp_path), out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experts: Any = load_simulated(out).get_submodule(EXPERTS)
    truth = one_by_one(out, *inputs())
    y = experts(*inputs())
    assert y.dtype == torch.float16 and apart(y, *truth) <= FINER
    for name, change in {
        "gate_up_proj_weight": lambda t: t.roll(t.shape[-1] // 2, dims=-1),
        "gate_up_proj_scale": lambda t: t.roll(1, dims=1),
        "down_proj_weight": lambda t: t.flip(0),
        "down_proj_scale": lambda t: t.roll(1, dims=1),
    }.items():
        kept = experts.get_buffer(name).clone()
        experts.get_buffer(name).copy_(change(kept))
        assert apart(experts(*inputs()), *truth) > 10 * FINER, name
        experts.get_buffer(name).copy_(kept)
    assert main(["verify", str(out), "--engine", "vllm-ascend", "--json"]) == 0, capsys.readouterr().out
