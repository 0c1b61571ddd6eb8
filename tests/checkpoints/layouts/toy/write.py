"""A checkpoint layout in which codes are plain bytes: all that a new target needs, beside its reader and its rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qat.checkpoints.layouts.arguments import weight_format
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.layouts.stored import shape, take, take_scale
from qat.checkpoints.layouts.target import TargetLayer
from qat.checkpoints.shards import STEMS
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales
from tests.checkpoints.layouts.toy.engines import ROWS as ROWS

CACHES = None
METHOD = "toy"
DESCRIPTION = None
STEM = STEMS[0]
FUSES_TENSOR_SCALES = False
ROTATED = None
TABLES = None
STACKS_OF = ()


def check(layer: TargetLayer) -> None:
    """Any layer."""


def pack(q: QTensor, input: Format | None, amax: Tensor | None) -> dict[str, Tensor]:
    """Codes and scales as they are."""
    return {"weight": q.codes.view(torch.int8), "toy_scale": q.scales.stored}


def unpack(module: PackedModule, tensors: Mapping[str, Tensor]) -> QTensor:
    """Undo `pack`."""
    fmt, (rows, columns) = weight_format(module.weights), shape(module, tensors)
    codes = take(module, tensors, "weight", torch.int8, (rows, columns)).view(torch.uint8)
    return QTensor(fmt, codes, Scales(take_scale(module, tensors, "toy_scale", torch.bfloat16, (rows, 1))))


def quantization_config(layers: list[TargetLayer], ignored: list[str]) -> dict[str, Any]:
    """The layers by name."""
    return {"quant_method": METHOD, "layers": [name for layer in layers for name in layer.names], "ignored": ignored}


def files(config: dict[str, Any], stored: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A second file, so that one is written."""
    return {"toy.json": {"layers": len(config["layers"])}}
