"""How good a student is: KL to the teacher first, then next-token loss and top-1 agreement, on text not trained on.

The teacher's final hidden states are stored (a few MB), not its logits (hundreds), so evaluating a checkpoint costs one
forward pass of the student plus the teacher's head.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from qat.checkpoints.progress import progress
from qat.config import Strict
from qat.errors import DataError, TrainingError
from qat.modes import served
from qat.sharded import is_divided, read
from qat.trainers.data import Blocks, DataConfig
from qat.trainers.forward import Head, hidden_states, split
from qat.trainers.packing import Batch, evaluating
from qat.trainers.sources import overlapping
from qat.trainers.strategy import ALONE, Ranks
from qat.training.known import Known, known_rows
from qat.training.losses import IGNORE

CHUNK = 512  # tokens whose logits exist at once
MOST_NLL = 700.0  # e to the power of more overflows


class EvalConfig(Strict):
    """The held-out text and how often to evaluate on it.

    Attributes:
        data: the text whose scores are reported; it must not be the training text.
        choose: the text that decides (which step is the best, when to stop), so that what is reported decided nothing.
            null is the same text as `data`, whose scores then flatter the student. With neither given: the two halves
            of the shipped text.
        tokens: how much of each.
        every: steps between evaluations of the choosing text while training, 0 for only at the end.
        patience: stop after so many evaluations without a better KL, 0 for never.
        batch: rows per forward pass.
        why: measure where the rest of the gap sits (`qat.trainers.why`): at most three more evaluations at the end.
    """

    data: DataConfig = DataConfig(source="heldout/reporting")
    choose: DataConfig | None = None
    tokens: int = Field(default=8192, ge=16)
    every: int = Field(default=20, ge=0)
    patience: int = Field(default=0, ge=0)
    batch: int = Field(default=2, ge=1)
    why: bool = True

    @model_validator(mode="before")
    @classmethod
    def _halves(cls, given: Any) -> Any:
        if isinstance(given, dict) and not given.keys() & {"data", "choose"}:
            return {**given, "choose": DataConfig(source="heldout/choosing")}
        return given

    @model_validator(mode="after")
    def _apart(self) -> "EvalConfig":
        if self.choose is not None and overlapping(self.choose, self.data):
            raise ValueError(
                f"choose {self.choose.source!r} and data {self.data.source!r} hold the same documents, so what is "
                "reported would have decided; give another text, or choose: null to say that it is one text"
            )
        return self


@dataclass(frozen=True)
class Scores:
    """Means over `tokens` predicted tokens: next-token loss and KL(teacher || model) in nats, share of equal top-1."""

    nll: float
    kl: float
    top1: float
    tokens: int

    @property
    def ppl(self) -> float:
        """Perplexity; infinite where a float cannot hold it."""
        return math.exp(self.nll) if self.nll < MOST_NLL else math.inf

    def row(self, name: str) -> dict[str, Any]:
        """One row of `report.json`."""
        return {"name": name, **asdict(self), "ppl": self.ppl}


class Evaluator:
    """Scores models against a teacher on fixed rows of text.

    Args:
        teacher: the reference; None scores next-token loss only (KL and agreement are NaN).
        blocks: held-out rows.
        device, dtype: where the forward runs, and the autocast dtype (None for the model's own).
        ranks: who shares the rows; each then has the scores of all.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        blocks: Blocks,
        batch: int = 2,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.blocks, self.batch, self.device, self.dtype = blocks, batch, torch.device(device), dtype
        self.teacher = teacher
        self.teacher_head: Head | None = None
        self.teacher_hidden: list[Tensor] = []
        self.teacher_says: Callable[[list[int]], Known] | None = None  # of rows, where it is not known whole,
        self.columns: int | None = None  # over so many of the first logits
        if teacher is not None:
            read(teacher, lambda: self._listen(teacher))

    def _listen(self, teacher: nn.Module) -> None:
        self.teacher_head = split(teacher)
        with evaluating(teacher):
            self.teacher_hidden = [h.cpu() for h, _ in self._hidden(teacher, "teacher reads held-out text")]

    def score(self, model: nn.Module, what: str = "evaluating") -> Scores:
        """Evaluate `model`: unquantized parameters at their BF16 values, quantized ones on their grid."""
        with served(model), evaluating(model):
            own = read(self.teacher, lambda: read(model, lambda: self._own(model, what)))
        *totals, tokens = self.ranks.sum(own).tolist()
        if not tokens:
            raise DataError(f"the held-out text ({self.blocks.source}) has no token to predict; give a longer one")
        nll, kl, top1 = (total / tokens for total in totals)
        if not math.isfinite(nll):
            raise TrainingError(
                f"{what}: the next-token loss is {nll}, so {type(model).__name__} computes NaN or infinity"
            )
        return Scores(nll, kl, top1, int(tokens))

    def own_rows(self) -> list[list[int]]:
        """The rows of each batch that is this rank's."""
        return self._parts()[self.ranks.rank :: self.ranks.size]

    def _parts(self) -> list[list[int]]:
        rows = list(range(len(self.blocks)))
        return [rows[start : start + self.batch] for start in range(0, len(rows), self.batch)]

    def _own(self, model: nn.Module, what: str) -> Tensor:
        """Sums of NLL, KL and agreement over this rank's tokens, and how many they are."""
        sums = torch.zeros(3, dtype=torch.float64)
        count = 0
        head = split(model)
        for index, (hidden, targets) in enumerate(self._hidden(model, what)):
            keep = (targets != IGNORE).nonzero().squeeze(1)
            teacher: Tensor | Known | None = None
            if self.teacher_head is not None:
                teacher = self.teacher_hidden[index].to(self.device)[keep]
            elif self.teacher_says is not None:
                teacher = self.teacher_says(self.own_rows()[index]).to(self.device)
            sums += self._sums(head, hidden[keep], teacher, targets[keep]).cpu()
            count += len(keep)
        return torch.cat([sums, torch.tensor([count])])

    @torch.no_grad()
    def _hidden(self, model: nn.Module, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Of every batch that is this rank's."""
        own, parts = self.own_rows(), self._parts()
        with progress(what, sum(map(len, own)), "rows") as advance:
            for part in own:
                batch, hidden = self._pass(model, part)
                yield hidden.flatten(0, 1), batch["targets"].flatten()
                advance(len(part))
        if is_divided(model) and len(own) < -(-len(parts) // self.ranks.size):
            self._pass(model, parts[0])  # others have one more, for which they need this rank's share of the model

    def _pass(self, model: nn.Module, rows: list[int]) -> tuple[Batch, Tensor]:
        batch = {name: tensor.to(self.device) for name, tensor in self.blocks.rows(rows).items()}
        with self._autocast():
            return batch, hidden_states(model, batch)

    @torch.no_grad()
    def _sums(self, head: Head, hidden: Tensor, teacher: Tensor | Known | None, targets: Tensor) -> Tensor:
        total = torch.zeros(3, dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            with self._autocast():
                logits = head(hidden[part])
                reference = None
                if self.teacher_head is not None and isinstance(teacher, Tensor):
                    reference = self.teacher_head(teacher[part])
            log_q = logits.float().log_softmax(-1)
            total[0] -= log_q.gather(1, targets[part, None]).double().sum()
            if isinstance(teacher, Known):
                known, log_q = teacher.part(part), log_q[:, : self.columns].contiguous()
                total[2] += (known.ids[:, 0] == log_q.argmax(-1)).sum()
                total[1] += known_rows(log_q, known).double().sum()
                continue
            if reference is None:
                total[1:] = math.nan
                continue
            if logits.shape[-1] != reference.shape[-1]:  # rows of padding: compare those that both have
                rows = min(logits.shape[-1], reference.shape[-1])
                log_q, reference = logits[:, :rows].float().log_softmax(-1), reference[:, :rows]
            log_p = reference.float().log_softmax(-1)
            total[1] += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum()
            total[2] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        return total

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def gap_closed(reference: float, before: float, after: float) -> float:
    """Share of the distance from `before` down to `reference` that `after` has covered; NaN where there was none."""
    gap = before - reference
    return (before - after) / gap if gap > 0 else math.nan
