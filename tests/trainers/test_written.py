"""`qat teacher` writes what `qat train` then reads, and shows it."""

import json
from pathlib import Path
from typing import Any

import pytest

from qat.cli import main
from qat.trainers import selfwritten
from qat.trainers.job import load_job
from qat.trainers.run import train
from tests.tiny import tiny_model
from tests.trainers.jobs import write


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    generate = {"chats": 1.0, "batch": 4}  # what a random model writes differs between processors
    parts = [{"share": 3, "source": "teacher", "generate": generate}, {"share": 1, "source": "embedded"}]
    calibration = {"source": "teacher", "seq_len": 32, "seed": 5}
    changes = {"data": {"mix": parts, "seq_len": 64}, "calibration": calibration, "calibration_rows": 2, "steps": 2}
    return write(tmp_path, tiny_model("llama", tmp_path / "model"), **changes)


def test_the_run_reads_what_was_written(job: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["teacher", str(job), "--json"]) == 0
    written = {one["text"]: one for one in json.loads(capsys.readouterr().out)}
    assert written.keys() == {"data", "calibration"}
    data = written["data"]
    assert data["tokens"] == 2 * 4 * 64 and data["documents"]["written chat"] > 0 and len(data["samples"]) == 3
    assert Path(data["folder"]).is_dir() and any("<|im_start|>user" in sample for sample in data["samples"])
    monkeypatch.setattr(selfwritten, "write", None)  # whatever is not there already cannot be made
    assert main(["teacher", str(job)]) == 0
    said = capsys.readouterr().out
    assert data["folder"] in said and "document 3 of 3 shown" in said and "512 tokens in 8 rows of 64" in said
    report = train(load_job(job), table=False)
    assert report["data_hash"] == data["sha256"]


def test_a_job_without_text_of_the_teachers_says_how_to_have_some(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path, tiny_model("llama", tmp_path / "model"))
    assert main(["teacher", str(path)]) == 2
    assert "set data.source=teacher" in capsys.readouterr().err
