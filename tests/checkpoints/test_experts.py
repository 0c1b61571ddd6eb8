"""Experts on the road of a user: trained, exported under the names of the source, verified, read and served packed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import find_target, open_export
from qat.checkpoints.names import stored_names
from qat.checkpoints.resume import load_student, save_best, student_tensors
from qat.checkpoints.shards import ShardReader
from qat.cli import main
from qat.engines.transformers import load_packed
from qat.sites import weights
from tests.checkpoints.exports import ids, pair_rules, quantized, rewrite
from tests.checkpoints.test_export_plan import exported, job, written
from tests.qat.adapters.test_experts import KINDS
from tests.tiny import tiny_model

REST = {"match": "*", "skip": "the rest"}
PAIRS: list[tuple[str, str, str | None, str]] = [
    ("compressed-tensors", "int4_g32", None, "weight_packed"),
    ("compressed-tensors", "nvfp4", "nvfp4", "weight_packed"),
    ("compressed-tensors", "fp8_channel", "fp8_token", "weight"),
    ("modelopt", "nvfp4", "nvfp4", "weight"),
    ("fp8", "fp8_b128", "fp8_g128", "weight"),
]
CASES = [("qwen3_moe", *pair) for pair in PAIRS]
CASES += [(kind, *pair) for kind in ("mixtral", "deepseek_v3") for pair in PAIRS[:2]]
ATTENTION = [pair_rules("int4_g32", None, "*.self_attn.*_proj"), REST]


def tiny(kind: str, folder: Path, **changes: Any) -> Path:
    return tiny_model(kind, folder / "model", **{**KINDS[kind], "num_hidden_layers": 1, **changes})


@pytest.mark.parametrize(("kind", "target", "weight", "input", "codes"), CASES)
def test_experts_travel_under_the_names_of_the_source(
    kind: str, target: str, weight: str, input: str | None, codes: str, tmp_path: Path, capsys: Any
) -> None:
    """`exported` goes through `qat export` and `qat verify`: weights bit for bit, and plain transformers' logits."""
    changes = {"moe_intermediate_size": 128} if kind == "qwen3_moe" else {}
    source = tiny(kind, tmp_path, **changes)
    out, record = exported(source, [pair_rules(weight, input, "*.experts.*"), REST], "--target", target)
    logits = capsys.readouterr().out
    assert re.search(r"logit difference 0\.0 " if weight != "nvfp4" else r"skipped: ", logits)
    with ShardReader(source) as reader:
        names = set(reader.names())
    matrices = {name.removesuffix(".weight") for name in names if re.search(r"\.experts\.\d+\.", name)}
    tensors = written(out)
    assert record["modules"].keys() == matrices and len(matrices) % 3 == 0
    assert {name for name in tensors if name.rpartition(".")[0] not in matrices} == {
        name for name in names if name.removesuffix(".weight") not in matrices
    }
    assert all(f"{path}.{codes}" in tensors for path in matrices)
    _one_input_scale_per_layer(tensors)
    _same_when_packed(out, exactly=weight == "nvfp4")


def _one_input_scale_per_layer(tensors: dict[str, Tensor]) -> None:
    scales: dict[str, set[float]] = {}
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        if key in ("input_scale", "input_global_scale"):
            layer, stack = path.partition(".experts.")[0], path.endswith(("down_proj", "w2"))
            scales.setdefault(f"{layer} {stack}", set()).add(float(tensor))
    assert all(len(values) == 1 for values in scales.values())


def _same_when_packed(out: Path, exactly: bool) -> None:
    """Packed weights other than NVFP4's are not rounded to BF16 after the scale: nothing else differs."""
    with torch.no_grad():
        dense = load_exported(out)
        if not exactly:
            _without_rounding(dense, out)
        expected = dense(input_ids=ids()).logits
        packed = load_packed(out, torch.float32)(input_ids=ids()).logits
    assert float((packed - expected).norm() / expected.norm()) <= (0.0 if exactly else 1e-3)


def _without_rounding(model: Any, out: Path) -> None:
    folder = open_export(out)
    rows = stored_names(model, folder.dense_names).rows
    for path, module in folder.modules.items():
        place, part = rows[f"{path}.weight"]
        q = find_target(folder.METHOD).unpack(module, folder.layer(path))
        model.get_parameter(place).view(-1, q.shape[-1])[part] = q.dequantize()


def test_routers_and_shared_experts_are_what_the_rules_say(tmp_path: Path) -> None:
    source = tiny("deepseek_v3", tmp_path)
    rules = [pair_rules("int4_g32", None, "*.mlp.*experts.*"), REST]
    _, record = exported(source, rules)
    shared = {path for path in record["modules"] if ".shared_experts." in path}
    assert len(shared) == 3 and len(record["modules"]) == 3 * 8 + 3
    assert "model.layers.0.mlp.gate.weight" in record["tensors"]
    assert ["model.layers.0.mlp.experts.0.gate_proj", "model.layers.0.mlp.experts.0.up_proj"] in record["fused"]


def test_a_run_trains_experts_and_counts_those_that_no_token_reaches(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A router that knows four of eight experts: of each token two of them."""
    source = tiny("qwen3_moe", tmp_path, num_experts=8)

    def route(tensors: dict[str, Tensor]) -> None:
        router = tensors["model.layers.0.mlp.gate.weight"]
        direction = 10 * router[0].clone()
        router.zero_()
        for expert, share in enumerate((1.0, -1.0, 0.5, -0.5)):
            router[expert] = share * direction

    rewrite(source, route)
    path = job(source, [pair_rules("nvfp4", "nvfp4", "*.experts.*"), REST])
    assert main(["train", path, "--dry-run"]) == 0
    assert main(["train", path]) == 0
    sentence = "4 of 8 experts of 1 layers were reached by no calibration token; they share their layer's input range"
    said = " ".join(capfd.readouterr().err.split())
    assert said.count(sentence) == 1
    run, out = tmp_path / "runs" / "run", tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0 and main(["verify", str(out)]) == 0


@pytest.mark.parametrize(
    "rules",
    [
        [pair_rules("int4_g32", None), REST],
        [pair_rules("int4_g32", None), {"match": "*.mlp.experts", "skip": "experts"}, REST],
    ],
)
def test_a_run_that_could_not_quantize_experts_is_read_as_it_was_trained(rules: Any, tmp_path: Path) -> None:
    """Earlier releases called experts by their module, so `*_proj` was about linear layers only."""
    source = tiny("qwen3_moe", tmp_path)
    model, run = quantized(source, ATTENTION), tmp_path / "run"
    run.mkdir()
    (run / "job.yaml").write_text(
        yaml.safe_dump({"model": {"id": str(source)}, "scheme": {"rules": rules, "learn": "none", "init": []}})
    )
    save_best(run, student_tensors(model), {"step": 1})
    student, _, _ = load_student(run)
    assert weights(student).keys() == weights(model).keys() and len(weights(student)) == 4
    with torch.no_grad():
        assert torch.equal(student(input_ids=ids()).logits, model(input_ids=ids()).logits)
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in written(out)


def test_a_run_of_today_keeps_its_experts(tmp_path: Path) -> None:
    source = tiny("qwen3_moe", tmp_path)
    rules, run = [pair_rules("int4_g32", None), REST], tmp_path / "run"
    model = quantized(source, rules)
    run.mkdir()
    (run / "job.yaml").write_text(
        yaml.safe_dump({"model": {"id": str(source)}, "scheme": {"rules": rules, "learn": "none", "init": []}})
    )
    save_best(run, student_tensors(model), {"step": 1})
    assert len(weights(load_student(run)[0])) == 6
