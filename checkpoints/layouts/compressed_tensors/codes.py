"""Stored tensors of one layer -> its codes and scales: what a server holds, nothing dequantized.

The inverse of `write.pack`. The independent reader (`read.py`) decodes the same bytes to dense weights with
arithmetic of its own; tests hold the two against each other.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qat.checkpoints.layouts.arguments import weight_format
from qat.checkpoints.layouts.reader import PackedModule
from qat.errors import CheckpointError
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales
from qat.numbers.scale import broken


def read_layer(module: PackedModule, tensors: Mapping[str, Tensor]) -> QTensor:
    """Codes and stored scales of a layer, on the tensors' device.

    Args:
        module: the layer as config.json describes it.
        tensors: its stored tensors by their name below the layer's path.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or a scale has another type or is zero, negative
            or not finite; named.
        UnsupportedError: a format that the catalogue does not have.
    """
    fmt, bits = weight_format(module.weights), module.bits
    stored = _tensor(module, tensors, "weight_packed" if module.packed else "weight")
    if module.format == "pack-quantized":
        rows, columns = map(int, _tensor(module, tensors, "weight_shape").tolist())
    else:
        rows, columns = stored.shape[0], stored.shape[1] * 8 // bits if module.packed else stored.shape[1]
    codes = _codes(module, stored, columns)
    if codes.shape != (rows, columns):
        raise CheckpointError(
            f"{module.path}: its codes are {list(codes.shape)}, not the {[rows, columns]} of its shape"
        )
    zero = None
    if fmt.zero_point:
        zero = _zero_points(module, _tensor(module, tensors, "weight_zero_point"), rows)
    scale = _scale(module, tensors, fmt)
    scale = scale.expand(rows, 1).contiguous() if scale.numel() == 1 and fmt.block == (1, 0) else scale
    divisor = _tensor(module, tensors, "weight_global_scale") if fmt.global_scale else None
    grid = fmt.grid_shape(rows, columns)
    for name, tensor in (("weight_scale", scale), ("weight_zero_point", zero)):
        if tensor is not None and tuple(tensor.shape) != grid:
            raise CheckpointError(
                f"{module.path}.{name} is {list(tensor.shape)}, but {rows} x {columns} needs {[*grid]}"
            )
    for name, tensor in (("weight_scale", scale), ("weight_global_scale", divisor)):
        if tensor is not None and broken(tensor):
            raise CheckpointError(f"{module.path}.{name} must be finite and positive everywhere, but is not")
    global_scale = None if divisor is None else divisor.to(torch.float32).reciprocal().reshape(())
    return QTensor(fmt, codes, Scales(scale, global_scale, zero))


def _tensor(module: PackedModule, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    try:
        return tensors[name]
    except KeyError:
        raise CheckpointError(f"{module.path}.{name} is missing") from None


def _scale(module: PackedModule, tensors: Mapping[str, Tensor], fmt: Format) -> Tensor:
    """In a type that kernels read: the format's own, or float32 where that is a float of more than a byte."""
    scale, own = _tensor(module, tensors, "weight_scale"), fmt.scale.storage
    wide = [torch.float32] if own.itemsize > 1 else []
    if wide and scale.dtype == torch.float16:  # of FP16 models; two bytes that a kernel would take for BF16
        return scale.to(torch.float32)
    if scale.dtype not in (own, *wide):
        allowed = " or ".join(map(str, dict.fromkeys((own, *wide))))
        raise CheckpointError(f"{module.path}.weight_scale is {scale.dtype}, but {fmt.name} scales are {allowed}")
    return scale


def _codes(module: PackedModule, stored: Tensor, columns: int) -> Tensor:
    """uint8 (rows, columns): bit patterns of `bits` bits, integers in two's complement."""
    bits, raw = module.bits, stored.contiguous().view(torch.uint8)
    if not module.packed:
        return raw & (2**bits - 1)
    fields = _fields(raw, bits, columns)
    return fields ^ (1 << (bits - 1)) if module.format == "pack-quantized" else fields


def _zero_points(module: PackedModule, stored: Tensor, rows: int) -> Tensor:
    """int8 (rows, groups); packed ones share words along the rows."""
    if module.format != "pack-quantized":
        return stored
    half = 1 << (module.bits - 1)
    fields = _fields(stored.t().contiguous().view(torch.uint8), module.bits, rows).t()
    return (fields.to(torch.int16) - half).to(torch.int8).contiguous()


def _fields(raw: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` fields of each row of bytes, least significant bit first: uint8 (rows, count)."""
    if bits == 8:
        return raw[:, :count].contiguous()
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, device=raw.device, dtype=torch.uint8)
        split = (raw[:, :, None] >> shifts) & (2**bits - 1)
        return split.flatten(1)[:, :count].contiguous()
    first = torch.arange(count, device=raw.device) * bits
    wide = torch.nn.functional.pad(raw, (0, 1)).to(torch.int32)
    pair = wide[:, first // 8] | wide[:, first // 8 + 1] << 8
    return ((pair >> (first % 8)) & (2**bits - 1)).to(torch.uint8)
