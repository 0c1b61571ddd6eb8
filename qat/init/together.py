"""An initialisation that several processes share, each of which holds a part of the model (`qat.sharded`).

The calibration text is divided by batches, what is summed over it is added up, and the weights of a block are divided
by their place: a process fits some and hands them to the others. All of them therefore do the same things in the same
order, and end with the same numbers. One process by itself asks nobody.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from qat.errors import ConfigError
from qat.init.step import Calibration
from qat.sharded import by_holder, edited, is_divided
from qat.sites import Site

T = TypeVar("T")


class Together:
    """The processes that hold a model.

    Attributes:
        rank, size: this one's place, and how many they are; 0 and 1 where the model is not divided.
    """

    def __init__(self, model: nn.Module) -> None:
        alone = not is_divided(model)
        self.rank, self.size = (0, 1) if alone else (distributed.get_rank(), distributed.get_world_size())

    def rows(self, batches: Sequence[T]) -> list[T]:
        """The batches that are this process's, as many as every other's.

        Raises:
            ConfigError: they cannot be dealt out evenly.
        """
        if len(batches) % self.size:
            raise ConfigError(
                f"{len(batches)} batches of calibration text cannot be divided among {self.size} processes; "
                f"give a multiple of {self.size}"
            )
        kind: Any = type(batches)  # which may show how far it is
        own: list[T] = kind(batches[self.rank :: self.size])
        return own

    def sum(self, *tensors: Tensor) -> None:
        """Add up tensors over processes, in place."""
        for tensor in tensors if self.size > 1 else ():
            distributed.all_reduce(tensor)

    def gather(self, value: T) -> list[T]:
        """Every process's value (small, and of any type), by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def total(self, counts: Counter[str]) -> Counter[str]:
        """Counts of all processes."""
        added: Counter[str] = Counter()
        for each in self.gather(counts):
            added.update(each)
        return added

    def owns(self, index: int) -> bool:
        """Whether the weight at this place in a list that all have is fitted by this process."""
        return index % self.size == self.rank

    @torch.no_grad()
    def spread(self, sites: Sequence[Site], places: Sequence[int] | None = None) -> None:
        """Weights and scales as their owners made them, in every process; `places` where they are not the list's."""
        for place, site in zip(places or range(len(sites)), sites if self.size > 1 else (), strict=False):
            quantizer = site.quantizer
            for tensor in (site.parameter, *quantizer.parameters(), *quantizer.buffers()):
                values = tensor.detach().contiguous()
                distributed.broadcast(values.view(-1).view(torch.uint8), place % self.size)
                if values.data_ptr() != tensor.data_ptr():
                    tensor.copy_(values)
                torch.autograd.graph.increment_version(tensor)  # a broadcast does not say that it writes


def opened_parts(calibration: Calibration) -> Iterator[dict[str, Site]]:
    """The sites of a calibration in parts, each of which has whole tensors while it is at hand, and keeps what is
    written there: all at once where the model is not divided, else by block."""
    parts = by_holder(calibration.model, list(calibration.sites.values()))
    divided = is_divided(calibration.model)
    named: dict[str, Any] = {members[0].path: (holder, members) for holder, members in parts if members}
    for _, (holder, members) in calibration.track(named) if divided else named.items():
        with edited(holder):
            yield {site.path: site for site in members}
