"""When a run's student gets its adapters: after its initialisation, whose weights are then kept once as their base."""

from qat.checkpoints import resume
from qat.lora import attach
from qat.trainers.job import Job
from qat.trainers.optim import freeze
from qat.trainers.parts import Parts


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
