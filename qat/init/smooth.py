"""The initialisation step `smooth`: it leaves what the model computes alone, so that quantization loses less.

It moves magnitude between a linear layer's input channels and the columns of its weight (SmoothQuant, arXiv
2211.10438): whatever produced the channel is divided by s, the columns that read it are multiplied by s. The factors
are powers of two, so BF16 weights stay exact and the unquantized model computes bit for bit what it did (norms that
multiply by 1 + w are rounded once more), and nothing is added to the checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qat.errors import UnsupportedError
from qat.families import find_family
from qat.init.calibration import observe
from qat.init.step import Calibration, InitStep
from qat.modes import dense
from qat.sites import weights

_PROBE = 16  # tokens that show what feeds what
_MOST = 8  # largest exponent of a factor
_TOLERANCE = 1e-3  # of the logits: powers of two change nothing, but 1 + w in BF16 or float32 is rounded


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
def smooth(model: nn.Module, mean_square: dict[str, Tensor], strength: float, input_ids: Tensor) -> list[Fold]:
    """Balance inputs against weights in place: s = rms(x)^strength / rms(w)^(1 - strength) per channel.

    Args:
        model: with a scheme applied; the weights of its layers, and the norms before them, change.
        mean_square: of each input channel, by path of the layer (see `qat.init.calibration.observe`).
        strength: 0.5 gives both sides the same root mean square; 1 moves everything into the weights.
        input_ids: (rows, tokens), to find out what feeds what and to check that nothing else changed.

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
        for fold in folds:
            _move(model, fold, next(mean_square[path] for path in fold.readers if path in mean_square), strength)
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
        strength: 0.5 balances them; 1 moves everything into the weights.
    """

    WHOLE_MODEL = True

    kind: Literal["smooth"] = "smooth"
    strength: float = Field(default=0.5, gt=0.0, le=1.0)

    def run(self, calibration: Calibration) -> str | None:
        """Smooth, and observe again what the model's layers read."""
        model, batches = calibration.model, calibration.batches
        folds = smooth(model, calibration.mean_square, self.strength, batches[0]["input_ids"])
        calibration.mean_square = observe(model, batches)
        smoothed = len({path for fold in folds for path in fold.readers})
        return f"smoothed the inputs of {smoothed} of {len(weights(model))} layers"


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

    norms = {path: m for path, m in model.named_modules() if _is_norm(m)}
    handles = [m.register_forward_hook(produced(path)) for path, m in norms.items()]
    handles += [m.register_forward_pre_hook(read(path)) for path, m in linears.items()]
    try:
        model(input_ids=probe)
    finally:
        for handle in handles:
            handle.remove()
    return readers


def _is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and all(p.dim() == 1 for p in own.values()) and not any(module.children())


def _move(model: nn.Module, fold: Fold, mean_square: Tensor, strength: float) -> None:
    readers: list[Any] = [model.get_submodule(path) for path in fold.readers]
    matrix = torch.cat([reader.weight.detach().float() for reader in readers])
    exponent = strength * _log2_rms(mean_square) - (1 - strength) * _log2_rms(matrix.square().mean(dim=0))
    heads = exponent.view(-1, fold.repeats, fold.width).mean(dim=1, keepdim=True)
    heads = (heads - heads.mean()).round().clamp(-_MOST, _MOST)
    columns = torch.exp2(heads.expand(-1, fold.repeats, -1).reshape(-1))
    for reader in readers:
        reader.weight.mul_(columns.to(reader.weight))
    _divide(model.get_submodule(fold.source), torch.exp2(heads.reshape(-1)))


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
        offset = _offset(source, weight)
        weight.copy_((weight.double() + offset) / factors - offset)
    if isinstance(bias, Tensor):
        bias.div_(factors.to(bias))


def _offset(norm: nn.Module, weight: Tensor) -> float:
    """1 for norms that multiply by 1 + weight (Gemma's), else 0: what remains where the weight is zero."""
    original = weight.detach().clone()
    x = torch.linspace(-1, 1, weight.numel(), device=weight.device, dtype=weight.dtype)[None]
    weight.zero_()
    nothing = norm(x) - (norm.bias if isinstance(getattr(norm, "bias", None), Tensor) else 0)
    weight.copy_(original)
    return 1.0 if bool(nothing.abs().max() > 0) else 0.0
