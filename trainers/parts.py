"""Everything a run holds in memory, between loading and the report."""

from dataclasses import dataclass, field
from typing import Any

import torch

from qat.surgery import Coverage
from qat.trainers.data import Blocks
from qat.trainers.strategy import ALONE, Ranks


@dataclass
class Parts:
    """Models, rows and where they are.

    Attributes:
        student, teacher: both on `device`; no teacher where it was `taught` before.
        train, heldout, calibration: rows of text; what is reported is read on `heldout`.
        choosing: what decides anything is read on these rows; the very same object where one text does both.
        coverage: which weights got which format.
        dtype: of autocast; None computes in float32.
        parameters: of the model that is trained, without learned scales.
        qsnr_start: dB by layer before training.
        ranks: the processes that train together.
        taught: what the teacher said earlier, where the job has a cache.
    """

    student: Any
    teacher: Any
    train: Blocks
    heldout: Blocks
    calibration: Blocks
    choosing: Blocks
    coverage: Coverage
    device: torch.device
    dtype: torch.dtype | None
    parameters: int
    qsnr_start: dict[str, float] = field(default_factory=dict)
    ranks: Ranks = ALONE
    taught: Any = None

    @property
    def chosen_apart(self) -> bool:
        """Whether a text of its own decides."""
        return self.choosing is not self.heldout
