"""Finished parts of an initialisation, kept so that one that was interrupted goes on to the same bits: blocks of a walk
(`qat.init.blocks`), and before it the model as the last step left that changes all of it.

A block is known by everything that decides what becomes of it: the settings of the steps, what enters the first block
in both models, and the quantizers and weights of all blocks up to it as they were; a model by the settings of the
steps, the text, and its quantizers and tensors before them. Whoever comes again finds what was made of exactly that, or
nothing; so no other text, model or setting ever meets a part that is not its own.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qat.init.step import InitStep
from qat.sharded import is_divided


class Store(Protocol):
    """Where they are kept: whole, or not at all."""

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
    """

    def __init__(self, store: Store | None, steps: Sequence[InitStep], entering: Iterable[Tensor]) -> None:
        self.store = store
        self.key = ""
        if store is not None:
            self.key = _digest([step.model_dump_json() for step in steps], entering)

    def restore(self, name: str, module: nn.Module) -> list[Counter[str]] | None:
        """Put what was made of a block into it; returns each step's sums, or None where it is still to be done. Called
        for every block in order, before anything changes it."""
        if self.store is None:
            return None
        tensors = _tensors(module)
        self.key = _digest([self.key, name, repr(module), *tensors], tensors.values())
        found = self.store.read(name, self.key)
        if found is None:
            return None
        _put(module, found[0])
        return [Counter(sums) for sums in found[1]]

    def keep(self, name: str, module: nn.Module, sums: Sequence[Counter[str]]) -> None:
        """Write a block that is done."""
        if self.store is not None:
            self.store.write(name, self.key, _tensors(module), [dict(each) for each in sums])


class KeptModel:
    """What the first steps make of a whole model; each that is finished replaces the one before.

    Args:
        store: None keeps nothing.
        steps: the first ones of an initialisation.
        model: before any of them.
        text: that they read.
    """

    NAME = "model"

    def __init__(
        self, store: Store | None, steps: Sequence[InitStep], model: nn.Module, text: Sequence[Mapping[str, Any]]
    ) -> None:
        self.steps, self.model = steps, model
        self.store = store if any(step.WHOLE_MODEL for step in steps) and not is_divided(model) else None
        self.key = ""
        if self.store is not None:
            tensors = _tensors(model)
            read = [value for batch in text for value in batch.values() if isinstance(value, Tensor)]
            device = next(model.parameters()).device.type
            cast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
            self.key = _digest([cast, repr(model), *tensors], [*tensors.values(), *read])

    def restore(self) -> list[str | None]:
        """Put into the model what most of the steps made of it; their sentences, one for each step that is done."""
        for count in range(len(self.steps), 0, -1):
            if self.store is None or not self.steps[count - 1].WHOLE_MODEL:
                continue
            if found := self.store.read(self.NAME, self._after(count)):
                _put(self.model, found[0])
                return [next(iter(sentence), None) for sentence in found[1]]
        return []

    def keep(self, sentences: Sequence[str | None]) -> None:
        """Write the model after as many steps as there are sentences, if the last of them changes all of it."""
        if self.store is not None and self.steps[len(sentences) - 1].WHOLE_MODEL:
            said = [{} if sentence is None else {sentence: 1} for sentence in sentences]
            self.store.write(self.NAME, self._after(len(sentences)), _tensors(self.model), said)

    def _after(self, count: int) -> str:
        return _digest([self.key, *(step.model_dump_json() for step in self.steps[:count])], ())


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """By name, a shared one once; on the CPU."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
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
