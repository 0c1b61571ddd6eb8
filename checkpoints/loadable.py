"""Whether an engine on an NPU will load what a model is to be exported as, asked before anything is trained."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qat.checkpoints.export_plan import ExportPlan, ignored, refusals
from qat.checkpoints.layouts import TARGETS, TargetLayer, npu, support
from qat.checkpoints.layouts.reader import HALF_RULE, NPU_RULE
from qat.errors import UnsupportedError
from qat.families import find_family, fused_sets
from qat.numbers.format import Format
from qat.sites import CACHED, sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_loadable(model: "PreTrainedModel", source: Path | None, engine: npu.Engine, device: npu.Device) -> list[str]:
    """What `engine` on `device` will do with exports of `model`, one sentence each.

    Args:
        model: with a scheme applied, with or without numbers.
        source: folder of the unquantized model; None where only its config is known.

    Raises:
        UnsupportedError: it loads no export of this model; names the layer, and what it does load.
    """
    plan, refused = refusals(model, source)
    if (device == npu.HALF) != (plan.dtype is torch.float16):
        raise UnsupportedError(_other_type(engine, device))
    layers = [plan.layer(path) for path in plan.linears]
    _check_fused(plan, layers)
    unpaired = [said for one in layers if (said := npu.unpaired(one.path, one.weight, one.shape[-1]))]
    if unpaired and engine == npu.ENGINES[0]:
        raise UnsupportedError(unpaired[0])
    able = [name for name in TARGETS if name not in refused and _loads(name, layers, engine, device)]
    if not able:
        raise UnsupportedError(_reason(layers, refused, engine, device))
    cached = {site.format.name: site.format for site in sites(model, *CACHED)}
    if cached:
        able = _reading_caches(able, cached, engine, device)
    rows: list[npu.HasNpu] = [row for name in able[:1] for layer in layers if (row := _row(name, layer)) is not None]
    rows += [layout for name in able[:1] if cached and (layout := TARGETS[name].CACHES) is not None]
    remarks = [one.remark for row in rows if (one := npu.loads(row, engine, device)) is not None and one.remark]
    first = f"{engine} on {device} loads this with --target {' or '.join(able)}"
    return [first, *dict.fromkeys(remarks)]


def _other_type(engine: str, device: str) -> str:
    others = ", ".join(each for each in npu.DEVICES if each != npu.HALF)
    half = f"activation_rule: {HALF_RULE} and round_bf16: false"
    if device == npu.HALF:
        return f"{engine} on {device} computes in FP16; train with {half}, or train for {others}"
    return f"this is an FP16 model, for {npu.HALF}; train it with activation_rule: {NPU_RULE} for {engine} on {device}"


def _row(target: str, layer: TargetLayer) -> support.Row | None:
    return support.find(TARGETS[target].ROWS, layer.weight, layer.input)


def _loads(target: str, layers: list[TargetLayer], engine: str, device: str) -> bool:
    return all(npu.loads(_row(target, layer), engine, device, layer.path) for layer in layers)


def _reading_caches(able: list[str], cached: dict[str, Format], engine: str, device: str) -> list[str]:
    """Those of the targets in which the engine reads caches of these formats, too.

    Raises:
        UnsupportedError: there is none; names the caches that it reads.
    """
    layouts = {name: layout for name, target in TARGETS.items() if (layout := target.CACHES) is not None}
    reading = [
        name
        for name in able
        if name in layouts
        and npu.loads(layouts[name], engine, device)
        and all(layouts[name].config(fmt) is not None for fmt in cached.values())
    ]
    if not reading:
        read = [
            f"{layout.scheme} of {name} ({', '.join(layout.holds())})"
            for name, layout in layouts.items()
            if npu.loads(layout, engine, device)
        ]
        raise UnsupportedError(
            f"keys and values are {' and '.join(cached)}, but of quantized caches {engine} on {device} reads "
            f"{', '.join(read) or 'none'}; leave `key` and `value` out of the rules, or give them such a format"
        )
    return reading


def _reason(layers: list[TargetLayer], refused: dict[str, str], engine: str, device: str) -> str:
    """The first layer that the engine loads in no layout; else why the layouts that it loads refuse the model."""
    tables = {name: target.ROWS for name, target in TARGETS.items()}
    for layer in layers:
        if said := npu.refusal(tables, [(name, _row(name, layer)) for name in TARGETS], engine, device, layer.path):
            pair = layer.weight.name + (f" with {layer.input.name} inputs" if layer.input else "")
            return f"{layer.path} is {pair}, but {said}"
    read = [f"{name}: {refused[name]}" for name in TARGETS if name in refused and _loads(name, layers, engine, device)]
    return f"{engine} on {device} loads no export of this model: " + (
        "; ".join(read) or "no layout holds all its layers"
    )


def _check_fused(plan: ExportPlan, layers: list[TargetLayer]) -> None:
    """Engines on Ascend merge these layers into one matrix of one type."""
    kinds = dict.fromkeys(ignored(plan), "dense")
    kinds |= {each.path: f"{each.weight.name}/{each.input.name if each.input else None}" for each in layers}
    for members in fused_sets(kinds, find_family(plan.model.config.model_type).fused):
        if len({kinds[path] for path in members}) > 1:
            listed = ", ".join(f"{path} is {kinds[path]}" for path in members)
            raise UnsupportedError(
                f"engines on Ascend fuse these layers and refuse several types among them: {listed}; give them one "
                "pair of formats, or none"
            )
