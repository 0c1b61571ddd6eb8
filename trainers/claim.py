"""The folder of a run: one process at a time writes it, and whoever takes it over destroys nothing.

A start needs a folder without a state to go on from and without a report; a resume needs the job that is on disk. Both
record the job with absolute paths and the fingerprints of its models, so that it means the same from anywhere, later.
"""

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import socket
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from qat.checkpoints import origin, resume
from qat.checkpoints.folders import settle
from qat.checkpoints.hf import ModelConfig, is_local, resolve
from qat.checkpoints.initialised import Initialised
from qat.checkpoints.origin import anchored, fingerprint, locate
from qat.config import load_yaml, validate, write_text_atomic
from qat.errors import CheckpointError, ConfigError
from qat.trainers import report
from qat.trainers.data import DataConfig
from qat.trainers.job import JOB, Job, recorded
from qat.trainers.optim import best_rate, schedule
from qat.trainers.sources import BUILT_IN

LOCK, METRICS = ".lock", "metrics.csv"


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Nobody else writes `run` inside the block. The lock is the system's and ends with the process, however it ends.

    Raises:
        CheckpointError: another process holds it; says which.
    """
    if run.exists() and not run.is_dir():
        raise CheckpointError(f"{run} is a file, not the folder of a run; choose another name=... or runs=...")
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            raise CheckpointError(
                f"{run} is being written by {holder}; wait for it, stop it, or choose another name=..."
            ) from None
        except OSError as error:
            warnings.warn(f"{run} cannot be locked ({error.strerror}): start no second process in it", stacklevel=3)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def located(job: Job) -> tuple[Job, Path, Path]:
    """The job as it is recorded, and the folders of its model and of its teacher (the same where it has none)."""
    source = locate(job.model)
    reference = source if job.teacher is None else _teacher(job, job.teacher)
    job = _anchored(job)
    changes = {"model": job.model.model_copy(update={"fingerprint": fingerprint(source)})}
    if job.teacher is not None:
        unread = _unread(job) and f"{job.teacher.id}@{reference.name}"
        changes["teacher"] = job.teacher.model_copy(update={"fingerprint": unread or fingerprint(reference)})
    return job.model_copy(update=changes), source, reference


def _unread(job: Job) -> bool:
    """Whether only config and tokenizer of a hub's teacher are wanted, as its answers are cached: it is then known by
    its commit."""
    return job.teacher is not None and job.teacher_cache is not None and not is_local(job.teacher)


def _teacher(job: Job, config: ModelConfig) -> Path:
    return resolve(config, weights=False) if _unread(job) else locate(config)


def _anchored(job: Job) -> Job:
    """With absolute paths where local ones were given."""
    changes: dict[str, Any] = {
        "model": anchored(job.model),
        "teacher": job.teacher and anchored(job.teacher),
        "data": _anchored_text(job.data),
        "eval": job.eval.model_copy(
            update={
                "data": _anchored_text(job.eval.data),
                "choose": job.eval.choose and _anchored_text(job.eval.choose),
            }
        ),
        "calibration": job.calibration and _anchored_text(job.calibration),
    }
    return job.model_copy(update=changes)


def _anchored_text(config: DataConfig) -> DataConfig:
    if config.mix:
        return config.model_copy(update={"mix": tuple(_anchored_text(part) for part in config.mix)})
    path = Path(config.source).expanduser()
    if config.source in BUILT_IN or not path.exists():
        return config
    return config.model_copy(update={"source": str(path.absolute())})


def check_there(job: Job) -> None:
    """Refuse models whose recorded path leads nowhere.

    Raises:
        CheckpointError: says which, and how to name its new place.
    """
    for key, config in (("model", job.model), ("teacher", job.teacher)):
        if config is not None:
            origin.check_there(config, f"say where it is: {key}.id=PATH")


def _plain(job: Job) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(job.model_dump_json())
    return settings


def _record(run: Path, job: Job) -> None:
    data = {**_plain(job), "runs": str(job.runs.absolute())}
    write_text_atomic(run / JOB, yaml.safe_dump(data, sort_keys=False))


# --- a start --------------------------------------------------------------------------------------


def refuse_restart(run: Path) -> None:
    """Refuse a fresh start over what only a person may throw away.

    Raises:
        CheckpointError: the run can be resumed, or is finished.
    """
    if resume.has_state(run):
        raise CheckpointError(f"{run} exists already; continue it with --resume, or choose another name=...")
    if (run / report.JSON).is_file():
        raise CheckpointError(f"{run} is a finished run; choose another name=..., or remove it first")


def start(run: Path, job: Job, console: Console) -> None:
    """Take over the folder for a fresh start: what an earlier one left that ended before its first state is cleared.

    A student that was trained there, although nothing can go on from it, is put aside and stays exportable.
    """
    refuse_restart(run)
    root = run / "checkpoints"
    _clear_unfinished(root)
    best = root / resume.BEST
    if best.is_dir():
        if resume.read_state(best).get("step"):
            aside = next(p for n in range(1, 10**6) if not (p := root / f"earlier-{n}").exists())
            best.rename(aside)
            if (run / METRICS).is_file():
                (run / METRICS).rename(aside / METRICS)
            console.print(
                f"an earlier start of this run saved no state to go on from; its best student is kept: "
                f"qat export {run} OUT --checkpoint {aside.name}",
                highlight=False,
                soft_wrap=True,
            )
        else:
            shutil.rmtree(best)
    (run / METRICS).unlink(missing_ok=True)
    _record(run, job)


def _clear_unfinished(root: Path) -> None:
    """Settle what killed processes were writing; the run is locked, so nobody is writing it now."""
    for unfinished in root.glob(".*.partial-*"):
        shutil.rmtree(unfinished)
    for old in root.glob(".*.old-*"):
        settle(root / old.name[1:].rpartition(".old-")[0])


# --- a resume -------------------------------------------------------------------------------------


def started(run: Path) -> Job:
    """The job that a run was started with."""
    return _anchored(validate(Job, recorded(load_yaml(run / JOB)), str(run / JOB)))


def take_up(run: Path, job: Job, console: Console) -> dict[str, Any]:
    """Check that the job on disk is this one; returns the saved state.

    More steps are allowed, other devices, and a model, text or run that moved.

    Raises:
        CheckpointError: there is nothing to resume.
        ConfigError: the job differs in anything else; names every key.
    """
    state = resume.read_state(resume.last_state(run))
    old = started(run)
    for name, one, other in (("model", old.model, job.model), ("teacher", old.teacher, job.teacher)):
        if one and other and one.fingerprint and one.fingerprint != other.fingerprint:
            raise ConfigError(
                f"the {name} {other.id} is not the one that {run} was started with: its weights or config.json "
                f"differ. Give the original ({name}.id=...), or start another run (name=...)"
            )
    changed = differences(_comparable(old), _comparable(job))
    if changed:
        raise ConfigError(
            f"{run} was started with another job; resume with the same one, or choose another name=... "
            "Differs: " + "; ".join(changed)
        )
    if job.steps < state["step"]:
        raise ConfigError(f"steps={job.steps}, but {state['step']} steps of {run} are done; give at least as many")
    if job.devices != old.devices:
        console.print(
            f"devices: {old.devices} -> {job.devices}. Every step reads the same rows, but sums them in another order: "
            "the curve goes on as it would have, up to rounding",
            highlight=False,
            soft_wrap=True,
        )
    state.setdefault("steps", old.steps)
    if job.steps != state["steps"]:
        _say_schedule(job, state, console)
    _clear_unfinished(run / "checkpoints")
    _record(run, job)
    return state


def _comparable(job: Job) -> dict[str, Any]:
    """The job without what may differ: steps, devices, and where the run, its models and its texts lie.

    Models are compared by their fingerprints, and texts when their rows are read (`check_text`).
    """
    data = _plain(job)
    for key in ("name", "runs", "steps", "devices", "strategy"):
        del data[key]
    for text in (data["data"], data["eval"]["data"], data["eval"]["choose"], data["calibration"]):
        for part in (text, *text["mix"]) if text else ():
            if Path(part["source"]).is_absolute():
                part["source"] = "a local text"
    if data["teacher_cache"]:
        del data["teacher_cache"]["folder"]
    for model in (data["model"], data["teacher"]):
        if model and Path(model["id"]).is_absolute():
            model["id"] = "a local model"
        if model:
            del model["fingerprint"]
    return data


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """'key was x, now y' for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = {**old, **new}
        return [
            line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i in range(len(old)) for line in differences(old[i], new[i], f"{path}.{i}")]
    return [] if old == new else [f"{path} was {old!r}, now {new!r}"]


