"""What every export target offers, and how it is told about the layers. A target decides names, bytes and config
entries; it never sees a model, so it can be tested one tensor at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from qat.checkpoints.layouts.caches import CacheLayout
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.layouts.support import Row
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor


@dataclass(frozen=True)
class TargetLayer:
    """One quantized weight.

    Attributes:
        path: its name in the checkpoint.
        shape: (rows, columns), or (experts, rows, columns) where the checkpoint holds a stack as one tensor.
        weight, input: its formats.
        module: path in transformers' model, where that differs.
        model_type: of the model's config.
        transposed: whether the dense tensor is stored (..., columns, rows).
        rotation: size of the block Hadamard that its input meets, 0 without; the weight is rotated already.
        is_table: whether it is an embedding, whose rows are looked up.
        tied: names, for any loader, of the output layers that multiply with a table's stored tensors.
        bias: whether it adds one.
        rounded: whether it was trained rounded to BF16 (`Scheme.round_bf16`).
        half: whether it is part of an FP16 model (`activation_rule: ascend_310p`).
    """

    path: str
    shape: tuple[int, ...]
    weight: Format
    input: Format | None
    module: str = ""
    model_type: str = ""
    transposed: bool = False
    rotation: int = 0
    is_table: bool = False
    tied: tuple[str, ...] = ()
    bias: bool = False
    rounded: bool = True
    half: bool = False

    @property
    def stacks_of(self) -> str:
        """The `model_type` whose stacks are stored as one tensor; "" for a matrix."""
        return self.model_type if len(self.shape) > 2 else ""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a loader may ask for: engines go by the checkpoint, plain transformers by its modules."""
        own = (self.path, self.module) if self.module and self.module != self.path else (self.path,)
        return own + self.tied


@runtime_checkable
class Target(Protocol):
    """The interface of a layout's `write.py`, which is a module. One that writes a single file instead of a folder
    also has `FILE`, how the file's name ends; it has no `Reader`, and `unpack` and `files` are never asked. One that
    holds the bias of a layer in its tensors has `fold_bias`, which gets what `pack` made and the bias; one whose
    tensors depend on the place of a layer has `placed`, which gets what `pack` made and the layer's path. One for FP16
    models, too, has `in_half`, which makes their tensors of what these made."""

    METHOD: str
    """The target's name, which is also config.json's `quant_method`."""

    DESCRIPTION: str | None
    """The JSON file that describes the quantization where config.json does not, which then gets only what
    `quantization_config` has in "config"."""

    STEM: str
    """What files of weights are called, see `qat.checkpoints.shards`."""

    ROWS: tuple[Row, ...]
    """The pairs of formats that the layout holds and which engine loads them, from its `engines.py`."""

    FUSES_TENSOR_SCALES: bool
    """Whether a format with one scale per tensor is stored as that one number, so that layers which engines fuse must
    agree in it. (Global scales above block scales must agree in every target.)"""

    STACKS_OF: tuple[str, ...]
    """The `model_type`s whose stacks of experts the layout holds as one tensor each, and nothing else; empty for a
    layout of matrices."""

    ROTATED: Row | None
    """Which engine rotates inputs where a checkpoint of this layout says so, None where it cannot say it."""

    TABLES: Row | None
    """Which engine reads packed tables (embeddings) in a checkpoint of this layout, None where none does."""

    CACHES: CacheLayout | None
    """How it describes quantized caches, None where it cannot."""

    def check(self, layer: TargetLayer) -> None:
        """Raise UnsupportedError where the target cannot hold the layer, although a row covers its formats."""

    def pack(self, q: QTensor, input: Format | None, amax: Tensor | None) -> dict[str, Tensor]:
        """Stored tensors of one layer by their name below the layer's path (see the reader's `tensor_name`), on CPU.

        Args:
            q: the quantized weight, of the layer's shape.
            input: format of the layer's input.
            amax: the input's calibrated range, float32 scalar; needed where that format has a static part.
        """

    def unpack(self, module: PackedModule, tensors: Mapping[str, Tensor]) -> QTensor:
        """The inverse of `pack`: codes and stored scales of the layer that the reader describes, where the tensors are.

        Raises CheckpointError, naming the tensor, where one is missing, does not fit, or is a scale that is zero,
        negative or not finite; UnsupportedError for a format that the catalogue does not have.
        """

    def quantization_config(self, layers: list[TargetLayer], ignored: list[str]) -> dict[str, Any]:
        """Value of config.json's `quantization_config`; `ignored` are the weights that stay dense.

        Raises UnsupportedError where the target cannot hold the layers together.
        """

    def files(self, config: dict[str, Any], stored: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Other JSON files to write, by name, given the `quantization_config` and the names of all stored tensors."""
