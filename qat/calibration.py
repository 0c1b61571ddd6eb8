"""What a few batches of text are for before training: activation ranges, and starts that know the inputs.

`calibrate` is the whole; `observe` and `begin` are its halves, for callers that try several starts on one observation.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.compensate import compensate
from qat.errors import FormatError
from qat.modules import QatLayer, QatLinear
from qat.ranges import start_scales
from qat.scheme import Scheme
from qat.surgery import dense, layers


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs of each linear layer, by path, over the calibration tokens.

    `mean_square` is (in_features,); `gram`, the mean of x x^T, is (in_features, in_features) and only there on request.
    Layers that read the same tensor share theirs.
    """

    mean_square: dict[str, Tensor]
    gram: dict[str, Tensor]


class _InputMoments:
    """Sums the second moments in forward hooks while the model runs unquantized."""

    def __init__(self, found: dict[str, QatLinear], gram: bool) -> None:
        self.gram = gram
        self.sums: dict[str, Tensor] = {}  # of x^2, or of x x^T
        self.counts: dict[str, int] = defaultdict(int)
        self.owner: dict[str, str] = {}  # the first layer that read the same tensor
        self.last: tuple[Tensor | None, str] = (None, "")
        self.handles = [m.register_forward_pre_hook(self._hook(path)) for path, m in found.items()]

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def collect(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if self.last[0] is x and self.owner.get(path, self.last[1]) == self.last[1]:
                self.owner[path] = self.last[1]
                return
            self.owner[path] = path
            self.last = (x, path)
            flat = x.detach().float().flatten(0, -2)
            with torch.autocast(flat.device.type, enabled=False):  # BF16 products would not stay positive definite
                total = flat.t() @ flat if self.gram else flat.square().sum(dim=0)
            self.sums[path] = self.sums[path].add_(total) if path in self.sums else total
            self.counts[path] += len(flat)

        return collect

    def remove(self) -> None:
        self.last = (None, "")
        for handle in self.handles:
            handle.remove()

    def moments(self) -> Moments:
        means = {path: total.div_(self.counts[path]) for path, total in self.sums.items()}
        grams = {path: means[owner] for path, owner in self.owner.items()} if self.gram else {}
        squares = {p: means[o].diagonal() if self.gram else means[o] for p, o in self.owner.items()}
        return Moments(squares, grams)


def calibrate(model: nn.Module, batches: Iterable[dict[str, Tensor]], scheme: Scheme) -> None:
    """Run `batches` (keyword arguments of the model) through the unquantized model, then fix activation ranges and find
    the start of the weight scales again, its error weighted by the inputs seen where `scheme.weighted_start`, and
    compensated where `scheme.compensate` says so (which changes the weights)."""
    begin(model, scheme, observe(model, batches, gram=scheme.compensate == "gptq"))


@torch.no_grad()
def observe(model: nn.Module, batches: Iterable[dict[str, Tensor]], *, gram: bool = False) -> Moments:
    """The first half of `calibrate`: fix activation ranges, and return the second moments of the inputs.

    `gram` keeps one (in_features, in_features) float32 matrix per distinct input.
    """
    linears = {path: m for path, m in layers(model).items() if isinstance(m, QatLinear)}
    inputs = {m.input_quantizer: path for path, m in linears.items() if m.input_quantizer is not None}
    moments = _InputMoments(linears, gram)
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
        moments.remove()
    for quantizer, path in inputs.items():
        try:
            quantizer.freeze()
        except FormatError as error:
            raise FormatError(f"input of {path}: {error}") from error
    return moments.moments()


@torch.no_grad()
def begin(model: nn.Module, scheme: Scheme, moments: Moments) -> None:
    """The second half of `calibrate`: put every layer at the start that `scheme` describes."""
    for path, module in layers(model).items():
        restart(module, scheme, moments.mean_square.get(path) if scheme.weighted_start else None)
        if scheme.compensate == "gptq" and path in moments.gram:
            quantizer = module.weight_quantizer
            module.weight.copy_(compensate(module.weight, quantizer.format, quantizer.scales(), moments.gram[path]))


@torch.no_grad()
def restart(module: QatLayer, scheme: Scheme, importance: Tensor | None = None) -> None:
    """Find the start scales of one layer again; its per-tensor scale stays (it is shared)."""
    quantizer = module.weight_quantizer
    scales = start_scales(module.weight, quantizer.format, scheme.start, quantizer.global_scale, importance)
    quantizer.set_scales(scales)
