"""Writing the file: what every tensor of the model is called and stored as, then settings, vocabulary and tensors, one
tensor in memory at a time. `qat.record` among the settings holds a digest of each trained weight, as qat.json does
beside other exports; llama.cpp does not read it.
"""

import hashlib
import json
import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from qat.checkpoints.dense_types import check_finite
from qat.checkpoints.folders import atomic_file
from qat.checkpoints.gguf import read_metadata
from qat.checkpoints.layouts.gguf.families import check, describe, find, rope_factors, row_order
from qat.checkpoints.layouts.gguf.spaces import name_for
from qat.checkpoints.layouts.gguf.types import bytes_per_row, row_bytes, type_of
from qat.checkpoints.layouts.gguf.vocabulary import add_vocabulary
from qat.checkpoints.layouts.reader import add_to_digest, digest
from qat.checkpoints.matrices import Matrix
from qat.checkpoints.progress import progress
from qat.checkpoints.record import RECORD_VERSION
from qat.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from qat.checkpoints.export_plan import ExportPlan

RECORD_KEY = "qat.record"
RULE = "llama_cpp"  # of the inputs, see `qat.training.activations`
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_KINDS = {
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    GGMLQuantizationType.Q4_K: LlamaFileType.MOSTLY_Q4_K_M,
    GGMLQuantizationType.Q5_K: LlamaFileType.MOSTLY_Q5_K_M,
    GGMLQuantizationType.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.MXFP4: LlamaFileType.MOSTLY_MXFP4_MOE,
    GGMLQuantizationType.NVFP4: LlamaFileType.MOSTLY_NVFP4,
}
_PENDING = "0" * 64  # of a digest that is not known yet


@dataclass(frozen=True)
class Stored:
    """One tensor of the file.

    Attributes:
        name: llama.cpp's.
        kind: how its numbers are stored.
        shape: as transformers has it, (experts, rows, columns) of a stack.
        parts: names of what it is made of, one for each matrix of a stack.
        above: whether it holds the scales above those matrices, not what is below.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    above: bool = False

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """The shape in bytes."""
        return (*self.shape[:-1], bytes_per_row(self.kind, self.shape[-1]))


def settings_of(plan: "ExportPlan") -> dict[str, Any]:
    """The model's configuration, with what transformers fills in."""
    settings: dict[str, Any] = plan.model.config.to_dict()
    return settings


def stored_tensors(plan: "ExportPlan") -> list[Stored]:
    """Every tensor of the file, in order.

    Raises:
        UnsupportedError: a tensor that llama.cpp has no name for, or experts of one stack in several formats.
    """
    family, settings = find(plan.model.config.model_type), settings_of(plan)
    check(family, settings)
    names = gguf.get_tensor_name_map(family.arch, settings["num_hidden_layers"])
    of_weights = {matrix.name: matrix for matrix in plan.linears.values()}
    found: dict[str, Stored] = {}
    for name, factors in rope_factors(settings).items():
        found[name] = Stored(name, GGMLQuantizationType.F32, tuple(factors.shape), ())
    for own in plan.order:
        expert = _EXPERT.fullmatch(own)
        known = names.get_name(f"{expert[1]}.{expert[3]}.weight" if expert else own, (".weight", ".bias"))
        if known is None or own in plan.copied:
            raise UnsupportedError(f"llama.cpp's {settings['model_type']} has no tensor for {own}; nothing was written")
        if own in of_weights:
            shape, kind = tuple(of_weights[own].weight.shape), type_of(of_weights[own].format)
            assert kind is not None  # the target was asked
        else:
            shape = tuple(plan.dense[own].shape)
            plain = len(shape) == 1 or "norm.weight" in known or "ffn_gate_inp" in known
            kind = GGMLQuantizationType.F32 if plain else GGMLQuantizationType.BF16
        before = found.get(known)
        if before is not None and before.kind is not kind:
            raise UnsupportedError(f"{own} is {kind.name}, {before.parts[0]} {before.kind.name}: one tensor holds both")
        found[known] = Stored(known, kind, shape, (*(before.parts if before else ()), own))
    stacks = {stored.name for stored in found.values() if stored.parts and _EXPERT.fullmatch(stored.parts[0])}
    every = [
        Stored(s.name, s.kind, (len(s.parts), *s.shape), tuple(sorted(s.parts, key=_number))) if s.name in stacks else s
        for s in found.values()
    ]
    return [each for stored in every for each in (stored, *_above(stored))]


