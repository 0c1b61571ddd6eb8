"""From a trained model to a folder of native low-precision weights, tensor by tensor, complete or not at all.

Nothing here runs the model or saves through transformers: codes and scales come from the layers' own quantizers, are
decoded again on the spot and compared with the weight that the forward pass multiplied with. `qat.json` beside the
weights records a digest of each of those, so that `verify` can repeat the comparison wherever the files travel.
"""

import hashlib
import json
import math
import shutil
import warnings
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.checkpoints.hf import read_json, source_files, unquantizable
from qat.checkpoints.names import fused_groups, stored_paths, stored_tensors
from qat.checkpoints.progress import progress
from qat.checkpoints.shards import DEFAULT_SHARD_BYTES, ShardReader, ShardWriter
from qat.checkpoints.targets import Target, TargetLayer, find_target
from qat.checkpoints.unpack import SCALES, digest
from qat.errors import CheckpointError, UnsupportedError
from qat.modules import QatEmbedding, QatLinear
from qat.numerics import decode_scale
from qat.surgery import layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "qat.json"
RECORD_VERSION = 1


@dataclass
class _Export:
    """What the export of one model needs to know, gathered before the first byte is written.

    Everything is by checkpoint name or path: `linears` and `embeddings` are quantized layers, `dense` every other
    tensor, `order` all names to write (those the model never loaded are copied from the source), `head` the output
    layer, `quantization` what config.json will say of all this.
    """

    model: "PreTrainedModel"
    target: Target
    linears: dict[str, QatLinear]
    embeddings: dict[str, QatEmbedding]
    dense: dict[str, Tensor]
    order: list[str]
    head: str
    quantization: dict[str, Any] = field(default_factory=dict)
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
        extras = plan.target.files(plan.quantization)
        for name, value in {"config.json": _config(plan, source), **extras}.items():
            files[name] = _write_json(writer.folder / name, value)
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
    run: Path,
    out: Path,
    target: str = "compressed-tensors",
    overwrite: bool = False,
    checkpoint: str = "best",
    moved: Path | str | None = None,
) -> Path:
    """Export a checkpoint of a training run; `moved` as in `load_student`, the rest as in `export_model`."""
    from qat.checkpoints.resume import load_student

    find_target(target)
    model, source, state = load_student(run, checkpoint, moved)
    extra = {"name": run.resolve().name, "checkpoint": checkpoint, "step": state.get("step"), "model": state["model"]}
    return export_model(model, source, out, target, overwrite=overwrite, extra=extra)  # type: ignore[arg-type]  # a run's model is a Hugging Face model


# --- before writing -------------------------------------------------------------------------------


