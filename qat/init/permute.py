"""The initialisation step `permute`: channels in an order whose blocks lose less, folded into the weights.

A block shares one scale, so who its neighbours are decides what a channel loses. Under a floating-point element the
largest value of a block is nearly free, so outliers want a block each: channels are *dealt* by size like cards. Under
an integer, like-sized channels want to be together: they are sorted. Which of these is best, or the order as it is, is
measured where it matters: in the products of the quantized layers that read the channels.

What the model computes stays, up to the order in which sums are taken: the residual stream is reordered in the
embedding's columns, in norms and in all that reads or writes it; feed-forward channels in the layers around them; value
channels within their heads. `qat.init.channels` says which are free; nothing is added to the checkpoint.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qat.errors import UnsupportedError
from qat.families import find_family
from qat.init.calibration import observe
from qat.init.channels import Channels, Member, channels
from qat.init.samples import Products, Sample, portions, samples
from qat.init.step import Calibration, InitStep, Track
from qat.modes import dense
from qat.quantizer import Quantizer, Transform
from qat.sites import Site, weights

_PROBE = 16  # tokens that show what is joined with what
_TOLERANCE = 1e-3  # of the logits, for float32; a wrong order changes them altogether
_TOLERANCE_SHORT = 0.1  # where weights have 16 bits
_GAIN = 0.995  # the share of its error that another order must stay below


@dataclass(frozen=True)
class Place:
    """Channels that may be reordered.

    Attributes:
        name: what they are, for people.
        members: the dimensions of parameters that go through them, `heads` x repeats x `width` each.
        readers: paths of the quantized weights that sum over them.
        width: how many may change places with one another.
        heads: how many sets of them there are, each with an order of its own.
    """

    name: str
    members: tuple[Member, ...]
    readers: tuple[str, ...]
    width: int
    heads: int = 1


class Permute(InitStep):
    """Reorder channels before anything is quantized, where that makes quantized products better."""

    WHOLE_MODEL = True

    kind: Literal["permute"] = "permute"

    @property
    def moves_stream(self) -> bool:
        """See `InitStep`."""
        return True

    def run(self, calibration: Calibration) -> str | None:
        """Permute, and observe again what the model's layers read."""
        model, batches = calibration.model, calibration.batches
        sentence = permute(model, batches, calibration.track)
        calibration.mean_square = observe(model, batches)
        return sentence


@torch.no_grad()
def permute(model: nn.Module, batches: list[dict[str, Tensor]], track: Track = dict.items) -> str:
    """Find and fold the best orders, in place.

    Args:
        model: with a scheme applied and activation ranges fixed.
        batches: calibration text.

    Returns:
        What was reordered, and what could not be.

    Raises:
        UnsupportedError: no format has blocks along columns, no channels are free, or the model's outputs changed; the
            model in memory is then no longer the one that was given.
    """
    probe = batches[0]["input_ids"][:1, :_PROBE]
    found, fixed = places(model, probe)
    if not found:
        why = f"what its layers read is fixed: {'; '.join(fixed)}" if fixed else _no_blocks(model)
        raise UnsupportedError(f"nothing to permute in {type(model).__name__}: {why}; leave it out of scheme.init")
    before = logits_of(model, probe)
    moved: Counter[str] = Counter()
    for place, order in _orders(model, batches, found, track):
        reorder(place, order)
        moved[place.name] += 1
    torch.clear_autocast_cache()  # it holds BF16 copies of the weights as they were, if the caller has autocast on
    change = float((logits_of(model, probe) - before).abs().max() / before.abs().max())
    if not change <= tolerance(model):
        raise UnsupportedError(
            f"reordering changed the outputs of {type(model).__name__} by {change:.1%}: something reads channels that "
            "was not seen to; leave `permute` out of scheme.init for this model"
        )
    free = Counter(place.name for place in found)
    done = ", ".join(f"{moved[name]} of {count} {name}" for name, count in free.items())
    return f"reordered channels: {done}" + (f"; fixed: {'; '.join(fixed)}" if fixed else "")


def tolerance(model: nn.Module) -> float:
    """How much of its logits a fold may change, which would be nothing in exact arithmetic."""
    return _TOLERANCE_SHORT if next(model.parameters()).element_size() < 4 else _TOLERANCE


