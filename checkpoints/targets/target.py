"""What every export target offers, and how it is told about the layers. A target decides names, bytes and config
entries; it never sees a model, so it can be tested one tensor at a time."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from qat.format import Format
from qat.numerics import QTensor


@dataclass(frozen=True)
class TargetLayer:
    """One quantized linear layer: its name in the checkpoint, its shape (rows, columns) and its formats."""

    path: str
    shape: tuple[int, int]
    weight: Format
    input: Format | None


class Target(Protocol):
    """The module interface of a file in this folder."""

    def check(self, layer: TargetLayer) -> None:
        """Raise UnsupportedError, naming the nearest formats, where the target cannot hold the layer."""

    def notes(self, weight: Format, input: Format | None) -> list[str]:
        """Known surprises of engines with this pair of formats, one sentence each."""

    def pairs(self) -> list[tuple[str, str | None]]:
        """Every (weight, input) pair of catalogue names the target holds."""

    def pack(self, q: QTensor, input: Format | None, amax: Tensor | None) -> dict[str, Tensor]:
        """Stored tensors of one layer by their name below the layer's path."""

    def quantization_config(self, layers: list[TargetLayer], ignored: list[str]) -> dict[str, Any]:
        """Value of config.json's `quantization_config`; `ignored` are the weights that stay dense."""
