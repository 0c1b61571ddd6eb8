"""What an export of a job's student will refuse, asked before a weight is loaded: a run that cannot be exported should
say so in seconds, not after its last step."""

import copy
from pathlib import Path
from typing import Any

import torch

from qat.checkpoints.export import check_export
from qat.checkpoints.hf import quiet
from qat.checkpoints.shards import INDEX, SINGLE, ShardReader
from qat.surgery import apply
from qat.trainers.job import Job


def export_notes(job: Job, folder: Path | None, model: Any = None) -> list[str]:
    """What `qat.checkpoints.export.check_export` says of the job's student.

    Args:
        job: gives the scheme.
        folder: the student's, resolved; None where only its config is known.
        model: the student without numbers, on the meta device; by default it is made from the folder's config.json.

    Raises:
        CheckpointError, UnsupportedError: no target can hold it, or its tensors do not fit.
    """
    weights = folder if folder is not None and any((folder / name).is_file() for name in (SINGLE, INDEX)) else None
    if weights is not None:
        ShardReader(weights).verify_complete()
    bare = copy.deepcopy(model) if model is not None else _without_numbers(str(folder), job.model.trust_remote_code)
    return check_export(apply(bare, job.scheme, defer_start=True), weights)  # type: ignore[arg-type]  # still transformers'


def _without_numbers(folder: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