def _say_schedule(job: Job, state: dict[str, Any], console: Console) -> None:
    before, step = state["steps"], state["step"]
    peak = best_rate(state["rates"]) if isinstance(job.optim.lr, str) else job.optim.lr
    was, now = (schedule(job.optim, step, steps) * peak for steps in (before, job.steps))
    console.print(
        f"steps: {before} -> {job.steps}. {step} are done; the learning rate, which would be {was:.3g} now, is "
        f"{now:.3g} and falls to its end at step {job.steps}",
        highlight=False,
        soft_wrap=True,
    )


def check_text(state: dict[str, Any], digests: dict[str, str], steps: int, console: Console) -> None:
    """Compare the rows of a resumed run with those it was started on.

    Raises:
        ConfigError: a text changed, so that the run would not go on exactly.
    """
    before = state.get("text", digests)  # runs of an older version did not record them
    changed = [key for key, digest in digests.items() if before.get(key) != digest]
    if changed == ["data"] and state["steps"] != steps:
        console.print("more steps read more text: rows come in a new order from here on", highlight=False)
    elif changed:
        raise ConfigError(
            f"the text of {' and '.join(changed)} is not what the run was started with, so it cannot go on "
            "exactly; restore it, or start another run with name=..."
        )


def how_to_go_on(run: Path) -> str:
    """What to type after an interruption."""
    if resume.has_state(run):
        return f"continue with: qat train {shlex.quote(str(run / JOB))} --resume"
    if parts := len(Initialised(run)):
        return f"start it again: what its initialisation has finished is kept ({parts} parts)"
    return "nothing was saved yet: start it again"
