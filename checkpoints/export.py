"""From a trained model to a folder of native low-precision weights, tensor by tensor, complete or not at all.

Nothing here runs the model or saves through transformers: codes and scales come from the layers' own quantizers, are
decoded again on the spot and compared with the weight that the forward pass multiplied with. `qat.json` beside the
weights records a digest of each of those, so that `verify` can repeat the comparison wherever the files travel.
"""

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat.checkpoints.caches import cache_offsets, cache_record, cache_tensors, exportable
from qat.checkpoints.dense_types import check_finite, check_held
from qat.checkpoints.export_plan import (
    DEFAULT_TARGET,
    ExportPlan,
    check_values,
    exported_config,
    plan_export,
    refusals,
)
from qat.checkpoints.hf import source_files
from qat.checkpoints.layouts import FILES, READERS, TARGETS, find_target, no_layout
from qat.checkpoints.layouts.gguf.file import check_file, write_file
from qat.checkpoints.layouts.reader import add_to_digest, digest
from qat.checkpoints.matrices import Matrix
from qat.checkpoints.peft import FOLDER, write_adapter
from qat.checkpoints.progress import progress
from qat.checkpoints.record import RECORD, RECORD_VERSION, is_export
from qat.checkpoints.shards import DEFAULT_SHARD_BYTES, ShardReader, ShardWriter
from qat.errors import CheckpointError, UnsupportedError
from qat.lora import take_off
from qat.numbers.numerics import QTensor
from qat.numbers.scale import broken
from qat.sites import CACHED, sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RECORD", "RECORD_VERSION", "check_export", "export", "export_model"]


def check_export(model: "PreTrainedModel", source: Path | None) -> list[str]:
    """What an export of `model` will refuse or should be known of, before anything is trained.

    Args:
        model: a Hugging Face model that a scheme was applied to, with or without numbers (torch's meta device).
        source: folder of the unquantized model; None where only its config is known.

    Returns:
        One sentence each: what the default target says, which other one to use where it refuses, or that these formats
        can be trained but not exported.

    Raises:
        UnsupportedError: every target would refuse.
        CheckpointError: tensors that do not fit the source, or would not be loaded again.
    """
    plan, refused = refusals(model, source)
    if DEFAULT_TARGET not in refused:
        return plan.notes
    able = [name for name in TARGETS if name not in refused]
    if able:
        return [f"{refused[DEFAULT_TARGET]}. Export this run with --target {' or '.join(able)}"]
    nowhere = dict.fromkeys(filter(None, (no_layout(plan.layer(path)) for path in plan.linears)))
    caches = {site.format.name: site.format for site in sites(model, *CACHED)}
    unheld = [name for name, fmt in caches.items() if not exportable(fmt, TARGETS.values())]
    reasons = [*nowhere, *(f"no export target holds {name} caches" for name in unheld)]
    if reasons:
        return [f"this can be trained and evaluated, but not exported: {'; '.join(reasons)}"]
    raise UnsupportedError("no export target can hold this model:\n  " + "\n  ".join(refused.values()))


def export_model(
    model: "PreTrainedModel",
    source: Path,
    out: Path,
    target: str = DEFAULT_TARGET,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    extra: dict[str, Any] | None = None,
    keep: tuple[Path, ...] = (),
    beside: Callable[[Path], None] | None = None,
    pack_tables: bool = False,
) -> Path:
    """Write `model` as a checkpoint of `target`; returns `out`.

    Args:
        model: a Hugging Face model with fake-quantized layers (`qat.apply`), on any device, in any float type.
        source: folder of the unquantized model; gives tensor names, config.json and all other files.
        out: folder to create.
        target: name of the file layout, see `qat.checkpoints.layouts`.
        overwrite, keep: replace `out` if an export wrote it; folders that must stay, besides the source.
        max_shard_bytes: size at which a new shard starts.
        extra: recorded as "run" in qat.json.
        beside: writes an adapter into a folder, which the export then has, too.
        pack_tables: see `plan_export`.

    Raises:
        ConfigError: no such target.
        UnsupportedError: a format, or pair of formats, that the target cannot hold.
        CheckpointError: non-finite weights or scales, tensors that do not fit the source, `out` is something that must
            not be replaced, or trouble with the disk.
    """
    keep = (source, *keep)
    check_replaceable(out, overwrite, keep, target)
    tables = pack_tables or (target in FILES and any(site.is_table for site in sites(model, "weight")))
    plan = plan_export(model, source, find_target(target), pack_tables=tables)
    check_values(plan)
    for note in plan.notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    if target in FILES:
        about = {"qat_version": _release(), "target": target, "source": source.resolve().name, "fused": plan.fused}
        return write_file(plan, source, out, about | ({"run": extra} if extra else {}), overwrite=overwrite)
    how: dict[str, Any] = {"overwrite": overwrite, "extra": extra, "keep": keep, "beside": beside}
    return _write_folder(plan, source, out, max_shard_bytes=max_shard_bytes, **how)