def logits_of(model: nn.Module, probe: Tensor) -> Tensor:
    """Of the unquantized model."""
    with dense(model, inputs=True), torch.autocast(probe.device.type, enabled=False):
        logits: Tensor = model(input_ids=probe).logits.float()
    return logits


def _no_blocks(model: nn.Module) -> str:
    names = sorted({f.name for site in weights(model).values() for f in _formats(site)})
    return f"{', '.join(names) or 'nothing quantized'} has no blocks along columns, so their order does not matter"


def _formats(site: Site) -> list[Any]:
    return [site.format] if site.input is None else [site.format, site.input.format]


def _block(site: Site) -> int | None:
    """Columns that share a scale, of the inputs if they have such."""
    return next((f.group for f in reversed(_formats(site)) if f.group), None)


# --- what is free ---------------------------------------------------------------------------------


def places(model: nn.Module, probe: Tensor) -> tuple[list[Place], list[str]]:
    """Channels that are free and read in blocks, in the model's order; and what is read in blocks but fixed, and by
    what, for people."""
    readers = {path: site for path, site in weights(model).items() if not site.is_table and _block(site)}
    with _without_transforms(model), dense(model, inputs=True), torch.autocast(probe.device.type, enabled=False):
        sets = channels(model, probe)
    of = {(id(member.parameter), member.dim): each for each in sets for member in each.members}
    found: list[Place] = []
    stuck: Counter[str] = Counter()
    by_set: dict[int, list[str]] = {}
    for path, site in readers.items():
        columns = (id(site.parameter), -2 if site.owner.TRANSPOSED else -1)
        each = of.get((columns[0], columns[1] % site.parameter.dim()))
        heads = in_heads(model, path) if each is None or each.why else None
        if each is not None and not each.why:
            by_set.setdefault(id(each), []).append(path)
        elif heads is not None and heads.width % (_block(site) or 1) == 0:
            found.append(heads)
        else:
            stuck[f"{_leaf(path)} (by {each.why if each is not None else 'an unknown path'})"] += 1
    free = {id(each): each for each in sets}
    found += [_place(free[key], [readers[path] for path in paths]) for key, paths in by_set.items()]
    return found, [f"{count} {name}" for name, count in stuck.items()]


def _place(each: Channels, readers: list[Site]) -> Place:
    parents = {site.path.rpartition(".")[0] for site in readers}
    name = "residual streams" if len(parents) > 1 else f"inputs of {', '.join(_leaf(s.path) for s in readers)}"
    return Place(name, each.members, tuple(site.path for site in readers), readers[0].weight.shape[-1])