def _plan(model: "PreTrainedModel", source: Path, target: Target) -> _Export:
    paths, found = stored_paths(model), layers(model)
    linears = {paths[path]: module for path, module in found.items() if isinstance(module, QatLinear)}
    embeddings = {paths[path]: module for path, module in found.items() if isinstance(module, QatEmbedding)}
    if not linears:
        raise UnsupportedError("no linear layer of this model is quantized; apply a scheme first (qat.apply)")
    quantized = {f"{path}.weight" for path in linears}
    with ShardReader(source) as reader:
        names = reader.names()
        matrices = {name for name in names if len(reader.info(name).shape) == 2}
    unquantized = {name: tensor for name, tensor in stored_tensors(model).items() if name not in quantized}
    dense, aliases = _without_aliases(unquantized, set(names))
    matrices = {name for name in matrices | {n for n, t in dense.items() if t.ndim == 2} if name.endswith(".weight")}
    present = quantized | set(dense)
    head = _head(model, paths)
    missing = sorted(present - set(names) - {f"{head}.weight"})
    if missing:
        raise CheckpointError(f"{source} has no {', '.join(missing[:4])}: is it the folder this model was loaded from?")
    order = [name for name in names if name not in aliases] + sorted(present - set(names))
    tables = {paths[path] for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    dense_paths = [name.removesuffix(".weight") for name in order if name in matrices - quantized]
    dense_paths += [head] if head not in linears and head not in dense_paths else []
    ignored = [path for path in dense_paths if path and path not in tables]
    plan = _Export(model, target, linears, embeddings, dense, order, head)
    for path, module in linears.items():
        target.check(plan.layer(path))
        _check_range(path, module)
    _check_fused(plan)
    plan.quantization = target.quantization_config([plan.layer(path) for path in linears], ignored)
    plan.notes = _notes(plan)
    return plan


def _without_aliases(tensors: dict[str, Tensor], preferred: set[str]) -> tuple[dict[str, Tensor], set[str]]:
    """One name per tensor, a preferred one if there is, and the other names of tied ones."""
    seen: set[int] = set()
    kept: dict[str, Tensor] = {}
    for name in sorted(tensors, key=lambda name: name not in preferred):
        if id(tensors[name]) not in seen:
            seen.add(id(tensors[name]))
            kept[name] = tensors[name]
    return kept, tensors.keys() - kept.keys()


def _head(model: "PreTrainedModel", paths: dict[str, str]) -> str:
    """Checkpoint path of the output head, or ""."""
    head = model.get_output_embeddings()
    return next((paths[path] for path, module in model.named_modules() if module is head and path in paths), "")


def _check_range(path: str, module: QatLinear) -> None:
    quantizer = module.input_quantizer
    if quantizer is not None and quantizer.needs_calibration and not 0 < float(quantizer.amax) < math.inf:
        raise CheckpointError(f"{path}: the range of its input is {float(quantizer.amax)}; run qat.calibrate first")


def _check_fused(plan: _Export) -> None:
    """What an engine merges must have one per-tensor scale and one calibrated input."""
    for members in fused_groups(list(plan.linears)):
        modules = [plan.linears[path] for path in members]
        scales = [module.weight_quantizer.scales() for module in modules]
        above = {float(s.global_scale) for s in scales if s.global_scale is not None}
        only = {float(decode_scale(s.stored)) for s in scales if s.stored.numel() == 1}
        ranges = {float(q.amax) for m in modules if (q := m.input_quantizer) is not None and q.needs_calibration}
        for what, values in (("global scales", above), ("input ranges", ranges)):
            if len(values) > 1:
                raise CheckpointError(f"engines fuse {', '.join(members)}, but their {what} differ: {sorted(values)}")
        if plan.target.FUSES_TENSOR_SCALES and len(only) > 1:
            raise UnsupportedError(
                f"engines fuse {', '.join(members)} under one scale, but theirs are {sorted(only)}, and rounding again "
                "would change trained weights; use one scale per row, or the target compressed-tensors"
            )


def _notes(plan: _Export) -> list[str]:
    found: dict[str, None] = {}
    for path in plan.linears:
        layer = plan.layer(path)
        pair = layer.weight.name + (f" with {layer.input.name} inputs" if layer.input else "")
        found.update(dict.fromkeys(f"{pair}: {note}" for note in plan.target.notes(layer.weight, layer.input)))
    for path, module in plan.embeddings.items():
        name = module.weight_quantizer.format.name
        found[f"{path} is quantized to {name} in training; this target stores its values as dense BF16"] = None
    elements = [module.weight_quantizer.format.element for module in plan.linears.values()]
    if unquantizable(plan.model) and not all(e.kind == "minifloat" and e.bits == 8 for e in elements):
        found["plain transformers (5.23) cannot load dense fused experts beside packed layers; vLLM can"] = None
    if not all(module.weight_quantizer.round_bf16 for module in plan.linears.values()):
        found["trained with round_bf16: false, so BF16 servers round the exported weights once more"] = None
    return list(found)


def _expected_bytes(plan: _Export) -> int:
    layers = [plan.layer(path) for path in plan.linears]
    packed = sum(layer.weight.bits_per_weight(*layer.shape) * layer.shape[0] * layer.shape[1] / 8 for layer in layers)
    return int(packed) + sum(2 * tensor.numel() for tensor in plan.dense.values())


# --- tensors --------------------------------------------------------------------------------------


def _tensors_of(plan: _Export, name: str, reader: ShardReader, record: dict[str, Any]) -> dict[str, Tensor]:
    """Stored tensors of one tensor of the dense model; their digests go into `record`."""
    path = name.removesuffix(".weight")
    if path in plan.linears and name.endswith(".weight"):
        return _packed(plan, path, record)
    if name in plan.dense:
        tensor = plan.dense[name]
        if path in plan.embeddings:
            tensor = plan.embeddings[path].weight_quantizer(tensor)
        tensor = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
    else:
        tensor = reader.get(name)  # the model never loaded it
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} holds NaN or infinity; nothing was written")
    record["tensors"][name] = digest(tensor)
    return {name: tensor}


