"""The export targets by the name users type. A new target is one file here, one line in `TARGETS`, its rows in
`support.py`, and its reader in `qat.checkpoints.layouts.readers`."""

from collections.abc import Mapping

from torch import Tensor

from qat.checkpoints.layouts.compressed_tensors import write as compressed_tensors
from qat.checkpoints.layouts.fp8 import write as fp8
from qat.checkpoints.layouts.modelopt import write as modelopt
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.layouts.target import Target, TargetLayer
from qat.errors import CheckpointError, ConfigError, nearest
from qat.numbers.numerics import QTensor

TARGETS: dict[str, Target] = {target.METHOD: target for target in (compressed_tensors, modelopt, fp8)}

__all__ = ["TARGETS", "Target", "TargetLayer", "find_target", "unpack_layer"]


def find_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        ConfigError: no such target; names the nearest.
    """
    try:
        return TARGETS[name]
    except KeyError:
        raise ConfigError(f"no export target called {name!r}; nearest: {nearest(name, TARGETS)}") from None


def unpack_layer(target: str, module: PackedModule, tensors: Mapping[str, Tensor]) -> QTensor:
    """Codes and stored scales of one layer of an exported checkpoint, on the tensors' device.

    Args:
        target: name of the layout.
        module: the layer as its configuration describes it.
        tensors: its stored tensors by their name below the layer's path.

    Raises:
        CheckpointError: a tensor is missing or does not fit, or a scale is zero, negative or not finite; named.
        UnsupportedError: a format that the catalogue does not have.
    """
    from qat.checkpoints.layouts.compressed_tensors.codes import (  # which read a target's tables
        read_layer,
        weight_format,
    )

    if target == compressed_tensors.METHOD:
        return read_layer(module, tensors)  # other tools write variants of it that no target of ours does
    fmt, weight = weight_format(module.weights), tensors.get("weight")
    if weight is None or weight.ndim != 2:
        raise CheckpointError(f"{module.path}.weight is missing, or no matrix")
    rows, width = weight.shape
    try:
        return TARGETS[target].unpack(tensors, fmt, (rows, width * 8 // module.bits if module.packed else width))
    except CheckpointError as error:
        raise CheckpointError(f"{module.path}.{error}") from None
