"""Turning a model into its quantized self and back: apply a Scheme, calibrate it, report what it covers.

`apply` never leaves anything unsaid: a 2-D weight that no rule matches, a rule that matches nothing, a group that does
not divide a layer and fused layers that disagree are errors that name the layer.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.adapters import Candidate, candidates, unknown_kind
from qat.errors import ConfigError, FormatError, UnsupportedError
from qat.families import find_family, fused_sets
from qat.init.scales import first_scales
from qat.numbers.catalog import lookup
from qat.numbers.hadamard import BlockHadamard, rotation, size_problem
from qat.numbers.numerics import width_problem
from qat.quantizer import InputQuantizer, WeightQuantizer
from qat.scheme import Rule, Scheme
from qat.sites import CACHED, Quantizers, Role, sites

Planned = list[tuple[Candidate, Rule]]  # tensors that a rule speaks of, each with that rule
DENSE_BITS = 16.0  # what an unquantized weight costs in a BF16 checkpoint


@dataclass(frozen=True)
class Covered:
    """One weight, and what the scheme says of it; `rotation` is the size of its input's block Hadamard, 0 without."""

    path: str
    shape: tuple[int, ...]
    weight: str | None
    input: str | None
    skip: str | None
    bits: float
    rotation: int = 0

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class CoveredCache:
    """What one attention module caches: formats of keys and values, None for BF16, and bytes per token."""

    path: str
    key: str | None
    value: str | None
    bytes: float
    dense_bytes: float


