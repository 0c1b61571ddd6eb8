"""What adapters weigh, and what a base that is held packed under them saves."""

import math
from pathlib import Path
from typing import Any

from torch import nn

from qat.adapters import candidates
from qat.checkpoints.packed import is_packed
from qat.lora import LoraConfig, is_linear
from qat.surgery import Coverage
from qat.trainers.job import Job

FP32 = 4


def parameters(config: LoraConfig, model: nn.Module, coverage: Coverage) -> int:
    """Of all adapters, as `qat.lora` adds them."""
    able = {c.path for c in candidates(model) if c.slot.low_rank} if config.patterns else _linear(model)
    shapes = [c.shape for c in coverage.modules if c.weight and c.path in able and config.wants(c.path)]
    return sum(
        math.prod(experts) * config.rank * (rows + columns) + rows * config.dora for *experts, rows, columns in shapes
    )


def saved(job: Job, model: nn.Module, coverage: Coverage) -> int:
    """Bytes of the master weights that are not there, since codes and scales are held instead."""
    if not holds_packed(job):
        return 0
    able = {candidate.path for candidate in candidates(model) if candidate.slot.low_rank}
    held = [covered for covered in coverage.modules if covered.weight and covered.path in able]
    return int(sum(covered.parameters * (FP32 - covered.bits / 8) for covered in held))


def largest(job: Job, coverage: Coverage) -> int:
    """Values of the largest quantized weight that is ever dense: of a stack that is held packed one matrix."""
    shapes = [
        covered.shape[-2:] if holds_packed(job) else covered.shape for covered in coverage.modules if covered.weight
    ]
    return max(map(math.prod, shapes), default=0)


def holds_packed(job: Job) -> bool:
    """Whether the frozen weights are held packed."""
    return job.lora is not None and job.lora.base == "packed"


def inputs(job: Job, shape: Any, width: int) -> float:
    """Bytes per token of a layer's inputs before rounding, which adapters beside quantized layers read."""
    if job.lora is None or job.lora.merge:
        return 0.0
    return float(width * (2 * shape.hidden + shape.query + shape.ffn))


def dense_first(job: Job) -> bool:
    """Whether weights that are held packed later are dense on the device until they are initialised: those of a packed
    checkpoint are not."""
    folder = Path(job.model.id).expanduser()
    return holds_packed(job) and not ((folder / "config.json").is_file() and is_packed(folder))


def _linear(model: nn.Module) -> set[str]:
    return {candidate.path for candidate in candidates(model) if is_linear(candidate)}
