"""Exports through simulated NPU operators: what was trained, within the bound; damaged layers far outside of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import open_export
from qat.checkpoints.layouts.ascend.simulate import SimulatedLinear
from qat.checkpoints.layouts.ascend.types import BY_NAME, Type, find_type
from qat.checkpoints.layouts.ascend.write import fold_bias, tensors_of
from qat.checkpoints.layouts.fp8.simulate import DenseLinear
from qat.checkpoints.simulated import check_engine, distance, is_simulated, load_simulated
from qat.cli import main
from qat.errors import CheckpointError
from qat.numbers.catalog import lookup
from qat.numbers.numerics import QTensor, quantize
from qat.training.activations import fake_quantize_input, static_part
from qat.training.phases import answering
from tests.checkpoints.exports import Pair, export_pair, ids, rewrite
from tests.checkpoints.layouts.test_ascend import ALL, PAIRS
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("source") / "model", num_hidden_layers=1)


def layer(pair: Pair) -> tuple[Type, QTensor, Tensor | None, Tensor]:
    """A type, a weight of it, what is stored of its input, and inputs in BF16."""
    weight, input = lookup(pair[0]), lookup(pair[1]) if pair[1] else None
    kind = find_type(weight, input)
    assert kind is not None
    generator = torch.Generator().manual_seed(5)
    q = quantize(torch.randn(96, 192, generator=generator) * 0.05, weight)
    affine = input is not None and input.zero_point
    amax = torch.tensor([-1.0, 3.0]) if affine else torch.tensor(3.0)
    static = static_part(input, amax) if input is not None else None
    x = torch.randn(24, 192, generator=generator) + (1.0 if affine else 0.0)
    return kind, q, static, x.bfloat16()


def expected(pair: Pair, q: QTensor, static: Tensor | None, x: Tensor) -> Tensor:
    """Fake quantization in float32, with the BF16 weight that training multiplies with."""
    wide = x.float()
    read = fake_quantize_input(wide, lookup(pair[1]), "ascend", "ste", static) if pair[1] else wide
    return read @ q.dequantize(torch.bfloat16).float().t()


@pytest.mark.parametrize(("kind", "pair"), ALL)
def test_a_layer_computes_what_was_trained(kind: str, pair: Pair) -> None:
    found, q, static, x = layer(pair)
    assert found.name == kind
    simulated = SimulatedLinear(found, tensors_of(found, q, static))
    y = simulated(x)
    assert y.dtype == torch.bfloat16 and distance(y.float(), expected(pair, q, static, x)) <= 1
    assert torch.equal(simulated(x.float().view(4, 6, 192)), y.float().view(4, 6, 96))


def test_prompts_and_answers_of_a_mixed_type() -> None:
    """The same tensors: static inputs for answers, with the folded bias; dynamic ones for prompts, with the bias."""
    pair = PAIRS["W8A8_MIX"][0]
    found, q, static, x = layer(pair)
    bias = torch.linspace(-2, 2, 96)
    tensors = fold_bias(tensors_of(found, q, static), bias)
    simulated, other = SimulatedLinear(found, tensors, bias), SimulatedLinear(BY_NAME["W8A8"], tensors)
    token = SimulatedLinear(BY_NAME["W8A8_DYNAMIC"], tensors, bias)
    assert simulated.mixes and not other.mixes
    with answering("answer"):
        assert torch.equal(simulated(x), other(x)) and not torch.equal(simulated(x), token(x))
        assert distance(simulated(x).float(), expected(pair, q, static, x) + bias) <= 1
    with answering("prompt"):
        assert torch.equal(simulated(x), token(x))
        assert distance(simulated(x).float(), expected(pair, q, static, x) + bias) <= 1
    mask = (torch.arange(24) % 3 == 0).view(4, 6)
    with answering(lambda: mask):
        both = simulated(x.view(4, 6, -1)).view(24, -1)
    assert torch.equal(both, torch.where(mask.view(-1, 1), other(x), token(x)))
    assert torch.equal(simulated(x.view(24, 1, -1)).view(24, -1), other(x)) and torch.equal(simulated(x), token(x))


def swapped(tensors: dict[str, Tensor]) -> None:
    tensors["weight"] = (tensors["weight"] & 15) << 4 | tensors["weight"] >> 4


def shifted(tensors: dict[str, Tensor]) -> None:
    tensors["weight_scale"] = tensors["weight_scale"].roll(1, dims=1 if tensors["weight_scale"].shape[1] > 1 else 0)


def wrong_sign(tensors: dict[str, Tensor]) -> None:
    tensors["input_offset"] = -tensors["input_offset"]


def unfolded(tensors: dict[str, Tensor]) -> None:
    tensors["quant_bias"] = torch.zeros_like(tensors["quant_bias"])


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("W4A4_MXFP4", swapped),
        ("W4A8_MXFP", swapped),
        ("W4A4_MXFP4", shifted),
        ("W8A8_MXFP8", shifted),
        ("W8A8_DYNAMIC", shifted),
        ("W8A16", shifted),
        ("W8A8", wrong_sign),
        ("W8A8", unfolded),
    ],
)
def test_damage_is_seen(kind: str, damage: Callable[[dict[str, Tensor]], None]) -> None:
    pair = PAIRS[kind][0]
    found, q, static, x = layer(pair)
    tensors = tensors_of(found, q, static)
    damage(tensors)
    assert distance(SimulatedLinear(found, tensors)(x).float(), expected(pair, q, static, x)) > 10


def test_a_bias_is_added() -> None:
    for kind in ("W8A8_DYNAMIC", "W8A16", "W4A4_DYNAMIC", "W4A4_MXFP4"):
        found, q, static, x = layer(PAIRS[kind][0])
        bias = torch.arange(96).float()
        plain, added = (SimulatedLinear(found, tensors_of(found, q, static), b)(x).float() for b in (None, bias))
        assert torch.allclose(added, plain + bias, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("pair", [PAIRS["W8A8"][0], PAIRS["W4A4_MXFP4"][0], PAIRS["W8A8_MIX"][0]])
def test_a_model_and_its_check(pair: Pair, source: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    export_pair(source, out, pair, "ascend", activation_rule="ascend")
    assert is_simulated(out)
    model, plain = load_simulated(out), load_exported(out)
    assert sum(isinstance(module, SimulatedLinear) for module in model.modules()) == 7
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SimulatedLinear):
            module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    with torch.no_grad():
        model(ids())
        moved = [(plain.get_submodule(name)(x) != y).float().mean() for name, (x, y) in seen.items()]
    assert len(moved) == 7 and max(moved) < 1e-3  # at the edge of two BF16 numbers: sums of integers are exact
    assert main(["verify", str(out), "--engine", "vllm-ascend", "--json"]) == 0
    checks = {check["name"]: check["detail"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["vllm-ascend"].startswith("7 layers load on " + ("a2, a3" if pair[0] == "int8_channel" else "950"))


def test_folded_and_added_biases(tmp_path: Path, capsys: Any) -> None:
    source = tiny_model("qwen2", tmp_path / "source", num_hidden_layers=1)
    for kind, limit in {"W8A8": 0.05, "W8A8_DYNAMIC": 0.05, "W4A4_DYNAMIC": 0.5}.items():
        trained = export_pair(source, tmp_path / kind, PAIRS[kind][0], "ascend", activation_rule="ascend")
        assert main(["verify", str(tmp_path / kind), "--engine", "vllm-ascend", "--json"]) == 0, capsys.readouterr().out
        with torch.no_grad():
            found, wanted = load_simulated(tmp_path / kind)(ids()).logits, trained(ids()).logits
        assert (found - wanted).norm() < limit * wanted.norm()  # one sum rounded the other way moves codes after it
    wrong = tmp_path / "W8A8"
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(wrong, lambda tensors: tensors[name].neg_())
    assert main(["verify", str(wrong), "--engine", "vllm-ascend", "--json"]) != 0


def test_portable_exports_are_checked_too(source: Path, tmp_path: Path) -> None:
    pairs: list[Pair] = [("int8_channel", "int8_token"), ("mxfp8", "mxfp8")]
    for number, pair in enumerate(pairs):
        export_pair(source, tmp_path / str(number), pair, activation_rule="ascend")
        exported = open_export(tmp_path / str(number))
        assert exported.rule == "ascend" and "7 layers" in check_engine(exported, "vllm-ascend")
        assert not is_simulated(tmp_path / str(number))
    with pytest.raises(CheckpointError, match=r"no device on which mindie.*it loads W8A8_DYNAMIC \(ascend\)"):
        check_engine(open_export(tmp_path / "0"), "mindie")
    # vllm-ascend reads an offset of static inputs there, which no such file has.
    export_pair(source, tmp_path / "static", ("int8_channel", "int8_tensor"), activation_rule="ascend")
    with pytest.raises(
        CheckpointError, match=r"no device on which vllm-ascend.*compressed-tensors int8_channel with int8_t"
    ):
        check_engine(open_export(tmp_path / "static"), "vllm-ascend")


def test_formats_of_gpus_are_checked_too(source: Path, tmp_path: Path, capsys: Any) -> None:
    """ModelOpt's MXFP8 computes what was trained; FP8 in blocks something else on each device, which is said."""
    export_pair(source, tmp_path / "mx", ("mxfp8", "mxfp8"), "modelopt", activation_rule="ascend")
    assert check_engine(open_export(tmp_path / "mx"), "vllm-ascend").startswith("7 layers load on 950 (")
    out = tmp_path / "fp8"
    export_pair(source, out, ("fp8_b128", "fp8_g128"), "fp8")
    assert main(["verify", str(out), "--engine", "vllm-ascend", "--json"]) == 0
    said = {check["name"]: check["detail"] for check in json.loads(capsys.readouterr().out)["checks"]}["vllm-ascend"]
    assert said.startswith("7 layers load on 950, a2, a3 (")
    assert "computes in other formats than were trained" in said
    far = {part.split()[0]: float(part.split()[1]) for part in said.rpartition(": ")[2].split(", ")}
    assert 0.015 < far["a2"] == far["a3"] < 0.04 < far["950"] < 0.08
    with pytest.raises(CheckpointError, match=r"mindie loads the layers before has a loader of fp8 fp8_b128"):
        check_engine(open_export(out), "mindie")


