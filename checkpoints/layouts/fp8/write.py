"""Block-scaled FP8 as transformers itself stores it (`quant_method: fp8`, from DeepSeek-V3): the FP8 most engines load.

`weight_scale_inv` multiplies, whatever its name says. Inputs are quantized on the fly in groups as wide as a block.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qat.checkpoints.layouts.arguments import weight_format
from qat.checkpoints.layouts.fp8.engines import ROWS as ROWS
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.layouts.stored import shape, take, take_narrow
from qat.checkpoints.layouts.target import TargetLayer
from qat.checkpoints.shards import STEMS
from qat.errors import UnsupportedError
from qat.families import is_outside
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales

METHOD = "fp8"
DESCRIPTION = None
STEM = STEMS[0]
FUSES_TENSOR_SCALES = False  # it has none
ROTATED = None
TABLES = None
STACKS_OF = ()
CACHES = None


def check(layer: TargetLayer) -> None:
    """Raise UnsupportedError where `layer` would not be read as it was trained."""
    for size, block, what in zip(layer.shape, layer.weight.block, ("rows", "columns"), strict=True):
        # transformers cuts each side into equal parts, so an incomplete last block would move all borders.
        if size > block and size % block:
            raise UnsupportedError(
                f"{layer.path}: {size} {what} are no multiple of {block}, and transformers would read other blocks; "
                "skip the layer, or use the target compressed-tensors"
            )
    if any(is_outside(name) for name in layer.names):
        raise UnsupportedError(
            f"{layer.path}: engines keep the output layer of {METHOD} checkpoints dense; skip it, or use the target "
            "compressed-tensors"
        )


def pack(q: QTensor, input: Format | None = None, amax: Tensor | None = None) -> dict[str, Tensor]:
    """Tensors of one layer, by their name below the layer's path, on CPU."""
    return {
        "weight": q.codes.to("cpu").view(torch.float8_e4m3fn),
        "weight_scale_inv": q.scales.stored.to("cpu", torch.float32),
    }


def unpack(module: PackedModule, tensors: Mapping[str, Tensor]) -> QTensor:
    """Undo `pack`.

    Raises:
        CheckpointError: a tensor is missing or does not fit, or a scale is zero, negative or not finite; names it.
    """
    fmt, (rows, columns) = weight_format(module.weights), shape(module, tensors)
    codes = take(module, tensors, "weight", torch.float8_e4m3fn, (rows, columns)).view(torch.uint8)
    return QTensor(
        fmt, codes, Scales(take_narrow(module, tensors, "weight_scale_inv", fmt, fmt.grid_shape(rows, columns)))
    )


def quantization_config(layers: list[TargetLayer], ignored: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`."""
    return {
        "quant_method": METHOD,
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(layers[0].weight.block),
        "modules_to_not_convert": ignored,
    }


def files(config: dict[str, Any], stored: Sequence[str]) -> dict[str, dict[str, Any]]:
    """config.json says everything."""
    return {}
