"""What an export of a job's student, or its optimizer, will refuse, asked before a weight is loaded: a run that cannot
be exported should say so in seconds, not after its last step."""

import copy
from pathlib import Path
from typing import Any

from qat.checkpoints.architecture import empty_model, read_config
from qat.checkpoints.export import check_export
from qat.checkpoints.layouts.reader import NPU_RULE
from qat.checkpoints.loadable import check_loadable
from qat.checkpoints.peft import check_package
from qat.checkpoints.shards import INDEX, SINGLE, ShardReader
from qat.errors import UnsupportedError
from qat.lora import attach
from qat.numbers.catalog import lookup
from qat.surgery import apply, report, rotate_inputs
from qat.trainers import packed
from qat.trainers.called import check_called
from qat.trainers.job import Job
from qat.trainers.optim import freeze
from qat.training import npu


def export_notes(job: Job, folder: Path | None, model: Any) -> list[str]:
    """What `qat.checkpoints.export.check_export` says of the job's student, one sentence each.

    Args:
        job: gives the scheme.
        folder: the student's, resolved; None where only its config is known.
        model: the student without numbers, on the meta device; it is left as it is.

    Raises:
        CheckpointError, UnsupportedError: no target can hold it, the job's engine loads none that can, its tensors do
            not fit, or layers are never called.
        ConfigError: `optim.freeze` matches nothing, or everything; `lora` cannot be had as configured; the model is
            quantized already, and the job does not go on from it.
    """
    weights = folder if folder is not None and any((folder / name).is_file() for name in (SINGLE, INDEX)) else None
    if weights is not None:
        ShardReader(weights).verify_complete()
    check_called(model, report(model, job.scheme))
    packed.check(job, folder, model)
    scheme = job.scheme.model_copy(update={"fallback": None})
    bare: Any = rotate_inputs(apply(copy.deepcopy(model), scheme, blank=True), scheme)
    notes = [f"export: {note}" for note in check_export(bare, weights)]
    if job.engine is not None and job.device is not None:
        notes += check_loadable(bare, weights, job.engine, job.device)
    _check_inputs(job)
    if job.lora is not None:
        check_package()
        attach(bare, job.lora)
    freeze(bare, job.optim)
    return notes


def _check_inputs(job: Job) -> None:
    inputs = [lookup(rule.input) for rule in job.scheme.rules if rule.input is not None]
    unmade = [fmt for fmt in inputs if not npu.has_operator(fmt)]
    if unmade and job.scheme.activation_rule == NPU_RULE:
        raise UnsupportedError(npu.missing(unmade[0]))


def student_without_numbers(job: Job, folder: Path) -> Any:
    """The architecture in the student's folder, as it would be loaded, on the meta device."""
    trusted = job.model.trust_remote_code
    return empty_model(read_config(folder, trusted), folder, job.model.attn_implementation, trusted)