def _write_folder(
    plan: ExportPlan,
    source: Path,
    out: Path,
    *,
    overwrite: bool,
    max_shard_bytes: int,
    extra: dict[str, Any] | None,
    keep: tuple[Path, ...],
    beside: Callable[[Path], None] | None,
) -> Path:
    """`export_model` for a target that writes folders."""
    target = plan.target.METHOD
    record: dict[str, Any] = {"modules": {}, "tensors": {}}
    own = {matrix.name: path for path, matrix in plan.linears.items()}
    with (
        torch.no_grad(),
        ShardReader(source) as reader,
        ShardWriter(out, max_shard_bytes, overwrite=overwrite, **_shards(plan)) as writer,
        progress(f"writing {out.name}", len(plan.order)) as advance,
    ):
        for name in plan.order:
            for stored, tensor in _tensors_of(plan, name, own.get(name), reader, record).items():
                writer.add(stored, tensor)
            advance(1)
        for name, scale in _cache_scales(plan, record).items():
            writer.add(name, scale)
        files = _copy_files(source, writer.folder) | _adapter(writer.folder, beside)
        extras = plan.target.files(plan.quantization, sorted(writer.names))
        for name, value in {"config.json": exported_config(plan, source), **extras}.items():
            files[name] = _write_json(writer.folder / name, value)
        whole = _record(plan, source, target, record) | {"bytes": writer.total_bytes, "files": files}
        _write_json(writer.folder / RECORD, whole | ({"run": extra} if extra else {}))
        check_replaceable(out, overwrite, keep)  # again: hours may have passed
    return out


def export(
    run: Path,
    out: Path,
    target: str = DEFAULT_TARGET,
    overwrite: bool = False,
    checkpoint: str = "best",
    moved: Path | str | None = None,
    pack_tables: bool = False,
) -> Path:
    """Export a checkpoint of a training run; `moved` as in `load_student`, the rest as in `export_model`."""
    from qat.checkpoints.resume import load_student, lora_config

    find_target(target)
    check_replaceable(out, overwrite, (run,), target)
    model, source, state = load_student(run, checkpoint, moved)
    config, adapter = lora_config(run), take_off(model)
    beside = partial(write_adapter, tensors=adapter, config=config) if config is not None and adapter else None
    extra = {"name": run.resolve().name, "checkpoint": checkpoint, "step": state.get("step"), "model": state["model"]}
    student: Any = model
    how: dict[str, Any] = {"overwrite": overwrite, "extra": extra, "beside": beside, "pack_tables": pack_tables}
    return export_model(student, source, out, target, keep=(run,), **how)


def check_replaceable(out: Path, overwrite: bool, keep: tuple[Path, ...], target: str = DEFAULT_TARGET) -> None:
    """Refuse to overwrite what no export wrote, and what holds one of `keep`, the working directory or home.

    Raises:
        CheckpointError: says which.
    """
    if target in FILES:
        return check_file(out, FILES[target], overwrite)
    destination = Path(os.path.realpath(out.expanduser()))
    if not overwrite or not destination.is_dir() or not any(destination.iterdir()):
        return
    stay = [Path(os.path.realpath(path)) for path in (*keep, Path(), Path("~").expanduser())]
    inside = next((path for path in stay if destination in (path, *path.parents)), None)
    if inside is not None:
        what = "is" if inside == destination else f"holds {inside},"
        raise CheckpointError(
            f"{destination} {what} the source model, the run, the working directory or home: --overwrite does not "
            "replace it; give another folder"
        )
    if not is_export(destination):
        raise CheckpointError(
            f"{destination} was not written by an export (it has no valid {RECORD}), so --overwrite does not replace "
            "it; give another folder, or remove it yourself"
        )


def _shards(plan: ExportPlan) -> dict[str, Any]:
    """What the writer of shards is told about them."""
    layers = [plan.layer(path) for path in plan.linears]
    packed = sum(each.weight.bits_per_weight(*each.shape[-2:]) * math.prod(each.shape) / 8 for each in layers)
    expected = int(packed) + sum(2 * tensor.numel() for tensor in plan.dense.values())
    return {"expected_bytes": expected, "stem": plan.target.STEM}


# --- tensors --------------------------------------------------------------------------------------


def _tensors_of(
    plan: ExportPlan, name: str, packed: str | None, reader: ShardReader, record: dict[str, Any]
) -> dict[str, Tensor]:
    """Stored tensors of one tensor of the dense model, whose quantized layer's path is `packed`; their digests go into
    `record`."""
    if packed is not None:
        return _packed(plan, packed, record)
    if name in plan.dense:
        tensor = plan.dense[name]
        dtype = torch.float32 if name in plan.wide else plan.dtype
        if (table := plan.embeddings.get(name.removesuffix(".weight"))) is not None:
            tensor = torch.empty_like(tensor, dtype=dtype)
            for part in Matrix(table, name).parts():
                tensor[part.rows] = part.value()
        elif tensor.is_floating_point():
            check_held(name, tensor, dtype)
            tensor = tensor.to(dtype)
    else:
        tensor = reader.get(name)  # the model never loaded it
    check_finite(name, tensor)
    record["tensors"][name] = digest(tensor)
    return {name: tensor}


