"""The matrices that a checkpoint stores, by the sites of a model: a linear layer is one, a stack of experts many, or
one stack where the file keeps it as the model does."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qat.checkpoints.names import StoredNames
from qat.families import stacks
from qat.numbers.numerics import QTensor
from qat.quantizer import WeightQuantizer
from qat.sites import Site

PART = 1 << 20  # weights quantized at a time: what that takes is some forty bytes for each


@dataclass(frozen=True, eq=False)
class Matrix:
    """One quantized matrix (rows, columns), or whole stack of them (experts, rows, columns), of a checkpoint.

    Attributes:
        site: the weight that holds it.
        name: of the dense tensor in the checkpoint.
        rows: which rows of a stack, its matrices one below the other; None for all of the site.
        transposed: whether that tensor is stored (..., columns, rows).
    """

    site: Site
    name: str
    rows: slice | None = None
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """The trained weight behind the codes."""
        site, rows = self.site, self.rows
        if rows is None or len(site.shape) == 2:
            return site.weight if rows is None else site.weight[rows]
        expert, first = divmod(rows.start, site.shape[1])
        return site.owner.expert(site.slot, expert)[first : first + rows.stop - rows.start]

    @cached_property
    def quantizer(self) -> WeightQuantizer:
        """With the scales of this matrix only."""
        own: WeightQuantizer = self.site.quantizer
        return own if self.rows is None else own.of_rows(self.rows)

    @property
    def group(self) -> tuple[str, ...]:
        """What it was trained as one with: the fused set of a layer, or the rows of one expert in its stack."""
        if self.rows is None:
            return self.site.fused or (self.site.path,)
        return self.site.path, str(self.rows.start // self.site.shape[1])

    @property
    def input(self) -> Any:
        """The quantizer of what is multiplied with it, or None."""
        return self.site.input

    @property
    def format(self) -> Any:
        """The Format of the codes."""
        return self.site.format

    @torch.no_grad()
    def value(self) -> Tensor:
        """As the forward pass multiplies with it."""
        value: Tensor = self.quantizer(self.weight)
        return value

    def quantize(self) -> QTensor:
        """Codes and stored scales."""
        return self.quantizer.quantize(self.weight)

    def parts(self) -> Iterator["Matrix"]:
        """The same in pieces, in order: whole blocks of rows of one matrix, about `PART` weights each."""
        *stack, rows, columns = self.weight.shape
        high = self.format.block[0] or 1
        step = max(PART // columns // high, 1) * high
        begin = 0 if self.rows is None else self.rows.start
        for top in range(begin, begin + math.prod(stack) * rows, rows):
            for start in range(top, top + rows, step):
                yield replace(self, rows=slice(start, min(start + step, top + rows)))


def stored_matrices(sites: list[Site], names: StoredNames) -> tuple[dict[str, Matrix], list[str]]:
    """By checkpoint path (without `.weight`), and the paths of sites that the file has no such names for."""
    whole = {place: name for name, place in names.origins.items()}
    found: list[Matrix] = []
    nameless = []
    for site in sites:
        place = f"{site.module}.{site.slot}"
        parts = {name: rows for name, (owner, rows) in names.rows.items() if owner == place}
        if place in whole and (len(site.shape) > 2 or whole[place].endswith(".weight")):
            found.append(Matrix(site, whole[place], transposed=site.owner.TRANSPOSED))
        elif parts and all(name.endswith(".weight") for name in parts):
            found += [Matrix(site, name, rows) for name, rows in parts.items()]
        else:
            nameless.append(site.path)
    return {matrix.name.removesuffix(".weight"): matrix for matrix in found}, nameless


def dense_parts(model: nn.Module, names: StoredNames, quantized: Collection[str]) -> bool:
    """Whether the model has stacks, or other tensors that transformers puts together, that stay dense.

    Args:
        quantized: names of the dense tensors of quantized matrices.
    """
    of_stacks = {names.rows[name][0] for name in quantized if name in names.rows}
    return bool(names.parts - set(quantized) or set(stacks(model)) - of_stacks)
