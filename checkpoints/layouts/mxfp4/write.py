"""gpt-oss's own layout (`quant_method: mxfp4`): each layer's stacked experts as two tensors of MXFP4, all else in BF16.

A stack (experts, rows, columns) becomes `<stack>_blocks`, uint8 [experts, rows, columns / 32, 16], whose low nibbles
are the even columns, and `<stack>_scales`, uint8 [experts, rows, columns / 32], biased exponents. Rows stay as the
model has them (gate and up take turns); the dense tensor that transformers makes of them is transposed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qat.checkpoints.layouts.arguments import weight_format
from qat.checkpoints.layouts.mxfp4.engines import METHOD as METHOD
from qat.checkpoints.layouts.mxfp4.engines import ROWS as ROWS
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.layouts.stored import take, take_scale
from qat.checkpoints.layouts.target import TargetLayer
from qat.checkpoints.shards import STEMS
from qat.errors import CheckpointError, UnsupportedError
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales

DESCRIPTION = None
STEM = STEMS[0]
FUSES_TENSOR_SCALES = False  # it has none
ROTATED = None
TABLES = None
STACKS_OF = ("gpt_oss",)
CACHES = None


def check(layer: TargetLayer) -> None:
    """Any stack whose formats a row covers."""


def pack(q: QTensor, input: Format | None = None, amax: Tensor | None = None) -> dict[str, Tensor]:
    """Tensors of one stack, by what follows its name, on CPU."""
    *above, columns = q.shape
    groups = (*above, columns // q.format.block[1])
    pairs = q.codes.to("cpu").reshape(*groups, -1, 2)
    return {"blocks": pairs[..., 0] | pairs[..., 1] << 4, "scales": q.scales.stored.to("cpu").reshape(groups)}


def unpack(module: PackedModule, tensors: Mapping[str, Tensor]) -> QTensor:
    """Undo `pack`.

    Raises:
        CheckpointError: a tensor is missing or does not fit, or a scale is not finite; names it.
    """
    fmt, blocks = weight_format(module.weights), tensors.get("blocks")
    if blocks is None or blocks.ndim != 4:
        raise CheckpointError(f"{module.path}_blocks is missing, or has no four dimensions")
    experts, rows, groups, half = blocks.shape
    take(module, tensors, "blocks", torch.uint8, (experts, rows, groups, fmt.block[1] // 2))
    scales = take_scale(module, tensors, "scales", torch.uint8, (experts, rows, groups))
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).reshape(experts, rows, groups * half * 2)
    return QTensor(fmt, codes, Scales(scales.reshape(experts * rows, groups)))


def quantization_config(layers: list[TargetLayer], ignored: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`.

    Raises:
        UnsupportedError: some experts stay dense, which engines would read as packed.
    """
    stacks = {layer.path for layer in layers}
    dense = sorted(path for path in ignored if path.endswith(".experts"))
    if dense:
        raise UnsupportedError(
            f"{dense[0]}: a stack of its experts stays dense, but {METHOD} holds those of all layers or none "
            f"({len(stacks)} stacks are quantized); give all `*.experts.*` one rule"
        )
    return {"quant_method": METHOD, "modules_to_not_convert": ignored}


def files(config: dict[str, Any], stored: Sequence[str]) -> dict[str, dict[str, Any]]:
    """config.json says everything."""
    return {}
