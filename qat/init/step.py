"""One step of what happens before training: a frozen config class with `run`, in a file of its own in this folder;
`Scheme.init` lists them in order."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from qat.config import Strict
from qat.sites import Site

Track = Callable[[dict[str, Any]], Iterable[tuple[str, Any]]]


@dataclass
class Calibration:
    """What a step has to work with.

    Attributes:
        model: with a scheme applied, and activation ranges fixed.
        batches: of calibration text.
        sites: the weights that the step is for, by path.
        mean_square: of each channel of what a weight is multiplied with, by path.
        track: goes over sites or blocks, and may show how far it is.
        store: of what is finished (`qat.init.kept.Store`), for an initialisation that may be interrupted.
    """

    model: nn.Module
    batches: list[dict[str, Tensor]]
    sites: dict[str, Site]
    mean_square: dict[str, Tensor]
    track: Track = dict.items
    store: Any = None


class InitStep(Strict):
    """One step of an initialisation. `kind` is its name in `Scheme.init`; what it makes is said by the constants."""

    MAKES_SCALES: ClassVar[bool] = False
    WHOLE_MODEL: ClassVar[bool] = False

    kind: str

    @property
    def moves_stream(self) -> bool:
        """Whether it changes what the residual stream's channels mean: final hidden states are then no longer the
        teacher's."""
        return False

    def run(self, calibration: Calibration) -> str | None:
        """Change weights or scales in place; returns a sentence for the user, or None."""
        raise NotImplementedError

    def take_up(self, calibration: Calibration) -> None:
        """Do what `run` does besides changing tensors, where those come from an earlier attempt."""
