"""`optim.lr: auto`: some rates for a few steps each, from the same initialisation; the choosing text decides.

What it costs is said: the steps tried are steps trained. A short trial is a hint, not a proof: with so few steps
displacement counts more, and noise less, than over a whole run.
"""

import math
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from qat.checkpoints import resume
from qat.checkpoints.progress import counted
from qat.errors import TrainingError
from qat.trainers.compile import compiled
from qat.trainers.data import Batches
from qat.trainers.evaluate import Evaluator
from qat.trainers.fit import lightning
from qat.trainers.job import Job
from qat.trainers.module import QatModule
from qat.trainers.optim import best_rate
from qat.trainers.parts import Parts


def settled(job: Job, parts: Parts, evaluator: Evaluator, saved: dict[str, Any], console: Console) -> Job:
    """The job with a number for its rate; what was tried goes into `saved`, so that it is tried once.

    Args:
        parts: the student stands at its initialisation, which is also kept as the best so far.
        evaluator: on the text that decides.
        saved: the run's state.
    """
    if job.optim.lr != "auto":
        return job
    if "rates" not in saved:
        saved["rates"] = _tried(job, parts, evaluator)
        start = saved.get("choosing") or saved["rows"]
        console.print(_said(saved["rates"], start[-1]["kl"], job), highlight=False, soft_wrap=True)
    return _at(job, best_rate(saved["rates"]))


def _said(rates: list[list[float]], start: float, job: Job) -> str:
    tried = ", ".join(f"{rate:.3g} -> {kl:.4f}" for rate, kl in rates)
    worse = "" if min(kl for _, kl in rates) < start else "; none improves on the initialisation, so expect little"
    return (
        f"learning rate: {best_rate(rates):.3g} (KL after {_steps(job)} steps, from {start:.4f}: {tried}){worse}; "
        f"that cost {len(rates) * _steps(job)} steps and {len(rates)} evaluations"
    )


def _steps(job: Job) -> int:
    return min(job.steps, job.optim.search.steps or max(4, job.steps // 10))


def _at(job: Job, rate: float, **changes: Any) -> Job:
    """The job at one rate; the rates of norms follow where they have none of their own."""
    return job.model_copy(update={"optim": job.optim.model_copy(update={"lr": rate}), **changes})


def _tried(job: Job, parts: Parts, evaluator: Evaluator) -> list[list[float]]:
    rates = job.optim.search.rates
    found = []
    for rate in counted(rates, "trying learning rates", len(rates), "rates"):
        with torch.random.fork_rng():
            found.append([rate, _kl(_at(job, rate, steps=_steps(job)), parts, evaluator)])
        start = load_file(job.folder / "checkpoints" / resume.BEST / resume.STUDENT)
        resume.restore_student(parts.student, start)
    return found


def _kl(job: Job, parts: Parts, evaluator: Evaluator) -> float:
    teacher = parts.teacher if job.objective.needs_teacher else None
    batches = Batches(parts.train, job.rows, job.seed)
    module = QatModule(parts.student, teacher, job, batches, 0, parts.ranks, parts.taught)
    parts.student.train()
    try:
        with compiled(module, parts):
            lightning(job, parts, job.steps, [], []).fit(module)
        parts.student.to(parts.device)
        return evaluator.score(parts.student, f"evaluating a rate of {job.optim.peak:.3g}").kl
    except TrainingError:  # too high a rate; not a number
        parts.student.to(parts.device)
        return math.inf
    finally:
        module.passes = None  # and the memory of its graphs
