"""Who may write the folder of a run, what a start may replace, and what a resume must find as it was."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from qat.cli import main
from qat.trainers.claim import differences
from qat.trainers.job import load_job
from tests.tiny import tiny_model
from tests.trainers.jobs import curve, metrics, write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path / "model", num_hidden_layers=1)


HOLD = """
import sys, time
from pathlib import Path
from qat.trainers.claim import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_the_second_process_is_told_who_holds_the_run_and_a_dead_one_holds_nothing(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, model, steps=1)
    run = load_job(path).folder
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    try:
        assert main(["train", str(path)]) == 2
        said = capsys.readouterr().err
        assert f"process {holder.pid} on {os.uname().nodename}" in said and "name=" in said
        assert not (run / "job.yaml").exists()
        assert main(["train", str(path), "--resume"]) == 2
        assert f"process {holder.pid}" in capsys.readouterr().err, "not: start it without --resume"
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert main(["train", str(path)]) == 0


def test_the_lock_lasts_until_the_report(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qat.trainers import run

    path = write(tmp_path, model, steps=1)
    lock = load_job(path).folder / ".lock"
    held = []

    def watched(*args: object, real: object = run.write_report) -> None:
        descriptor = os.open(lock, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.append(True)
        finally:
            os.close(descriptor)
        assert callable(real)
        real(*args)

    monkeypatch.setattr(run, "write_report", watched)
    assert main(["train", str(path)]) == 0
    assert held == [True]


def test_a_finished_or_resumable_run_is_never_started_over(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, model, steps=2)
    run = load_job(path).folder
    assert main(["train", str(path)]) == 0
    report = (run / "report.json").read_bytes()
    assert main(["train", str(path)]) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    for state in (run / "checkpoints").glob("step-*"):
        shutil.rmtree(state)  # as users do to save space
    assert main(["train", str(path)]) == 2
    assert "finished run" in capsys.readouterr().err
    assert (run / "report.json").read_bytes() == report and (run / "checkpoints" / "best").is_dir()


def test_more_steps_go_on_and_fewer_than_done_are_refused(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, model, steps=4)
    assert main(["train", str(path)]) == 0
    first = curve(load_job(path))
    capsys.readouterr()
    assert main(["train", str(path), "--resume", "steps=6"]) == 0
    said = capsys.readouterr().err
    assert "steps: 4 -> 6" in said and "learning rate" in said
    assert curve(load_job(path))[:4] == first and len(metrics(load_job(path))) == 6
    assert main(["train", str(path), "--resume", "steps=3"]) == 2
    assert "steps=3, but 6 steps" in capsys.readouterr().err
    assert yaml.safe_load((load_job(path).folder / "job.yaml").read_text())["steps"] == 6


def test_every_other_changed_key_is_named(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, model, steps=1)
    assert main(["train", str(path)]) == 0
    changes = ["optim.lr=0.5", "seed=3", "data.seq_len=64", "scheme.rules.2.weight=mxfp4", "steps=2"]
    assert main(["train", str(path), "--resume", *changes]) == 2
    said = capsys.readouterr().err
    for line in ("optim.lr was 0.001, now 0.5", "seed was 0, now 3", "data.seq_len was 32, now 64"):
        assert line in said
    assert "scheme.rules.2.weight was 'nvfp4', now 'mxfp4'" in said and "steps was" not in said


def test_differences_reach_into_lists() -> None:
    assert differences({"a": [1, {"b": 2}], "c": 0}, {"a": [1, {"b": 3}], "c": 0}) == ["a.1.b was 2, now 3"]
    assert differences([1], [1, 2]) == [" was [1], now [1, 2]"]


def test_a_run_is_resumed_from_anywhere_and_after_it_moved(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths, another working directory, a moved run and a moved model."""
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    changes = {"data": {"source": "text.txt", "seq_len": 32}, "steps": 2, "runs": "runs"}
    write(tmp_path, Path("model"), **changes)
    assert main(["train", "tiny.yaml"]) == 0
    recorded = yaml.safe_load(Path("runs/tiny/job.yaml").read_text())
    assert recorded["model"]["id"] == str(model) and recorded["data"]["source"] == str(text)
    assert recorded["model"]["fingerprint"].startswith("sha256:")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(tmp_path / "runs" / "tiny", tmp_path / "elsewhere" / "moved")
    shutil.move(model, tmp_path / "elsewhere" / "model2")
    assert main(["train", "moved/job.yaml", "--resume", "steps=3"]) == 2
    said = capsys.readouterr().err
    assert f"the model {model} is no longer there; say where it is: model.id=PATH" in said and "hub" not in said
    assert main(["train", "moved/job.yaml", "--resume", "steps=3", "model.id=model2"]) == 0
    assert len((tmp_path / "elsewhere" / "moved" / "metrics.csv").read_text().splitlines()) == 4


def test_a_model_or_text_that_changed_is_refused_by_name(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    path = write(tmp_path, model, data={"source": str(text), "seq_len": 32}, steps=2)
    assert main(["train", str(path)]) == 0
    text.write_text("The lazy fox sleeps. " * 300)
    assert main(["train", str(path), "--resume"]) == 2
    assert "the text of data is not what the run was started with" in capsys.readouterr().err
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    assert main(["train", str(path), "--resume"]) == 2
    assert f"the model {model} is not the one" in capsys.readouterr().err


def test_a_file_where_the_run_should_be(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, model, steps=1)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").touch()
    assert main(["train", str(path)]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main(["train", str(path), f"runs={tmp_path}/runs/tiny"]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_a_run_of_an_earlier_release_goes_on_and_is_exported(tmp_path: Path, model: Path) -> None:
    """Its job.yaml has the keys that `scheme.init` replaced."""
    job = load_job(write(tmp_path, model, steps=2))
    assert main(["train", str(tmp_path / "tiny.yaml")]) == 0
    recorded = job.folder / "job.yaml"
    record = yaml.safe_load(recorded.read_text())
    assert record["scheme"].pop("init") == [{"kind": "scales", "search": "auto", "weighted": True}]
    record["scheme"].update(start="auto", weighted_start=True, smooth=0.0, compensate="none")
    recorded.write_text(yaml.safe_dump(record))
    assert main(["export", str(job.folder), str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["train", str(recorded), "--resume", "steps=3"]) == 0
