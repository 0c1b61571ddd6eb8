"""The kinds of modules that can be quantized, one file each with an `ADAPTER`; a new kind is a new file here."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from qat.quantizer import Quantizer
from qat.sites import Adapter, Role, Slot, site_path


@cache
def _adapters() -> tuple[Adapter, ...]:
    names = sorted(module.name for module in iter_modules(__path__))
    return tuple(import_module(f"{__name__}.{name}").ADAPTER for name in names)


def adapter_for(module: nn.Module) -> Adapter | None:
    """Who knows modules of this kind, or None."""
    return next((adapter for adapter in _adapters() if adapter.takes(module)), None)


@dataclass(frozen=True)
class Candidate:
    """A tensor that a rule of a scheme has to speak of, or may (keys and values).

    Attributes:
        path, role: as in `Site`.
        module: path of the module that owns it.
        slot: its description; of a tensor that no adapter knows, the parameter's name and shape.
        adapter: who can quantize it; None where nobody can.
    """

    path: str
    role: Role
    module: str
    slot: Slot
    adapter: Adapter | None = field(default=None, compare=False)


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every weight of two or more dimensions, and every cache, in the model's order; shared modules under each path."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Quantizer):
            continue
        adapter = adapter_for(module)
        slots = {slot.name: slot for slot in adapter.slots(module)} if adapter is not None else {}
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and not name.endswith("bias"):  # experts have a bias each
                known = slots.pop(name, None)
                slot = known or Slot(name, "weight", tuple(parameter.shape))
                yield Candidate(site_path(path, name), "weight", path, slot, adapter if known else None)
        for slot in slots.values():
            own = site_path(path, slot.name) if slot.role == "weight" else path  # a weight that is held packed
            yield Candidate(own, slot.role, path, slot, adapter)


def unknown_kind(module: nn.Module) -> str:
    """What a module that no adapter takes is, in words."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolutions"
    return "this kind of module"
