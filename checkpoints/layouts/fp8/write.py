"""Block-scaled FP8 as transformers itself stores it (`quant_method: fp8`, from DeepSeek-V3): the FP8 most engines load.

`weight_scale_inv` multiplies, whatever its name says. Inputs are quantized on the fly in groups as wide as a block.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qat.checkpoints.layouts import support
from qat.checkpoints.layouts.stored import narrowed, take, take_scale
from qat.checkpoints.layouts.target import TargetLayer
from qat.errors import UnsupportedError
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales

METHOD = "fp8"
FUSES_TENSOR_SCALES = False  # it has none
CACHES = None


def check(layer: TargetLayer) -> None:
    """Raise UnsupportedError where `layer` cannot be written, or would not be read as it was trained."""
    if support.find(METHOD, layer.weight, layer.input) is None:
        raise UnsupportedError(f"{layer.path}: {support.refusal(METHOD, layer.weight, layer.input)}")
    for size, block, what in zip(layer.shape, layer.weight.block, ("rows", "columns"), strict=True):
        # transformers cuts each side into equal parts, so an incomplete last block would move all borders.
        if size > block and size % block:
            raise UnsupportedError(
                f"{layer.path}: {size} {what} are no multiple of {block}, and transformers would read other blocks; "
                "skip the layer, or use the target compressed-tensors"
            )
    if any("." not in name for name in layer.names):
        raise UnsupportedError(
            f"{layer.path}: engines keep the output layer of {METHOD} checkpoints dense; skip it, or use the target "
            "compressed-tensors"
        )


def notes(weight: Format, input: Format | None) -> list[str]:
    """What engines are known to do differently with this pair."""
    return support.notes(METHOD, weight, input)


def pairs() -> list[tuple[str, str | None]]:
    """Every pair of catalogue names that the layout holds."""
    return support.pairs(METHOD)


def pack(q: QTensor, input: Format | None = None, amax: Tensor | None = None) -> dict[str, Tensor]:
    """Tensors of one layer, by their name below the layer's path, on CPU."""
    return {
        "weight": q.codes.to("cpu").view(torch.float8_e4m3fn),
        "weight_scale_inv": q.scales.stored.to("cpu", torch.float32),
    }


def unpack(tensors: Mapping[str, Tensor], fmt: Format, shape: tuple[int, int]) -> QTensor:
    """Undo `pack`.

    Raises:
        CheckpointError: a tensor is missing or does not fit, or a scale is zero, negative or not finite; names it.
    """
    codes = take(tensors, "weight", torch.float8_e4m3fn, shape).view(torch.uint8)
    scale = take_scale(tensors, "weight_scale_inv", torch.float32, fmt.grid_shape(*shape))
    return QTensor(fmt, codes, Scales(narrowed(scale, "weight_scale_inv", fmt)))


def quantization_config(layers: list[TargetLayer], ignored: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`."""
    return {
        "quant_method": METHOD,
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(layers[0].weight.block),
        "modules_to_not_convert": ignored,
    }


def files(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """config.json says everything."""
    return {}
