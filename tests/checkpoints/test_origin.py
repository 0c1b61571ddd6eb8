"""A model is known again wherever it lies, and another one is not taken for it."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qat.checkpoints.hf import ModelConfig
from qat.checkpoints.origin import anchored, fingerprint, is_path, locate
from qat.cli import main
from qat.errors import CheckpointError
from tests.tiny import tiny_model
from tests.trainers.jobs import write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path / "model", num_hidden_layers=1)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_copy_has_the_same_fingerprint_and_a_change_another(model: Path, tmp_path: Path) -> None:
    first = fingerprint(model)
    shutil.copytree(model, tmp_path / "copy")
    change_config(tmp_path / "copy", transformers_version="1.0")  # what saves it again says
    assert fingerprint(tmp_path / "copy") == first
    change_config(tmp_path / "copy", rope_theta=123.0)
    assert fingerprint(tmp_path / "copy") != first
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert fingerprint(model) != first


def test_paths_become_absolute_and_names_stay(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert anchored(ModelConfig(id="model")).id == str(model)
    for name in ("owner/name", "embedded:smollm2-135m"):
        assert anchored(ModelConfig(id=name)).id == name and not is_path(ModelConfig(id=name))


def test_locate_refuses_what_is_gone_or_another(model: Path, tmp_path: Path) -> None:
    config = ModelConfig(id=str(model), fingerprint=fingerprint(model))
    assert locate(config) == model
    shutil.move(model, tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"no longer there; say where"):
        locate(config, hint="say where")
    with pytest.raises(CheckpointError, match=r"no model at models/gone; say where"):
        locate(config, "models/gone", "say where")  # looks like a hub id, and is not asked for there
    assert locate(config, tmp_path / "moved") == tmp_path / "moved"
    change_config(tmp_path / "moved", rms_norm_eps=0.1)
    with pytest.raises(CheckpointError, match="have changed"):
        locate(config, tmp_path / "moved")


def test_a_moved_model_is_found_by_model_or_refused_by_name(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command that needs the model of a run, from another working directory; nobody asks the hub."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, Path("model"), steps=1, runs="runs")
    assert main(["train", "tiny.yaml"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run, out = str(tmp_path / "runs" / "tiny"), str(tmp_path / "out")
    assert main(["eval", run, "--tokens", "64"]) == 0
    assert "KL to teacher" in capsys.readouterr().out
    moved = shutil.move(model, tmp_path / "moved")
    commands = (["export", run, out], ["eval", run, "--tokens", "64"], ["generate", run, "The", "--tokens", "1"])
    for command in commands:
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"{model} is no longer there" in said and "--model PATH" in said and "hub" not in said
    for command in commands:
        assert main([*command, "--model", str(moved)]) == 0
    assert "KL to teacher" in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "out" / "qat.json").read_text(), "a path of this machine is nobody's"
    with pytest.warns(UserWarning, match="KL and agreement are left out: give it with --teacher"):
        assert main(["eval", out, "--tokens", "64"]) == 0
    assert main(["eval", out, "--tokens", "64", "--model", "x"]) == 2
    assert "is no run" in capsys.readouterr().err
    change_config(moved, rms_norm_eps=0.1)
    for command in commands:
        assert main([*command, "--model", str(moved)]) == 2
        assert "have changed" in capsys.readouterr().err


def test_a_moved_teacher_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tiny_model("llama", tmp_path / "teacher", seed=1, num_hidden_layers=1)
    path = write(tmp_path, model, steps=1, teacher={"id": str(teacher)})
    assert main(["train", str(path)]) == 0
    moved = shutil.move(teacher, tmp_path / "moved")
    run = str(tmp_path / "runs" / "tiny")
    assert main(["eval", run, "--tokens", "64"]) == 2
    said = capsys.readouterr().err
    assert f"{teacher} is no longer there" in said and "--teacher" in said
    assert main(["eval", run, "--tokens", "64", "--teacher", str(moved)]) == 0
    assert "KL to teacher" in capsys.readouterr().out
