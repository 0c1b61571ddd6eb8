"""Stand-ins for `torch_npu` and `vllm`, and for nothing else: what an engine's own code imports of them before it runs
on a CPU. Whatever is asked of a stubbed module is a class that can be a base, a decorator or called, and computes
nothing; what has to compute is put in its place: `operators.py` and `vllm_parts.py`."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import torch

STUBBED = ("torch_npu", "vllm")


class _Meta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(name)

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __iter__(cls) -> Any:
        return iter(())


class Standin(metaclass=_Meta):
    """Takes any arguments, gives a stand-in for any attribute; called with a function or class, it gives that back."""

    def __init__(self, *given: Any, **named: Any) -> None:
        pass

    def __call__(self, *given: Any, **named: Any) -> Any:
        return given[0] if len(given) == 1 and callable(given[0]) and not named else Standin()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Standin()

    def __bool__(self) -> bool:
        return False

    def __class_getitem__(cls, item: Any) -> Any:
        return cls

    def __iter__(self) -> Any:
        return iter(())


def stand_in(name: str) -> Any:
    """A class of that name."""
    return _Meta(name, (Standin,), {})


class Stub(ModuleType):
    """A module that has everything."""

    __path__: Any = ()
    __all__: Any = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = stand_in(name)
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in STUBBED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install(operators: dict[str, Any], device: str, vllm: str) -> ModuleType:
    """Stub `torch_npu` and `vllm`; `operators` become functions of `torch_npu`. Returns that.

    `device` is A2, A3, _310P or A5: setup.py of vllm-ascend generates `_build_info.py` with it, which its source lacks;
    `vllm` is the version that it asks about.
    """
    sys.meta_path.insert(0, _Finder())
    built = ModuleType("vllm_ascend._build_info")
    vars(built)["__device_type__"] = device
    sys.modules[built.__name__] = built
    module: ModuleType = importlib.import_module("torch_npu")
    vars(torch)["npu"] = Stub("torch.npu")  # which importing torch_npu makes, as it does torch.ops.npu
    vars(torch.ops)["npu"] = Stub("torch.ops.npu")
    vars(importlib.import_module("vllm"))["__version__"] = vllm
    for name, operator in operators.items():
        setattr(module, name, operator)
    return module
