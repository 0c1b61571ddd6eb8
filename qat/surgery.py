"""Turning a model into its quantized self and back: apply a Scheme, calibrate it, report what it covers.

`apply` never leaves anything unsaid: a 2-D weight that no rule matches, a rule that matches nothing, a group that does
not divide a layer and fused layers that disagree are errors that name the layer.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.errors import ConfigError, FormatError, UnsupportedError
from qat.init.ranges import shared_global_scale, start_scales
from qat.kept import kept_in_float32, own_tensors
from qat.numbers.catalog import lookup
from qat.numbers.numerics import width_problem
from qat.quantizer import InputQuantizer, QatEmbedding, QatLayer, QatLinear, WeightQuantizer
from qat.scheme import Rule, Scheme

DENSE_BITS = 16.0  # what an unquantized weight costs in a BF16 checkpoint


@dataclass(frozen=True)
class Covered:
    """One module with a weight, and what the scheme says of it."""

    path: str
    shape: tuple[int, ...]
    weight: str | None
    input: str | None
    skip: str | None
    bits: float

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Coverage:
    """Every weight of a model with its format or the reason it has none."""

    modules: tuple[Covered, ...]

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
            groups[module.weight or f"not quantized: {module.skip}", module.input or "-"].append(module)
        rows = []
        for (weight, input), members in groups.items():
            count = sum(m.parameters for m in members)
            bits = sum(m.parameters * m.bits for m in members) / count
            rows.append((weight, input, len(members), count, bits))
        return sorted(rows, key=lambda row: -row[3])


def weight_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that own a weight of two or more dimensions, by path, in order; a shared one appears under each path."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, WeightQuantizer | InputQuantizer):
            continue
        if any(p.dim() >= 2 for p in module.parameters(recurse=False)):
            found[path] = module
    return found


def plan(model: nn.Module, scheme: Scheme) -> dict[str, Rule]:
    """The rule of every weighted module, checked.

    Raises:
        ConfigError: a module without a rule, a rule without a module, or fused layers treated differently.
        FormatError: a group does not divide a layer's width.
        UnsupportedError: a rule gives a format to something other than nn.Linear or nn.Embedding.
    """
    modules = weight_modules(model)
    rules: dict[str, Rule] = {}
    missing = []
    for path in modules:
        rule = scheme.rule_for(path)
        if rule is None:
            missing.append(path)
        else:
            rules[path] = rule
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ConfigError(f"no rule of the scheme matches {shown}; give them a format, or `skip:` with a reason")
    _no_idle_rule(scheme, rules, list(modules))
    for path, rule in rules.items():
        if rule.weight is not None:
            _check_module(path, modules[path], rule)
    for members in fused_sets(list(modules), scheme):
        if len({(rules[m].weight, rules[m].input) for m in members}) > 1:
            given = ", ".join(f"{m}: {rules[m].weight or 'skip'}/{rules[m].input or '-'}" for m in members)
            raise ConfigError(f"engines fuse these layers, so they need one treatment: {given}")
    return rules


def _no_idle_rule(scheme: Scheme, used: dict[str, Rule], paths: list[str]) -> None:
    for rule in scheme.rules:
        if not any(rule is other for other in used.values()):
            shadowed = any(rule.matches(path) for path in paths)
            why = "every module it matches is taken by an earlier rule" if shadowed else "no weighted module matches"
            sample = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in paths})[:12])
            raise ConfigError(f"rule {rule.match!r} has no effect: {why}; modules end in: {sample}")


def _check_module(path: str, module: nn.Module, rule: Rule) -> None:
    if type(module) not in (nn.Linear, nn.Embedding, QatLinear, QatEmbedding):
        shapes = [tuple(p.shape) for p in module.parameters(recurse=False) if p.dim() >= 2]
        raise UnsupportedError(
            f"{path} ({type(module).__name__}, weights {shapes}): {_kind(module, shapes)} cannot be quantized yet; "
            f"add a rule `match: {path}` with `skip:` and a reason, before {rule.match!r}"
        )
    if isinstance(module, nn.Embedding) and rule.input is not None:
        raise ConfigError(f"{path} is an embedding: its input is token ids, so it takes no `input` format")
    columns = _weight(module).shape[1]
    for name in (rule.weight, rule.input):
        if name is not None and not lookup(name).divides(columns):
            raise FormatError(f"{path}: {width_problem(lookup(name), columns)}")


def _kind(module: nn.Module, shapes: list[tuple[int, ...]]) -> str:
    """What a module that is no linear layer and no embedding is, in words."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolutions"
    if type(module).__name__ == "Conv1D":  # of transformers, in GPT-2 and its kin
        return "linear layers that store their weight transposed (GPT-2's Conv1D)"
    if any(len(shape) > 2 and min(shape[-2:]) > 1 for shape in shapes):
        return "fused mixture-of-experts weights"
    return "this kind of module"


