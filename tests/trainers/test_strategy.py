"""Several processes against one that accumulates the same micro-batches: curves, codes, crashes, launchers, refusals.

The processes run on the CPU with gloo. Every launch is a real command, because starting is half of what is tested.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from qat.checkpoints.resume import load_student
from qat.cli import main
from qat.errors import ConfigError, UnsupportedError
from qat.sites import weights
from qat.trainers import strategy
from qat.trainers.evaluate import Scores
from qat.trainers.job import load_job
from qat.trainers.strategy import ALONE, Ranks
from tests.tiny import tiny_model
from tests.trainers.jobs import metrics, write

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 2}
STEPS = 12
TOLERANCE = 1e-5
SAME_CODES = 0.999
WALKED: dict[str, Any] = {
    "scheme": {
        "rules": [{"match": "*_proj", "weight": "nvfp4", "input": "nvfp4"}, {"match": "*", "skip": "kept in BF16"}],
        "init": ["smooth", {"kind": "gptq", "sequential": True, "choose": "arrival", "refit": 1}],
    },
    "calibration_rows": 2,
    "steps": 2,
}
TIMEOUT = 300  # of a command, on a machine that has other things to do
SEVERAL = """
import json, os, sys
from qat.cli import main
for port, arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = port
    if status := main(arguments):
        sys.exit(status)
