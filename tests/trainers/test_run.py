"""The whole road on a tiny model: train, resume exactly after a kill, stop on bad input, keep the best."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from qat.checkpoints.export import export
from qat.checkpoints.resume import load_student
from qat.checkpoints.verify import verify
from qat.errors import CheckpointError, ConfigError, DataError, TrainingError, UnsupportedError
from qat.sites import weights
from qat.trainers import zero
from qat.trainers.job import load_job
from qat.trainers.run import train
from tests.tiny import tiny_model
from tests.trainers.jobs import curve, metrics, saved_steps, write

ROTATED = {  # a state that more than numbers belong to
    "rules": [{"match": "*_proj", "weight": "nvfp4", "input": "nvfp4"}, {"match": "*", "skip": "kept in BF16"}],
    "init": ["smooth", {"kind": "hadamard", "size": 16}, "gptq"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")


def command(path: Path, *more: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "qat.cli", "train", str(path), *more]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def test_report_and_files(tmp_path: Path, model: Path) -> None:
    job = load_job(write(tmp_path, model))
    report = train(job, table=False)
    assert [row["name"] for row in report["rows"]] == ["bf16", "ptq", "best_ptq", "student"]
    rows = {row["name"]: row for row in report["rows"]}
    assert abs(rows["bf16"]["kl"]) < 1e-6 and rows["bf16"]["top1"] == 1.0
    assert rows["student"]["kl"] < rows["ptq"]["kl"]
    assert report["gap_closed"]["kl"] == pytest.approx(1 - rows["student"]["kl"] / rows["ptq"]["kl"], rel=1e-5)
    assert report["tokens"] == 6 * 4 * 32
    on_disk = json.loads((job.folder / "report.json").read_text())
    assert on_disk["rows"] == report["rows"]
    for name in ("job.yaml", "report.md", "metrics.csv", "plots/loss.png", "plots/recovery.png", "plots/qsnr.png"):
        assert (job.folder / name).stat().st_size > 0, name
    assert [row["step"] for row in metrics(job)] == [str(n) for n in range(1, 7)]
    best = min((float(r["heldout_kl"]), int(r["step"])) for r in metrics(job) if r["heldout_kl"])
    state = json.loads((job.folder / "checkpoints/best/state.json").read_text())
    assert state["step"] == best[1] and rows["student"]["kl"] == pytest.approx(best[0], rel=1e-4)


def test_every_method_loss_and_learning_mode_trains(tmp_path: Path, model: Path) -> None:
    scheme = yaml.safe_load(write(tmp_path, model).read_text())["scheme"]
    for number, changes in enumerate(
        (
            {"method": "qat"},
            {"loss": {"kind": "jsd"}},
            {"loss": {"kind": "reverse_kl"}, "scheme": {**scheme, "learn": "lsq"}},
            {"scheme": {**scheme, "learn": "none"}, "activation_checkpointing": True, "optim": {"lr": 1e-3}},
            {"scheme": {**scheme, "learn": "refit"}, "loss": {"kind": "cakld", "hidden": 0.1}},
            {"scheme": {**scheme, "learn": "focus"}},
            {"optim": {"train": "scales", "scale_lr": 1e-2, "decay": "linear", "final": 0.0}},
        )
    ):
        job = load_job(write(tmp_path, model, name=f"run{number}", steps=2, **changes))
        report = train(job, table=False)
        assert math.isfinite(report["rows"][-1]["kl"])


FOLLOWED = {  # what follows a step: refits, damping, an average of the weights
    "scheme": {
        "rules": [{"match": "*_proj", "weight": "int4_g32_asym", "input": "int8_tensor"}, {"match": "*", "skip": "no"}],
        "learn": "refit",
        "learn_inputs": True,
    },
    "optim": {"lr": 1e-3, "ema": 0.9, "refit_every": 1, "cage": {"strength": 100, "begin": 0.1}},
}


ADAPTED = {"scheme": ROTATED, "lora": {"rank": 4, "dropout": 0.1}, "optim": {"lr": 1e-4, "lora_lr": 2e-3, "ema": 0.9}}


PACKED = {"scheme": {**ROTATED, "learn": "lsq"}, "lora": {"rank": 4, "dropout": 0.1, "base": "packed"}}
RESUMED = {"rotated": {"scheme": ROTATED}, "followed": FOLLOWED, "adapted": ADAPTED, "packed": PACKED}


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED)
def test_resume_after_kill_repeats_the_uninterrupted_run(tmp_path: Path, model: Path, changes: dict[str, Any]) -> None:
    whole = load_job(write(tmp_path, model, name="whole", **changes))
    train(whole, table=False)
    path = write(tmp_path, model, name="cut", **changes)
    cut = load_job(path)
    process = command(path)
    for _ in poll(120):
        if (cut.folder / "metrics.csv").is_file() and len(metrics(cut)) >= 3 and saved_steps(cut):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert load_student(cut.folder)[0] is not None  # the best so far is loadable
    report = train(cut, resume_run=True, table=False)
    assert curve(cut) == curve(whole)
    theirs, ours = (load_file(j.folder / "checkpoints/best/student.safetensors") for j in (whole, cut))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[n], ours[n]) for n in theirs)
    assert report["tokens"] == 6 * 4 * 32


def poll(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.01)
    pytest.fail(f"nothing happened within {seconds} s")


def test_sigterm_saves_and_says_how_to_go_on(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path, model, steps=2000, checkpoint_every=0, eval={"data": {"source": "heldout", "seq_len": 32}})
    job = load_job(path)
    process = command(path)
    for _ in poll(120):
        if (job.folder / "metrics.csv").is_file() and len(metrics(job)) >= 3:
            break
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "--resume" in errors
    assert json.loads((saved_steps(job)[-1] / "state.json").read_text())["step"] == len(metrics(job))


def test_what_is_quantized_is_printed_in_columns(tmp_path: Path, model: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, width=60)
    job = load_job(write(tmp_path, model, steps=1), ["scheme.rules.0.skip=a reason, in [brackets], of any length " * 3])
    train(job, console=console, table=False)
    lines = [line for line in text.getvalue().splitlines() if " modules " in line]
    assert len(lines) == 3 and len({line.index(" modules ") for line in lines}) == 1
    assert any("a reason, in [brackets], of any length" in line for line in lines)


def test_resume_with_another_job_says_what_differs(tmp_path: Path, model: Path) -> None:
    train(load_job(write(tmp_path, model)), table=False)
    with pytest.raises(ConfigError, match=r"optim\.lr was 0\.001, now 0\.002"):
        train(load_job(write(tmp_path, model), ["optim.lr=0.002"]), resume_run=True)
    with pytest.raises(CheckpointError, match="exists already"):
        train(load_job(write(tmp_path, model)))
    with pytest.raises(CheckpointError, match="no resumable state"):
        train(load_job(write(tmp_path, model, name="never")), resume_run=True)


def test_loss_that_is_not_finite_stops_and_keeps_the_best(tmp_path: Path, model: Path) -> None:
    job = load_job(write(tmp_path, model, optim={"lr": 1e30, "clip": 1e30}, steps=20))
    with pytest.raises(TrainingError, match=r"loss became (nan|inf) at step \d+"):
        train(job, table=False)
    student, _, state = load_student(job.folder)
    assert all(torch.isfinite(p).all() for p in student.parameters()) and math.isfinite(state["kl"])


def test_a_start_that_failed_early_can_be_repeated(tmp_path: Path, model: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    data = {"source": str(empty), "seq_len": 32}
    with pytest.raises(DataError, match="empty"):
        train(load_job(write(tmp_path, model, data=data)), table=False)
    assert train(load_job(write(tmp_path, model, steps=2)), table=False)["steps"] == 2


def test_one_half_decides_and_the_other_is_reported(tmp_path: Path, model: Path) -> None:
    texts = {
        key: {"source": f"heldout/{half}", "seq_len": 32}
        for key, half in (("data", "reporting"), ("choose", "choosing"))
    }
    job = load_job(write(tmp_path, model, name="halves", eval={**texts, "tokens": 256, "every": 2}))
    said = io.StringIO()
    report = train(job, table=False, console=Console(file=said, width=200))
    old = load_job(write(tmp_path, model, name="old", eval={"data": texts["data"], "tokens": 256, "every": 2}))
    same = train(old, table=False)
    assert same["choosing"] == [] and same["rows"][:3] == report["rows"][:3]
    chosen = {row["name"]: row["kl"] for row in report["choosing"]}
    seen = [float(row["heldout_kl"]) for row in metrics(job) if row["heldout_kl"]]
    assert list(chosen) == ["ptq", "best_ptq", "student"] and chosen["student"] == min(chosen["best_ptq"], *seen)
    assert report["choosing_hash"] != report["eval_hash"] == same["eval_hash"]
    assert "choosing KL" in said.getvalue()
    page = (job.folder / "report.md").read_text()
    assert "KL on the choosing text" in page and "flatters" in (old.folder / "report.md").read_text()
    moved, gap = report["why"]["moved"], report["why"]["gap"]
    assert 0 < moved["flipped"] < 1 and len(moved["sites"]) == 14 and gap["both"] == report["rows"][-1]["kl"]
    assert "## What training did" in page and (job.folder / "plots/flipped.png").is_file()


def test_data_that_is_evaluated_on_is_refused(tmp_path: Path, model: Path) -> None:
    data = {"source": "heldout", "seq_len": 32}
    with pytest.raises(ConfigError, match=r"eval\.data are the same documents"):
        load_job(write(tmp_path, model, data=data, eval={"tokens": 64}))


def test_early_stop(tmp_path: Path, model: Path) -> None:
    evaluation = {"data": {"source": "heldout", "seq_len": 32}, "tokens": 256, "every": 1, "patience": 2}
    job = load_job(write(tmp_path, model, steps=50, optim={"lr": 0.3}, eval=evaluation))
    report = train(job, table=False)
    assert len(metrics(job)) < 50 and report["best_step"] <= len(metrics(job)) - 2


def test_the_start_is_kept_when_training_only_hurts(tmp_path: Path, model: Path) -> None:
    job = load_job(write(tmp_path, model, optim={"lr": 0.3}))
    rows = {row["name"]: row for row in train(job, table=False)["rows"]}
    assert rows["student"]["kl"] == pytest.approx(rows["best_ptq"]["kl"], rel=1e-5)


def test_unavailable_strategy_is_refused_before_anything_is_written(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda name: None)  # as where it is not installed
    job = load_job(write(tmp_path, model, strategy="deepspeed"))
    with pytest.raises(UnsupportedError, match="fsdp"):
        train(job)
    assert not job.folder.exists()


def test_a_smoothed_student_of_a_larger_teacher_is_exported_as_it_was_trained(tmp_path: Path, model: Path) -> None:
    """Smoothing changes norms, which an export must carry; sizes and the first row are the trained model's own."""
    larger = tiny_model("llama", tmp_path / "teacher", seed=1, num_hidden_layers=3)
    scheme = yaml.safe_load(write(tmp_path, model).read_text())["scheme"]
    changes = {"scheme": {**scheme, "init": ["smooth", "gptq"]}, "teacher": {"id": str(larger)}, "steps": 2}
    job = load_job(write(tmp_path, model, **changes))
    said = io.StringIO()
    report = train(job, table=False, console=Console(file=said, width=200))
    assert "smoothed the inputs of 14 of 14 layers" in said.getvalue()
    assert report["rows"][0]["kl"] > 0.01  # another model than the teacher
    own = sum(t.numel() for t in load_file(model / "model.safetensors").values())
    assert report["dense_bytes"] == 2 * own
    export(job.folder, tmp_path / "out", "compressed-tensors")
    checked = verify(tmp_path / "out")
    assert checked.ok and "difference 0.0" in checked.checks[-1].detail


