"""Low-rank adapters (LoRA, DoRA) on quantized linear layers: a frozen weight W and a trained update, Q(W + s BA), or
beside it, Q(W) x + s BA x.

The first is added before rounding, so that what is trained is what will be stored: `LowRank.merged` is the one
function that the forward pass, every reader of a site and the merge before an export call, so they agree bit for bit.
The quantizer and its scales stay what the initialisation left.
"""

import re
from collections import Counter
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from qat.adapters import Candidate, candidates
from qat.config import Strict
from qat.errors import ConfigError, UnsupportedError
from qat.serving.held import HeldWeight
from qat.sites import Quantized, Site, sites
from qat.text import some
from qat.training.low_rank import LowRank


class LoraConfig(Strict):
    """Train low-rank updates of frozen weights, and learned scales, instead of the weights.

    Attributes:
        rank: of B and A, as peft's `r`.
        alpha: the update is multiplied with alpha / rank.
        dropout: share of an adapter's input channels that is left out of a forward pass while training. All tokens
            leave out the same ones: the update is added to the weight before anything is multiplied with it.
        targets: patterns of the quantized layers that get an adapter; by default every quantized linear layer. Fused
            experts (`*.experts.*_proj`) get one for each expert, where a pattern names them.
        dora: train every row's magnitude apart from its direction.
        norms: train norms and biases, too.
        merge: add the update to the weight before rounding. False leaves the quantized weights as they are and the
            adapter beside them in BF16, as engines serve adapters on one packed model; an export then has both.
        base: how the frozen weights are held. "dense" as float32; "packed" as codes and scales, every weight in the
            middle of its cell (QLoRA), from which each forward and backward pass makes the weight anew, of experts one
            at a time.
    """

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = ()
    dora: bool = False
    norms: bool = False
    merge: bool = True
    base: Literal["dense", "packed"] = "dense"

    @model_validator(mode="after")
    def _consistent(self) -> "LoraConfig":
        if not self.merge and (self.dora or self.norms):
            raise ValueError(
                f"{'dora' if self.dora else 'norms'} changes more than an adapter beside the packed model can say "
                "(vLLM loads no such adapter); leave it out, or merge"
            )
        return self

    @property
    def patterns(self) -> tuple[str, ...]:
        """`targets`, as a tuple."""
        return (self.targets,) if isinstance(self.targets, str) else self.targets

    def wants(self, path: str) -> bool:
        """Whether a quantized linear layer of this path gets an adapter."""
        return not self.patterns or any(fnmatchcase(path, pattern) for pattern in self.patterns)


def is_linear(candidate: Candidate) -> bool:
    """Whether it is the weight of a linear layer, not of experts."""
    return candidate.role == "weight" and candidate.slot.low_rank and len(candidate.slot.shape) == 2


def targets(model: nn.Module, config: LoraConfig) -> list[Site]:
    """The sites that get an adapter, each checked.

    Raises:
        ConfigError: a pattern matches nothing or only layers that are not quantized; a rank is larger than its matrix.
        UnsupportedError: a pattern matches what cannot carry one.
    """
    quantized, every = sites(model, "weight"), [c for c in candidates(model) if c.role == "weight"]
    able = {candidate.path for candidate in every if candidate.slot.low_rank}
    linear = {candidate.path for candidate in every if is_linear(candidate)}
    found = {site.path: site for site in quantized if not config.patterns and site.path in linear}
    for pattern in config.patterns:
        chosen = {site.path: site for site in quantized if fnmatchcase(site.path, pattern)}
        skipped = [c.path for c in every if fnmatchcase(c.path, pattern) and c.path not in chosen]
        if skipped:
            raise ConfigError(
                f"lora.targets {pattern!r} matches {some(skipped)}, which the scheme does not quantize; an adapter "
                "there would be merged unrounded: give the layer a format, or name only quantized layers"
            )
        if not chosen:
            ends = dict.fromkeys("*" + site.path.rsplit(".", 1)[-1] for site in quantized)
            raise ConfigError(f"lora.targets {pattern!r} matches no layer; quantized are {some(list(ends))}")
        found |= chosen
    if not found:
        experts = some([site.path for site in quantized if site.path in able])
        hint = f"; name experts in lora.targets, where they are meant: {experts}" if experts else ""
        raise ConfigError(f"lora: the scheme quantizes no linear layer that an adapter could be put on{hint}")
    for site in found.values():
        if site.path not in able:
            raise UnsupportedError(
                f"lora: {site.path} ({type(site.owner).__name__}) cannot carry an adapter, only linear layers and "
                "fused experts can; leave it out of lora.targets"
            )
        if site.path not in linear and (config.dora or config.dropout or not config.merge):
            what = "dora" if config.dora else "dropout" if config.dropout else "merge: false"
            raise UnsupportedError(
                f"lora.{what}: {site.path} is a stack of experts, for which peft has no such adapter "
                "(target_parameters); leave it out, or the experts out of lora.targets"
            )
    in_order = [site for site in quantized if site.path in found]
    _check_sizes(in_order, {candidate.path: candidate.slot.shape for candidate in every}, config)
    return in_order