def test_far_blocks_are_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_pair(source, tmp_path / "out", ("fp8_b128", "fp8_g128"), "fp8")
    real = DenseLinear.forward
    monkeypatch.setattr(DenseLinear, "forward", lambda self, x: real(self, x) * 1.05)
    with pytest.raises(CheckpointError, match=r"simulated operators of vllm-ascend are .* times the bound"):
        check_engine(open_export(tmp_path / "out"), "vllm-ascend")


def test_far_layers_are_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_pair(source, tmp_path / "out", PAIRS["W8A8_DYNAMIC"][0], "ascend", activation_rule="ascend")
    real = SimulatedLinear.forward
    monkeypatch.setattr(SimulatedLinear, "forward", lambda self, x: real(self, x) * 1.05)
    with pytest.raises(CheckpointError, match=r"simulated operators of vllm-ascend are .* times the bound"):
        check_engine(open_export(tmp_path / "out"), "vllm-ascend")


def test_the_distance_is_the_smaller_of_two() -> None:
    y = torch.tensor([[1.0, -2.0], [0.0, 1.0]])
    rms = float(y.square().mean().sqrt())
    assert distance(y, y) == 0
    one = y + torch.tensor([[0.0, 0.0], [2**-8 * rms, 0.0]])
    assert distance(one, y) == pytest.approx(2**-8 * rms / (2**-8 * float(y.norm())))
    assert distance(y * 2, y) > 50 and distance(y * float("nan"), y) == float("inf")
