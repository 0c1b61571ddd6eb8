"""The independent reader of block-scaled FP8 checkpoints as transformers and DeepSeek write them.

`weight_scale_inv` multiplies, whatever its name says: weight = code * weight_scale_inv of its block.
"""

import importlib.util
from typing import TYPE_CHECKING

from torch import Tensor

from qat.checkpoints.layouts.bits import Array, scale_values
from qat.checkpoints.layouts.reader import ExportedFolder, PackedModule, PlainLoading, Spec
from qat.checkpoints.names import StoredNames
from qat.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reader(ExportedFolder):
    """A checkpoint with `quant_method: fp8`, scales per block of the weight, and inputs quantized on the fly."""

    METHOD = "fp8"
    SCALE = "weight_scale_inv"
    SCALES = ("weight_scale_inv",)
    SUFFIXES = ("weight", *SCALES)

    def _check_configuration(self) -> None:
        block = self.quantization.get("weight_block_size")
        if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 1 for n in block):
            raise UnsupportedError(f"{self.where}: weight_block_size {block}; readable: [rows, columns], as [128, 128]")
        for key, only in (("activation_scheme", "dynamic"), ("fmt", "e4m3"), ("scale_fmt", "float")):
            if self.quantization.get(key, only) != only:
                raise UnsupportedError(f"{self.where}: {key} {self.quantization[key]!r}; readable: {only!r}")
        self._block = block

    def matching_groups(self, path: str, linear: bool = True) -> list[str]:
        """The method, for every linear layer that is not excluded."""
        return [self.METHOD] if linear and not self.ignored(path) else []

    def ignored(self, path: str, linear: bool = True) -> bool:
        """Whether `modules_to_not_convert` names `path`, one of its parents, or its last parts."""
        names = self.quantization.get("modules_to_not_convert") or []
        return any(path == name or path.startswith(f"{name}.") or path.endswith(f".{name}") for name in names)

    def _module(self, path: str, group: str) -> PackedModule:
        shared = {"num_bits": 8, "type": "float", "symmetric": True}
        weights = {**shared, "dynamic": False, "strategy": "block", "block_structure": self._block}
        inputs = {**shared, "dynamic": True, "strategy": "group", "group_size": self._block[1]}
        return PackedModule(path, "float-quantized", weights, inputs)

    def expected_tensors(self, module: PackedModule, *shape: int) -> dict[str, Spec]:
        """Type and shape of every tensor that a layer (rows, columns) must have, by its name below its path."""
        rows, columns = shape
        grid = (-(-rows // self._block[0]), -(-columns // self._block[1]))
        return {"weight": ("F8_E4M3", (rows, columns)), "weight_scale_inv": ("F32", grid)}

    def _scale(self, module: PackedModule, tensors: dict[str, Tensor]) -> Array:
        return scale_values(tensors["weight_scale_inv"])

    def plain_loading(self, model: "PreTrainedModel", names: StoredNames) -> PlainLoading:
        """Dequantized, without quantized inputs, which plain transformers leaves to GPUs."""
        from transformers import FineGrainedFP8Config

        if importlib.util.find_spec("accelerate") is None:
            return PlainLoading("accelerate is not installed, without which transformers loads no FP8")
        options = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
        return PlainLoading(options=options, quantizes_inputs=False, remark="weights only, ")
