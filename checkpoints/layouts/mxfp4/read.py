"""The independent reader of gpt-oss's own checkpoints: stacked experts in MXFP4 (`quant_method: mxfp4`).

weight = E2M1 value * 2^(scale - 127) for each group of 32 columns; a byte holds the even column in its low nibble.
"""

import re
from typing import TYPE_CHECKING

from torch import Tensor

from qat.checkpoints.layouts.bits import Array, scale_values
from qat.checkpoints.layouts.mxfp4.engines import METHOD
from qat.checkpoints.layouts.reader import ExportedFolder, PackedModule, PlainLoading, Spec
from qat.checkpoints.names import StoredNames
from qat.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GROUP, _BYTES = 32, 16  # columns under one scale, and what their codes take
_WEIGHTS = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "dynamic": False,
    "strategy": "group",
    "group_size": _GROUP,
    "scale_dtype": "torch.uint8",
}


class Reader(ExportedFolder):
    """A checkpoint whose experts are stacks of MXFP4; everything else is dense."""

    METHOD = METHOD
    SCALE = "scales"
    SCALES = (SCALE,)
    SUFFIXES = ("blocks", SCALE)
    JOINT, DENSE = "_", ""  # `gate_up_proj_blocks` and `gate_up_proj_scales` in place of `gate_up_proj`
    TRANSPOSED = True

    def _check_configuration(self) -> None:
        names = self.quantization.get("modules_to_not_convert") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UnsupportedError(f"{self.where}: modules_to_not_convert {names!r}; readable: a list of names")
        self._dense = names

    def matching_groups(self, path: str, linear: bool = True) -> list[str]:
        """The method, for every stack of experts that is not excluded."""
        return [self.METHOD] if ".experts." in path and not self.ignored(path) else []

    def ignored(self, path: str, linear: bool = True) -> bool:
        """Whether `modules_to_not_convert` names `path`, one of its parents or its end, or a pattern of it matches, as
        transformers decides that."""
        patterns = (rf"(?:{name})(?:(?<=\.)|(?=\.|$))" for name in self._dense)
        return any(map(path.endswith, self._dense)) or any(re.match(pattern, path) for pattern in patterns)

    def _module(self, path: str, group: str) -> PackedModule:
        return PackedModule(path, "mxfp4-pack-quantized", _WEIGHTS, None, self.JOINT)

    def shape(self, path: str) -> tuple[int, ...]:
        """Experts, rows and columns."""
        name = self.tensor_name(path, "blocks")
        shape = self.reader.info(name).shape if name in self.names else ()
        if len(shape) != 4:
            raise CheckpointError(f"{self.folder}: {name} is missing, or has no four dimensions")
        experts, rows, groups, _ = shape
        return experts, rows, groups * _GROUP

    def expected_tensors(self, module: PackedModule, *shape: int) -> dict[str, Spec]:
        """Type and shape of both tensors of a stack, by what follows its name."""
        groups = (*shape[:-1], shape[-1] // _GROUP)
        return {"blocks": ("U8", (*groups, _BYTES)), "scales": ("U8", groups)}

    def _codes_name(self, module: PackedModule) -> str:
        return "blocks"

    def _scale(self, module: PackedModule, tensors: dict[str, Tensor]) -> Array:
        scales = scale_values(tensors["scales"])
        return scales.reshape(-1, scales.shape[-1])

    def plain_loading(self, model: "PreTrainedModel", names: StoredNames) -> PlainLoading:
        """Dequantized, as it does by itself on a CPU."""
        from transformers.utils.quantization_config import Mxfp4Config

        return PlainLoading(options={"quantization_config": Mxfp4Config(dequantize=True)}, remark="weights only, ")