def _above(stored: Stored) -> list[Stored]:
    """The tensor of what multiplies whole matrices, where the type has that: llama.cpp's name for it and its shape."""
    if stored.kind is not GGMLQuantizationType.NVFP4:
        return []
    name = stored.name.removesuffix(".weight") + ".scale"
    return [Stored(name, GGMLQuantizationType.F32, (len(stored.parts),), stored.parts, above=True)]


def _number(part: str) -> int:
    match = _EXPERT.fullmatch(part)
    return int(match[2]) if match else 0


def check_file(out: Path, suffix: str, overwrite: bool) -> None:
    """Refuse a name that is no file's, and to overwrite what no export wrote.

    Raises:
        CheckpointError: says which.
    """
    if out.suffix != suffix or out.is_dir():
        raise CheckpointError(f"{out}: this target writes one file; give it a name that ends in {suffix}")
    if overwrite and out.is_file() and RECORD_KEY not in _facts(out):
        raise CheckpointError(
            f"{out} was not written by an export (it has no {RECORD_KEY}), so --overwrite does not replace it; give "
            "another name, or remove it yourself"
        )


def _facts(file: Path) -> dict[str, Any]:
    try:
        return read_metadata(file)
    except (CheckpointError, UnsupportedError):
        return {}


def write_file(plan: "ExportPlan", source: Path, out: Path, record: dict[str, Any], *, overwrite: bool = False) -> Path:
    """Write `out`, complete or not at all.

    Args:
        plan: what is written.
        source: folder of the unquantized model.
        out: the file.
        record: what is kept of the run.
        overwrite: replace a file that an export wrote.

    Raises:
        UnsupportedError: what llama.cpp cannot express; names it.
        CheckpointError: weights that are not finite, or trouble with the disk.
    """
    tensors = stored_tensors(plan)
    other = {m.input.rule for m in plan.linears.values() if m.input is not None} - {RULE}
    if other:
        raise UnsupportedError(
            f"inputs were trained with activation_rule: {', '.join(other)}, but llama.cpp rounds them by its own; set "
            f"scheme.activation_rule: {RULE}"
        )
    total = sum(math.prod(stored.byte_shape) for stored in tensors)
    with atomic_file(out, overwrite=overwrite, expected_bytes=total + (64 << 20)) as partial:
        writer = GGUFWriter(None, gguf.MODEL_ARCH_NAMES[find(plan.model.config.model_type).arch])
        for stored in tensors:
            nbytes = math.prod(stored.byte_shape)
            writer.add_tensor_info(stored.name, stored.byte_shape, np.dtype(np.uint8), nbytes, stored.kind)
        _describe(writer, plan, source, tensors)
        record = _record(plan, tensors, record)
        writer.add_string(RECORD_KEY, json.dumps(record))
        pending = json.dumps(record).encode()
        writer.write_header_to_file(path=partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with torch.no_grad(), progress(f"writing {out.name}", len(tensors)) as advance:
            for stored in tensors:
                writer.write_tensor_data(_data(plan, stored, record))
                advance(1)
        writer.close()
        _settle(partial, pending, json.dumps(record).encode())
    return out


def _describe(writer: GGUFWriter, plan: "ExportPlan", source: Path, tensors: list[Stored]) -> None:
    family, settings = find(plan.model.config.model_type), settings_of(plan)
    counted = writer.get_total_parameter_count()
    about = gguf.Metadata.load(None, source, None, counted[0])
    about.name = name_for(about.name or source.name, source)
    about.size_label = about.size_label or gguf.size_label(*counted)
    writer.add_type(gguf.GGUFType.MODEL)
    about.set_gguf_meta_model(writer)
    describe(writer, family, settings)
    for note in family.notes(settings):
        warnings.warn(note, UserWarning, stacklevel=2)
    sizes = Counter[GGMLQuantizationType]()
    for stored in tensors:
        if stored.kind in _KINDS:
            sizes[stored.kind] += math.prod(stored.shape)
    writer.add_file_type(_KINDS[sizes.most_common(1)[0][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, source, settings["vocab_size"], family)


def _record(plan: "ExportPlan", tensors: list[Stored], record: dict[str, Any]) -> dict[str, Any]:
    """With digests that are still to come."""
    modules, others = {}, {}
    layers = {matrix.name: path for path, matrix in plan.linears.items()}
    for stored in (each for each in tensors if not each.above):
        for part in stored.parts:
            if part in layers:
                layer = plan.layer(layers[part])
                formats = {"weight": layer.weight.name, "input": layer.input.name if layer.input else None}
                modules[layers[part]] = {**formats, **_place(stored, part)}
            else:
                others[part] = _place(stored, part)
    rules = {matrix.input.rule for matrix in plan.linears.values() if matrix.input is not None}
    factors = {name: digest(each) for name, each in rope_factors(settings_of(plan)).items()}
    about = {"record_version": RECORD_VERSION, "model_type": plan.model.config.model_type, "rope_factors": factors}
    return {**about, "activation_rules": sorted(rules), **record, "modules": modules, "tensors": others}


def _place(stored: Stored, part: str) -> dict[str, Any]:
    expert = {"expert": stored.parts.index(part)} if len(stored.shape) > 2 else {}
    return {"tensor": stored.name, **expert, "sha256": _PENDING}


def _settle(file: Path, pending: bytes, settled: bytes) -> None:
    """Put the record with its digests over the one without."""
    assert len(pending) == len(settled)
    with file.open("r+b") as opened:
        head, at = b"", -1
        while at < 0:
            piece = opened.read(1 << 22)
            if not piece:
                raise CheckpointError(f"{file} lost its record while it was written")
            head += piece
            at = head.find(pending)
        opened.seek(at)
        opened.write(settled)


# --- tensors --------------------------------------------------------------------------------------


def _data(plan: "ExportPlan", stored: Stored, record: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The bytes of one tensor; digests of what it is made of go into `record`."""
    family, settings = find(plan.model.config.model_type), settings_of(plan)
    if not stored.parts:
        return rope_factors(settings)[stored.name].numpy().view(np.uint8)
    layers = {matrix.name: path for path, matrix in plan.linears.items()}
    if stored.above:
        return np.array([_scale_above(plan.linears[layers[part]]) for part in stored.parts], np.float32).view(np.uint8)
    pieces = []
    for part in stored.parts:
        if part in layers:
            rows, record["modules"][layers[part]]["sha256"] = _quantized(plan.linears[layers[part]])
        else:
            shift = float(family.shifted and part.endswith("norm.weight"))
            rows = _dense(plan.dense[part], part, stored.kind)
            rows = rows + shift if shift else rows
            record["tensors"][part]["sha256"] = digest(rows.to(torch.float32) - shift)
        order = row_order(part, len(rows), family, settings)
        pieces.append((rows if order is None else rows[order]).view(torch.uint8))
    return torch.cat(pieces).numpy().reshape(stored.byte_shape)


def _dense(tensor: Tensor, name: str, kind: GGMLQuantizationType) -> Tensor:
    """What is not quantized: the BF16 value that other exports store, in float32 where llama.cpp wants that."""
    value = tensor.detach().to("cpu").to(torch.bfloat16).contiguous()
    check_finite(name, value)
    return value if kind is GGMLQuantizationType.BF16 else value.to(torch.float32)


def _quantized(matrix: Matrix) -> tuple[Tensor, str]:
    """Rows of blocks of a matrix, compared with what the forward pass multiplies with, and the digest of that."""
    pieces, whole = [], hashlib.sha256()
    for part in matrix.parts():
        q, trained = part.quantize(), part.value().to(torch.float32)
        check_finite(matrix.name, trained)
        if not torch.equal(q.dequantize(torch.float32), trained):
            raise CheckpointError(f"{matrix.name}: its codes do not decode to the weight of the forward pass")
        pieces.append(row_bytes(q))
        add_to_digest(whole, trained)
    return torch.cat(pieces), whole.hexdigest()


def _scale_above(matrix: Matrix) -> float:
    """What multiplies all of a matrix; all of its parts have it."""
    above = next(matrix.parts()).quantize().scales.global_scale
    assert above is not None
    return above.flatten()[0].item()
