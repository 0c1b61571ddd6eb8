"""The Lightning module: one optimizer step of QAT or QAD. What differs between the two is only the loss.

The step counter, the order of the data and the learning rate are pure functions of the optimizer step, so that a
resumed run repeats the interrupted one exactly; Lightning's own loop state is not needed.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import lightning as lit
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from qat import zero
from qat.errors import TrainingError
from qat.modes import held
from qat.sharded import close, is_divided, read, run, whole
from qat.trainers import optim
from qat.trainers.after_step import AfterStep
from qat.trainers.cached import Taught
from qat.trainers.cuda_graphs import Passes, padded, passes
from qat.trainers.data import Batches
from qat.trainers.forward import Head, heads, hidden_states
from qat.trainers.job import Job
from qat.trainers.packing import Batch
from qat.trainers.packing import known as known_of
from qat.trainers.readings import Readings
from qat.trainers.strategy import ALONE, Ranks
from qat.training.known import known_in
from qat.training.losses import IGNORE, chunked

if TYPE_CHECKING:
    from qat.trainers.compile import Compiled


class MicroBatches(IterableDataset[Batch]):
    """The micro-batches of optimizer steps `start` to `stop`, in order, each with the token count of its whole step."""

    def __init__(
        self, batches: Batches, start: int, stop: int, micro_rows: int, world_size: int, taught: Taught | None = None
    ) -> None:
        self.taught = taught
        self.batches, self.start, self.stop = batches, start, stop
        self.micro_rows, self.world_size = micro_rows, world_size

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.start, self.stop):
            whole = Batches(self.batches.blocks, self.batches.rows_per_batch, self.batches.seed).batch(step)
            count = (whole["targets"] != IGNORE).sum()
            mine = self.batches.batch(step) if self.world_size > 1 else whole
            for first in range(0, len(mine["targets"]), self.micro_rows):
                part = slice(first, first + self.micro_rows)
                micro = {name: tensor[part] for name, tensor in mine.items()}
                said = {} if self.taught is None else self.taught.columns(self.batches.indices(step)[part])
                yield {**micro, **known_of(micro), **said, "step_tokens": count}


class QatModule(lit.LightningModule):
    """Student, teacher and loss.

    Args:
        student: a model that a scheme was applied to.
        teacher: or None, for losses without one. It is not a submodule, so it is neither trained nor saved.
        job: the run.
        blocks: training rows.
        start_step: optimizer steps already done.
        ranks: the processes that train together.
        taught: what the teacher said earlier, in its place.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        job: Job,
        batches: Batches,
        start_step: int,
        ranks: Ranks = ALONE,
        taught: Taught | None = None,
    ) -> None:
        super().__init__()
        self.taught = taught
        self.student, self.job, self.batches, self.start_step = student, job, batches, start_step
        self.ranks = ranks
        self._teacher = (teacher,)
        self._heads: tuple[Head, Head | None] | None = None
        self._after: AfterStep | None = None
        self._losses: list[Tensor] = []  # of the step's micro-batches
        self._held = contextlib.ExitStack()  # open while a step's weights are held
        self.compiled: Compiled | None = None  # see `qat.trainers.compile`
        self.passes: Passes | None = None  # see `qat.trainers.cuda_graphs`
        self.say: Callable[[str], None] = lambda _: None
        self._replayed = False
        self.readings = Readings()
        self.step_loss = 0.0  # of the last step that was read, as `grad_norm`
        self.step_tokens = 0
        self.grad_norm = 0.0
        self.rates: dict[str, float] = {}

    @property
    def step(self) -> int:
        """Optimizer steps done since the job began, over all resumptions."""
        return self.start_step + int(self.trainer.global_step)

    @property
    def teacher(self) -> nn.Module | None:
        """See the class."""
        return self._teacher[0]

    def configure_model(self) -> None:
        """Lightning's strategy for FSDP2 wants the model to be divided here; `qat.trainers.strategy` has done it."""

    def forward(self, work: Any) -> Any:
        """Run a function as a forward pass of this module, which is how DeepSpeed gathers what it divided."""
        return work()

    def on_fit_start(self) -> None:
        """Place the teacher, find both heads, freeze what the job freezes."""
        if self.teacher is not None:
            self.teacher.to(self.device).eval().requires_grad_(False)
        with torch.autocast(self.device.type, enabled=False):
            student, teacher = self.student, self.teacher
            own, other = read(teacher, lambda: read(student, lambda: heads(student, teacher)))
        self._heads = own if self.taught is None else self.taught.head(own), other
        self._after = AfterStep(self.student, self.job.optim, self.job.steps)
        self.passes = passes(self)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Micro-batches from the current step to the last."""
        return DataLoader(self._data(self.global_rank, self.trainer.world_size), batch_size=None)

    def _data(self, rank: int, world: int) -> MicroBatches:
        share = Batches(self.batches.blocks, self.batches.rows_per_batch, self.batches.seed, rank, world)
        return MicroBatches(share, self.start_step, self.job.steps, self.job.micro_rows, world, self.taught)

    def first_batch(self, device: torch.device) -> Batch:
        """The first of this process's micro-batches."""
        batch: Batch = move_data_to_device(next(iter(self._data(self.ranks.rank, self.ranks.size))), device)
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss per token of the whole optimizer step, this micro-batch's share of it."""
        first = not self._losses
        recorded = self.passes is not None and self.passes.active  # which keeps nothing for the next pass
        if self.job.holds and first and not recorded:
            self._held.enter_context(held(self.student))
        if self.compiled is not None:
            self.compiled.begin(first and not recorded)
        replayed = None if self.passes is None else self.passes(padded(batch), first)
        self._replayed = replayed is not None
        value = run(self.student, lambda: self.share(batch)) if replayed is None else replayed
        close(self.teacher)
        self._losses.append(value.detach())
        self.step_tokens += batch["input_ids"].numel() * self.trainer.world_size
        # Lightning divides by the accumulation count and averages over processes; the sum over the step is wanted.
        return value * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Of a replayed pass, whose forward pass was followed by it, the gradients that it left."""
        if self._replayed and self.passes is not None:
            self.passes.give()
        else:
            super().backward(loss, *args, **kwargs)

    def on_after_backward(self) -> None:
        """A pass of training has ended, with all that was recomputed in it."""
        if self.compiled is not None:
            self.compiled.on = False

    def share(self, batch: Batch) -> Tensor:
        """This micro-batch's share of the step's mean loss."""
        assert self._heads is not None
        student_head, teacher_head = self._heads
        teacher, teacher_hidden = self.teacher, None
        if teacher is not None and self.job.objective.needs_teacher:
            with torch.no_grad():
                teacher_hidden = run(teacher, lambda: hidden_states(teacher, batch))
        hidden = hidden_states(self.student, batch)
        models = (hidden, student_head, teacher_hidden, teacher_head)
        places, gaps = batch.get("places", batch.get("kept")), "places" in batch
        chunk, known = self.job.loss_chunk, known_in(batch)
        total = chunked(self.job.objective, *models, batch["targets"], chunk, known, places, gaps)
        return total / batch["step_tokens"].clamp(min=1)

    def read(self) -> None:
        """Read what the steps since the last reading measured, which a GPU waits for.

        Raises:
            TrainingError: something is not finite.
        """
        for reading in self.readings.read(self.ranks):
            self.step_loss, self.grad_norm = reading.loss, reading.norm
            if reading.problem is not None:
                raise TrainingError(
                    f"the {reading.problem} at step {reading.step}; the last good checkpoint is kept. Lower "
                    f"optim.lr (now {self.job.optim.peak:g}), or look for bad rows in {self.job.data.source!r}"
                )

    def configure_optimizers(self) -> Any:
        """AdamW; rates follow `optim.schedule` from the true step."""
        optimizer = optim.build(self.student, self.job.optim)

        def factor(steps: int) -> float:
            return optim.schedule(self.job.optim, self.start_step + steps, self.job.steps)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """One step, and what follows it before anything is evaluated or saved."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if (division := zero.of(self.student)) is not None:  # its engine is called for every micro-batch, and clips
            if self.trainer.fit_loop._should_accumulate():
                return
            self._measured(optimizer, division.norm)
        assert self._after is not None
        self._after(self.step + 1, getattr(optimizer, "optimizer", optimizer))  # Lightning counts the step afterwards

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clip by the norm over all trained parameters, and remember loss, norm and the rates in force for the log;
        they are read at once, unless `log_every` says later.

        Raises:
            TrainingError: the loss or the norm is not finite.
        """
        if zero.of(self.student) is not None:
            return
        groups = optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        self._held.close()
        self._measured(optimizer, whole(nn.utils.clip_grad_norm_(parameters, self.job.optim.clip)))

    def _measured(self, optimizer: Any, norm: Tensor) -> None:
        self.readings.add(self.step + 1, self._losses, norm)
        self._losses = []
        if self.job.log_every > 1 and not is_divided(self.student):
            self.readings.guard(getattr(optimizer, "optimizer", optimizer))
        else:  # before the optimizer writes NaN into the weights
            self.read()
        self.rates = {group["kind"]: group["lr"] for group in optimizer.param_groups}