def in_heads(model: nn.Module, reader: str) -> Place | None:
    """The channels of values, which attention mixes across tokens but not with each other."""
    parent, _, leaf = reader.rpartition(".")
    attention = model.get_submodule(parent)
    width = getattr(attention, "head_dim", None)
    pairs = find_family(getattr(getattr(model, "config", None), "model_type", None)).pairs
    for first, second in pairs:
        source, read = getattr(attention, first, None), getattr(attention, second, None)
        if leaf != second or not isinstance(source, nn.Linear) or not isinstance(read, nn.Linear):
            continue
        made = source.out_features
        if isinstance(width, int) and made % width == 0 and read.in_features % made == 0:
            bias = () if source.bias is None else (Member(source.get_parameter("bias"), 0),)
            members = (Member(source.weight, 0), *bias, Member(read.weight, 1))
            return Place(f"values of {first} within heads", members, (reader,), width, made // width)
    return None


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


class _without_transforms:
    """Quantizers leave out their chain inside this context: both sides of a product have one, and it cancels."""

    def __init__(self, model: nn.Module) -> None:
        self.before: list[tuple[Quantizer, tuple[Transform, ...]]] = [
            (module, module.transforms) for module in model.modules() if isinstance(module, Quantizer)
        ]

    def __enter__(self) -> None:
        for quantizer, _ in self.before:
            quantizer.transforms = ()

    def __exit__(self, *_: object) -> None:
        for quantizer, transforms in self.before:
            quantizer.transforms = transforms


# --- which order ----------------------------------------------------------------------------------


def _orders(
    model: nn.Module, batches: list[dict[str, Tensor]], found: list[Place], track: Track
) -> Iterator[tuple[Place, Tensor]]:
    """Places whose channels fare better in another order, with that order: (heads, width) indices within a head."""
    sites = weights(model)
    by_name = {place.readers[0]: place for place in found}
    for part in portions({name: place.readers for name, place in by_name.items()}, model):
        seen = samples(model, batches, {path for paths in part.values() for path in paths})
        for name, _ in track({name: sites[name] for name in part}):
            place = by_name[name]
            readers = [(sites[path], seen[path]) for path in place.readers if path in seen]
            order = _best(place, readers) if readers else None
            if order is not None:
                yield place, order


def _best(place: Place, readers: list[tuple[Site, Sample]]) -> Tensor | None:
    of: dict[int, tuple[Sample, list[Site]]] = {}
    for site, sample in readers:
        of.setdefault(id(sample), (sample, []))[1].append(site)
    products = [Products(sample, sites) for sample, sites in of.values()]

    def error(order: Tensor) -> Tensor:
        total = torch.zeros((), device=order.device)
        for each in products:
            index = _index(order, each.sample.x.shape[-1])
            total += each.lost(partial(_at, index), partial(_at, index), each.sample.amax.amax())
        return total

    as_it_is = torch.arange(place.width, device=products[0].sample.x.device).expand(place.heads, -1)
    orders = [as_it_is, *_candidates(place, products)]
    errors = torch.stack([error(order) for order in orders])
    errors[0] *= _GAIN
    best = int(errors.argmin())
    return orders[best] if best else None


def _at(index: Tensor, x: Tensor) -> Tensor:
    return x[:, index]


def _candidates(place: Place, products: list[Products]) -> Iterator[Tensor]:
    """Orders by three measures of size (inputs on average, at most, and weights), for every block that is in use."""
    measures = (
        [each.sample.mean_square.sqrt() for each in products],
        [each.sample.amax for each in products],
        [rows.square().mean(dim=0).sqrt() for each in products for rows in each.rows],
    )
    blocks = {_block(site) or 0 for each in products for site in each.sites}
    for measure in measures:
        shares = torch.stack([each / each.mean().clamp_min(torch.finfo(torch.float32).tiny) for each in measure])
        size = shares.clamp_min(1e-6).log().mean(dim=0).view(place.heads, -1, place.width).mean(dim=1)
        largest_first = size.argsort(dim=-1, descending=True)
        yield largest_first
        for block in blocks:
            if place.width % block == 0 and place.width > block:
                yield dealt(largest_first, block)
                yield alone(largest_first, block)


def dealt(largest_first: Tensor, block: int) -> Tensor:
    """(heads, width): the largest one to each block, then the next ones in the other direction, and so on."""
    heads, width = largest_first.shape
    rounds = largest_first.view(heads, block, width // block).clone()
    rounds[:, 1::2] = rounds[:, 1::2].flip(-1)
    return rounds.transpose(1, 2).reshape(heads, width)


def alone(largest_first: Tensor, block: int) -> Tensor:
    """(heads, width): the largest one to each block, and the smallest of the others to the largest of these."""
    heads, width = largest_first.shape
    count = width // block
    first = largest_first[:, :count, None]
    others = largest_first[:, count:].flip(-1).reshape(heads, count, block - 1)
    return torch.cat([first, others], dim=-1).reshape(heads, width)


def _index(order: Tensor, size: int) -> Tensor:
    """Where each of `size` channels comes from: heads x repeats x width, the order of a head in each repetition."""
    heads, width = order.shape
    starts = torch.arange(0, size, width, device=order.device).view(heads, -1, 1)
    return (starts + order[:, None, :]).reshape(-1)


def reorder(place: Place, order: Tensor) -> None:
    """Fold an order, (heads, width) indices within a head, into all parameters that hold these channels."""
    for member in place.members:
        parameter, dim = member.parameter, member.dim
        index = _index(order.to(parameter.device), parameter.shape[dim])
        parameter.copy_(parameter.index_select(dim, index))
