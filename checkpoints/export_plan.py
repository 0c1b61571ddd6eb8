"""What an export will write, decided and checked before the first byte: every tensor of the source by its fate, which
layers are packed, and whether the architecture loads exactly that. Training asks the same questions before its first
step, of a model without weights.
"""

import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat.checkpoints.architecture import quiet, read_config, read_json
from qat.checkpoints.caches import CachePlan, check_ranges, plan_caches
from qat.checkpoints.dense_types import check_source, narrowed
from qat.checkpoints.fused import check_fused, scales_apart
from qat.checkpoints.layouts import FILES, TARGETS, Target, TargetLayer, check_layer, support
from qat.checkpoints.matrices import Matrix, dense_parts, stored_matrices
from qat.checkpoints.names import (
    StoredNames,
    lost_when_packed,
    missing_names,
    skeleton,
    stored_names,
    surplus_names,
    tables,
    wanted_while_loading,
)
from qat.checkpoints.shards import ShardReader, TensorInfo
from qat.checkpoints.tables import packed_sites
from qat.errors import CheckpointError, UnsupportedError
from qat.float32 import float32_names, own_tensors, stored_dtype
from qat.numbers.hadamard import rotation
from qat.sites import Site, sites
from qat.text import some
from qat.training.npu import NPU_RULES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_TARGET = "compressed-tensors"


@dataclass
class ExportPlan:
    """What the export of one model needs to know, gathered before the first byte is written.

    Everything is by checkpoint name or path: `linears` are the quantized layers that are packed, `embeddings` quantized
    tables that are not, `heads` the tables whose packed tensors an output layer shares, `dense` every other tensor,
    `wide` those of them that stay in float32, `copied` what the model never loaded (with shapes), `left_out`
    names of the source that are not written (with the reason), `order` all names to write, `head` the output layer,
    `fused` the sets that were trained as one, `quantization` what config.json will say of all this, `caches` what
    attention layers keep quantized, `dtype` the type of `dense`.
    """

    model: "PreTrainedModel"
    target: Target
    names: StoredNames
    linears: dict[str, Matrix]
    embeddings: dict[str, Site]
    heads: dict[str, str]
    dense: dict[str, Tensor]
    wide: frozenset[str]
    copied: dict[str, tuple[int, ...]]
    left_out: dict[str, str]
    order: list[str]
    head: str
    fused: list[list[str]]
    quantization: dict[str, Any] = field(default_factory=dict)
    caches: CachePlan = field(default_factory=CachePlan)
    notes: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.bfloat16

    def layer(self, path: str) -> TargetLayer:
        """The target's view of one packed layer."""
        matrix = self.linears[path]
        input = matrix.input.format if matrix.input is not None else None
        module, kind = self.names.modules.get(path, ""), self.model.config.model_type
        rotated = rotation(matrix.input.transforms) if matrix.input is not None else 0
        shape, weight, table = tuple(matrix.weight.shape), matrix.format, matrix.site.is_table
        heads = {name: None for h, t in self.heads.items() if t == path for name in (h, self.names.modules[h])}
        last = matrix.transposed, rotated, table, tuple(heads), f"{path}.bias" in self.dense
        own = matrix.site.quantizer.round_bf16, self.dtype is torch.float16
        return TargetLayer(path, shape, weight, input, module, kind, *last, *own)


def plan_export(
    model: "PreTrainedModel", source: Path | None, target: Target, *, pack_tables: bool = False
) -> ExportPlan:
    """Everything that can be said of an export without the numbers; `model` may have none (torch's meta device).

    Args:
        source: folder of the unquantized model; None where only its config is known.
        target: the layout.
        pack_tables: pack quantized embeddings, too, instead of storing their values in BF16.

    Raises:
        UnsupportedError: a format, or pair of formats, that the target cannot hold, or a layer that no file can hold.
        CheckpointError: tensors that do not fit the source, or would not be loaded again.
    """
    plan = _sort_tensors(model, source, target, pack_tables)
    for path in plan.linears:
        check_layer(target, plan.layer(path))
    plan.quantization = target.quantization_config([plan.layer(path) for path in plan.linears], ignored(plan))
    plan.caches = plan_caches(model, plan.names, target)
    plan.quantization |= plan.caches.config
    if source is not None:
        _check_loads(plan, source)
    plan.notes = _notes(plan, source)
    return plan


