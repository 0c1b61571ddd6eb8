"""What a few batches of text are for before training: activation ranges, and starts that know the inputs.

`calibrate` is the whole; `observe`, `prepare` and `begin` are its parts, for callers that try several starts.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor, nn

from qat.errors import FormatError
from qat.init.gptq import compensate
from qat.init.ranges import shared_global_scale, start_scales
from qat.init.smooth import Fold, smooth
from qat.quantizer import QatLayer, QatLinear
from qat.scheme import Scheme
from qat.surgery import dense, fused_sets, layers

Track = Callable[[dict[str, QatLayer]], Iterable[tuple[str, QatLayer]]]
Batches = Iterable[dict[str, Tensor]]  # keyword arguments of the model
PRODUCTS = 4 << 30  # bytes of input products at a time: Llama 8B has 33 GB of them in all, 1 GB per block


class _InputSums:
    """Sums a statistic of each layer's inputs in forward hooks. Layers that read the same tensor share theirs."""

    def __init__(self, found: dict[str, QatLinear], statistic: Callable[[Tensor, QatLinear], Tensor]) -> None:
        self.statistic = statistic
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = defaultdict(int)
        self.owner: dict[str, str] = {}  # the first layer that read the same tensor
        self.last: tuple[Tensor | None, str] = (None, "")
        self.handles = [m.register_forward_pre_hook(self._hook(path)) for path, m in found.items()]

    def _hook(self, path: str) -> Callable[[QatLinear, tuple[Tensor, ...]], None]:
        def collect(module: QatLinear, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if self.last[0] is x and self.owner.get(path, self.last[1]) == self.last[1]:
                self.owner[path] = self.last[1]
                return
            self.owner[path] = path
            self.last = (x, path)
            flat = x.detach().flatten(0, -2)
            with torch.autocast(flat.device.type, enabled=False):  # BF16 products would not stay positive definite
                total = self.statistic(flat, module)
            self.sums[path] = self.sums[path].add_(total) if path in self.sums else total
            self.counts[path] += len(flat)

        return collect

    def remove(self) -> None:
        self.last = (None, "")
        for handle in self.handles:
            handle.remove()

    def means(self) -> dict[str, Tensor]:
        found = {path: total.div_(self.counts[path]) for path, total in self.sums.items()}
        return {path: found[owner] for path, owner in self.owner.items()}


def calibrate(model: nn.Module, batches: Batches, scheme: Scheme) -> None:
    """Run `batches` through the unquantized model, then fix activation ranges and find the start of the weight scales
    again, its error weighted by the inputs seen where `scheme.weighted_start`. Weights change where `scheme.smooth` and
    `scheme.compensate` say so."""
    kept = list(batches)
    prepare(model, kept, scheme, observe(model, kept))


@torch.no_grad()
def observe(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Fix activation ranges; returns the mean square of each linear layer's input channels, by path."""
    linears = _linears(model)
    inputs = {m.input_quantizer: path for path, m in linears.items() if m.input_quantizer is not None}
    sums = _InputSums(linears, _squares)
    for quantizer in inputs:
        quantizer.observe()
    try:
        with dense(model):
            for batch in batches:
                model(**batch)
    except BaseException:
        for quantizer in inputs:
            quantizer.cancel()
        raise
    finally:
        sums.remove()
    for quantizer, path in inputs.items():
        try:
            quantizer.freeze()
        except FormatError as error:
            raise FormatError(f"input of {path}: {error}") from error
    return sums.means()


def _linears(model: nn.Module) -> dict[str, QatLinear]:
    return {path: m for path, m in layers(model).items() if isinstance(m, QatLinear)}


def _squares(x: Tensor, _layer: QatLinear) -> Tensor:
    return x.float().square().sum(dim=0)


def _products(x: Tensor, layer: QatLinear) -> Tensor:
    x = x.float() if layer.input_quantizer is None else layer.input_quantizer.quantize(x.float())
    return x.t() @ x


@torch.no_grad()
def input_products(model: nn.Module, batches: Batches, paths: Collection[str] | None = None) -> dict[str, Tensor]:
    """Mean of x x^T over the inputs x of these linear layers (all by default), by path: one (in_features, in_features)
    float32 matrix per distinct input. Inputs are quantized as they will be when served, so that weights fit what they
    will meet; the layers before them are not."""
    sums = _InputSums({path: m for path, m in _linears(model).items() if paths is None or path in paths}, _products)
    try:
        with dense(model, inputs=True):
            for batch in batches:
                model(**batch)
    finally:
        sums.remove()
    return sums.means()


def prepare(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    scheme: Scheme,
    mean_square: dict[str, Tensor],
    track: Track = dict.items,
) -> list[Fold]:
    """From an observed model to its start: smooth and observe again, multiply inputs, `begin`, as the scheme says.

    Returns where smoothing moved magnitude.
    """
    folds: list[Fold] = []
    if scheme.smooth:
        folds = smooth(model, mean_square, scheme.smooth, batches[0]["input_ids"])
        mean_square = observe(model, batches)
    if scheme.compensate == "gptq":
        _begin_in_parts(model, scheme, mean_square, batches, track)
    else:
        begin(model, scheme, mean_square, track=track)
    return folds


@torch.no_grad()
def begin(
    model: nn.Module,
    scheme: Scheme,
    mean_square: dict[str, Tensor],
    products: dict[str, Tensor] | None = None,
    track: Track = dict.items,
) -> None:
    """Put every layer at the start that `scheme` describes, given the moments of its inputs; `track` goes over the
    layers, and may show how far it is."""
    found = layers(model)
    _share_global_scales(found, scheme)
    _start(track(found), scheme, mean_square, products or {})


@torch.no_grad()
def _begin_in_parts(
    model: nn.Module,
    scheme: Scheme,
    mean_square: dict[str, Tensor],
    batches: list[dict[str, Tensor]],
    track: Track,
) -> None:
    """`begin` with the products of all inputs, of which there are never more than PRODUCTS bytes, or one block's.

    The text is read once per part, and the last blocks come first: what a compensated weight changes comes after it, so
    that all parts see the inputs of the same model. A weight that another module shares is written last, therefore.
    """
    found = layers(model)
    _share_global_scales(found, scheme)
    _start(((path, layer) for path, layer in found.items() if path not in mean_square), scheme, {}, {})
    held: list[tuple[Tensor, Tensor]] = []
    counted = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for paths in _parts(mean_square):
        part = {path: found[path] for path in paths}
        products = input_products(model, batches, paths)
        shared = [layer.weight for layer in part.values() if counted[id(layer.weight)] > 1]
        before = [weight.clone() for weight in shared]
        _start(track(part), scheme, {path: gram.diagonal() for path, gram in products.items()}, products)
        for weight, original in zip(shared, before, strict=True):
            held.append((weight, weight.clone()))
            weight.copy_(original)
    for weight, compensated in held:
        weight.copy_(compensated)


def _parts(mean_square: dict[str, Tensor]) -> Iterator[list[str]]:
    """The layers that have seen inputs (in that order), from the last to the first: whole decoder
    blocks, as many at a time as PRODUCTS allows. Layers that read one tensor share a mean square and their products."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for path in mean_square:
        blocks[_block(path)].append(path)
    part: list[str] = []
    size = 0
    for paths in reversed(blocks.values()):
        more = sum(4 * len(square) ** 2 for square in {id(s): s for s in (mean_square[p] for p in paths)}.values())
        if part and size + more > PRODUCTS:
            yield part
            part, size = [], 0
        part, size = [*part, *paths], size + more
    if part:
        yield part


def _block(path: str) -> str:
    """ "model.layers.3" of everything below it; a layer outside of numbered blocks is one by itself."""
    names = path.split(".")
    number = next((index for index, name in enumerate(names) if name.isdecimal()), len(names))
    return ".".join(names[: number + 1])


def _start(
    found: Iterable[tuple[str, QatLayer]],
    scheme: Scheme,
    mean_square: dict[str, Tensor],
    products: dict[str, Tensor],
) -> None:
    for path, module in found:
        with torch.autocast(module.weight.device.type, enabled=False):  # a caller's: starts need float32 products
            restart(module, scheme, mean_square.get(path) if scheme.weighted_start else None)
            if path in products:
                quantizer = module.weight_quantizer
                module.weight.copy_(compensate(module.weight, quantizer.format, quantizer.scales(), products[path]))
    torch.clear_autocast_cache()  # see `smooth`


def _share_global_scales(found: dict[str, QatLayer], scheme: Scheme) -> None:
    """Per-tensor scales from the weights as they are now; fused layers share theirs."""
    fused = fused_sets(list(found), scheme)
    alone = [[path] for path in found if not any(path in members for members in fused)]
    for members in fused + alone:
        first = found[members[0]].weight_quantizer.format
        shared = shared_global_scale([found[path].weight.detach() for path in members], first)
        for path in members:  # a tensor each: saved students hold one under every name
            found[path].weight_quantizer.global_scale = None if shared is None else shared.clone()


@torch.no_grad()
def restart(module: QatLayer, scheme: Scheme, importance: Tensor | None = None) -> None:
    """Find the start scales of one layer again; its per-tensor scale stays (it is shared)."""
    quantizer = module.weight_quantizer
    scales = start_scales(module.weight, quantizer.format, scheme.start, quantizer.global_scale, importance)
    quantizer.set_scales(scales)
