"""Every early end: signals while training and before, loss of the terminal, and a fresh start afterwards."""

import contextlib
import csv
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qat.cli import main
from qat.trainers.interrupts import STATUS, Interruptions
from qat.trainers.job import load_job
from tests.tiny import tiny_model
from tests.trainers.jobs import metrics, saved_steps, write

FOREVER = {"steps": 100_000, "checkpoint_every": 0, "eval": {"data": {"source": "heldout", "seq_len": 32}, "every": 0}}
FOREVER["eval"]["tokens"] = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=1)


def send_when_training(path: Path, *numbers: signal.Signals, pause: float = 0.0) -> threading.Thread:
    """Send the signals to this process once the run has written two steps."""
    rows = load_job(path).folder / "metrics.csv"

    def wait() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end and not (rows.is_file() and len(rows.read_text().splitlines()) > 2):
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("number", list(STATUS))
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, model, **FOREVER)
    before = [signal.getsignal(n) for n in STATUS]
    thread = send_when_training(path, number)
    assert main(["train", str(path)]) == STATUS[number]
    thread.join()
    job = load_job(path)
    said = capsys.readouterr().err
    assert f"stopped by {number.name}" in said and "Traceback" not in said
    again = said[said.index("continue with: qat ") + len("continue with: qat ") :].split("\n")[0]
    done = len(metrics(job))
    assert [int(p.name.removeprefix("step-")) for p in saved_steps(job)] == [done]
    assert [signal.getsignal(n) for n in STATUS] == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "tiny.yaml"], "nothing pickled anywhere"
    if number == signal.SIGINT:
        assert main([*again.split(), f"steps={done + 1}"]) == 0, "what it said works as it stands"
        assert len(metrics(job)) == done + 1


def test_a_second_ctrl_c_does_not_wait_for_the_step(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qat.trainers import module

    path = write(tmp_path, model, **FOREVER)
    began: list[float] = []

    def slow(self: Any, batch: Any, index: int, real: Any = module.QatModule.training_step) -> Any:
        if self.step == 3:
            began.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                time.sleep(0.05)
                if time.monotonic() - began[0] > 0.5:
                    os.kill(os.getpid(), signal.SIGINT)
        return real(self, batch, index)

    monkeypatch.setattr(module.QatModule, "training_step", slow)
    assert main(["train", str(path)]) == 130
    said = capsys.readouterr().err
    assert "nothing was saved yet: start it again" in said and time.monotonic() - began[0] < 30
    monkeypatch.undo()
    assert main(["train", str(path), "steps=2"]) == 0, "a run without a resumable state starts afresh"


def test_ctrl_c_before_training_leaves_nothing_in_the_way(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qat.trainers import run

    path = write(tmp_path, model, steps=2)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    for moment in ("load_configured", "observe", "initialise"):  # loading, calibration, initialisation
        with monkeypatch.context() as patch:
            patch.setattr(run, moment, interrupted)
            assert main(["train", str(path)]) == 130
        said = capsys.readouterr().err
        assert "stopped by SIGINT; nothing was saved yet: start it again" in said and "Traceback" not in said
        assert main(["train", str(path), "--resume"]) == 2
        assert "start it without --resume" in capsys.readouterr().err
    assert main(["train", str(path)]) == 0


def test_after_a_loss_that_is_not_finite_the_run_starts_afresh_and_keeps_what_was_trained(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qat.trainers import module

    def broken(self: Any, batch: Any, index: int, real: Any = module.QatModule.training_step) -> Any:
        if self.step == 3:
            self.student.get_input_embeddings().weight.data.fill_(float("nan"))
        return real(self, batch, index)

    path = write(tmp_path, model, optim={"lr": 1e-3}, checkpoint_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(module.QatModule, "training_step", broken)
        assert main(["train", str(path)]) == 2
    assert "the loss became nan at step 4" in capsys.readouterr().err
    assert main(["train", str(path)]) == 0
    assert "--checkpoint earlier-1" in capsys.readouterr().err
    kept = load_job(path).folder / "checkpoints" / "earlier-1"
    with (kept / "metrics.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3
    assert main(["export", str(load_job(path).folder), str(tmp_path / "out"), "--checkpoint", "earlier-1"]) == 0
    assert main(["train", str(path)]) == 2, "a run that can be resumed is never started over"
    assert "continue it with --resume" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["nohup", "a script's &"])
def test_what_the_shell_ignores_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Interruptions() as interruptions:
            interruptions.finish_steps()
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_IGN and interruptions.signal is None
    finally:
        signal.signal(number, before)


def test_ctrl_c_saves_although_the_log_s_reader_ended_with_it(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`qat train ... 2>&1 | tee log`: the whole pipeline gets the signal, and tee is gone first."""
    reading, writing = os.pipe()
    path = write(tmp_path, model, **{**FOREVER, "eval": {**FOREVER["eval"], "every": 1}})
    thread = send_when_training(path, signal.SIGINT)
    os.close(reading)
    with open(writing, "w") as nobody, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", nobody)
        assert main(["train", str(path)]) == 130
    thread.join()
    assert len(saved_steps(load_job(path))) == 1


def test_a_report_that_cannot_be_printed_is_no_early_end(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, model, steps=1)
    with contextlib.suppress(OSError), open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", full)
        assert main(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"report: {load_job(path).folder / 'report.md'}" in said and "ended early" not in said


LAUNCHERS = {
    "SLURM_NTASKS": "4",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "train",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
    "SLURM_NODELIST": "node[1-2]",
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "3",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x",
    "KUBERNETES_PORT": "tcp://127.0.0.1:443",
    "LSB_JOBID": "7",
    "LSB_DJOB_RANKFILE": "/nowhere",
    "JSM_NAMESPACE_LOCAL_RANK": "3",
    "JSM_NAMESPACE_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
}


@pytest.mark.parametrize("prefix", ["SLURM", ""])
def test_variables_of_a_launcher_change_nothing(
    prefix: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in LAUNCHERS.items():
        if name.startswith(prefix):
            monkeypatch.setenv(name, value)
    path = write(tmp_path, model, steps=2)
    assert main(["train", str(path)]) == 0
    assert len(metrics(load_job(path))) == 2 and (load_job(path).folder / "report.md").is_file()
