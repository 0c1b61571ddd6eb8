"""Finished blocks of a walk (`qat.init.blocks`), kept so that one that was interrupted goes on to the same bits.

A block is known by everything that decides what becomes of it: the settings of the steps, what enters the first block
in both models, and the weights of all blocks up to it as they were. Whoever walks again finds what was made of exactly
that, or nothing; so no other text, model or setting ever meets a block that is not its own.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from qat.init.step import InitStep
from qat.init.together import Together
from qat.sharded import is_divided


class Store(Protocol):
    """Where blocks are kept: whole, or not at all."""

    def read(self, name: str, key: str) -> tuple[dict[str, Tensor], list[dict[str, int]]] | None:
        """Tensors and sums that were written under this name, if it was with this key."""

    def write(self, name: str, key: str, tensors: dict[str, Tensor], sums: list[dict[str, int]]) -> None:
        """Keep them, instead of what has the name."""


class Kept:
    """One walk's side of a store.

    Args:
        store: None keeps nothing.
        steps: of the walk.
        entering: hidden states that enter the first block.
        together: the processes that walk; each has states of its own, and finds a block only if all do.
    """

    def __init__(
        self, store: Store | None, steps: Sequence[InitStep], entering: Iterable[Tensor], together: Together
    ) -> None:
        self.store, self.together = store, together
        self.key = ""
        if store is not None:
            self.key = _digest([step.model_dump_json() for step in steps], entering)
            if together.size > 1:
                self.key = _digest(together.gather(self.key), ())

    def restore(self, name: str, module: nn.Module) -> list[Counter[str]] | None:
        """Put what was made of a block into it; returns each step's sums, or None where it is still to be done. Called
        for every block in order, before anything changes it."""
        if self.store is None:
            return None
        tensors = _tensors(module)
        self.key = _digest([self.key, name, *tensors], tensors.values())
        found = self.store.read(name, self.key)
        if not all(self.together.gather(found is not None)) or found is None:
            return None
        _put(module, found[0])
        return [Counter(sums) for sums in found[1]]

    def keep(self, name: str, module: nn.Module, sums: Sequence[Counter[str]]) -> None:
        """Write a block that is done."""
        if self.store is not None:
            self.store.write(name, self.key, _tensors(module), [dict(each) for each in sums])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """By name, a shared one once; on the CPU."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    if is_divided(module):  # and whole: its state_dict would divide it, and what numpy saw could not be given back
        named = {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}
    else:
        named = module.state_dict(keep_vars=True)
    for name, tensor in named.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach().cpu().contiguous()
    return found


def _put(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Write parameters in place; buffers may not exist yet, or have another shape."""
    parameters = dict(module.named_parameters())
    device = next(iter(parameters.values())).device
    for name, tensor in tensors.items():
        if name in parameters:
            parameters[name].data.copy_(tensor)
        else:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, tensor.to(device))


def _digest(words: Iterable[str], tensors: Iterable[Tensor]) -> str:
    state = hashlib.sha256("\n".join(words).encode())
    for tensor in tensors:
        state.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