def _packed(plan: _Export, path: str, record: dict[str, Any]) -> dict[str, Tensor]:
    layer, module = plan.layer(path), plan.linears[path]
    q = module.weight_quantizer.quantize(module.weight)
    trained = module.weight_quantizer(module.weight).to(torch.bfloat16)
    if not bool(torch.isfinite(trained).all()):
        raise CheckpointError(f"{path}.weight holds NaN or infinity; nothing was written")
    if not torch.equal(q.dequantize(torch.bfloat16), trained):
        raise CheckpointError(f"{path}.weight: its codes do not decode to the weight of the forward pass")
    amax = module.input_quantizer.amax if module.input_quantizer is not None else None
    tensors = {f"{path}.{key}": value for key, value in plan.target.pack(q, layer.input, amax).items()}
    for name, tensor in tensors.items():
        key = name.rpartition(".")[2]
        if key in SCALES:
            _check_scale(name, tensor)
        if key.startswith("input_"):
            record["tensors"][name] = digest(tensor)
    record["modules"][path] = {
        "weight": layer.weight.name,
        "input": layer.input.name if layer.input else None,
        "shape": list(layer.shape),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "input_amax": float(amax) if amax is not None and bool(torch.isfinite(amax)) else None,
        "sha256": digest(trained),
    }
    return tensors


def _check_scale(name: str, scale: Tensor) -> None:
    values = decode_scale(scale)
    if not bool((torch.isfinite(values) & (values > 0)).all()):
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


def _config(plan: _Export, source: Path) -> dict[str, Any]:
    """The source's config.json with the quantization, the BF16 type, and the truth about tied embeddings."""
    config = read_json(source / "config.json")
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        part.update({key: "bfloat16" for key in ("dtype", "torch_dtype") if key in part})
    config["dtype"] = "bfloat16"
    tied = plan.head not in plan.linears and f"{plan.head}.weight" not in plan.dense
    nested = config.get("text_config") or {}
    for part in [config, nested] if "tie_word_embeddings" in nested else [config]:
        part["tie_word_embeddings"] = bool(plan.head) and tied
    config["quantization_config"] = plan.quantization
    return config


def _header(plan: _Export, source: Path, target: str) -> dict[str, Any]:
    rules = {m.input_quantizer.rule for m in plan.linears.values() if m.input_quantizer is not None}
    try:
        release = version("qat-native")
    except PackageNotFoundError:
        release = "unknown"
    return {
        "record_version": RECORD_VERSION,
        "qat_version": release,
        "target": target,
        "source": source.resolve().name,
        "source_config_sha256": hashlib.sha256((source / "config.json").read_bytes()).hexdigest(),
        "activation_rules": sorted(rules),
        "embeddings_on_grid": {path: m.weight_quantizer.format.name for path, m in plan.embeddings.items()},
        "notes": plan.notes,
    }


def _write_json(path: Path, value: dict[str, Any]) -> str:
    """Write it; returns the sha256."""
    text = (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    path.write_bytes(text)
    return hashlib.sha256(text).hexdigest()
