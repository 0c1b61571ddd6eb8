"""Losses and norms of steps, which stay on the device until somebody reads them: each reading waits for a GPU."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.trainers.strategy import Ranks


class Reading(NamedTuple):
    """A step: its loss over all ranks, and the norm of its gradients."""

    step: int
    loss: float
    norm: float

    @property
    def problem(self) -> str | None:
        """What of it is not finite."""
        for what, measure in (("loss", self.loss), ("norm of the gradients", self.norm)):
            if not math.isfinite(measure):
                return f"{what} became {measure}"
        return None


class Readings:
    """What steps measured."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, list[Tensor], Tensor]] = []
        self._known: list[Reading] = []

    def add(self, step: int, losses: list[Tensor], norm: Tensor) -> None:
        """A step's shares of the loss, one of each micro-batch, and the norm of its gradients."""
        self._waiting.append((step, losses, norm))

    def guard(self, optimizer: Any) -> None:
        """Have the fused optimizer leave out the step that was just added, if its gradients are not finite, without the
        host's knowing. Their norm is the same on every rank."""
        _, _, norm = self._waiting[-1]
        optimizer.grad_scale, optimizer.found_inf = None, torch.logical_not(norm.isfinite()).to(torch.float32)

    def read(self, ranks: Ranks) -> list[Reading]:
        """Of the steps since the last reading, in order; the device is waited for once."""
        if not self._waiting:
            return []
        waiting, self._waiting = self._waiting, []
        values = iter(torch.stack([each for _, losses, norm in waiting for each in (*losses, norm)]).tolist())
        measured = [(step, sum(next(values) for _ in losses), next(values)) for step, losses, _ in waiting]
        totals = ranks.sum(torch.tensor([loss for _, loss, _ in measured], dtype=torch.float64)).tolist()
        found = [Reading(step, loss, norm) for (step, _, norm), loss in zip(measured, totals, strict=True)]
        self._known += found
        return found

    def take(self) -> dict[int, Reading]:
        """All that was read since the last call, by step."""
        known, self._known = self._known, []
        return {reading.step: reading for reading in known}
