"""What of a model can be quantized, and what is: `Site`, and the protocol of the adapters that know kinds of modules.

An adapter (one file in `qat.adapters`) says which modules it takes, lists the `Slot`s of one (its weights, or the keys
and values that pass through it), and replaces it by a module with quantizers on them. Everything else (coverage,
calibration, initialisation, optimizer groups, export, evaluation) asks for `sites(model)` and knows no class of module.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from qat.numbers.numerics import QTensor
from qat.quantizer import InputQuantizer, Quantizer, WeightQuantizer

Role = Literal["weight", "input", "key", "value"]
CACHED: tuple[Role, Role] = ("key", "value")


@dataclass(frozen=True)
class Slot:
    """One tensor of a module that could be quantized.

    Attributes:
        name: below the module's path; the parameter's for weights.
        role: what the tensor is.
        shape: of a weight as it multiplies: (rows, columns), or (experts, rows, columns); of a cache (heads, width).
        no_input: why the weight takes no input format; "" where it does.
        transposed: whether the parameter is stored (..., columns, rows).
        refused: why it cannot be quantized at all; "" where it can.
        low_rank: whether the weight can carry a trained update (`qat.lora`).
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    no_input: str = ""
    transposed: bool = False
    refused: str = ""
    low_rank: bool = False


@dataclass(frozen=True)
class Quantizers:
    """What an adapter puts on one slot.

    Attributes:
        own: on the tensor itself; None leaves it as it is.
        input: on what a weight is multiplied with: an InputQuantizer, or where nothing is trained any function of a
            tensor that is a module.
        fused: see `Site`.
    """

    own: Quantizer | None
    input: nn.Module | None = None
    fused: tuple[str, ...] = ()


class Adapter(Protocol):
    """The interface of `ADAPTER` in a file of `qat.adapters`."""

    def takes(self, module: nn.Module) -> bool:
        """Whether this adapter knows the module, quantized already or not."""

    def slots(self, module: nn.Module) -> list[Slot]:
        """What could be quantized in it."""

    def attach(self, module: nn.Module, quantizers: Mapping[str, Quantizers]) -> nn.Module:
        """The module with quantizers on some slots, by name; it takes over the parameters under their old names."""


@dataclass(frozen=True, eq=False)
class Site:
    """A quantized tensor of a model.

    Attributes:
        path: what the rules of a scheme call it: the module's path, with the parameter's name unless that is `weight`.
        role: what the tensor is.
        module: path of the module that owns it.
        slot: its name there.
        owner: the module.
        quantizer: what stands on it.
        input: the quantizer of what is multiplied with this weight, or None.
        fused: paths of the weights that are trained as one with this one, itself among them.
    """

    path: str
    role: Role
    module: str
    slot: str
    owner: "Quantized"
    quantizer: Any  # a WeightQuantizer for weights, else an InputQuantizer
    input: InputQuantizer | None = None
    fused: tuple[str, ...] = ()

    @property
    def format(self) -> Any:
        """The Format of the tensor."""
        return self.quantizer.format

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, as the model stores it."""
        parameter = self.owner.get_parameter(self.slot)
        return parameter

    @property
    def weight(self) -> Tensor:
        """The parameter as it multiplies: (rows, columns) or (experts, rows, columns); a view that may be written,
        unless the layer carries an adapter, whose update is then added."""
        return self.owner.matrix(self.slot)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of `weight`, which is not made for it where it is held packed."""
        return self.owner.shape(self.slot)

    @property
    def is_held(self) -> bool:
        """Whether the weight is held packed, and no parameter."""
        return getattr(self.owner, self.slot) is None

    def parts(self) -> Iterator[tuple[Tensor, WeightQuantizer]]:
        """The weight as it multiplies, and its quantizer; of a stack that is held packed every matrix in turn, with a
        quantizer that writes through, so that the stack is never whole."""
        return self.owner.parts(self.slot)

    @torch.no_grad()
    def quantize(self) -> QTensor:
        """Codes and stored scales of the weight."""
        codes = [quantizer.quantize(weight).codes for weight, quantizer in self.parts()]
        together = codes[0] if len(codes) == 1 else torch.stack(codes)
        return QTensor(self.format, together, self.quantizer.scales())

    @property
    def is_table(self) -> bool:
        """Whether the weight is looked up, not multiplied with."""
        return self.owner.IS_TABLE

    @torch.no_grad()
    def value(self) -> Tensor:
        """The weight on its grid, as the forward pass multiplies with it."""
        value: Tensor = self.quantizer(self.weight)
        return value

    def watch(self, see: Callable[[Tensor], None]) -> Any:
        """Call `see` with everything that is multiplied with this weight, before it is quantized; returns a handle."""
        return self.owner.watch(self.slot, see)


class Quantized(nn.Module):
    """A module with quantizers on some of its slots: what the adapters' modules have in common."""

    IS_TABLE = False
    TRANSPOSED = False  # whether parameters are stored (..., columns, rows)

    def quantizers(self) -> dict[str, Quantizers]:
        """By slot."""
        raise NotImplementedError

    def matrix(self, slot: str) -> Tensor:
        """A weight as it multiplies."""
        parameter = self.get_parameter(slot)
        return parameter.transpose(-1, -2) if self.TRANSPOSED else parameter

    def shape(self, slot: str) -> tuple[int, ...]:
        """See `Site.shape`."""
        return tuple(self.matrix(slot).shape)

    def expert(self, slot: str, index: int) -> Tensor:
        """One matrix (rows, columns) of a stack as it multiplies."""
        return self.matrix(slot)[index]

    def parts(self, slot: str) -> Iterator[tuple[Tensor, WeightQuantizer]]:
        """See `Site.parts`."""
        own = self.quantizers()[slot].own
        assert isinstance(own, WeightQuantizer)
        yield self.matrix(slot), own

    def watch(self, slot: str, see: Callable[[Tensor], None]) -> Any:
        """See `Site.watch`."""
        return self.register_forward_pre_hook(lambda _, args: see(args[0]))

    def unreached(self) -> tuple[int, int]:
        """Of the parts that data chooses between (experts): those that no watched data reached, and all."""
        return 0, 0


def site_path(module: str, slot: str) -> str:
    """What rules call a weight."""
    return module if slot == "weight" else f"{module}.{slot}"


def sites(model: nn.Module, *roles: Role) -> list[Site]:
    """The quantized tensors of a model, in its order; of these roles, or of all."""
    return [site for site in _sites(model) if not roles or site.role in roles]


def _sites(model: nn.Module) -> Iterator[Site]:
    for path, module in model.named_modules():
        if not isinstance(module, Quantized):
            continue
        for slot, given in module.quantizers().items():
            if isinstance(given.own, WeightQuantizer):
                name, input = site_path(path, slot), given.input
                assert input is None or isinstance(input, InputQuantizer)
                yield Site(name, "weight", path, slot, module, given.own, input, given.fused)
                if input is not None:
                    yield Site(name, "input", path, slot, module, input)
            elif given.own is not None:
                role: Role = "key" if slot == "key" else "value"
                yield Site(path, role, path, slot, module, given.own)


def weights(model: nn.Module) -> dict[str, Site]:
    """The quantized weights of a model by path."""
    return {site.path: site for site in sites(model, "weight")}
