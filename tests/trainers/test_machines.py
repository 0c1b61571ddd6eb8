"""Machines that users have: full disks, homes and folders that cannot be written, terminals that know only ASCII."""

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from qat import cache
from qat.cli import main
from qat.trainers import callbacks, machine
from qat.trainers.job import load_job
from tests.tiny import tiny_model
from tests.trainers.jobs import curve, metrics, write

SMALL = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama", **SMALL)


def test_a_disk_that_fills_while_metrics_are_written_loses_nothing_that_was_saved(
    small_disk: Path,
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A row has about 85 bytes and a page of the disk 4096, so the disk refuses one between two saved states.
    changes = {
        "steps": 60,
        "checkpoint_every": 30,
        "rows": 2,
        "eval": {"data": {"source": "heldout"}, "tokens": 64, "every": 0},
    }
    whole = write(tmp_path, model, name="whole", **changes)
    assert main(["train", str(whole)]) == 0
    path = write(tmp_path, model, runs=str(small_disk), **changes)
    filler = small_disk / "filler"

    def filling(self: Any, module: Any, step: int, real: Any = callbacks.StepLoop._row) -> Any:
        if step == 31:
            with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1024))
        return real(self, module, step)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.StepLoop, "_row", filling)
        assert main(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and f"qat train: No space left on device: {small_disk}/tiny/metrics.csv" in said
    assert "continue with: qat train" in said
    filler.unlink()
    assert main(["train", str(path), "--resume"]) == 0
    assert curve(load_job(path)) == curve(load_job(whole)) and len(metrics(load_job(path))) == 60


def test_a_torn_last_line_is_not_a_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    rows = [{"step": step, "loss": step / 10, "lr": 1e-3} for step in range(1, 13)]
    file = callbacks.MetricsFile(path, 0)
    for row in rows:
        file.write(row)
    file.close()
    whole = path.read_bytes()
    for torn in (whole[: whole.index(b"\r\n12,") + 3], whole[:-1], whole[:-2], whole + b"\0\0\0\n", whole + b"13,1"):
        path.write_bytes(torn)  # the first one ends in "1", which looks like step 1
        callbacks.MetricsFile(path, 12).close()
        lines = path.read_bytes().splitlines()
        assert lines == whole.splitlines()[: len(lines)] and len(lines) >= 12


def test_a_terminal_that_knows_only_ascii(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["train", str(write(tmp_path, model, steps=1))]) == 0
    assert main(["generate", str(tmp_path / "runs" / "tiny"), "Grüße, 世界", "--tokens", "2"]) == 0
    out.flush()
    assert b"trained student" in out.buffer.getvalue() and b"Gr" in out.buffer.getvalue()  # type: ignore[attr-defined]  # a BytesIO


def test_a_home_that_cannot_be_written(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QAT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache._temporary.cache_clear()
    with pytest.warns(UserWarning, match="set QAT_CACHE"):
        assert main(["train", str(write(tmp_path, model, steps=1))]) == 0
    assert list(tmp_path.glob("qat-cache-*/data/*/rows.bin"))


def test_a_tilde_is_home_where_no_shell_has_seen_it(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In YAML files, in quotes and behind `=`: what is written and what is read must be one place."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.setenv("QAT_CACHE", str(cache.cache_folder("data").parent))  # compiled kernels, too
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    shutil.copytree(model, home / "model")
    (home / "text.txt").write_text("The fox jumps over the dog. " * 300)
    data = {"source": "~/text.txt", "seq_len": 32}
    write(home, Path("~/model"), runs="~/runs", steps=2, checkpoint_every=0, data=data)
    assert main(["train", "~/tiny.yaml"]) == 0
    assert main(["export", "~/runs/tiny", "~/out", "--model", "~/model"]) == 0
    assert " kB of weights for compressed-tensors; check it with: qat verify" in capsys.readouterr().out
    assert main(["verify", "~/out", "--no-logits"]) == 0
    assert main(["eval", "~/out", "--teacher", "~/model", "--text", "~/text.txt", "--tokens", "64"]) == 0
    assert main(["generate", "~/out", "The", "--tokens", "2"]) == 0
    assert not [*here.iterdir()] and (home / "runs" / "tiny" / "report.json").is_file()


def test_qat_cache_is_where_rows_of_tokens_lie(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "own"))
    assert main(["train", str(write(tmp_path, model, steps=1))]) == 0
    assert list((tmp_path / "own" / "data").glob("*/rows.bin"))


@pytest.mark.parametrize("place", ["runs", "out"])
def test_places_that_cannot_be_written_are_named(
    place: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, model, steps=1, **({"runs": "/proc/runs"} if place == "runs" else {}))
    status = main(["train", str(path)])
    if place == "out":
        assert status == 0
        status = main(["export", str(load_job(path).folder), "/proc/out"])
    said = capsys.readouterr().err
    assert status == 2 and "Traceback" not in said and f"/proc/{place}" in said


def test_an_export_onto_a_mount_point(small_disk: Path, tmp_path: Path, model: Path) -> None:
    path = write(tmp_path, model, steps=1)
    assert main(["train", str(path)]) == 0
    assert main(["export", str(load_job(path).folder), str(small_disk)]) == 0
    assert main(["verify", str(small_disk), "--no-logits"]) == 0
    assert not [p for p in small_disk.iterdir() if p.name.startswith(".")]


def test_a_source_tree_that_is_not_installed_still_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine._PACKAGES, "qat", "qat-native-that-is-not-installed")
    assert machine.versions()["qat"] == "not installed"


def test_training_scales_alone(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = load_job(write(tmp_path, model, steps=2, optim={"freeze": ["*.weight"], "scale_lr": 1e-2}))
    assert main(["train", str(tmp_path / "tiny.yaml")]) == 0
    rows = metrics(job)
    assert [row["lr"] for row in rows] == ["", ""] and all(float(row["scale_lr"]) > 0 for row in rows)
    for more, said in (([], "leaves no parameter to train"), (["optim.freeze=[nothing]"], "matches no parameter")):
        for asked in ([], ["--dry-run"]):
            assert main(["train", str(tmp_path / "tiny.yaml"), "name=none", "optim.freeze=['*']", *more, *asked]) == 2
            assert said in capsys.readouterr().err


def test_wandb_without_a_login_is_said_before_the_baselines(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    path = write(tmp_path, model, steps=1, wandb={"project": "x"})
    assert main(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert "wandb does not start" in said and "wandb.offline=true" in said and "held-out KL" not in said