def _packed(plan: ExportPlan, path: str, record: dict[str, Any]) -> dict[str, Tensor]:
    layer, site, layout = plan.layer(path), plan.linears[path], READERS[plan.target.METHOD]
    q, sha256 = _coded(site)
    amax = site.input.limit if site.input is not None else None
    tensors = {}
    packed = plan.target.pack(q, layer.input, amax)
    if (placed := getattr(plan.target, "placed", None)) is not None:
        packed = placed(packed, path)
    if layer.bias and (fold := getattr(plan.target, "fold_bias", None)) is not None:
        packed = fold(packed, plan.dense[f"{path}.bias"].detach().to(plan.dtype))
    if layer.half:
        packed = plan.target.in_half(packed)  # type: ignore[attr-defined]  # `check_layer` asked for it
    for key, tensor in packed.items():
        name = layout.tensor_name(path, key)
        tensors[name] = tensor
        if key in layout.SCALES:
            _check_scale(name, tensor)
        if key.startswith(("input_", "quant_bias")):
            record["tensors"][name] = digest(tensor)
    record["modules"][path] = {
        "weight": layer.weight.name,
        "input": layer.input.name if layer.input else None,
        "shape": list(layer.shape),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "input_amax": amax.tolist() if amax is not None and bool(torch.isfinite(amax).all()) else None,
        "sha256": sha256,
    }
    return tensors


def _coded(matrix: Matrix) -> tuple[QTensor, str]:
    """Codes and scales of a matrix, compared with what the forward pass multiplies with, and the digest of that. Made
    part by part: the whole in float32 with what rounding needs would take thirty times the codes."""
    weight, whole = matrix.weight, hashlib.sha256()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    rest = codes.flatten(0, -2)
    for part in matrix.parts():
        q, trained = part.quantize(), part.value().to(torch.bfloat16)
        check_finite(matrix.name, trained)
        if not torch.equal(q.dequantize(torch.bfloat16), trained):
            raise CheckpointError(f"{matrix.name}: its codes do not decode to the weight of the forward pass")
        rest[: len(q.codes)], rest = q.codes, rest[len(q.codes) :]
        add_to_digest(whole, trained)
    return QTensor(matrix.format, codes, matrix.quantizer.scales()), whole.hexdigest()


def _cache_scales(plan: ExportPlan, record: dict[str, Any]) -> dict[str, Tensor]:
    """Scales and zero points of caches by name; their digests go into `record`."""
    scales = cache_tensors(plan.caches, plan.target)
    for name, scale in scales.items():
        _check_scale(name, scale)
    stored = scales | cache_offsets(plan.caches, plan.target)
    record["tensors"] |= {name: digest(tensor) for name, tensor in stored.items()}
    return stored


def _check_scale(name: str, scale: Tensor) -> None:
    if broken(scale):
        raise CheckpointError(f"{name} must be finite and positive everywhere, but is not; nothing was written")


# --- other files ----------------------------------------------------------------------------------


def _copy_files(source: Path, folder: Path) -> dict[str, str]:
    """Copy everything but weights and config.json byte for byte; sha256 by relative name."""
    files = {}
    for path in source_files(source):
        name = path.relative_to(source)
        if str(name) == RECORD:
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
        files[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return files


def _adapter(folder: Path, write: Callable[[Path], None] | None) -> dict[str, str]:
    """Write an adapter, if there is one; sha256 by relative name."""
    if write is None:
        return {}
    (folder / FOLDER).mkdir()
    write(folder / FOLDER)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / FOLDER).iterdir())
    }


def _record(plan: ExportPlan, source: Path, target: str, written: dict[str, Any]) -> dict[str, Any]:
    """What qat.json says; `written` are the entries of modules and tensors."""
    weights = sum(site.weight.numel() for site in plan.linears.values())
    packed = sum(entry["bytes"] for entry in written["modules"].values())
    rules = {site.input.rule for site in plan.linears.values() if site.input is not None}
    return {
        "record_version": RECORD_VERSION,
        "qat_version": _release(),
        "target": target,
        "source": source.resolve().name,
        "source_config_sha256": hashlib.sha256((source / "config.json").read_bytes()).hexdigest(),
        "activation_rules": sorted(rules),
        "fused": plan.fused,
        "caches": cache_record(plan.caches),
        "copied": list(plan.copied),
        "left_out": plan.left_out,
        "embeddings_on_grid": {path: site.format.name for path, site in plan.embeddings.items()},
        "notes": plan.notes,
        "bits_per_weight": 8 * packed / weights,
        **written,
    }


def _release() -> str:
    try:
        return version("qat-native")
    except PackageNotFoundError:
        return "unknown"


def _write_json(path: Path, value: dict[str, Any]) -> str:
    """Write it; returns the sha256. Infinity stays as in the source's config.json (Mamba's `time_step_limit`)."""
    text = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    path.write_bytes(text)
    return hashlib.sha256(text).hexdigest()