@dataclass(frozen=True)
class Coverage:
    """Every weight of a model with its format or the reason it has none, and every cache where one is quantized."""

    modules: tuple[Covered, ...]
    caches: tuple[CoveredCache, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits over all weights, scales included; unquantized ones count 16."""
        total = sum(m.parameters for m in self.modules)
        return sum(m.parameters * m.bits for m in self.modules) / max(total, 1)

    @property
    def quantized_share(self) -> float:
        """Share of the weights that a format covers."""
        total = sum(m.parameters for m in self.modules)
        return sum(m.parameters for m in self.modules if m.weight) / max(total, 1)

    def by_format(self) -> list[tuple[str, str, int, int, float]]:
        """(weight format or reason, input format, modules, parameters, bits per weight), largest first."""
        groups: dict[tuple[str, str], list[Covered]] = defaultdict(list)
        for module in self.modules:
            input = (module.input or "-") + (f" rotated by {module.rotation}" if module.rotation else "")
            groups[module.weight or f"not quantized: {module.skip}", input].append(module)
        rows = []
        for (weight, input), members in groups.items():
            count = sum(m.parameters for m in members)
            bits = sum(m.parameters * m.bits for m in members) / count
            rows.append((weight, input, len(members), count, bits))
        return sorted(rows, key=lambda row: -row[3])

    def by_cache(self) -> list[tuple[str, str, int, float, float]]:
        """(key format, value format, modules, bytes per token, in BF16), in the model's order; [] if all are BF16."""
        groups: dict[tuple[str, str], list[CoveredCache]] = defaultdict(list)
        for module in self.caches:
            groups[module.key or "bf16", module.value or "bf16"].append(module)
        return [
            (*formats, len(members), sum(m.bytes for m in members), sum(m.dense_bytes for m in members))
            for formats, members in groups.items()
        ]


def plan(model: nn.Module, scheme: Scheme) -> dict[str, Rule]:
    """The rule of every weight by path, checked.

    Raises:
        ConfigError: a weight without a rule, a rule without effect, or fused layers treated differently.
        FormatError: a group does not divide a layer's width.
        UnsupportedError: a rule gives a format to a tensor that no adapter knows.
    """
    return {candidate.path: rule for candidate, rule in _plan(model, scheme) if candidate.role == "weight"}


def _plan(model: nn.Module, scheme: Scheme) -> Planned:
    """Every tensor that a rule speaks of, with that rule, in the model's order."""
    planned, missing = [], []
    everything = list(candidates(model))
    for candidate in everything:
        rule = scheme.rule_for(candidate.path, candidate.module, candidate.role)
        if rule is not None:
            planned.append((candidate, rule))
        elif candidate.role == "weight":
            missing.append(candidate.path)
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ConfigError(f"no rule of the scheme matches {shown}; give them a format, or `skip:` with a reason")
    _check_rules_used(scheme, planned, everything)
    for candidate, rule in planned:
        if getattr(rule, candidate.role) is not None:
            _check_candidate(candidate, model, rule)
    rules = {candidate.path: rule for candidate, rule in planned if candidate.role == "weight"}
    rotations = _rotations(planned, scheme)
    for members in trained_together(model, scheme, rules):
        if len({(rules[m].weight, rules[m].input, rotations.get(m)) for m in members}) > 1:
            treatments = ", ".join(f"{m}: {_treatment(rules[m], rotations.get(m))}" for m in members)
            raise ConfigError(f"engines fuse these layers, so they need one treatment: {treatments}")
    return planned


def _treatment(rule: Rule, rotated: int | None) -> str:
    return f"{rule.weight or 'skip'}/{rule.input or '-'}" + (f" rotated by {rotated}" if rotated else "")


def _rotations(planned: Planned, scheme: Scheme) -> dict[str, int]:
    """Sizes of the block Hadamards that inputs will meet, by path of the weight, if they can."""
    read = (candidate for candidate, _ in planned if candidate.role == "weight")
    given = {c.path: (c, size) for c in read if (size := scheme.rotation_of(c.path, c.module))}
    for path, (candidate, size) in given.items():
        *stack, _, columns = candidate.slot.shape
        if problem := size_problem(size, columns):
            raise FormatError(f"{path}: hadamard: {problem}; set its `size`, or give the layer's rule an `init`")
        if stack:
            raise UnsupportedError(
                f"{path}: no loader rotates the inputs of fused experts; give them a rule with an `init` of their own "
                "that leaves hadamard out"
            )
    if not given and any(step.kind == "hadamard" for step in scheme.init):
        raise ConfigError("hadamard rotates quantized inputs, but no rule has an `input` format; leave it out of init")
    return {path: size for path, (_, size) in given.items()}


def rotate_inputs(model: nn.Module, scheme: Scheme) -> nn.Module:
    """Leave the input quantizers of `model` as the steps of the scheme leave them, where its weights are (or will be)
    those of an initialised model: `hadamard` folds its rotation into weights. Returns the model."""
    for site in sites(model, "weight"):
        size = scheme.rotation_of(site.path, site.module)
        if site.input is not None and size:
            site.input.transforms = (BlockHadamard(size),)
    return model


def _check_rules_used(scheme: Scheme, planned: Planned, everything: list[Candidate]) -> None:
    for rule in scheme.rules:
        if any(rule is other for _, other in planned):
            continue
        roles: list[Role] = [role for role in ("weight", *CACHED) if rule.speaks_of(role)]
        of_role = [c for c in everything if c.role in roles]
        shadowed = any(rule.matches(c.path) or rule.matches(c.module) for c in of_role)
        kind = "weighted module" if "weight" in roles else "attention module with a cache"
        why = "every module it matches is taken by an earlier rule" if shadowed else f"no {kind} matches"
        sample = ", ".join(sorted({c.path.rsplit(".", 1)[-1] for c in of_role})[:12])
        raise ConfigError(f"rule {rule.match!r} has no effect: {why}; modules end in: {sample or 'none'}")


def _check_candidate(candidate: Candidate, model: nn.Module, rule: Rule) -> None:
    module, slot = model.get_submodule(candidate.module), candidate.slot
    if candidate.adapter is None:
        shapes = [tuple(p.shape) for p in module.parameters(recurse=False) if p.dim() >= 2]
        raise UnsupportedError(
            f"{candidate.path} ({type(module).__name__}, weights {shapes}): {unknown_kind(module)} cannot be quantized "
            f"yet; add a rule `match: {candidate.path}` with `skip:` and a reason, before {rule.match!r}"
        )
    if slot.refused:
        raise UnsupportedError(f"{candidate.path}: {slot.refused}; leave `{candidate.role}` out of {rule.match!r}")
    if slot.no_input and rule.input is not None:
        raise ConfigError(f"{candidate.path} is {slot.no_input}, so it takes no `input` format")
    names = (rule.weight, rule.input) if candidate.role == "weight" else (getattr(rule, candidate.role),)
    for name in names:
        if name is None:
            continue
        fmt, (*stack, rows, columns) = lookup(name), slot.shape
        if not fmt.divides(columns):
            raise FormatError(f"{candidate.path}: {width_problem(fmt, columns)}")
        if stack and fmt.prompt:
            raise UnsupportedError(
                f"{candidate.path}: {name} inputs ask which tokens are a prompt, and experts, which are sent tokens in "
                f"an order of their own, do not know it; give {rule.match!r} {fmt.prompt} inputs, or leave experts out"
            )
        if stack and name == rule.weight and (fmt.block[0] == 0 or rows % fmt.block[0]):
            raise FormatError(
                f"{candidate.path}: {name} has blocks of {fmt.block[0] or 'all'} rows, which would span experts of "
                f"{rows} rows; use a channel, group or 128-row format that divides them"
            )


def trained_together(model: nn.Module, scheme: Scheme, paths: Iterable[str]) -> list[list[str]]:
    """Sets of `paths` that engines merge: by the scheme, or else by what is usual for the model."""
    config = getattr(model, "config", None)
    usual = find_family(getattr(config, "model_type", None)).fused
    return fused_sets(paths, usual if scheme.fused is None else scheme.fused)


def apply(model: nn.Module, scheme: Scheme, *, defer_init: bool = False, blank: bool = False) -> nn.Module:
    """Put quantizers on the tensors that the scheme names, in place; returns the model.

    Weight scales begin as `scheme.init` says, unweighted; `calibrate` repeats that with calibration data where the
    scheme wants it, and gives static activation ranges their values. `defer_init` takes the format's own rule instead
    of searching, for callers that calibrate right afterwards; `blank` leaves all scales one, for those that load them.
    """
    if scheme.fallback is not None:
        raise ConfigError(
            "scheme.fallback is decided by `qat train`, from text, and recorded as rules in the run's job.yaml; "
            "apply that scheme, or leave fallback out"
        )
    planned = _plan(model, scheme)
    _resolve_tied(model, planned, scheme)
    quantized = [(c, rule) for c, rule in planned if getattr(rule, c.role) is not None]
    makers = _Makers(model, scheme, quantized, defer_init, blank)
    by_module: dict[str, dict[str, Quantizers]] = defaultdict(dict)
    adapters: dict[str, Any] = {}
    for candidate, rule in quantized:
        by_module[candidate.module][candidate.slot.name] = makers.quantizers(candidate, rule)
        adapters[candidate.module] = candidate.adapter
    for path, quantizers in by_module.items():
        model.set_submodule(path, adapters[path].attach(model.get_submodule(path), quantizers))
    return model


class _Makers:
    """Makes quantizers, one for each tensor: tied weights and fused inputs share theirs."""

    def __init__(self, model: nn.Module, scheme: Scheme, quantized: Planned, defer_init: bool, blank: bool) -> None:
        self.model, self.scheme, self.defer_init, self.blank = model, scheme, defer_init, blank
        self.candidates = {c.path: c for c, _ in quantized if c.role == "weight"}
        self.groups = {m: members for members in trained_together(model, scheme, self.candidates) for m in members}
        self.weights: dict[int, WeightQuantizer] = {}
        self.inputs: dict[str, InputQuantizer] = {}

    def quantizers(self, candidate: Candidate, rule: Rule) -> Quantizers:
        """For one tensor, by its rule."""
        if candidate.role != "weight":
            device = next(self.model.parameters()).device
            heads, width = candidate.slot.shape
            return Quantizers(self._following(getattr(rule, candidate.role), device, columns=heads * width))
        members = self.groups.get(candidate.path, [candidate.path])
        return Quantizers(self._weight(candidate, rule, members), self._input(candidate, rule, members), tuple(members))

    def _weight(self, candidate: Candidate, rule: Rule, members: list[str]) -> WeightQuantizer:
        key = id(self._parameter(candidate))
        if key not in self.weights:
            fmt, together = lookup(rule.weight or ""), [self._matrix(self.candidates[m]) for m in members]
            search = None if self.blank else "amax" if self.defer_init else self.scheme.search_of(rule)
            scales = first_scales(self._matrix(candidate), fmt, search, together)
            rounds = self.scheme.rounds_bf16(fmt.name, rule.input)
            self.weights[key] = WeightQuantizer(fmt, scales, rule.learn or self.scheme.learn, rounds)
        return self.weights[key]

    def _input(self, candidate: Candidate, rule: Rule, members: list[str]) -> InputQuantizer | None:
        """The set's one input quantizer: fused layers read the same tensor."""
        if rule.input is None:
            return None
        key = members[0]
        if key not in self.inputs:
            learn = self.scheme.learn_inputs and lookup(rule.input).is_static
            self.inputs[key] = self._following(rule.input, self._parameter(candidate).device, learn)
            self.inputs[key].consumers = len(members)
            if len(candidate.slot.shape) > 2:  # a stack of matrices
                self.inputs[key].reader = "experts"
        return self.inputs[key]

    def _following(self, name: str, device: torch.device, learn: bool = False, columns: int = 0) -> InputQuantizer:
        scheme, fmt = self.scheme, lookup(name)
        made = InputQuantizer(fmt, scheme.activation_rule, scheme.estimator, scheme.observer, learn)
        if fmt.is_columnwise:
            made.amax = made.amax.new_full((columns,), math.nan)
        return made.to(device)

    def _parameter(self, candidate: Candidate) -> nn.Parameter:
        return self.model.get_submodule(candidate.module).get_parameter(candidate.slot.name)

    def _matrix(self, candidate: Candidate) -> Tensor:
        """The weight as it multiplies, without its history."""
        weight = self._parameter(candidate).detach()
        return weight.transpose(-1, -2) if candidate.slot.transposed else weight


def _resolve_tied(model: nn.Module, planned: Planned, scheme: Scheme) -> None:
    """Apply the tied-weight policy."""
    rules = {candidate.path: rule for candidate, rule in planned if candidate.role == "weight"}
    first: dict[int, str] = {}
    for candidate, rule in planned:
        if candidate.role != "weight":
            continue
        module, path = model.get_submodule(candidate.module), candidate.path
        weight = module.get_parameter(candidate.slot.name)
        other = first.setdefault(id(weight), path)
        if other == path:
            continue
        apart = _comes_apart(rules, other, path, scheme)
        if any(step.moves_stream and step.kind == "rotate" for step in scheme.init) and not apart:
            raise ConfigError(
                f"{other} and {path} are one tensor (tied), but rotating the residual stream puts the last norm's gain "
                f"into the head only. `untie: true` of rotate makes two, which costs {2 * weight.numel():,} bytes in "
                "BF16; or leave `residual` out of its sites"
            )
        if apart:
            setattr(module, candidate.slot.name, nn.Parameter(weight.detach().clone()))
            config = getattr(model, "config", None)
            if config is not None:
                config.tie_word_embeddings = False
        elif rules[other].weight != rule.weight or (rule.weight is not None and scheme.tied == "error"):
            raise ConfigError(
                f"{other} and {path} are one tensor (tied), but the rules say {rules[other].weight or 'skip'} and "
                f"{rule.weight or 'skip'}; skip both, or set scheme.tied to `share` (one format for both) "
                "or `untie` (two tensors in the export)"
            )
        elif any(scheme.rotation_of(each, "") for each in (other, path)):
            raise ConfigError(
                f"{other} and {path} are one tensor (tied), which hadamard cannot rotate; use tied: untie"
            )


def _comes_apart(rules: dict[str, Rule], first: str, second: str, scheme: Scheme) -> bool:
    """Whether a tied weight gets its own tensor: by `untie` where the rules differ or quantize it, or for a step."""
    if scheme.unties:
        return True
    weights = rules[first].weight, rules[second].weight
    return scheme.tied == "untie" and (weights[0] != weights[1] or weights[1] is not None)


def report(model: nn.Module, scheme: Scheme | None = None) -> Coverage:
    """What is quantized how; with `scheme`, of a model it has not been applied to yet (nothing is changed)."""
    rules = plan(model, scheme) if scheme is not None else {}
    quantized = {site.path: site for site in sites(model, "weight")}
    rows: list[Covered] = []
    first: dict[int, str] = {}
    for candidate in candidates(model):
        if candidate.role != "weight":
            continue
        path, shape = candidate.path, candidate.slot.shape
        parameter = model.get_submodule(candidate.module).get_parameter(candidate.slot.name)
        other = first.setdefault(id(parameter), path)
        if other != path and not (scheme and _comes_apart(rules, other, path, scheme)):
            continue
        rule, site = rules.get(path), quantized.get(path)
        rotated = 0
        if rule is not None and scheme is not None:
            weight, input, skip = rule.weight, rule.input, rule.skip
            rotated = scheme.rotation_of(path, candidate.module)
        elif site is not None:
            weight, input, skip = site.format.name, site.input.format.name if site.input else None, None
            rotated = rotation(site.input.transforms) if site.input else 0
        else:
            weight, input, skip = None, None, "not part of the scheme"
        rows.append(Covered(path, shape, weight, input, skip, _bits(weight, shape), rotated))
    return Coverage(tuple(rows), _caches(model, scheme))


def _caches(model: nn.Module, scheme: Scheme | None) -> tuple[CoveredCache, ...]:
    """Every cache, () where none is quantized."""
    formats = {(site.path, site.role): site.format.name for site in sites(model, *CACHED)}
    if scheme is not None:
        given = ((c, rule) for c, rule in _plan(model, scheme) if c.role in CACHED)
        formats |= {(c.path, c.role): name for c, rule in given if (name := getattr(rule, c.role)) is not None}
    if not formats:
        return ()
    bits: dict[str, list[float]] = defaultdict(list)
    for candidate in candidates(model):
        if candidate.role in CACHED:
            (heads, width), name = candidate.slot.shape, formats.get((candidate.path, candidate.role))
            row = lookup(name).bits_per_row(width) if name else DENSE_BITS * width
            bits[candidate.path] += [heads * row / 8, heads * DENSE_BITS * width / 8]
    return tuple(
        CoveredCache(path, formats.get((path, "key")), formats.get((path, "value")), key + value, dense_k + dense_v)
        for path, (key, dense_k, value, dense_v) in bits.items()
    )


def _bits(weight: str | None, shape: tuple[int, ...]) -> float:
    return lookup(weight).bits_per_weight(*shape[-2:]) if weight else DENSE_BITS
