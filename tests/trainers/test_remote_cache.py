"""A job whose teacher is a server: the cache and the run of the same weights on this machine, whatever goes wrong."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qat.cli import main
from qat.trainers import remote, remote_cache, run
from qat.trainers.job import load_job
from qat.trainers.logitcache import Store, Writer
from qat.trainers.remote import Remote, Server
from qat.trainers.run import train
from qat.training.known import Known, likeliest
from tests.tiny import VOCABULARY, tiny_model
from tests.trainers.served import Served, serving
from tests.trainers.test_cached import SIZES, config, losses

K = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    names = {"student": 0, "teacher": 1, "another": 2}
    return {name: tiny_model("llama", root / name, seed=seed, **SIZES) for name, seed in names.items()}


@pytest.fixture(scope="module")
def started(models: dict[str, Path]) -> Iterator[Served]:
    with serving(models["teacher"]) as served:
        yield served


@pytest.fixture
def served(started: Served) -> Served:
    return started.set()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)


def job(folder: Path, models: dict[str, Path], served: Served, name: str = "run", **changes: Any) -> Path:
    k = changes.pop("k", K)
    asked = {"url": served.url, "model": "some/teacher", "timeout": 60, **changes.pop("remote", {})}
    return config(folder, models, name, {"remote": asked, "k": k}, **changes)


@pytest.mark.parametrize("k", [K, VOCABULARY])
def test_the_run_is_that_of_the_same_weights_on_this_machine(
    tmp_path: Path, models: dict[str, Path], served: Served, monkeypatch: pytest.MonkeyPatch, capsys: Any, k: int
) -> None:
    """What is evaluated is a lower bound, and with all tokens the whole."""
    served.set(most=VOCABULARY)
    local = config(tmp_path, models, "local", {"kind": "topk", "k": k, "folder": str(tmp_path / "local")})
    assert main(["teacher", str(local)]) == 0
    known = train(load_job(local), table=False)
    path = job(tmp_path, models, served, k=k)
    capsys.readouterr()
    assert main(["teacher", str(path), "--json"]) == 0
    (filled,) = json.loads(capsys.readouterr().out)
    assert filled["rows"] == 16 and filled["asked"] == 24  # those that are evaluated on, too
    theirs, own = Store.read(tmp_path / "said"), Store.read(tmp_path / "local")
    keys = sorted(own.places)
    (ids, log_p, tail, _), (own_ids, own_log_p, own_tail, _) = theirs.columns(keys), own.columns(keys)
    assert (ids == own_ids).float().mean() > 0.99 and tail is not None and own_tail is not None
    torch.testing.assert_close(log_p.float(), own_log_p.float(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(tail, own_tail, rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(run, "load_teacher", None)
    with pytest.warns(UserWarning, match=rf"with some/teacher on a server, over its {k} likeliest tokens"):
        found = train(load_job(path), table=False)
    assert losses(path) == pytest.approx(losses(local), rel=1e-3)
    for bound, whole in zip(found["rows"], known["rows"], strict=True):
        if k == VOCABULARY:
            assert bound["kl"] == pytest.approx(whole["kl"], rel=2e-3)
        assert 0 < bound["kl"] < whole["kl"] * 1.002
        assert bound["top1"] == pytest.approx(whole["top1"], abs=0.02)
        assert bound["nll"] == pytest.approx(whole["nll"], rel=1e-3)


def test_of_a_wider_student_only_what_both_have_is_compared(
    tmp_path: Path, models: dict[str, Path], served: Served, capsys: Any
) -> None:
    """Logits of padding, which are no small ones here."""
    wide = {**models, "student": tiny_model("llama", tmp_path / "wide", vocab_size=VOCABULARY + 64, **SIZES)}
    scores = []
    for name, cache in (("own", None), ("asked", "remote")):
        served.set(most=VOCABULARY)
        path = (
            job(tmp_path, wide, served, name, k=VOCABULARY, steps=1)
            if cache
            else config(tmp_path, wide, name, None, steps=1)
        )
        assert not cache or main(["teacher", str(path)]) == 0
        scores.append([row["kl"] for row in train(load_job(path), table=False)["rows"]])
    assert scores[1] == pytest.approx(scores[0], rel=2e-3)


def test_ctrl_c_keeps_what_was_answered_and_the_next_time_goes_on(
    tmp_path: Path, models: dict[str, Path], served: Served, capsys: Any
) -> None:
    """2 answers are the probe's, and every row of this text is one document."""
    served.set(hang_after=9)
    changes: dict[str, Any] = {"data": {"source": "embedded", "seq_len": 32, "pack": False}}
    path = job(tmp_path, models, served, remote={"concurrency": 3}, **changes)

    def interrupt() -> None:
        served.wait("hang", 3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    begin = time.monotonic()
    assert main(["teacher", str(path)]) == 130
    thread.join()
    assert time.monotonic() - begin < 50  # and not the 60 of an answer
    assert len(Store.read(tmp_path / "said").places) == 7
    assert main(["train", str(path)]) == 2
    assert "lacks 9 of the 16 rows of data" in " ".join(capsys.readouterr().err.split())
    served.set()
    assert main(["teacher", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["asked"] == 17
    assert main(["train", str(path), "steps=2"]) == 0
    run_of = str(load_job(path).folder / "job.yaml")
    moved = ["steps=4", "teacher_cache.remote.url=http://localhost:1/v1", "teacher_cache.remote.concurrency=2"]
    assert main(["train", run_of, "--resume", *moved]) == 0


class Answering(Server):
    """Answers at once, and counts."""

    answered = 0

    def row(self, row: Any) -> Known:
        self.answered += 1
        return likeliest(torch.zeros(2, 9), 4)


class Interrupted(Writer):
    """Somebody presses Ctrl-C while the first answer is being written, when all others have come."""

    def __init__(self, store: Store, server: Answering, count: int) -> None:
        super().__init__(store)
        self.server, self.count, self.calls = server, count, 0

    def add(self, key: bytes, known: Known) -> None:
        self.calls += 1
        if self.calls == 1:
            while self.server.answered < self.count:
                time.sleep(0.01)
            raise KeyboardInterrupt
        super().add(key, known)


def test_answers_that_came_before_the_end_are_kept(tmp_path: Path) -> None:
    server = Answering(Remote(url="http://127.0.0.1:1/v1", model="m", concurrency=3), 4, 9)
    rows = {bytes([number] * 16): np.zeros((3, 4), np.int32) for number in range(3)}
    writer = Interrupted(Store(tmp_path), server, len(rows))
    with pytest.raises(KeyboardInterrupt):
        remote_cache._ask(server, rows, writer)
    writer.flush()
    assert set(Store.read(tmp_path).places) == set(rows)


def test_another_tokenizer_or_model_is_refused(
    tmp_path: Path, models: dict[str, Path], served: Served, capsys: Any
) -> None:
    lower = shutil.copytree(models["teacher"], tmp_path / "lower")
    rules = json.loads((lower / "tokenizer.json").read_text())
    rules["normalizer"] = {"type": "Lowercase"}
    (lower / "tokenizer.json").write_text(json.dumps(rules))
    path = job(tmp_path, models, served, steps=1)
    served.set(folder=str(lower))
    assert main(["teacher", str(path)]) == 2
    assert "splits text otherwise than the student's tokenizer" in " ".join(capsys.readouterr().err.split())
    assert not Store.read(tmp_path / "said").header
    moved = shutil.copytree(models["teacher"], tmp_path / "moved")  # as many tokens, of which two are each other's
    rules = json.loads((moved / "tokenizer.json").read_text())
    vocabulary = rules["model"]["vocab"]
    vocabulary["Q"], vocabulary["2"] = vocabulary["2"], vocabulary["Q"]
    (moved / "tokenizer.json").write_text(json.dumps(rules))
    served.set(folder=str(moved))
    assert main(["teacher", str(path)]) == 2
    assert "a probe becomes another token" in " ".join(capsys.readouterr().err.split())
    served.set()
    assert main(["teacher", str(path), "teacher_cache.remote.ask=echo"]) == 0
    served.set(folder=str(models["another"]))
    assert main(["teacher", str(path), "steps=2"]) == 2
    assert "is another model than the one that filled" in " ".join(capsys.readouterr().err.split())
    assert main(["teacher", str(path), "teacher_cache.remote.model=other"]) == 2
    assert "the teacher's weights or config.json changed" in " ".join(capsys.readouterr().err.split())


def test_what_a_server_cannot_do_is_refused_before_it_is_asked(
    tmp_path: Path, models: dict[str, Path], capsys: Any
) -> None:
    nowhere = Served(1, None, tmp_path)  # type: ignore[arg-type]  # no process
    path = job(tmp_path, models, nowhere, data={"source": "teacher", "seq_len": 32})
    assert main(["teacher", str(path)]) == 2
    assert "data.source: teacher has to be written by the teacher's weights" in capsys.readouterr().err
    path = job(tmp_path, models, nowhere, remote={"key_env": "QAT_NO_SUCH_KEY"})
    assert main(["teacher", str(path)]) == 2
    assert "environment variable QAT_NO_SUCH_KEY is not set" in capsys.readouterr().err


def test_a_server_that_dies_loses_no_answer(
    tmp_path: Path, models: dict[str, Path], served: Served, capsys: Any
) -> None:
    """The last test: nobody is asked afterwards."""
    served.set(hang_after=6)
    path = job(tmp_path, models, served, remote={"concurrency": 2, "retries": 1})

    def kill() -> None:
        served.wait("hang", 2)
        served.stop()

    thread = threading.Thread(target=kill)
    thread.start()
    assert main(["teacher", str(path)]) == 2
    thread.join()
    assert "did not answer in 2 tries" in " ".join(capsys.readouterr().err.split())
    assert Store.read(tmp_path / "said").places
