"""One result for several readers of one tensor: layers that multiply with the same input quantize it once."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SameTensor:
    """What was made of the tensor seen last, by identity: several layers read one tensor, which needs one result.

    Threads may share one: its state is read once and written once, so at worst something is made again. The tensor
    itself is not kept alive, and the result no longer than until its last reader.

    Args:
        readers: how many ask for the result of one tensor.
    """

    def __init__(self, readers: float = math.inf) -> None:
        self.readers = readers
        self._state: tuple[weakref.ref[Tensor], Any, int] | None = None
        self._recorded: tuple[Tensor, Any, int] | None = None

    def seen(self, x: Tensor) -> Any:
        """What was made of x, if it is the very tensor seen last; else None."""
        state = self._state
        return state[1] if state is not None and state[0]() is x else None

    def remember(self, x: Tensor, made: Any, uses: int = 0) -> None:
        """x is the tensor seen last, and `made` was made of it."""
        self._state = (weakref.ref(x), made, uses) if uses < self.readers else None

    def once(self, x: Tensor, make: Callable[[Tensor], Any]) -> Any:
        """What `make` makes of x, made for its first reader only."""
        if torch.compiler.is_compiling():
            return self._recorded_once(x, make)
        state = self._state
        made, uses = (state[1], state[2]) if state is not None and state[0]() is x else (make(x), 0)
        self.remember(x, made, uses + 1)
        return made

    def _recorded_once(self, x: Tensor, make: Callable[[Tensor], Any]) -> Any:
        """The same in a graph that is being recorded, which nothing may outlive."""
        seen = self._recorded
        made, uses = (seen[1], seen[2] + 1) if seen is not None and seen[0] is x else (make(x), 1)
        self._recorded = (x, made, uses) if uses < self.readers < math.inf else None
        return made

    def forget(self) -> None:
        """None was seen."""
        self._state = None