@pytest.mark.gpu
def test_on_a_gpu_the_student_is_evaluated_where_it_was_trained(tmp_path: Path, model: Path) -> None:
    report = train(load_job(write(tmp_path, model)), table=False)
    assert "GPU" in report["machine"] or "NVIDIA" in report["machine"]


def test_adapters_are_small_on_disk_and_their_export_is_the_trained_student(tmp_path: Path, model: Path) -> None:
    """GPTQ and smoothing move the base, which is kept once; the merged codes are those of the last forward pass."""
    scheme = {**ROTATED, "init": ["smooth", "gptq"]}
    changes = {"scheme": scheme, "lora": {"rank": 2, "dora": True}, "optim": {"lr": 1e-4, "lora_lr": 2e-4}}
    job = load_job(write(tmp_path, model, **changes))
    report = train(job, table=False)
    folder = job.folder / "checkpoints"
    assert 0 < report["why"]["moved"]["flipped"] < 0.5
    tensors = load_file(folder / "best" / "student.safetensors")
    assert not any(name.endswith("_proj.weight") for name in tensors) and any(".lora.B" in name for name in tensors)
    base = load_file(folder / "base" / "base.safetensors")
    assert "lm_head.weight" not in base and sum(name.endswith("_proj.weight") for name in base) == 14
    assert json.loads((folder / "best" / "adapter_config.json").read_text())["use_dora"] is True
    export(job.folder, tmp_path / "out")
    assert verify(tmp_path / "out").ok
    student, _, _ = load_student(job.folder)
    trained = weights(student)
    start = load_file(folder / "start" / "codes.safetensors")
    flips = sum(int((s.quantizer.quantize(s.weight).codes != start[f"{p} codes"]).sum()) for p, s in trained.items())
    assert flips / report["why"]["moved"]["codes"] == pytest.approx(report["why"]["moved"]["flipped"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": {"targets": "lm_head"}}, "lm_head, which the scheme does not quantize"),
        ({"lora": {"targets": "*nothing"}}, "matches no layer"),
        ({"lora": {"rank": 100}}, "rank 100 is larger than"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"lora": {}, "optim": {"train": "scales"}}, "beside lora"),
        ({"lora": {}, "optim": {"cage": {"strength": 1.0}}}, "lora leaves frozen"),
    ],
)
def test_adapters_that_cannot_be_are_refused_before_anything_is_loaded(
    changes: dict[str, Any], words: str, tmp_path: Path, model: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        train(load_job(write(tmp_path, model, **changes)), table=False)
    assert not (tmp_path / "runs" / "tiny" / "checkpoints").exists()