def _weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer or an embedding, without its history."""
    assert isinstance(module, nn.Linear | nn.Embedding)
    return module.weight.detach()


def fused_sets(paths: list[str], scheme: Scheme) -> list[list[str]]:
    """Groups of two or more paths that share a parent and belong to one fused set, in the order of the model."""
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        for index, names in enumerate(scheme.fused):
            if leaf in names:
                groups[parent, index].append(path)
    return [members for members in groups.values() if len(members) > 1]


def apply(model: nn.Module, scheme: Scheme, *, defer_start: bool = False) -> nn.Module:
    """Replace the layers that the scheme names by fake-quantized ones, in place; returns the model.

    Weight scales start as `scheme.start` says, unweighted; `calibrate` repeats that with calibration data where the
    scheme wants it, and gives static activation ranges their values. `defer_start` takes the format's own rule instead
    of searching, for callers that calibrate, or load trained scales, right afterwards.
    """
    start = "amax" if defer_start else scheme.start
    rules = plan(model, scheme)
    modules = weight_modules(model)
    owners = _resolve_tied(model, modules, rules, scheme)
    inputs: dict[str, InputQuantizer] = {}
    quantizers: dict[int, WeightQuantizer] = {}
    groups = {member: members for members in fused_sets(list(rules), scheme) for member in members}
    for path, rule in rules.items():
        if rule.weight is None:
            continue
        module, fmt = modules[path], lookup(rule.weight)
        members = groups.get(path, [path])
        key = id(module.weight)
        if key not in quantizers:
            shared = shared_global_scale([_weight(modules[m]) for m in members], fmt)
            scales = start_scales(_weight(module), fmt, start, shared)
            quantizers[key] = WeightQuantizer(fmt, scales, scheme.learn, scheme.round_bf16)
        if isinstance(module, nn.Embedding):
            layer: QatLayer = QatEmbedding.wrap(module, quantizers[key])
        else:
            assert isinstance(module, nn.Linear)
            input = _input_for(rule, members, inputs, scheme, module.weight.device)
            layer = QatLinear.wrap(module, quantizers[key], input)
        layer.fused = tuple(members)
        _replace(model, path, layer)
    for first, second in owners:
        assert model.get_submodule(first).weight is model.get_submodule(second).weight
    return model


def _input_for(
    rule: Rule, members: list[str], made: dict[str, InputQuantizer], scheme: Scheme, device: torch.device
) -> InputQuantizer | None:
    """The set's one input quantizer: fused layers read the same tensor."""
    if rule.input is None:
        return None
    key = members[0]
    if key not in made:
        quantizer = InputQuantizer(lookup(rule.input), scheme.activation_rule, scheme.estimator, scheme.observer)
        made[key] = quantizer.to(device)
        made[key].consumers = len(members)
    return made[key]


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _resolve_tied(
    model: nn.Module, modules: dict[str, nn.Module], rules: dict[str, Rule], scheme: Scheme
) -> list[tuple[str, str]]:
    """Apply the tied-weight policy; returns the pairs of paths that stay tied."""
    first: dict[int, str] = {}
    kept = []
    for path, module in modules.items():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        other = first.setdefault(id(weight), path)
        if other == path:
            continue
        alike = rules[other].weight == rules[path].weight
        if _comes_apart(rules, other, path, scheme):
            module.weight = nn.Parameter(weight.detach().clone())
            config = getattr(model, "config", None)
            if config is not None:
                config.tie_word_embeddings = False
        elif not alike or (rules[path].weight is not None and scheme.tied == "error"):
            raise ConfigError(
                f"{other} and {path} are one tensor (tied), but the rules say {rules[other].weight or 'skip'} and "
                f"{rules[path].weight or 'skip'}; skip both, or set scheme.tied to `share` (one format for both) "
                "or `untie` (two tensors in the export)"
            )
        else:
            kept.append((other, path))
    return kept