def check_values(plan: ExportPlan) -> None:
    """What only a trained model can violate: calibrated ranges, and one value where engines keep one.

    Raises:
        CheckpointError, UnsupportedError: names the layers.
    """
    check_ranges(plan.caches)
    for path, site in plan.linears.items():
        quantizer = site.input
        limit = quantizer.limit if quantizer is not None and quantizer.needs_calibration else torch.ones(())
        if not (limit.isfinite().all() and limit.max() - limit.min().clamp_max(0.0) > 0):
            raise CheckpointError(f"{path}: the range of its input is {limit.tolist()}; run qat.calibrate first")
    check_fused(plan)


def refusals(model: "PreTrainedModel", source: Path | None) -> tuple[ExportPlan, dict[str, str]]:
    """The plan of the default target, with its layers only where it refuses; and by target why it refuses. Where only
    the scales of fused layers are in the way, the plan's notes say so.

    Raises:
        CheckpointError, UnsupportedError: what has nothing to do with formats, so that every target would refuse.
    """
    base = _sort_tensors(model, source, TARGETS[DEFAULT_TARGET])
    surplus = surplus_names(model, base.names)
    if surplus:
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__}: {len(surplus)} tensors belong to no module (they would be "
            f"ignored): {some(surplus)}"
        )
    if source is not None:
        check_source(base.dense.keys() - base.wide, source, base.dtype)
    layered = [base.layer(path) for path in base.linears]
    refused: dict[str, str] = {}
    apart: dict[str, str] = {}
    for name, target in TARGETS.items():
        try:
            for layer in layered:
                check_layer(target, layer)
            target.quantization_config(layered, ignored(replace(base, target=target)))
            plan_caches(model, base.names, target)
        except UnsupportedError as error:
            refused[name] = str(error)
        else:
            apart |= {name: reason} if (reason := scales_apart(base, target)) else {}
    if DEFAULT_TARGET in refused:
        return base, refused | apart
    plan = plan_export(model, source, TARGETS[DEFAULT_TARGET])
    plan.notes += apart.values()
    return plan, refused | apart


# --- the fate of every tensor ---------------------------------------------------------------------


def _sort_tensors(
    model: "PreTrainedModel", source: Path | None, target: Target, pack_tables: bool = False
) -> ExportPlan:
    to_pack, unpacked, shared = packed_sites(sites(model, "weight"), pack_tables, target.METHOD in FILES)
    given: dict[str, TensorInfo] = {}
    if source is not None:
        with ShardReader(source) as reader:
            given = {name: reader.info(name) for name in reader.names()}
    names = stored_names(model, given)
    packed, nameless = stored_matrices(to_pack, names)
    _check_own_tensors(model, names, packed, nameless)
    embeddings = {names.paths[site.path]: site for site in unpacked}
    heads = {names.paths[head]: names.paths[table] for head, table in shared.items()}
    own = {matrix.name for matrix in packed.values()}
    rest = {name: tensor for name, tensor in names.tensors.items() if name not in own}
    aliases = _aliases(model, names, rest) | {f"{head}.weight": f"{table}.weight" for head, table in heads.items()}
    dense = {name: tensor for name, tensor in rest.items() if name not in aliases}
    left_out = {name: f"a second name of {other}" for name, other in names.shadowed.items()}
    left_out |= {name: f"the same tensor as {other}" for name, other in aliases.items() if name in given}
    if source is not None:
        _check_source(model, names, source, {**names.shadowed, **aliases}, dense.keys() | own)
    order = [name for name in given if name not in left_out]
    order += sorted((dense.keys() | own) - set(given))
    in_float32 = float32_names(model)
    wide = frozenset(name for name in dense if names.origins.get(name) in in_float32)
    copied, head = {name: given[name].shape for name in sorted(names.unread)}, _head(model, names.paths)
    kinds = packed, embeddings, heads, dense, wide
    return ExportPlan(
        model, target, names, *kinds, copied, left_out, order, head, _trained_as_one(packed), dtype=stored_dtype(model)
    )


def _trained_as_one(matrices: dict[str, Matrix]) -> list[list[str]]:
    """Sets of checkpoint paths whose matrices share what engines keep once: fused layers, and those of one expert."""
    sets: dict[tuple[str, ...], list[str]] = {}
    for path, matrix in matrices.items():
        sets.setdefault(matrix.group, []).append(path)
    return [members for members in sets.values() if len(members) > 1]


