"""From a trained model to a folder of native low-precision weights, tensor by tensor, complete or not at all.

Nothing here runs the model or saves through transformers: codes and scales come from the layers' own quantizers, are decoded
again on the spot and compared with the weight that the forward pass multiplied with. `qat.json` beside the weights records
a digest of each of those, so that `verify` can repeat the comparison on the files, wherever they travel.
"""

import hashlib
import json
import shutil
import warnings
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.checkpoints.hf import read_json, source_files
from qat.checkpoints.names import fused_groups, stored_paths, stored_tensors
from qat.checkpoints.progress import progress
from qat.checkpoints.shards import DEFAULT_SHARD_BYTES, ShardReader, ShardWriter
from qat.checkpoints.targets import Target, TargetLayer, find_target
from qat.checkpoints.unpack import digest
from qat.errors import CheckpointError, UnsupportedError
from qat.modules import QatEmbedding, QatLinear
from qat.surgery import layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "qat.json"
RECORD_VERSION = 1
_SCALES = ("weight_scale", "weight_global_scale", "input_scale", "input_global_scale")


@dataclass
class _Export:
    """What the export of one model needs to know, gathered before the first byte is written.

    `linears` and `embeddings` are by checkpoint path; `dense` holds every other tensor by checkpoint name; `copied` are
    tensors of the source that the model does not have (such as prediction heads it never loads).
    """

    model: "PreTrainedModel"
    target: Target
    linears: dict[str, QatLinear]
    embeddings: dict[str, QatEmbedding]
    dense: dict[str, Tensor]
    copied: list[str]
    order: list[str]
    tied: bool
    notes: list[str] = field(default_factory=list)

    def layer(self, path: str) -> TargetLayer:
        """The target's view of one linear layer."""
        module = self.linears[path]
        input = module.input_quantizer.format if module.input_quantizer is not None else None
        return TargetLayer(path, (module.out_features, module.in_features), module.weight_quantizer.format, input)


def export_model(
    model: "PreTrainedModel",
    source: Path,
    out: Path,
    target: str = "compressed-tensors",
    *,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write `model` as a checkpoint of `target`.

    Args:
        model: a Hugging Face model with fake-quantized layers (`qat.apply`), on any device, in any float type.
        source: folder of the unquantized model; gives tensor names, config.json and all other files.
        out: folder to create.
        target: name of the file layout, see `qat.checkpoints.targets`.
        overwrite: replace `out` if it is not empty.
        max_shard_bytes: size at which a new shard starts.
        extra: recorded as "run" in qat.json.

    Returns:
        `out`.

    Raises:
        ConfigError: no such target.
        UnsupportedError: a format, or pair of formats, that the target cannot hold.
        CheckpointError: non-finite weights or scales, tensors that do not fit the source, or trouble with the disk.
    """
    plan = _plan(model, source, find_target(target))
    for note in plan.notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    record: dict[str, Any] = {"modules": {}, "tensors": {}}
    with (
        torch.no_grad(),
        ShardReader(source) as reader,
        ShardWriter(out, max_shard_bytes, overwrite=overwrite, expected_bytes=_expected_bytes(plan)) as writer,
        progress(f"writing {out.name}", len(plan.order)) as advance,
    ):
        for name in plan.order:
            for stored, tensor in _tensors_of(plan, name, reader, record).items():
                writer.add(stored, tensor)
            advance(1)
        files = _copy_files(source, writer.folder)
        config = _config(plan, source)
        _write_json(writer.folder / "config.json", config)
        weights = sum(module.weight.numel() for module in plan.linears.values())
        packed = sum(entry["bytes"] for entry in record["modules"].values())
        record = {
            **_header(plan, source, target),
            "bytes": writer.total_bytes,
            "bits_per_weight": 8 * packed / weights,
            "files": files,
            **record,
            **({"run": extra} if extra else {}),
        }
        _write_json(writer.folder / RECORD, record)
    return out


def export(
    run: Path, out: Path, target: str = "compressed-tensors", overwrite: bool = False, checkpoint: str = "best"
) -> Path:
    """Export a checkpoint of a training run; see `export_model`."""
    from qat.checkpoints.resume import load_student

    find_target(target)
    model, source, state = load_student(run, checkpoint)
    extra = {"name": run.resolve().name, "checkpoint": checkpoint, "step": state.get("step")}
    return export_model(model, source, out, target, overwrite=overwrite, extra=extra)  # type: ignore[arg-type]  # a run's model is a Hugging Face model


# --- before writing -------------------------------------------------------------------------------


def _plan(model: "PreTrainedModel", source: Path, target: Target) -> _Export:
    paths = stored_paths(model)
    found = layers(model)
    linears = {paths[path]: module for path, module in _named_layers(model) if isinstance(module, QatLinear)}
    embeddings = {paths[path]: module for path, module in _named_layers(model) if isinstance(module, QatEmbedding)}
    if not linears:
        hint = "only embeddings are" if found else "apply a scheme first (qat.apply)"
        raise UnsupportedError(f"no linear layer of this model is quantized, {hint}")
    dense, tied = _dense_tensors(model, linears)
    present = set(dense) | {f"{path}.weight" for path in linears}
    with ShardReader(source) as reader:
        names = reader.names()
        copied = [name for name in names if name not in present and name not in stored_tensors(model)]
    missing = sorted(present - set(names) - {"lm_head.weight", *_untied_names(model, paths)})
    if missing:
        raise CheckpointError(f"{source} has no {', '.join(missing[:4])}: is it the folder this model was loaded from?")
    order = [name for name in names if name in present or name in copied]
    plan = _Export(model, target, linears, embeddings, dense, copied, order + sorted(present - set(names)), tied)
    for path in linears:
        target.check(plan.layer(path))
    plan.notes = _notes(plan)
    return plan
