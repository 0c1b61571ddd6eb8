"""The kinds of modules that can be quantized, one file each with an `ADAPTER`; a new kind is a new file here."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from qat.sites import Adapter


@cache
def _adapters() -> tuple[Adapter, ...]:
    names = sorted(module.name for module in iter_modules(__path__))
    return tuple(import_module(f"{__name__}.{name}").ADAPTER for name in names)


def adapter_for(module: nn.Module) -> Adapter | None:
    """Who knows modules of this kind, or None."""
    return next((adapter for adapter in _adapters() if adapter.takes(module)), None)


def unknown_kind(module: nn.Module) -> str:
    """What a module that no adapter takes is, in words."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolutions"
    return "this kind of module"
