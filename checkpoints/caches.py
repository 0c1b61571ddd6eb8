"""The quantized caches of a model between its attention layers and the files: what an export stores of them, and the
way back into a model that was loaded."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.adapters import candidates
from qat.checkpoints.layouts.caches import TargetCache, cache_format, engine_flag
from qat.checkpoints.layouts.reader import ExportedFolder
from qat.checkpoints.layouts.target import Target
from qat.checkpoints.names import StoredNames
from qat.checkpoints.record import RECORD, read_record
from qat.errors import CheckpointError, UnsupportedError
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.format import Format
from qat.quantizer import InputQuantizer
from qat.sites import CACHED, Quantizers, Site, sites
from qat.training.activations import static_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CachePlan:
    """What an export writes of the caches.

    Attributes:
        layers: by checkpoint path: the target's view, and the sites of keys and values.
        stored: whether the layout holds them; else the record does.
        config: what config.json's `quantization_config` says of them.
        notes: what should be known of them.
    """

    layers: dict[str, tuple[TargetCache, Site, Site]] = field(default_factory=dict)
    stored: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan_caches(model: nn.Module, names: StoredNames, target: Target) -> CachePlan:
    """What `target` makes of the model's caches.

    Raises:
        UnsupportedError: it cannot hold their formats, or not for these layers.
    """
    layers = _layers(model, names)
    formats = {fmt.name: fmt for cache, *_ in layers.values() for fmt in (cache.key, cache.value)}
    layout = target.CACHES
    if layout is not None and any(layout.config(fmt) is not None for fmt in formats.values()):
        dense = sorted(set(attention_paths(model, names).values()) - layers.keys())
        what = f"{target.METHOD} has one format for the keys and values of all layers"
        if len(formats) > 1:
            raise UnsupportedError(f"{what}, but these are {' and '.join(formats)}; {_what_is_held(target)}")
        if dense:
            raise UnsupportedError(f"{what}, but {dense[0]} has none ({len(dense)} layers); match all of them")
        for cache, *_ in layers.values():
            layout.scales(cache)
        ((name, fmt),) = formats.items()
        return CachePlan(layers, True, layout.config(fmt) or {}, (f"{name} caches: {layout.note(fmt)}",))
    for name, fmt in formats.items():
        if engine_flag(fmt) is None:
            raise UnsupportedError(f"{target.METHOD} cannot hold {name} caches; {_what_is_held(target)}")
    flags = ", ".join(f"{name}: --kv-cache-dtype {engine_flag(fmt)}" for name, fmt in formats.items())
    note = (
        f"the files of {target.METHOD} do not say how these caches are quantized: `qat generate` and `qat serve` read "
        f"it from qat.json, vLLM has to be told ({flags})"
    )
    return CachePlan(layers, notes=(note,) if layers else ())


def _layers(model: nn.Module, names: StoredNames) -> dict[str, tuple[TargetCache, Site, Site]]:
    by_path: dict[str, dict[str, Site]] = {}
    for site in sites(model, *CACHED):
        by_path.setdefault(site.path, {})[site.role] = site
    paths = attention_paths(model, names) if by_path else {}
    widths = {(c.path, c.role): c.slot.shape[1] for c in candidates(model) if c.role in CACHED and by_path}
    layers = {}
    for path, both in by_path.items():
        key, value = (names.paths.get(f"{path}.{leaf}") for leaf in ("k_proj", "v_proj"))
        projections = (key, value) if key and value else None
        formats = both["key"].format, both["value"].format
        both_widths = widths[path, "key"], widths[path, "value"]
        cache = TargetCache(paths[path], projections, *formats, both_widths, _special(both["key"].owner))
        layers[paths[path]] = cache, both["key"], both["value"]
    return layers


def _special(attention: nn.Module) -> str:
    of_all = getattr(getattr(attention, "config", None), "sliding_window", None)  # layers of one kind do not repeat it
    window = getattr(attention, "sliding_window", of_all)
    if isinstance(window, int) and window > 0:
        return f"a window of {window} tokens"
    return "sinks" if getattr(attention, "sinks", None) is not None else ""


def _what_is_held(target: Target) -> str:
    flagged = ", ".join(fmt.name for fmt in CATALOG.values() if engine_flag(fmt))
    formats = ", ".join(target.CACHES.holds()) if target.CACHES is not None else "no caches"
    return f"it holds {formats}; qat.json alone can say {flagged}"


def exportable(fmt: Format, targets: Iterable[Target]) -> bool:
    """Whether some target exports models with such caches."""
    layouts = (target.CACHES for target in targets)
    return engine_flag(fmt) is not None or any(layout is not None and layout.config(fmt) for layout in layouts)


def check_ranges(plan: CachePlan) -> None:
    """Raise CheckpointError where a range was not calibrated."""
    for _, *both in plan.layers.values():
        for site in both:
            every = site.quantizer.amax.flatten().tolist()
            if site.quantizer.needs_calibration and (wrong := [amax for amax in every if not 0 < amax < math.inf]):
                raise CheckpointError(
                    f"{site.path}: the range of its {site.role} is {wrong[0]}; run qat.calibrate first"
                )


def cache_tensors(plan: CachePlan, target: Target) -> dict[str, Tensor]:
    """Scales to store, by name."""
    tensors: dict[str, Tensor] = {}
    if plan.stored and target.CACHES is not None:
        for cache, *both in plan.layers.values():
            for name, site in zip(target.CACHES.scales(cache), both, strict=True):
                scale = static_part(site.format, site.quantizer.amax.cpu())
                assert scale is not None  # what layouts hold is static
                tensors[name] = target.CACHES.stored(scale)
    return tensors


def cache_offsets(plan: CachePlan, target: Target) -> dict[str, Tensor]:
    """Zero points to store beside the scales, by name: formats of caches have none, and some loaders ask for them."""
    if not plan.stored or target.CACHES is None:
        return {}
    scales, tensors = cache_tensors(plan, target), {}
    for cache, *_ in plan.layers.values():
        offsets = target.CACHES.offsets(cache)
        for offset, scale in zip(offsets, target.CACHES.scales(cache)[: len(offsets)], strict=True):
            tensors[offset] = torch.zeros_like(scales[scale])
    return tensors


def cache_record(plan: CachePlan) -> dict[str, dict[str, Any]]:
    """Formats and, where they are calibrated, ranges of the caches, by layer; not those of every channel, which only
    layouts that store them hold."""

    def said(site: Site) -> dict[str, Any]:
        calibrated = site.quantizer.needs_calibration and not site.format.is_columnwise
        return {"format": site.format.name} | ({"amax": float(site.quantizer.amax)} if calibrated else {})

    return {path: {site.role: said(site) for site in both} for path, (_, *both) in plan.layers.items()}


# --- into a model -----------------------------------------------------------------------------------


class StoredQuantizer(InputQuantizer):
    """A quantizer whose static part is what a checkpoint stores, whatever tool wrote it."""

    def __init__(self, fmt: Format, rule: Any, static: Tensor | None) -> None:
        super().__init__(fmt, rule, "ste", "minmax")
        self.register_buffer("stored", static, persistent=False)

    def static(self) -> Tensor | None:
        """As stored."""
        return self.get_buffer("stored") if self._buffers["stored"] is not None else None


def attention_paths(model: nn.Module, names: StoredNames) -> dict[str, str]:
    """Checkpoint path of every attention layer with a cache by its path in the model: its own, as those of its
    projections say."""
    paths = {}
    for candidate in candidates(model):
        if candidate.role not in CACHED or candidate.slot.refused:
            continue
        path = candidate.path
        tails = {inner: stored for inner, stored in names.paths.items() if inner.startswith(f"{path}.")}
        parents = {stored.removesuffix(inner[len(path) :]) for inner, stored in tails.items()}
        paths[path] = parents.pop() if len(parents) == 1 else path
    return paths


def quantize_caches(model: "PreTrainedModel", exported: ExportedFolder, rule: str, names: StoredNames) -> None:
    """Quantize keys and values as the checkpoint, or its record, says.

    Raises:
        CheckpointError: a layer of the model has no scales, or scales belong to no layer.
    """
    given = stored_caches(exported)
    if not given:
        return
    paths = attention_paths(model, names)
    if (missing := sorted(set(paths.values()) - given.keys())) and exported.caches:
        raise CheckpointError(f"{exported.folder}: keys and values are quantized, but {missing[0]} has no scales")
    if surplus := sorted(given.keys() - set(paths.values())):
        raise CheckpointError(f"{exported.folder}: {surplus[0]} caches nothing in {type(model).__name__}")
    adapters = {c.path: c.adapter for c in candidates(model) if c.role in CACHED}
    for path, stored in paths.items():
        adapter = adapters[path]
        if stored in given and adapter is not None:
            module = model.get_submodule(path)
            device = next(module.parameters(), torch.empty(0)).device
            both = {r: StoredQuantizer(fmt, rule, static).to(device) for r, (fmt, static) in given[stored].items()}
            adapter.attach(module, {role: Quantizers(quantizer) for role, quantizer in both.items()})


def stored_caches(exported: ExportedFolder) -> dict[str, dict[str, tuple[Format, Tensor | None]]]:
    """By checkpoint path and role: the format and its static part."""
    given: dict[str, dict[str, tuple[Format, Tensor | None]]] = {}
    for path, cache in exported.caches.items():
        fmt, scales = cache_format(cache.args), exported.cache_scales(path)
        given[path] = {role: (fmt, scale) for role, scale in zip(CACHED, scales, strict=True)}
    if not given:
        for path, roles in ((read_record(exported.folder) or {}).get("caches") or {}).items():
            given[path] = {role: _recorded(entry) for role, entry in roles.items()}
    return given


def _recorded(entry: dict[str, Any]) -> tuple[Format, Tensor | None]:
    fmt, amax = lookup(entry["format"]), entry.get("amax")
    if amax is not None and not (isinstance(amax, float) and 0 < amax < math.inf):
        raise CheckpointError(f"{RECORD}: the range of a cache is {amax!r}, not a positive number")
    return fmt, None if amax is None else static_part(fmt, torch.tensor(amax))
