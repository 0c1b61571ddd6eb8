"""Layers that engines merge: the trained sets are recorded, and export, verify and serving go by the record."""

import json
from pathlib import Path
from typing import Any

import pytest

from qat.checkpoints.export import RECORD, check_export, export_model
from qat.checkpoints.exported import load_exported
from qat.checkpoints.hf import load_model
from qat.checkpoints.layouts import open_export
from qat.scheme import Scheme
from qat.surgery import apply
from tests.checkpoints.exports import broken, pair_rules, projections, quiet_export, rewrite
from tests.tiny import tiny_model

Q, K, V, O = (f"model.layers.0.self_attn.{name}_proj" for name in "qkvo")  # noqa: E741  # the letters of their names
MLP = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
REST = {"match": "*", "skip": "the rest"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Its k_proj alone would have another global scale."""
    folder = tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    rewrite(folder, lambda t: t.update({f"{K}.weight": 16 * t[f"{K}.weight"]}))
    return folder


def double(name: str) -> Any:
    return lambda tensors: tensors.update({name: 2 * tensors[name]})


def sharing(folder: Path) -> dict[str, int]:
    """How many layers share the quantized input of each, where it is served."""
    model = load_exported(folder)
    hooks = {path: next(iter(model.get_submodule(path)._forward_pre_hooks.values())) for path in (Q, K, V, O)}
    return {path[-6:]: hook.same.readers for path, hook in hooks.items()}  # type: ignore[attr-defined]  # a ServedInput


def test_sets_that_were_trained_as_one_are_recorded_and_used(source: Path, tmp_path: Path) -> None:
    model, out = projections(source, ("nvfp4", "nvfp4"), fused=[["o_proj", "q_proj"]]), tmp_path / "out"
    with pytest.warns(UserWarning, match=r"engines usually fuse .*k_proj.* which this scheme trained apart"):
        export_model(model, source, out)
    assert json.loads((out / RECORD).read_text())["fused"] == open_export(out).fused == [[Q, O]]
    assert not broken(out)
    assert sharing(out) == {"q_proj": 2, "k_proj": 1, "v_proj": 1, "o_proj": 2}
    rewrite(out, double(f"{K}.input_global_scale"))
    assert "fused" not in broken(out)
    rewrite(out, double(f"{O}.input_global_scale"))
    assert "fused" in broken(out)


@pytest.mark.parametrize("kind", ["old", "foreign"])
def test_without_a_record_of_them_they_are_the_familys(kind: str, source: Path, tmp_path: Path) -> None:
    """Exports of earlier releases have a record without the field, other tools' have none."""
    out = quiet_export(projections(source, ("nvfp4", "nvfp4")), source, tmp_path / "out")
    assert open_export(out).fused == [[Q, K, V], MLP]
    record = json.loads((out / RECORD).read_text())
    del record["fused"]
    (out / RECORD).write_text(json.dumps(record))
    if kind == "foreign":
        (out / RECORD).unlink()
    assert sorted(map(sorted, open_export(out).fused)) == sorted(map(sorted, [[Q, K, V], MLP]))
    assert not broken(out) and sharing(out) == {"q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 1}
    rewrite(out, double(f"{K}.weight_global_scale"))
    assert "fused" in broken(out)


def test_scales_that_a_target_cannot_fuse_are_named_before_training(source: Path) -> None:
    notes = {}
    for name, options in (("together", {}), ("apart", {"fused": []})):
        model = apply(load_model(source), Scheme(rules=[pair_rules("fp8_tensor", "fp8_tensor"), REST], **options))
        notes[name] = [note for note in check_export(model, source) if "modelopt" in note]
    (note,) = notes["together"]
    assert note.startswith("modelopt cannot hold fp8_tensor weights of layers that engines fuse")
    assert f"({Q}, {K}, {V}; 2 such sets)" in note
    assert note.endswith("train fp8_channel") and notes["apart"] == []
