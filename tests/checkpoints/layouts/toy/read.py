"""The reader of the toy layout."""

from typing import TYPE_CHECKING

from torch import Tensor

from qat.checkpoints.layouts.bits import Array, scale_values
from qat.checkpoints.layouts.reader import ExportedFolder, PackedModule, PlainLoading, Spec
from qat.checkpoints.names import StoredNames

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARGS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}


class Reader(ExportedFolder):
    """A toy checkpoint on disk."""

    METHOD = "toy"
    SCALE = "toy_scale"
    SCALES = (SCALE,)
    SUFFIXES = ("weight", SCALE)

    def _check_configuration(self) -> None:
        assert isinstance(self.quantization["layers"], list)

    def matching_groups(self, path: str, linear: bool = True) -> list[str]:
        """The layout, for the layers that it lists."""
        return [self.METHOD] if path in self.quantization["layers"] else []

    def ignored(self, path: str, linear: bool = True) -> bool:
        """Whether it lists the layer as dense."""
        return path in self.quantization["ignored"]

    def _module(self, path: str, group: str) -> PackedModule:
        return PackedModule(path, "int-quantized", ARGS, None)

    def expected_tensors(self, module: PackedModule, *shape: int) -> dict[str, Spec]:
        """Codes and scales."""
        rows, columns = shape
        return {"weight": ("I8", (rows, columns)), "toy_scale": ("BF16", (rows, 1))}

    def _scale(self, module: PackedModule, tensors: dict[str, Tensor]) -> Array:
        return scale_values(tensors["toy_scale"])

    def plain_loading(self, model: "PreTrainedModel", names: StoredNames) -> PlainLoading:
        """Not at all."""
        return PlainLoading("transformers has no toys")
