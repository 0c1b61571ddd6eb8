"""The initialisation step `smooth`: it leaves what the model computes alone, so that quantization loses less.

It moves magnitude between a linear layer's input channels and the columns of its weight (SmoothQuant, arXiv
2211.10438): whatever produced the channel is divided by s, the columns that read it are multiplied by s. The factors
are powers of two, so BF16 weights stay exact and the unquantized model computes bit for bit what it did (norms that
multiply by 1 + w are rounded once more), and nothing is added to the checkpoint.

How far to go is one number for the model, or searched at each place (`strength: auto`): s = rms(x)^a / rms(w)^b whose
a and b lose least in the products with both sides quantized. Where inputs are not, that is AWQ's search (2306.00978).
`strength: flex` (Flex Smooth, AngelSlim) searches s = max|x|^a / max|w|^b over all pairs of a coarse grid, then around
the best pair.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qat.errors import UnsupportedError
from qat.families import find_family
from qat.init.calibration import observe
from qat.init.samples import Products, portions, samples
from qat.init.step import Calibration, InitStep, Track
from qat.modes import dense
from qat.sharded import edited, holders, is_divided
from qat.sites import weights

_PROBE = 16  # tokens that show what feeds what
_MOST = 8  # largest exponent of a factor
_TOLERANCE = 1e-3  # of the logits: powers of two change nothing, but 1 + w in BF16 or float32 is rounded
_BALANCES = tuple((step / 10, 1 - step / 10) for step in range(1, 10))  # exponents (a, b) of inputs and weights
_FREE = (0.0, 0.25, 0.5, 0.75, 1.0)  # b by itself, for the best a
_COARSE = tuple((a / 5, b / 5) for a in range(6) for b in range(6))  # a and b apart
_FINE = tuple((a / 10, b / 10) for a in (-1, 0, 1) for b in (-1, 0, 1))  # then, around the best pair
Strength = Annotated[float, Field(gt=0.0, le=1.0)] | Literal["auto", "flex"]


@dataclass(frozen=True)
class Fold:
    """One place where magnitude can be moved.

    Attributes:
        source: path of the norm or linear layer that produces the channels.
        readers: paths of the linear layers that read them; nothing else does.
        repeats: how many input channels of the readers one output of the source becomes (grouped-query attention).
        width: channels that stay together in such a repetition (the head dimension).
    """

    source: str
    readers: tuple[str, ...]
    repeats: int = 1
    width: int = 1


@torch.no_grad()
def smooth(
    model: nn.Module,
    mean_square: dict[str, Tensor],
    strength: float | Literal["auto", "flex"],
    input_ids: Tensor,
    batches: Iterable[dict[str, Tensor]] = (),
    track: Track = dict.items,
) -> list[Fold]:
    """Balance inputs against weights in place: s = rms(x)^strength / rms(w)^(1 - strength) per channel.

    Args:
        model: with a scheme applied; the weights of its layers, and the norms before them, change.
        mean_square: of each input channel, by path of the layer (see `qat.init.calibration.observe`).
        strength: 0.5 gives both sides the same root mean square; 1 moves everything into the weights; "auto" and "flex"
            search both exponents for each fold.
        input_ids: (rows, tokens), to find out what feeds what and to check that nothing else changed.
        batches: calibration text for a search, which does not need `mean_square`.
        track: goes over what is searched, and may show how far it is.

    Returns:
        Where magnitude was moved.

    Raises:
        UnsupportedError: the model's outputs changed, so something this cannot see reads a smoothed tensor. The model
            in memory is then no longer the one that was given. Or there is nothing to smooth.
    """
    probe = input_ids[:1, :_PROBE]
    with dense(model, inputs=True), torch.autocast(probe.device.type, enabled=False):
        before = model(input_ids=probe).logits.float()
        folds = find_folds(model, probe)
    searched = _search(model, folds, list(batches), track, strength) if isinstance(strength, str) else {}
    with dense(model, inputs=True), torch.autocast(probe.device.type, enabled=False):
        for holder, members in _by_holder(model, folds):
            with edited(holder):
                for fold in members:
                    if isinstance(strength, str):
                        exponents = searched.get(fold.source)
                    else:
                        square = next(mean_square[path] for path in fold.readers if path in mean_square)
                        exponents = _exponents(fold, square, _squares(_matrix(model, fold)), strength, 1 - strength)
                    if exponents is not None:
                        _move(model, fold, exponents)
        torch.clear_autocast_cache()  # it holds BF16 copies of the weights as they were, if the caller has autocast on
        after = model(input_ids=probe).logits.float()
    if not folds:
        raise UnsupportedError(
            f"nothing to smooth in {type(model).__name__}: no norm feeds a quantized linear layer; leave "
            "`smooth` out of scheme.init"
        )
    change = float((after - before).abs().max() / before.abs().max())
    if not change <= _TOLERANCE:
        raise UnsupportedError(
            f"smoothing changed the outputs of {type(model).__name__} by {change:.1%}: more than the linear "
            "layers found reads a smoothed tensor; leave `smooth` out of scheme.init for this model"
        )
    return folds


class Smooth(InitStep):
    """Move magnitude between input channels and weight columns before anything is quantized.

    Attributes:
        strength: 0.5 balances them; 1 moves everything into the weights; `auto` and `flex` search at each place, by
            what the products there lose on a few hundred tokens.
    """

    WHOLE_MODEL = True

    kind: Literal["smooth"] = "smooth"
    strength: Strength = 0.5

    @property
    def divides(self) -> bool:
        """See `InitStep`: a search needs samples of all weights."""
        return not isinstance(self.strength, str)

    def run(self, calibration: Calibration) -> str | None:
        """Smooth, and observe again what the model's layers read."""
        model, batches = calibration.model, calibration.batches
        probe = batches[0]["input_ids"]
        folds = smooth(model, calibration.mean_square, self.strength, probe, batches, calibration.track)
        calibration.mean_square = observe(model, batches)
        smoothed = len({path for fold in folds for path in fold.readers})
        return f"smoothed the inputs of {smoothed} of {len(weights(model))} layers"


