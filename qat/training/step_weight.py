"""What a linear layer made of its weight in a step of training, for the step's other passes (`qat.modes.held`)."""

import weakref
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepWeight:
    """A weight on its grid.

    Attributes:
        of, version: the parameter whose numbers it was made of, and how often they had been written.
        scales: multiplier and divisor that were in force.
        value: the weight on its grid.
    """

    of: weakref.ref[Tensor]
    version: int
    scales: tuple[Tensor, Tensor | None]
    value: Tensor

    @classmethod
    def from_weight(cls, weight: Tensor, scales: tuple[Tensor, Tensor | None], value: Tensor) -> "StepWeight":
        """What was made of `weight` as it is now."""
        multiplier, divisor = scales
        plain = multiplier.detach(), None if divisor is None else divisor.detach()
        return cls(weakref.ref(_owner(weight)), weight._version, plain, value)

    def fits(self, weight: Tensor) -> bool:
        """Whether it was made of these very numbers."""
        return self.of() is _owner(weight) and self.version == weight._version


def _owner(weight: Tensor) -> Tensor:
    """The parameter, of a transposed one, which is another view at every call."""
    return weight if weight._base is None else weight._base
