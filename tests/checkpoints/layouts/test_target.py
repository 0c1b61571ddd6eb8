"""A target is one folder: every one has the whole interface, and a toy one exports, verifies and is served."""

import inspect
from pathlib import Path

import pytest
import torch

from qat.checkpoints.export import check_export
from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import FILES, FOLDERS, READERS, TARGETS, Target, find_target, open_export, table
from qat.checkpoints.verify import verify
from qat.errors import ConfigError, UnsupportedError
from qat.modes import served
from tests.checkpoints.exports import broken, forward_weights, ids, projections, quiet_export, rewrite
from tests.checkpoints.layouts.toy import read, write
from tests.tiny import tiny_model

DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("name", [*TARGETS, "toy"])
def test_a_writer_has_the_whole_interface(name: str, toy: None) -> None:
    target = TARGETS[name]
    assert isinstance(target, Target) and name == target.METHOD
    for method in ("check", "pack", "unpack", "quantization_config", "files"):
        own, wanted = (inspect.signature(getattr(given, method)) for given in (target, Target))
        assert list(own.parameters) == list(wanted.parameters)[1:], method
    if name in FILES:
        return
    assert name == READERS[name].METHOD
    assert READERS[name].SCALE in READERS[name].SCALES and set(READERS[name].SCALES) <= set(READERS[name].SUFFIXES)


def test_every_folder_is_a_target() -> None:
    root = Path(inspect.getfile(find_target)).parent
    folders = {path.name for path in root.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(FOLDERS) and len(TARGETS) == len(FOLDERS)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "toy", write)
    monkeypatch.setitem(READERS, "toy", read.Reader)


def test_a_new_target_is_its_folder(toy: None, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", num_hidden_layers=1)
    model = projections(source, ("int8_channel", None))
    out = quiet_export(model, source, tmp_path / "out", "toy")
    report = verify(out)
    assert report.ok, report.checks
    assert report.checks[-1].detail == "skipped: transformers has no toys"
    folder = open_export(out)
    for path, weight in forward_weights(model).items():
        assert torch.equal(folder.dense(path), weight)
        q = find_target("toy").unpack(folder.modules[path], folder.layer(path))
        assert torch.equal(q.dequantize(torch.bfloat16), weight)
    with torch.no_grad(), served(model):
        assert torch.equal(load_exported(out)(ids()).logits, model(ids()).logits)
    rewrite(out, lambda tensors: tensors[f"{DOWN}.toy_scale"].neg_())
    assert {"scales", "weights"} <= broken(out)


def test_what_a_new_target_says_is_heard_everywhere(toy: None, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", num_hidden_layers=1)
    model = projections(source, ("int4_g64", None))
    assert "| `toy` | bytes | `int8_channel` | - | no (" in table() and ". toys.\n" in table()
    with pytest.raises(UnsupportedError, match=r"q_proj: toy .*int4_g64 weights \(ascend, compressed-tensors can\)"):
        quiet_export(model, source, tmp_path / "out", "toy")
    with pytest.raises(UnsupportedError, match=r"\(ascend, compressed-tensors, toy can\)"):
        quiet_export(projections(source, ("int8_channel", None)), source, tmp_path / "out", "modelopt")
    assert check_export(model, source) == []
    with pytest.raises(ConfigError, match="nearest: toy"):
        find_target("toys")