def _by_holder(model: nn.Module, folds: list[Fold]) -> list[tuple[nn.Module | None, list[Fold]]]:
    """In their order; folds of a divided model with what makes their tensors whole."""
    if not is_divided(model):
        return [(None, folds)]
    inner = holders(model)
    groups: dict[int, tuple[nn.Module | None, list[Fold]]] = {}
    for fold in folds:
        first, *others = (inner[id(model.get_submodule(path))] for path in (fold.source, *fold.readers))
        if any(other is not first for other in others):
            raise UnsupportedError(f"{fold.source} and its readers lie in several blocks; use strategy=ddp")
        groups.setdefault(id(first), (first, []))[1].append(fold)
    return list(groups.values())


def find_folds(model: nn.Module, probe: Tensor) -> list[Fold]:
    """Norms whose output is read by quantized linear layers, and the pairs of its family, in the model's order."""
    quantized = set(weights(model))
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    family, folds = find_family(getattr(getattr(model, "config", None), "model_type", None)), []
    for source, readers in _read_by(model, linears, probe).items():
        if quantized & set(readers):
            folds.append(Fold(source, tuple(readers)))
    for path in linears:
        parent, _, leaf = path.rpartition(".")
        for first, second in family.pairs:
            reader = f"{parent}.{second}"
            if leaf == first and reader in linears and reader in quantized:
                folds += _pair(path, reader, linears, model.get_submodule(parent))
    return folds


