"""Layers that engines merge into one matrix, in an export: what has only one value after merging must have one before.

Which layers those are is what the scheme trained as one, recorded in `qat.json`; the model's family says only what
engines usually merge.
"""

from typing import TYPE_CHECKING, Any

from qat.checkpoints.layouts import Target, support
from qat.checkpoints.layouts.kinds import ROW, TENSOR
from qat.errors import CheckpointError, UnsupportedError
from qat.families import find_family, fused_sets
from qat.numbers.catalog import CATALOG
from qat.numbers.scale import type_of

if TYPE_CHECKING:
    from qat.checkpoints.export_plan import ExportPlan


def scales_apart(plan: "ExportPlan", target: Target) -> str:
    """Why fused layers do not fit a target that has one scale for all of them, where each learns its own; "" if they
    do. Nothing is trained yet, but they start from each layer's own largest weight, so no two are equal."""
    apart = [members for members in plan.fused if plan.layer(members[0]).weight.block == TENSOR]
    if not (target.FUSES_TENSOR_SCALES and apart):
        return ""
    fmt = plan.layer(apart[0][0]).weight
    rows = {weight for weight, _ in support.pairs(target.ROWS) if CATALOG[weight].block == ROW}
    instead = sorted(weight for weight in rows if CATALOG[weight].elements == fmt.elements)
    return (
        f"{target.METHOD} cannot hold {fmt.name} weights of layers that engines fuse ({', '.join(apart[0])}; "
        f"{len(apart)} such sets), each of which learns a scale of its own; to export to it, train "
        + " or ".join(instead)
    )


def check_fused(plan: "ExportPlan") -> None:
    """Refuse sets that were trained as one and differ where engines keep one value; a note for other sets that engines
    usually merge.

    Raises:
        CheckpointError: global scales or calibrated ranges differ; names the layers.
        UnsupportedError: scales per tensor differ, and the target has one for all.
    """
    for members in plan.fused:
        if what := _difference(plan, members):
            raise CheckpointError(f"engines fuse {', '.join(members)}, but their {what}")
        if scales := _merged_scales(plan, members):
            raise UnsupportedError(
                f"engines fuse {', '.join(members)} under one scale, but theirs are {scales}, and rounding again "
                "would change trained weights; use one scale per row, or the target compressed-tensors"
            )
    trained = {frozenset(members) for members in plan.fused}
    sets = fused_sets(plan.linears, find_family(plan.model.config.model_type).fused)
    usual = [members for members in sets if frozenset(members) not in trained]
    apart = [members for members in usual if _difference(plan, members) or _merged_scales(plan, members)]
    if apart:
        what = _difference(plan, apart[0]) or f"scales differ: {_merged_scales(plan, apart[0])}"
        plan.notes.append(
            f"engines usually fuse {', '.join(apart[0])}, which this scheme trained apart ({len(apart)} such sets), "
            f"and their {what}: serve it only where they stay apart"
        )


def _difference(plan: "ExportPlan", members: list[str]) -> str:
    """What of layers that are merged has only one value, and more here; "" if nothing."""
    matrices = [plan.linears[path] for path in members]
    scales = [matrix.quantizer.scales() for matrix in matrices]
    above = {float(s.global_scale) for s in scales if s.global_scale is not None and s.global_scale.numel() == 1}
    ranges = {str(q.limit.tolist()) for m in matrices if (q := m.input) is not None and q.needs_calibration}
    values: tuple[tuple[str, set[Any]], ...] = (("global scales", above), ("input ranges", ranges))
    return next((f"{what} differ: {sorted(own)}" for what, own in values if len(own) > 1), "")


def _merged_scales(plan: "ExportPlan", members: list[str]) -> list[float]:
    """Per-tensor scales of layers that the target's engines merge under one, where they differ."""
    scales = [plan.linears[path].quantizer.scales() for path in members]
    only = {float(type_of(s.stored).decode(s.stored)) for s in scales if s.stored.numel() == 1}
    return sorted(only) if plan.target.FUSES_TENSOR_SCALES and len(only) > 1 else []