def _comes_apart(rules: dict[str, Rule], first: str, second: str, scheme: Scheme) -> bool:
    """Whether `untie` gives a tied weight its own tensor: where the rules differ or quantize it."""
    weights = rules[first].weight, rules[second].weight
    return scheme.tied == "untie" and (weights[0] != weights[1] or weights[1] is not None)


def layers(model: nn.Module) -> dict[str, QatLayer]:
    """The fake-quantized layers by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, QatLinear | QatEmbedding)}


def report(model: nn.Module, scheme: Scheme | None = None) -> Coverage:
    """What is quantized how; with `scheme`, of a model it has not been applied to yet (nothing is changed)."""
    rules = plan(model, scheme) if scheme is not None else {}
    rows: list[Covered] = []
    first: dict[int, str] = {}
    for path, module in weight_modules(model).items():
        for name, parameter in module.named_parameters(recurse=False):
            other = first.setdefault(id(parameter), path)
            if parameter.dim() < 2 or (other != path and not (scheme and _comes_apart(rules, other, path, scheme))):
                continue
            weight, input, skip = _state(path, module, rules.get(path))
            shape = tuple(parameter.shape)
            bits = lookup(weight).bits_per_weight(shape[0], shape[1]) if weight else DENSE_BITS
            rows.append(Covered(path if name == "weight" else f"{path}.{name}", shape, weight, input, skip, bits))
    return Coverage(tuple(rows))


def _state(path: str, module: nn.Module, rule: Rule | None) -> tuple[str | None, str | None, str | None]:
    if rule is not None:
        return rule.weight, rule.input, rule.skip
    if isinstance(module, QatLinear):
        input = module.input_quantizer.format.name if module.input_quantizer is not None else None
        return module.weight_quantizer.format.name, input, None
    if isinstance(module, QatEmbedding):
        return module.weight_quantizer.format.name, None, None
    return None, None, "not part of the scheme"


@contextlib.contextmanager
def dense(model: nn.Module, inputs: bool = False) -> Iterator[None]:
    """Weights, and with `inputs` layer inputs, pass through unquantized inside this context (inputs that are being
    observed always do)."""
    kinds = (WeightQuantizer, InputQuantizer) if inputs else WeightQuantizer
    quantizers = [m for m in model.modules() if isinstance(m, kinds) and "forward" not in vars(m)]
    for quantizer in quantizers:  # those of an outer `dense` are left to it
        quantizer.forward = _identity  # type: ignore[method-assign]  # instance override, removed below
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.__dict__.pop("forward", None)  # an inner `served` may have taken it away


def _identity(weight: Tensor) -> Tensor:
    return weight


@contextlib.contextmanager
def served(model: nn.Module) -> Iterator[None]:
    """The model as an export stores it, inside this context: what is not quantized has its BF16 value, unless the
    model keeps it in float32, and on a CPU each weight is quantized once instead of at every call. Nothing may be
    trained inside."""
    quantizers = {id(m): m for m in model.modules() if isinstance(m, WeightQuantizer)}
    skipped, kept = {id(layer.weight) for layer in layers(model).values()}, kept_in_float32(model)
    own = {id(t): t for name, t in own_tensors(model).items() if t.is_floating_point() and name not in kept}
    originals = [(tensor, tensor.data) for key, tensor in own.items() if key not in skipped]
    try:
        for tensor, data in originals:
            tensor.data = data.to(torch.bfloat16).to(data.dtype)
        for quantizer in quantizers.values():
            if quantizer.start.device.type == "cpu":
                quantizer.forward = _Once(quantizer.forward)  # type: ignore[method-assign]  # undone below
        yield
    finally:
        for tensor, data in originals:
            tensor.data = data
        for quantizer in quantizers.values():
            quantizer.__dict__.pop("forward", None)


class _Once:
    """A weight's quantized value, computed at the first call."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.forward = forward
        self.value: Tensor | None = None

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> Tensor:
        if self.value is None:
            self.value = self.forward(weight)
        return self.value
