"""What happens after every optimizer step: averaging, the metrics file, evaluating on held-out text, saving, the
progress bar.

One Lightning callback calls the parts in a fixed order, so that what is saved is what was evaluated and logged.
"""

import contextlib
import csv
import io
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as lit
import torch
from torch import Tensor, nn

from qat.checkpoints import resume
from qat.checkpoints.progress import Meter
from qat.config import write_text_atomic
from qat.errors import ConfigError
from qat.sharded import copy, is_divided, share, swapped
from qat.trainers import why
from qat.trainers.evaluate import Evaluator, Scores
from qat.trainers.interrupts import Interruptions
from qat.trainers.job import Job
from qat.trainers.loggers import wanted
from qat.trainers.module import QatModule
from qat.trainers.quantizer_metrics import QuantizerMetrics

COLUMNS = (
    "step",
    "tokens",
    "seconds",
    "loss",
    "lr",
    "scale_lr",
    "grad_norm",
    "tokens_per_second",
    "heldout_kl",
    "heldout_nll",
    "heldout_top1",
)


class MetricsFile:
    """`metrics.csv`: one row per step, flushed at once; rows after the step a run resumes from are dropped."""

    def __init__(self, path: Path, after: int) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(_rows(path, after) if after else [])
        write_text_atomic(path, text.getvalue())  # whole before and after, whenever the process ends
        self.file = path.open("a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, COLUMNS)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; missing columns stay empty."""
        try:
            self.writer.writerow(row)
            self.file.flush()
        except OSError as error:
            error.filename = self.file.name
            raise

    def sync(self) -> None:
        """On disk before a state that counts on these rows."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close it; what a full disk refused is lost with the step that it belonged to."""
        with contextlib.suppress(OSError):
            self.file.close()


def _rows(path: Path, last: int) -> list[dict[str, str]]:
    """Whole rows up to step `last`: a crash or a full disk may have cut the final line anywhere."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    rows = csv.DictReader(line for line in whole.splitlines() if "\0" not in line)
    complete = [row for row in rows if None not in row and None not in row.values() and row["step"].isdigit()]
    return [row for row in complete if int(row["step"]) <= last]


class Average:
    """Exponential moving average of the trained parameters, bias-corrected by a warm-up of the decay."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.model = decay, model
        self.values: dict[str, Tensor] = {}

    def begin(self) -> None:
        """From the parameters as they are now, divided if they are."""
        self.values = {n: copy(p) for n, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.model.named_parameters():
            if name in self.values:
                share(self.values[name]).lerp_(share(parameter), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averaged values inside this context."""
        parameters = dict(self.model.named_parameters())
        with swapped((parameters[name], share(value)) for name, value in self.values.items()):
            yield


class Keeper:
    """Knows the best student so far and when to give up waiting for a better one."""

    def __init__(self, run: Path, job: Job, evaluator: Evaluator, best: dict[str, Any]) -> None:
        self.run, self.job, self.evaluator, self.best = run, job, evaluator, best
        self.ranks = evaluator.ranks

    def evaluate(self, model: nn.Module, step: int) -> Scores:
        """Score the model; keep it if its held-out KL is the lowest yet."""
        scores = self.evaluator.score(model)
        if not self.best or scores.kl < self.best["kl"]:
            self.best = {"step": step, "kl": scores.kl, "since": 0}
            first = self.ranks.first
            tensors = resume.student_tensors(model, keep=first) if first or is_divided(model) else {}
            if first:
                resume.save_best(self.run, tensors, {"step": step, **scores.row("student")}, self.job.lora)
        else:
            self.best["since"] += 1
        return scores

    @property
    def exhausted(self) -> bool:
        """Whether `eval.patience` evaluations have passed without improvement."""
        return 0 < self.job.eval.patience <= self.best.get("since", 0)


class StepLoop(lit.Callback):
    """Runs the parts after each optimizer step."""

    def __init__(
        self,
        run: Path,
        job: Job,
        keeper: Keeper,
        average: Average | None,
        saved: dict[str, Any],
        interruptions: Interruptions,
    ) -> None:
        self.run, self.job, self.keeper, self.average, self.saved = run, job, keeper, average, saved
        self.interruptions = interruptions
        self.metrics: MetricsFile | None = None
        self.meter: Meter | None = None
        self.quantizers: QuantizerMetrics | None = None
        self.stopped_by: str | None = None
        self._step_begin = time.monotonic()
        self._last_step = 0
        self._unread: list[dict[str, Any]] = []  # rows without what has not been read yet

    def give_up(self) -> bool:
        """Whether there is nothing left to wait for; `stopped_by` says why."""
        if self.keeper.exhausted:
            self.stopped_by = f"no better held-out KL in {self.job.eval.patience} evaluations"
        return self.keeper.exhausted

    def on_fit_start(self, trainer: lit.Trainer, pl_module: lit.LightningModule) -> None:
        """Open the metrics file and the bar."""
        module = _as_qat(pl_module)
        if wanted(self.job):
            start = self.run / "checkpoints" / why.START / why.CODES
            self.quantizers = QuantizerMetrics(module.student, start if module.start_step else None)
            self._log(trainer, self.quantizers.read(module.student), module.start_step)
        if not trainer.is_global_zero:
            return
        self.metrics = MetricsFile(self.run / "metrics.csv", module.start_step)
        self.meter = Meter("training", self.job.steps, unit="steps", done=module.start_step, quiet_seconds=0)

    def on_train_start(self, trainer: lit.Trainer, pl_module: lit.LightningModule) -> None:
        """Start the clock; from here on a signal means: finish the step, save, then stop."""
        self._step_begin = time.monotonic()
        self.interruptions.finish_steps()

    def on_train_batch_end(
        self, trainer: lit.Trainer, pl_module: lit.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a micro-batch that completed an optimizer step: average, record, evaluate, save."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        module = _as_qat(pl_module)
        step = module.step
        if self.average is not None:
            self.average.update(step)
        self._unread.append(self._row(module, step))
        every = self.job.eval.every
        last = step == self.job.steps
        evaluates = last or bool(every and step % every == 0)
        due = last or bool(self.job.checkpoint_every and step % self.job.checkpoint_every == 0)
        if evaluates or due or step % self.job.log_every == 0:
            self._read(trainer, module, evaluates)
        if number := self.keeper.ranks.most(self.interruptions.signal or 0):  # one rank may have had it alone
            self.interruptions.signal = signal.Signals(number)
        stop = self.give_up() or bool(number)
        if stop:
            self._read(trainer, module, False)
        if due or stop:
            self.save(module, step)
        trainer.should_stop = stop
        if not self._unread:
            self._step_begin = time.monotonic()

    def _row(self, module: QatModule, step: int) -> dict[str, Any]:
        rates, tokens = module.rates, module.step_tokens
        module.step_tokens = 0
        self.saved["tokens"] = self.saved.get("tokens", 0) + tokens
        return {
            "step": step,
            "tokens": self.saved["tokens"],
            "lr": next((rates[kind] for kind in ("weight", "lora", "flat") if kind in rates), ""),
            "scale_lr": rates.get("scale", ""),
            "tokens_per_second": tokens,
        }

    def _read(self, trainer: lit.Trainer, module: QatModule, evaluates: bool) -> None:
        """Complete the rows of the steps since the last reading, which share its time alike; evaluate at the last."""
        module.read()
        found = module.readings.take()
        seconds = (time.monotonic() - self._step_begin) / max(1, len(self._unread))
        rows, self._unread = self._unread, []
        for row in rows:
            reading = found[row["step"]]
            self.saved["seconds"] = self.saved.get("seconds", 0.0) + seconds
            row.update(seconds=round(self.saved["seconds"], 3), loss=reading.loss, grad_norm=reading.norm)
            row["tokens_per_second"] = round(row["tokens_per_second"] / seconds, 2)
            quantizers: dict[str, float] = {}
            if evaluates and row is rows[-1]:
                scores, quantizers = self._evaluate(module, row["step"])
                row.update(scores)
            self._record(row, row["step"])
            self._log(trainer, {k: v for k, v in {**row, **quantizers}.items() if v != ""}, row["step"])

    def _evaluate(self, module: QatModule, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """Scores, and where anyone wants them what the quantizers do."""
        with self.average.applied() if self.average is not None else contextlib.nullcontext():
            scores = self.keeper.evaluate(module.student, step)
            quantizers = self.quantizers.read(module.student) if self.quantizers is not None else {}
        return {"heldout_kl": scores.kl, "heldout_nll": scores.nll, "heldout_top1": scores.top1}, quantizers

    def _record(self, row: dict[str, Any], step: int) -> None:
        if self.metrics is None or self.meter is None:
            return
        self.metrics.write(row)
        if "heldout_kl" in row:
            mark = " (best)" if self.keeper.best["step"] == step else ""
            text = "choosing" if self.job.eval.choose is not None else "held-out"
            self.meter.say(f"step {step}: {text} KL {row['heldout_kl']:.4f}{mark}")
        self.meter.advance(1, f"loss {row['loss']:.4f}  {row['tokens_per_second']:.0f} tokens/s")

    @staticmethod
    def _log(trainer: lit.Trainer, values: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)

    def save(self, module: QatModule, step: int) -> None:
        """Write the resumable state: the first rank does, and where the model is divided the others hand it theirs."""
        first = self.keeper.ranks.first
        if not (first or is_divided(module.student)):
            return
        if self.metrics is not None:
            self.metrics.sync()
        values = self.average.values if self.average is not None else None
        state = {**self.saved, "best": self.keeper.best}
        optimizer: Any = module.optimizers()
        resume.save_state(self.run, step, module.student, optimizer.optimizer, values, state, write=first)

    def _close(self, complete: bool) -> None:
        self.interruptions.end_at_once()
        if self.meter is not None:
            self.meter.close(complete)
        if self.metrics is not None:
            self.metrics.close()

    def on_fit_end(self, trainer: lit.Trainer, pl_module: lit.LightningModule) -> None:
        """Close what was opened."""
        self._close(complete=True)

    def on_exception(self, trainer: lit.Trainer, pl_module: lit.LightningModule, exception: BaseException) -> None:
        """Close what was opened."""
        self._close(complete=False)


def _as_qat(module: lit.LightningModule) -> QatModule:
    if not isinstance(module, QatModule):
        raise ConfigError(f"these callbacks drive a QatModule, not a {type(module).__name__}")
    return module
