"""The optimizer steps of a run, driven by Lightning, from a saved state or the start."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as lit
import torch
from safetensors.torch import load_file

from qat.checkpoints import resume
from qat.sharded import put
from qat.trainers.callbacks import Average, Keeper, StepLoop
from qat.trainers.compile import compiled
from qat.trainers.data import Batches
from qat.trainers.interrupts import Interruptions
from qat.trainers.job import Job
from qat.trainers.module import QatModule
from qat.trainers.parts import Parts
from qat.trainers.strategy import trainer_arguments


def fit(
    job: Job,
    parts: Parts,
    keeper: Keeper,
    saved: dict[str, Any],
    folder: Path | None,
    interruptions: Interruptions,
    loggers: list[Any],
    say: Callable[[str], None],
) -> StepLoop:
    """Run the steps that are left, from the state in `folder` or from the start; says in the loop why it ended."""
    start = 0
    if folder is not None:
        start = int(resume.read_state(folder)["step"])
        resume.restore_student(parts.student, load_file(folder / resume.STUDENT))
    teacher = parts.teacher if job.objective.needs_teacher else None
    batches = Batches(parts.train, job.rows, job.seed)
    module = QatModule(parts.student, teacher, job, batches, start, parts.ranks, parts.taught)
    average = Average(parts.student, job.optim.ema) if job.optim.ema else None
    loop = StepLoop(job.folder, job, keeper, average, saved, interruptions)
    if start >= job.steps or loop.give_up():
        return loop
    restore = _Restore(folder, average)
    parts.student.train()
    module.say = say
    try:
        with compiled(module, parts, say) as saved["compiled"]:
            lightning(job, parts, job.steps - start, [restore, loop], loggers).fit(module)
    finally:
        saved["graphs"] = [] if module.passes is None else module.passes.sentences
        module.passes = None  # and the memory of its graphs
    parts.student.to(parts.device)  # Lightning leaves it on the CPU
    return loop


def lightning(job: Job, parts: Parts, steps: int, callbacks: list[Any], loggers: list[Any]) -> lit.Trainer:
    """A trainer for so many steps, which keeps and shows nothing itself."""
    return lit.Trainer(
        max_steps=steps,
        accumulate_grad_batches=job.rows // (job.micro_rows * job.devices),
        accelerator=parts.device.type,
        callbacks=callbacks,
        logger=loggers or False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **trainer_arguments(job, parts.ranks, parts.dtype is torch.bfloat16),
    )


class _Restore(lit.Callback):
    """Loads the saved state once the optimizer exists."""

    def __init__(self, folder: Path | None, average: Average | None) -> None:
        self.folder, self.average = folder, average

    def on_train_start(self, trainer: lit.Trainer, pl_module: lit.LightningModule) -> None:
        """Bring back parameters, moments, averages and random state."""
        if self.average is not None:
            self.average.begin()
        if self.folder is None:
            return
        assert isinstance(pl_module, QatModule)
        optimizer: Any = pl_module.optimizers()
        _, values = resume.restore_state(self.folder, pl_module.student, optimizer.optimizer)
        if self.average is not None and values is not None:
            for name, value in values.items():
                put(self.average.values[name], value)


def quiet_lightning() -> None:
    """Lightning's tips and warnings about things this trainer does on purpose."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