def _check_sizes(chosen: list[Site], shapes: dict[str, tuple[int, ...]], config: LoraConfig) -> None:
    tied: dict[int, str] = {}
    for site in chosen:
        rows, columns = shapes[site.path][-2:]
        if config.rank > min(rows, columns):
            raise ConfigError(f"lora.rank {config.rank} is larger than {site.path} ({rows} x {columns}); lower it")
        weight = getattr(site.owner, site.slot)
        if weight is None:  # held packed, as no shared one is
            continue
        other = tied.setdefault(id(weight), site.path)
        if other != site.path:
            raise ConfigError(f"lora: {other} and {site.path} share one weight; leave both out of lora.targets")


def attach(model: nn.Module, config: LoraConfig) -> None:
    """Put an adapter on every target, and freeze everything but adapters, learned scales and, as configured, norms.

    The model computes the same as before, where A is drawn from torch's generator.
    """
    chosen = targets(model, config)
    if not config.merge:
        _check_beside(model, chosen)
    if config.base == "packed":
        hold(model)
    learned = {id(p) for site in sites(model) for p in site.quantizer.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in learned and not (config.norms and parameter.dim() < 2):
            parameter.requires_grad_(False)
    for site in chosen:
        owner: Any = site.owner
        scaling = config.alpha / config.rank
        kind = {"dora": config.dora, "merges": config.merge}
        update = LowRank(_frozen(site), config.rank, scaling, dropout=config.dropout, **kind)
        update.train(owner.training)
        _put(owner, "lora", site.slot, update)


def _frozen(site: Site) -> Tensor:
    """The weight under an adapter; of a stack that is held packed shape and device only."""
    held = getattr(site.owner, "held", None)
    if not isinstance(held, nn.ModuleDict) or site.slot not in held:
        return site.weight.detach()
    stack: Any = held[site.slot]
    return torch.empty(1, device=stack.words.device).expand(stack.shape)


def _put(owner: Any, name: str, slot: str, module: nn.Module) -> None:
    """Give a layer its adapter or held weight, experts one for each stack."""
    if not hasattr(owner, "weight_quantizers"):
        setattr(owner, name, module)
        return
    if getattr(owner, name) is None:
        setattr(owner, name, nn.ModuleDict())
    getattr(owner, name)[slot] = module


def _check_beside(model: Any, chosen: list[Site]) -> None:
    """Refuse what would change the packed model, or have engines leave an adapter out."""
    moving = [
        s.path
        for s in sites(model)
        if any(True for _ in s.quantizer.parameters()) or getattr(s.quantizer, "learn", "") == "refit"
    ]
    if moving:
        raise ConfigError(
            f"lora.merge: false keeps the packed weights and their scales as they are, but those of {some(moving)} are "
            "learned; use scheme.learn: none (and no learn_inputs), or merge"
        )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if on_head := [site.path for site in chosen if site.owner is head]:
        raise UnsupportedError(
            f"lora.merge: false: {on_head[0]} is the output head, whose adapter engines do not serve; name other "
            "layers in lora.targets, or merge"
        )


@torch.no_grad()
def hold(model: nn.Module) -> None:
    """Hold every quantized weight of linear layers and experts as its codes, from which it is made again, instead of as
    a parameter; what is held already stays. Without numbers (on torch's meta device) only shapes change.

    Raises:
        UnsupportedError: a weight, or its format, cannot be held so, or its codes would not come back; names it.
    """
    able = {candidate.path for candidate in candidates(model) if candidate.slot.low_rank}
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for site in sites(model, "weight"):
        owner: Any = site.owner
        if site.is_table or site.is_held:
            continue
        if site.path not in able:
            raise UnsupportedError(
                f"lora.base: packed holds linear layers and fused experts, but {site.path} ({type(owner).__name__}) is "
                "quantized, too, and would stay dense; use base: dense, or skip it"
            )
        if owners[id(site.parameter)] == 1:  # else it is a table, too
            _put(owner, "held", site.slot, _held(site))
            setattr(owner, site.slot, None)


def _held(site: Site) -> HeldWeight:
    weight = site.weight
    try:
        held = HeldWeight(site.format, tuple(weight.shape), weight.device)
    except UnsupportedError as error:
        raise UnsupportedError(f"lora.base: packed: {site.path}: {error}; use base: dense") from error
    rows = weight.shape[-2]
    for expert in () if weight.is_meta else (None,) if weight.dim() == 2 else range(len(weight)):
        one, matrix = site.quantizer, weight
        if expert is not None:
            one, matrix = one.of_rows(slice(expert * rows, (expert + 1) * rows)), weight[expert]
        q = one.quantize(matrix)
        held.hold(q, expert)
        if one.transforms or not torch.equal(one.quantize(held.dequantize(expert)).codes, q.codes):
            raise UnsupportedError(
                f"lora.base: packed: {site.path} does not round to the codes that it is made from, since its scales "
                "for rounding and for dequantizing were moved apart before (reconstruct); use base: dense"
            )
    return held


def adapters(model: nn.Module) -> dict[str, Any]:
    """The layers that carry one, by path."""
    kinds = (LowRank, nn.ModuleDict)  # of a layer, and of experts by stack
    quantized = ((path, m) for path, m in model.named_modules() if isinstance(m, Quantized))
    return {path: m for path, m in quantized if isinstance(getattr(m, "lora", None), kinds)}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Write every update into its weight and drop it: an ordinary quantized model with the same values. Adapters beside
    the weight stay, which is then no longer held packed.

    Computed on the GPU where there is one, as training did: products of devices may differ in their last bit.
    """
    gpu = torch.device("cuda") if torch.cuda.is_available() else None
    changed = adapters(model) | {p: m for p, m in model.named_modules() if getattr(m, "held", None) is not None}
    for layer in changed.values():
        if hasattr(layer, "weight_quantizers"):
            _merge_stacks(layer, gpu)
            continue
        place = layer.weight_quantizer.start.device
        device = gpu or place
        weight = layer.weight.to(device) if layer.held is None else layer.held.to(device).dequantize()
        merges = layer.lora is not None and layer.lora.merges
        if merges:
            weight = layer.lora.eval().to(device).merged(weight)
        if layer.held is None:
            layer.weight.data = weight.to(place)
        else:
            layer.weight = nn.Parameter(weight.to(place), requires_grad=False)
        layer.held = None
        if merges:
            layer.lora = None


def _merge_stacks(layer: Any, gpu: torch.device | None) -> None:
    updates = dict(layer.lora.items()) if layer.lora is not None else {}
    for slot, held in layer.held.items() if layer.held is not None else ():
        place = held.words.device
        held.to(gpu or place)
        if slot in updates:
            updates.pop(slot).eval().to(gpu or place)
        total = torch.empty(held.shape, device=place)
        for index, matrix in enumerate(total):
            matrix.copy_(layer.expert(slot, index))
        total = total.transpose(-1, -2).contiguous() if layer.TRANSPOSED else total
        setattr(layer, slot, nn.Parameter(total, requires_grad=False))
    for slot, update in updates.items():
        parameter = layer.get_parameter(slot)
        weight = parameter.transpose(-1, -2) if layer.TRANSPOSED else parameter
        device = gpu or parameter.device
        total = update.eval().to(device).merged(weight.to(device)).to(parameter.device)
        parameter.data = (total.transpose(-1, -2) if layer.TRANSPOSED else total).contiguous()
    layer.lora = layer.held = None


def take_off(model: nn.Module) -> dict[str, Tensor]:
    """Take the adapters beside the weights off; returns their tensors by name."""
    taken: dict[str, Tensor] = {}
    for path, layer in adapters(model).items():  # never experts, whose adapters are always merged
        taken |= {f"{path}.lora.{name}": parameter.detach() for name, parameter in layer.lora.named_parameters()}
        layer.lora = None
    return taken


def is_adapter(name: str) -> bool:
    """Whether a tensor of a state dict belongs to an adapter."""
    return _ADAPTER.search(name) is not None


_ADAPTER = re.compile(r"\.lora\.(?:\w+\.)?(?:A|B|magnitude)$")