def _check_own_tensors(
    model: "PreTrainedModel", names: StoredNames, packed: dict[str, Matrix], merged: list[str]
) -> None:
    """Packed weights need a name of their own that transformers finds again."""
    if merged:
        raise UnsupportedError(
            f"{some(merged)}: {type(model).__name__} stores these weights merged with others, or under a name that "
            "does not end in `.weight`, which no packed layout can say; give them a rule with `skip:` and a reason"
        )
    single = {path: matrix.site.path for path, matrix in packed.items() if path in names.modules}
    lost = lost_when_packed(model, single)
    if lost:
        raise UnsupportedError(
            f"{some(lost)}: transformers renames the dense weight of {type(model).__name__} while it loads, but not "
            "packed ones, which would be lost; give them a rule with `skip:` and a reason"
        )


def _aliases(model: "PreTrainedModel", names: StoredNames, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The other names of tied tensors, and the one that is written: what the tie starts from (the embedding)."""
    sources = set((getattr(model, "all_tied_weights_keys", None) or {}).values())
    order = {place: number for number, place in enumerate(own_tensors(model))}
    groups: dict[int, list[str]] = {}
    for name in tensors:
        if name in names.origins:
            groups.setdefault(id(tensors[name]), []).append(name)
    others = {}
    for members in groups.values():
        members.sort(key=lambda name: (names.origins[name] not in sources, order[names.origins[name]]))
        others.update(dict.fromkeys(members[1:], members[0]))
    return others


def _check_source(
    model: "PreTrainedModel", names: StoredNames, source: Path, doubled: dict[str, str], written: Iterable[str]
) -> None:
    """The source holds what the model was loaded from, and names that are left out hold nothing of their own."""
    with ShardReader(source) as reader:
        given = set(reader.names())
        for name, other in doubled.items():
            if name in given and other in given and not torch.equal(reader.get(name), reader.get(other)):
                raise CheckpointError(
                    f"{source} holds {name} and {other}, which are one tensor of {type(model).__name__} as config.json "
                    "describes it, but two different ones in the file: remove the wrong one, or set "
                    "tie_word_embeddings to false if both are meant"
                )
    missing = sorted(set(missing_names(model, names, given)) & set(written))
    if missing:
        raise CheckpointError(
            f"{source} has no {some(missing)}, which {type(model).__name__} needs: is it the folder this model was "
            f"loaded from? It holds {some(sorted(given))}"
        )


def _head(model: "PreTrainedModel", paths: dict[str, str]) -> str:
    """Checkpoint path of the output layer, or ""."""
    head = model.get_output_embeddings()
    return next((paths[path] for path, module in model.named_modules() if module is head and path in paths), "")


def ignored(plan: ExportPlan) -> list[str]:
    """Matrices that stay dense, under every name that a loader may ask for: the file's, which engines go by, and the
    module's, which plain transformers goes by."""
    skipped = plan.linears.keys() | tables(plan.model, plan.names)
    matrices = [name.removesuffix(".weight") for name in plan.order if name.endswith(".weight")]
    matrices = [path for path in matrices if path not in skipped and _is_matrix(plan, path)]
    if plan.head and plan.head not in plan.linears and plan.head not in [*matrices, *plan.heads]:
        matrices.append(plan.head)
    if plan.target.STACKS_OF:
        matrices += [name.rpartition(".")[0] for name, tensor in plan.dense.items() if tensor.dim() > 2]
    modules = plan.names.modules
    return list(dict.fromkeys([*matrices, *(modules[path] for path in matrices if path in modules)]))


def _is_matrix(plan: ExportPlan, path: str) -> bool:
    name = f"{path}.weight"
    return len(plan.copied[name] if name in plan.copied else plan.dense[name].shape) == 2


# --- would it be loaded ---------------------------------------------------------------------------


def exported_config(plan: ExportPlan, source: Path) -> dict[str, Any]:
    """The source's config.json with the quantization, the type, and the truth about tied embeddings."""
    config, dtype = read_json(source / "config.json"), str(plan.dtype).removeprefix("torch.")
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
    config["dtype"] = dtype
    tied = plan.head not in plan.linears and f"{plan.head}.weight" not in plan.dense
    nested = config.get("text_config") or {}
    for part in [config, nested] if "tie_word_embeddings" in nested else [config]:
        part["tie_word_embeddings"] = bool(plan.head) and tied
    own: dict[str, Any] = {"quantization_config": plan.quantization}
    return config | (own if plan.target.DESCRIPTION is None else plan.quantization["config"])


def _check_loads(plan: ExportPlan, source: Path) -> None:
    """The architecture that the exported config.json describes loads every tensor to be written, and needs no other.

    Raises:
        CheckpointError: names what would be lost or made up.
    """
    config = exported_config(plan, source)
    config.pop("quantization_config", None)
    model = _bare(plan.model, config)
    loaded = stored_names(model, plan.order)
    problems = [f"{name} would be missing" for name in missing_names(model, loaded, plan.order)]
    for name in plan.order:
        if name not in plan.copied and name in loaded.tensors:
            written, wanted = list(plan.names.tensors[name].shape), list(loaded.tensors[name].shape)
            problems += [f"{name} would be {written}, not {wanted}"] if written != wanted else []
    lost = (loaded.unread.keys() | loaded.shadowed.keys()) - plan.copied.keys()
    problems += [f"{name} would not be loaded" for name in sorted(lost)]
    if problems:
        raise CheckpointError(
            f"{type(model).__name__}, as the exported config.json describes it, does not fit the tensors to be "
            f"written: {some(problems, joint='; ')}; nothing was written"
        )


def _bare(model: "PreTrainedModel", config: dict[str, Any]) -> "PreTrainedModel":
    """The class that loaders make of a config.json, without memory."""
    own: Any = type(model)
    with tempfile.TemporaryDirectory() as folder, quiet():
        config = {"model_type": model.config.model_type, **config}
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if own.__module__.startswith("transformers."):
            return skeleton(read_config(Path(folder)))
        with torch.device("meta"):  # code that came with the model
            bare: PreTrainedModel = own._from_config(type(model.config).from_pretrained(folder), dtype=torch.bfloat16)
            return bare


# --- what is said ---------------------------------------------------------------------------------


def _notes(plan: ExportPlan, source: Path | None) -> list[str]:
    notes: dict[str, None] = {}
    for path in plan.linears:
        layer = plan.layer(path)
        pair = layer.weight.name + (f" with {layer.input.name} inputs" if layer.input else "")
        notes.update(
            dict.fromkeys(f"{pair}: {note}" for note in support.notes(plan.target.ROWS, layer.weight, layer.input))
        )
        if layer.rotation and plan.target.ROTATED is not None:
            notes.update(dict.fromkeys(support.notes((plan.target.ROTATED,), layer.weight, layer.input)))
        if layer.is_table and plan.target.TABLES is not None:
            notes.update(dict.fromkeys(support.notes((plan.target.TABLES,), layer.weight, layer.input)))
    for path, site in plan.embeddings.items():
        name = site.format.name
        how = ", unless qat export gets --pack-tables" if plan.target.TABLES is not None else ""
        notes[f"{path} is quantized to {name} in training; this target stores its values as dense BF16{how}"] = None
    elements = [matrix.format.element for matrix in plan.linears.values()]
    parts = dense_parts(plan.model, plan.names, [matrix.name for matrix in plan.linears.values()])
    if parts and not all(e.is_minifloat and e.bits == 8 for e in elements):
        notes[
            "plain transformers (5.23) cannot load dense fused experts, or other tensors that it merges, beside packed "
            "layers; vLLM can"
        ] = None
    if "pack-quantized" in json.dumps(plan.quantization):
        modules = plan.names.modules
        wanted = wanted_while_loading(plan.model, [modules[path] for path in plan.linears if path in modules])
        notes.update(dict.fromkeys(f"plain transformers (5.23) cannot load packed layers of {name}, whose weights it "
                                   "initialises; vLLM can" for name in wanted))  # fmt: skip
    in_bf16 = plan.target.METHOD not in FILES and plan.dtype is torch.bfloat16
    if in_bf16 and not all(m.quantizer.round_bf16 or _for_npu(m) for m in plan.linears.values()):
        notes["trained with round_bf16: false, so BF16 servers round the exported weights once more"] = None
    if any(m.rows is not None and (m.format.global_scale or m.format.zero_point) for m in plan.linears.values()):
        notes[
            "plain transformers (5.23) reads experts without global scales and without zero points, so it computes "
            "garbage from these; vLLM does not"
        ] = None
    notes.update(dict.fromkeys([*plan.caches.notes, *_of_the_source(plan, source)]))
    return list(notes)


def _for_npu(matrix: Matrix) -> bool:
    return matrix.input is not None and matrix.input.rule in NPU_RULES


def _of_the_source(plan: ExportPlan, source: Path | None) -> list[str]:
    """What is not quantized and not simply kept, of the source's tensors."""
    notes = [f"{name} is left out: {reason}" for name, reason in plan.left_out.items()]
    kind = type(plan.model).__name__
    if plan.copied:
        families = list(dict.fromkeys(re.sub(r"\d+", "N", name) for name in plan.copied))
        notes.append(f"{len(plan.copied)} tensors that {kind} does not load are copied unread: {some(families)}")
    return notes + (narrowed(plan.dense.keys() - plan.wide, source, plan.dtype) if source is not None else [])
