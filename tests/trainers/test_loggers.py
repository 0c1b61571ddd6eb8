"""What Weights & Biases and TensorBoard get of a run, read back from the files they write."""

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qat.errors import ConfigError
from qat.trainers.job import Job, load_job
from qat.trainers.loggers import finish_loggers, start_loggers
from qat.trainers.run import train
from tests.tiny import tiny_model
from tests.trainers.jobs import metrics, write

TOTALS = {f"quantizers/{name}" for name in ("flip_rate", "flip_rate_last", "clip_rate", "scale_drift", "qsnr")}
OPTIM = {"lr": 1e-3, "scale_lr": 0.05}
PLOTS = {"plots/loss", "plots/recovery", "plots/qsnr", "plots/flipped"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path / "model")


def check(job: Job, history: dict[int, dict[str, float]]) -> None:
    """`history` (values by step) repeats metrics.csv, and says of quantizers what their steps did."""
    for row in metrics(job):
        logged = history[int(row["step"])]
        assert logged["loss"] == pytest.approx(float(row["loss"]), rel=1e-5)
        assert ("heldout_kl" in logged) == (row["heldout_kl"] != "") == (logged.keys() >= TOTALS)
    layers = {key for key in history[2] if key.startswith("qsnr/")}
    assert len(layers) == 14 and all(5 < history[2][layer] < 40 for layer in layers)
    first, last = history[0], history[4]
    assert first["quantizers/flip_rate"] == 0 < history[2]["quantizers/flip_rate"]
    assert last["quantizers/flip_rate"] > 0 and last["quantizers/flip_rate_last"] > 0
    assert last["quantizers/scale_drift"] > 0 and 0 <= last["quantizers/clip_rate"] < 0.1


def test_wandb_offline_gets_metrics_quantizers_and_plots(tmp_path: Path, source: Path) -> None:
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    wandb = {"project": "qat-tests", "offline": True}
    job = load_job(write(tmp_path, source, steps=4, optim=OPTIM, wandb=wandb))
    train(job, table=False)
    (file,) = (job.folder / "wandb").glob("offline-run-*/*.wandb")
    history, pictures = _wandb_file(file)
    check(job, history)
    assert pictures == PLOTS
    assert len(list(file.parent.glob("files/media/images/plots/*.png"))) == len(PLOTS)
    assert sys.modules["wandb"].run is None  # the next run of this process is its own


def _wandb_file(file: Path) -> tuple[dict[int, dict[str, float]], set[str]]:
    """Values by step, and names of pictures."""
    from wandb.proto import wandb_internal_pb2

    history: dict[int, dict[str, float]] = {}
    pictures = set()
    for data in _records(_complete(file)):
        record: Any = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") != "history":
            continue
        names = [item.key or item.nested_key[0] for item in record.history.item]
        pictures |= {name for name in names if name.startswith("plots/")}
        row = dict(zip(names, (json.loads(item.value_json) for item in record.history.item), strict=True))
        if "trainer/global_step" in row:
            history.setdefault(row["trainer/global_step"], {}).update(row)
    return history, pictures


def _complete(file: Path) -> bytes:
    """The file's content once wandb's own process, which outlives the run by a moment, no longer writes to it."""
    data = b""
    for _ in range(60):
        before, data = data, file.read_bytes()
        if data and data == before:
            break
        time.sleep(1)
    return data


def _records(data: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format, behind a header of seven bytes: parts of records in blocks of 32 KiB."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_tensorboard_gets_the_same(tmp_path: Path, source: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = load_job(write(tmp_path, source, steps=4, optim=OPTIM, tensorboard=True))
    train(job, table=False)
    events = EventAccumulator(str(job.folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    history: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            history.setdefault(event.step, {})[tag] = event.value
    check(job, history)
    assert set(events.Tags()["images"]) == PLOTS


def test_a_resumed_run_compares_with_its_start(tmp_path: Path, source: Path) -> None:
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    wandb = {"project": "qat-tests", "offline": True}
    path = write(tmp_path, source, steps=2, wandb=wandb)
    train(load_job(path), table=False)
    longer = load_job(path, ["steps=4"])
    train(longer, resume_run=True, table=False)
    files = sorted((longer.folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    (first, _), (second, _) = map(_wandb_file, files)
    assert second[2]["quantizers/flip_rate"] > 0 == second[2]["quantizers/flip_rate_last"]
    assert second[4]["quantizers/flip_rate"] > 0 and first[2]["quantizers/flip_rate"] > 0


def test_a_package_that_is_missing_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, change in (("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": {"project": "x"}})):
        monkeypatch.setitem(sys.modules, name, None)
        job = load_job(write(tmp_path, tmp_path / "no-model", **change))
        with pytest.raises(ConfigError, match=f"{name}, which is not installed: pip install {name}"):
            start_loggers(job)


def test_a_service_that_fails_at_the_end_is_a_warning(tmp_path: Path) -> None:
    class Broken:
        @property
        def experiment(self) -> Any:
            raise OSError("the disk is full")

    with pytest.warns(UserWarning, match="the disk is full"):
        finish_loggers([Broken()], tmp_path)
    finish_loggers([], tmp_path)
