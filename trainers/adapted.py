"""When a run's student gets its adapters: after its initialisation, whose weights are then kept once as their base."""

from pathlib import Path
from typing import Any

import torch

from qat.checkpoints import resume
from qat.lora import attach, hold
from qat.trainers import packed
from qat.trainers.job import Job
from qat.trainers.optim import freeze
from qat.trainers.parts import Parts


def first_place(job: Job, source: Path, device: torch.device) -> torch.device:
    """Where the student is loaded from its folder and stays while it is dense: on the CPU where it is held packed
    before it goes to `device`."""
    return torch.device("cpu") if _held_from_the_start(job, source) else device


def hold_early(job: Job, student: Any) -> None:
    """Hold the weights of a packed checkpoint packed before anything else, where the job asks for that."""
    if _held_from_the_start(job, packed.folder_of(student)):
        packed.put(student)
        hold(student)


def _held_from_the_start(job: Job, source: Path) -> bool:
    return job.lora is not None and job.lora.base == "packed" and packed.is_from_packed(source)


def fingerprints(job: Job, parts: Parts) -> dict[str, str]:
    """Of the weights before the initialisation, where the job has adapters."""
    return resume.fingerprints(parts.student) if job.lora is not None and parts.ranks.first else {}


def begin(job: Job, parts: Parts, before: dict[str, str]) -> None:
    """Put the job's adapters, if any, on the initialised student; what the initialisation moved goes to disk.

    Args:
        before: `fingerprints`.
    """
    if job.lora is None:
        return
    _attach(job, parts)
    parts.ranks.share(parts.student)
    if parts.ranks.first:
        resume.save_base(job.folder, parts.student, before)


def take_up(job: Job, parts: Parts) -> None:
    """The same for a resumed run, from disk; what was trained is restored with the rest of the state."""
    if job.lora is not None:
        _attach(job, parts)
        resume.restore_base(job.folder, parts.student)


def _attach(job: Job, parts: Parts) -> None:
    assert job.lora is not None
    attach(parts.student, job.lora)
    freeze(parts.student, job.optim)
