"""What a check of first contact is, and how its results are compared (see `tests/kernels/contact.py`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROUNDED = 4e-3  # error of a result in BF16


@dataclass(frozen=True)
class Check:
    """A name, "operator what size", and what must hold: True, or an error of at most `limit`."""

    name: str
    limit: float | None
    run: Callable[[], float | bool]

    def holds(self) -> tuple[bool, float]:
        """Whether it does, and what was found."""
        found = self.run()
        return (bool(found), float(found)) if self.limit is None else (found <= self.limit, float(found))


def normal(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def error(found: Tensor, truth: Tensor) -> float:
    """Relative, by norms; NaN where either holds one."""
    found, truth = found.detach().double().cpu(), truth.detach().double().cpu()
    assert found.shape == truth.shape, f"{tuple(found.shape)} instead of {tuple(truth.shape)}"
    return float((found - truth).norm() / truth.norm().clamp_min(1e-30))


def same(found: Any, truth: Any) -> bool:
    """Equal tensors, or tuples of them: codes in every bit, numbers but for the sign of a zero."""
    if isinstance(found, Tensor):
        a, b = found.cpu(), truth.cpu()
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(*(t.view(torch.uint8) if t.element_size() == 1 else t for t in (a, b)))
    return len(found) == len(truth) and all(same(a, b) for a, b in zip(found, truth, strict=True))


def there(device: str, *given: Any) -> tuple[Any, ...]:
    """The same arguments on the device."""
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in given)