def _pair(source: str, reader: str, linears: dict[str, nn.Linear], parent: nn.Module) -> list[Fold]:
    """Grouped-query attention repeats each value head for several output heads."""
    made, read = linears[source].out_features, linears[reader].in_features
    if made == read:
        return [Fold(source, (reader,))]
    width = getattr(parent, "head_dim", None)
    fits = isinstance(width, int) and read % made == 0 and made % width == 0
    return [Fold(source, (reader,), read // made, width)] if fits and isinstance(width, int) else []


def _read_by(model: nn.Module, linears: dict[str, nn.Linear], probe: Tensor) -> dict[str, list[str]]:
    """Linear layers by the norm whose very output they are given."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors stay alive, so that no id is used twice
    readers: dict[str, list[str]] = {}

    def produced(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _module, _args, output: made.__setitem__(id(output), (path, output))

    def read(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            source = made.get(id(args[0]))
            if source is not None and path not in readers.setdefault(source[0], []):
                readers[source[0]].append(path)

        return hook

    norms = {path: m for path, m in model.named_modules() if is_norm(m)}
    handles = [m.register_forward_hook(produced(path)) for path, m in norms.items()]
    handles += [m.register_forward_pre_hook(read(path)) for path, m in linears.items()]
    try:
        model(input_ids=probe)
    finally:
        for handle in handles:
            handle.remove()
    return readers


def is_norm(module: nn.Module) -> bool:
    """Whether all it has is vectors, one of them its weight."""
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and all(p.dim() == 1 for p in own.values()) and not any(module.children())


# --- how far --------------------------------------------------------------------------------------


def _search(
    model: nn.Module, folds: list[Fold], batches: list[dict[str, Tensor]], track: Track, kind: Literal["auto", "flex"]
) -> dict[str, Tensor]:
    """Exponents by the fold's source, where moving magnitude loses less than leaving it."""
    sites = weights(model)
    by_source = {fold.source: fold for fold in folds}
    readers = {fold.source: [path for path in fold.readers if path in sites] for fold in folds}
    found: dict[str, Tensor] = {}
    for part in portions(readers, model):
        seen = samples(model, batches, {path for paths in part.values() for path in paths})
        first = {next(iter(paths)): source for source, paths in part.items()}
        for path, _ in track({path: sites[path] for path in first}):
            source = first[path]
            if path in seen:
                products = Products(seen[path], [sites[reader] for reader in readers[source]])
                searched = Searched(by_source[source], products, _matrix(model, by_source[source]))
                best = searched.auto() if kind == "auto" else searched.flex()
                if best is not None:
                    found[source] = best
    return found


class Searched:
    """What the products at one place lose by the exponents tried there; the first leave all as it is."""

    def __init__(self, fold: Fold, products: Products, matrix: Tensor) -> None:
        self.fold, self.products, self.matrix = fold, products, matrix
        self.tried: list[Tensor] = []
        self.errors: list[Tensor] = []
        self._try(torch.zeros_like(_exponents(fold, products.sample.mean_square, _squares(matrix), 0.0, 0.0)))

    def auto(self) -> Tensor | None:
        """Balances first, then b for the best a; None where nothing is better than to leave all as it is."""
        square, of_weights = self.products.sample.mean_square, _squares(self.matrix)
        for a, b in _BALANCES:
            self._try(_exponents(self.fold, square, of_weights, a, b))
        a = _BALANCES[max(0, self._best() - 1)][0]
        for b in _FREE:
            self._try(_exponents(self.fold, square, of_weights, a, b))
        return self.tried[self._best()] if self._best() else None

    def flex(self) -> Tensor | None:
        """The same by largest magnitudes: pairs of a coarse grid, then those around the best."""
        square, of_weights = self.products.sample.amax.square(), self.matrix.abs().amax(dim=0).square()
        pairs = [(0.0, 0.0)]
        for grid, around in ((_COARSE, False), (_FINE, True)):
            middle = pairs[self._best()] if around else (0.0, 0.0)
            for a, b in grid:
                exponents = _exponents(self.fold, square, of_weights, middle[0] + a, middle[1] + b)
                if not any(torch.equal(exponents, each) for each in self.tried):  # factors are few: powers of two
                    pairs.append((middle[0] + a, middle[1] + b))
                    self._try(exponents)
        return self.tried[self._best()] if self._best() else None

    def _try(self, exponents: Tensor) -> None:
        factors = _columns(self.fold, exponents)
        amax = (self.products.sample.amax / factors).amax()
        self.tried.append(exponents)
        self.errors.append(self.products.lost(lambda rows: rows * factors, lambda x: x / factors, amax))

    def _best(self) -> int:
        return int(torch.stack(self.errors).argmin())


def _matrix(model: nn.Module, fold: Fold) -> Tensor:
    """Everything that reads the channels, (rows, columns)."""
    return torch.cat([model.get_submodule(path).get_parameter("weight").detach().float() for path in fold.readers])


def _squares(matrix: Tensor) -> Tensor:
    return matrix.square().mean(dim=0)


def _exponents(fold: Fold, x: Tensor, w: Tensor, a: float, b: float) -> Tensor:
    """Powers of two of s = x^(a/2) / w^(b/2), both squares of how large a channel is: (heads, 1, width), of one
    repetition."""
    exponent = a * _log2_rms(x) - b * _log2_rms(w)
    heads = exponent.view(-1, fold.repeats, fold.width).mean(dim=1, keepdim=True)
    return (heads - heads.mean()).round().clamp(-_MOST, _MOST)


def _columns(fold: Fold, exponents: Tensor) -> Tensor:
    return torch.exp2(exponents.expand(-1, fold.repeats, -1).reshape(-1))


def _move(model: nn.Module, fold: Fold, exponents: Tensor) -> None:
    columns = _columns(fold, exponents)
    for path in fold.readers:
        weight = model.get_submodule(path).get_parameter("weight")
        weight.mul_(columns.to(weight))
    _divide(model.get_submodule(fold.source), torch.exp2(exponents.reshape(-1)))


def _log2_rms(mean_square: Tensor) -> Tensor:
    """A channel that is always zero counts as a thousandth of the typical one."""
    rms = mean_square.float().sqrt()
    return rms.clamp_min(1e-3 * rms.mean() + torch.finfo(torch.float32).tiny).log2()


def _divide(source: Any, factors: Tensor) -> None:
    """Divide the outputs of a norm or linear layer by `factors`."""
    weight, bias = source.weight, getattr(source, "bias", None)
    factors = factors.to(weight.device)
    if weight.dim() == 2:
        weight.div_(factors[:, None].to(weight))
    else:
        offset = offset_of(source, weight)
        weight.copy_((weight.double() + offset) / factors - offset)
    if isinstance(bias, Tensor):
        bias.div_(factors.to(bias))


def offset_of(norm: nn.Module, weight: Tensor) -> float:
    """1 for norms that multiply by 1 + weight (Gemma's), else 0: what remains where the weight is zero."""
    original = weight.detach().clone()
    x = torch.linspace(-1, 1, weight.numel(), device=weight.device, dtype=weight.dtype)[None]
    weight.zero_()
    nothing = norm(x) - (norm.bias if isinstance(getattr(norm, "bias", None), Tensor) else 0)
    weight.copy_(original)
    return 1.0 if bool(nothing.abs().max() > 0) else 0.0