"""
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multi")
    for kind, name in (("llama", "dense"), ("qwen3_moe", "experts")):
        tiny_model(kind, folder / name, **{**SMALL, "moe_intermediate_size": 64})
    return folder


def job_file(home: Path, kind: str, name: str, **changes: Any) -> Path:
    rules = [
        {"match": "lm_head", "skip": "kept in BF16"},
        {"match": "model.embed_tokens", "skip": "kept in BF16"},
        {"match": "*.gate", "skip": "a router"},
        {"match": "re:.*(_proj|experts.*)", "weight": "nvfp4", "input": "nvfp4"},
    ]
    if kind == "dense":
        del rules[2]
    settings = {
        "scheme": {"rules": rules, "learn": "dual_lsq"},
        "steps": STEPS,
        "micro_rows": 1,
        "checkpoint_every": 4,
        "eval": {"data": {"source": "heldout", "seq_len": 32}, "tokens": 480, "every": 4},
        "optim": {"lr": 1e-3, "ema": 0.9},
    }
    return write(home, home / kind, name=name, **{**settings, **changes})


def command(*arguments: str, launcher: tuple[str, ...] = (), **variables: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    full = [sys.executable, *launcher, "-m", "qat.cli", *arguments]
    return subprocess.Popen(full, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def several(*commands: tuple[str, ...], **variables: str) -> "subprocess.Popen[str]":
    """One process of two that runs commands one after another; `PORTS` is where they meet for each."""
    ports = variables.pop("PORTS").split(",")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    full = [sys.executable, "-c", SEVERAL, json.dumps([*zip(ports, commands, strict=True)])]
    return subprocess.Popen(full, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def free_ports(count: int) -> str:
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ",".join(ports)


def finished(*processes: "subprocess.Popen[str]") -> list[str]:
    try:
        said = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.terminate()
    for process, (_, error) in zip(processes, said, strict=True):
        assert process.returncode == 0, error
    return [out + error for out, error in said]


def close(one: Path, other: Path) -> None:
    """Two runs have one curve."""
    rows = [metrics(load_job(path)) for path in (one, other)]
    assert len(rows[0]) == len(rows[1]) == STEPS
    for left, right in zip(*rows, strict=True):
        for key in ("loss", "heldout_kl", "heldout_nll"):
            assert (left[key] == "") == (right[key] == ""), (key, left["step"])
            if left[key]:
                assert float(left[key]) == pytest.approx(float(right[key]), rel=TOLERANCE), (key, left["step"])
        assert left["tokens"] == right["tokens"] and left["lr"] == right["lr"]


def codes(path: Path) -> dict[str, torch.Tensor]:
    student, _, _ = load_student(load_job(path).folder)
    return {name: site.quantizer.quantize(site.weight).codes for name, site in weights(student).items()}


def same_codes(one: Path, other: Path) -> float:
    left, right = codes(one), codes(other)
    assert left.keys() == right.keys()
    equal = sum(int((left[name] == right[name]).sum()) for name in left)
    return equal / sum(each.numel() for each in left.values())


@pytest.fixture(scope="module")
def alone(home: Path) -> dict[str, Path]:
    files = {kind: job_file(home, kind, f"{kind}-alone") for kind in ("dense", "experts")}
    for path in files.values():
        assert main(["train", str(path)]) == 0
    return files


@pytest.fixture(scope="module")
def divided(home: Path) -> dict[str, Path]:
    """Runs of one pair of processes: two with divided models, one with copies; and what each rank exports."""
    files = {kind: job_file(home, kind, f"{kind}-fsdp", strategy="fsdp", devices=2) for kind in ("dense", "experts")}
    files["walked"] = job_file(home, "dense", "walked-fsdp", strategy="fsdp", devices=2, **WALKED)
    files["copies"] = job_file(home, "dense", "dense-ddp", strategy="ddp", devices=2)
    trained = [("train", str(path)) for path in files.values()]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "PORTS": free_ports(5)}
    run = str(load_job(files["experts"]).folder)
    finished(
        *(
            several(*trained, ("export", run, str(home / f"export-{rank}")), RANK=rank, LOCAL_RANK=rank, **group)
            for rank in ("0", "1")
        )
    )
    return files


@pytest.mark.multi
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_divided_models_are_trained_as_whole_ones(kind: str, alone: dict[str, Path], divided: dict[str, Path]) -> None:
    close(alone[kind], divided[kind])
    assert same_codes(alone[kind], divided[kind]) >= SAME_CODES
    one, two = (json.loads((load_job(path[kind]).folder / "report.json").read_text()) for path in (alone, divided))
    assert one["why"]["moved"]["codes"] == two["why"]["moved"]["codes"]
    assert one["why"]["moved"]["flipped"] == pytest.approx(two["why"]["moved"]["flipped"], abs=1 - SAME_CODES)
    for left, right in zip(one["rows"], two["rows"], strict=True):
        assert left["tokens"] == right["tokens"] and left["nll"] == pytest.approx(right["nll"], rel=TOLERANCE)


@pytest.mark.multi
def test_divided_models_are_initialised_as_whole_ones(home: Path, divided: dict[str, Path]) -> None:
    """Smoothed and walked through with a batch for each rank, sums have one order: the same bits."""
    path = job_file(home, "dense", "walked-alone", **WALKED)
    assert main(["train", str(path)]) == 0
    one, two = (load_job(each).folder for each in (path, divided["walked"]))
    files = [load_file(run / "checkpoints" / "start" / "codes.safetensors") for run in (one, two)]
    assert files[0].keys() == files[1].keys()
    assert [name for name in files[0] if not torch.equal(files[0][name], files[1][name])] == []
    rows = [json.loads((run / "report.json").read_text())["rows"] for run in (one, two)]
    for left, right in zip(*rows, strict=True):
        assert left["nll"] == pytest.approx(right["nll"], rel=TOLERANCE)
    assert not (two / "checkpoints" / "initialised").exists(), "finished blocks have become the first student"


@pytest.mark.multi
def test_two_processes_are_one_that_accumulates(alone: dict[str, Path], divided: dict[str, Path]) -> None:
    close(alone["dense"], divided["copies"])
    assert same_codes(alone["dense"], divided["copies"]) >= SAME_CODES
    reports = (load_job(path).folder / "report.json" for path in (alone["dense"], divided["copies"]))
    one, two = (json.loads(report.read_text()) for report in reports)
    assert two["machine"].startswith("2 x ") and one["tokens"] == two["tokens"]
    for left, right in zip(one["rows"], two["rows"], strict=True):
        assert left["tokens"] == right["tokens"] and left["nll"] == pytest.approx(right["nll"], rel=TOLERANCE)


@pytest.mark.multi
def test_experts_whose_processes_torchrun_starts(home: Path, alone: dict[str, Path]) -> None:
    path = job_file(home, "experts", "experts-ddp", devices=2)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    said = finished(command("train", str(path), launcher=launcher))[0]
    assert said.count("held-out text:") == said.count("report:") == 1, "only the first rank speaks"
    close(alone["experts"], path)
    assert same_codes(alone["experts"], path) >= SAME_CODES


@pytest.mark.parametrize(
    ("statuses", "cause"),
    [((2, -signal.SIGTERM), 0), ((-signal.SIGTERM, 2), 1), ((2, -signal.SIGKILL), 1), ((1, 2), 0)],
)
def test_the_rank_that_ended_the_others(statuses: tuple[int, ...], cause: int) -> None:
    failures = {rank: ProcessFailure(rank, 1000 + rank, status, "/no/file") for rank, status in enumerate(statuses)}
    for rank, failure in failures.items():
        failure.timestamp = 10 + rank
    assert strategy._cause(failures)[0] == cause


@pytest.mark.multi
def test_a_killed_rank_is_named_and_the_run_goes_on_as_if_nothing_had_happened(
    home: Path, divided: dict[str, Path]
) -> None:
    """With the strategy it had to the same bits, with another one and on one device along the same curve."""
    path, as_before = job_file(home, "dense", "killed", devices=2, strategy="fsdp"), divided["dense"]
    process = command("train", str(path))
    state = load_job(path).folder / "checkpoints" / "step-00000004" / "state.json"
    while not state.is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "RANK" in child.environ()]
    next(child for child in ranks if child.environ()["RANK"] == "1").send_signal(signal.SIGKILL)
    said = process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == 2 and "was ended by SIGKILL, and the others with it; continue with: " in said, said
    assert "rank 1 (process " in said and "--resume" in said
    assert "Traceback" not in said
    assert not [child for child in ranks if child.is_running()]

    copied, elsewhere = job_file(home, "dense", "copied", devices=2), job_file(home, "dense", "elsewhere")
    for other in (copied, elsewhere):
        shutil.copytree(load_job(path).folder, load_job(other).folder)
    variables = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "MASTER_ADDR": "localhost"}
    variables["PORTS"] = free_ports(2)
    commands = [("train", str(each), "--resume") for each in (path, copied)]
    finished(*(several(*commands, SLURM_PROCID=rank, SLURM_LOCALID=rank, **variables) for rank in ("0", "1")))
    assert [_exact(row) for row in metrics(load_job(path))] == [_exact(row) for row in metrics(load_job(as_before))]
    assert same_codes(path, as_before) == 1.0
    close(copied, as_before)  # with ddp
    assert main(["train", str(elsewhere), "--resume"]) == 0  # on one device
    close(elsewhere, as_before)


def _exact(row: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")}


@pytest.mark.multi
def test_every_rank_exports_a_state_to_the_same_bytes(home: Path, divided: dict[str, Path]) -> None:
    assert main(["export", str(load_job(divided["experts"]).folder), str(home / "export-alone")]) == 0
    for file in sorted((home / "export-alone").iterdir()):
        assert [(home / f"export-{rank}" / file.name).read_bytes() == file.read_bytes() for rank in (0, 1)] == [
            True
        ] * 2


# --- what is refused, and where a process stands ----------------------------------------------------


def test_bad_input_is_named_before_anything_starts(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(job_file(home, "dense", "refused"))
    for given, expected in (
        (["devices=8"], "devices (8) are more than rows (4)"),
        (["devices=3"], "must be a multiple of micro_rows x devices"),
        (["deepspeed={stage: 3}"], "strategy is auto; set strategy: deepspeed"),
        (["strategy=deepspeed", "deepspeed={offload: all}"], "stage 2 does not divide; use stage: 3"),
        (["strategy=deepspeed", "scheme.learn=none", "lora={base: packed}"], "strategy deepspeed does not divide"),
        (["devices=2", "strategy=fsdp", "lora={base: packed}"], "strategy fsdp does not divide"),
    ):
        assert main(["train", path, *given]) == 2
        assert expected in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["train", path, "devices=2"]) == 2
    assert "it has 1 GPUs; set devices=1" in capsys.readouterr().err
    assert not load_job(path).folder.exists()


def test_a_model_that_cannot_be_divided_is_refused_by_fsdp_alone(home: Path) -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(2, 2)])})])
    for name, expected in (("fsdp", True), ("ddp", False)):
        job = load_job(job_file(home, "dense", f"refused-{name}", devices=2, strategy=name))
        assert bool(strategy.undividable(job, model)) == expected
    with pytest.raises(UnsupportedError, match="take strategy=ddp"):
        strategy.check_models(load_job(home / "refused-fsdp.yaml"), model)
    strategy.check_models(load_job(home / "refused-fsdp.yaml", ["devices=1"]), model)  # nothing to divide


def test_a_group_of_another_size_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = load_job(job_file(home, "dense", "sized", devices=2))
    with pytest.raises(ConfigError, match="this is one process; start it with `qat train`"), strategy.joined(job):
        pass
    for name, value in zip(LAUNCHERS, ("0", "4", "0", "localhost", "1234"), strict=False):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="4 processes were started, but devices is 2; set devices=4"):
        strategy.joined(job).__enter__()
    assert not strategy.must_launch(job)


def test_places_that_launchers_give(monkeypatch: pytest.MonkeyPatch) -> None:
    assert strategy._placed() is None
    slurm = {"PROCID": "9", "LOCALID": "1", "NTASKS": "16", "NNODES": "2", "STEP_ID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert strategy._placed() == Ranks(9, 16, 1, 8)
    assert strategy.Placed(Ranks(9, 16, 1, 8)).node_rank() == 1
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[07-09],cpu1")
    monkeypatch.setenv("SLURM_JOB_ID", "1234567")
    assert strategy._meeting_point() == ("gpu07", "19567")
    monkeypatch.setenv("ENVIRONMENT", "BATCH")
    assert strategy._placed() == Ranks(9, 16, 1, 8)
    monkeypatch.delenv("SLURM_STEP_ID")  # the batch script itself, where nothing was started yet
    assert strategy._placed() is None
    for name, value in zip(LAUNCHERS, ("3", "4", "1", "host", "1234"), strict=False):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert strategy._placed() == Ranks(3, 4, 1, 2)


def test_one_process_asks_nobody() -> None:
    values = torch.tensor([1.0, float("nan")])
    assert ALONE.sum(values) is values and ALONE.most(-3) == -3 and ALONE.lead(lambda: Scores) is Scores
    with pytest.raises(UnsupportedError, match="x"):
        ALONE.lead(lambda: (_ for _ in ()).throw(UnsupportedError("x")))
