"""Packed embeddings in a model of transformers: looked up row by row, and shared with heads that are tied to them."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import nn

from qat.errors import CheckpointError, UnsupportedError
from qat.serving.packed import PackedLinear
from qat.serving.table import PackedEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_table(layer: nn.Module, path: str) -> bool:
    """Whether a layer that is stored packed is an embedding.

    Raises:
        UnsupportedError: one that does more than look rows up.
    """
    if isinstance(layer, nn.Embedding) and type(layer) is not nn.Embedding:
        raise UnsupportedError(
            f"{path} is a {type(layer).__name__}, which does more than look rows up, so it cannot be served packed; "
            "qat.checkpoints.exported.load_exported reads it densely"
        )
    return isinstance(layer, nn.Embedding)


def set_heads_aside(model: "PreTrainedModel", packed: Collection[str]) -> dict[str, str]:
    """Heads tied to packed tables, as the paths of these by their own: transformers must neither look for their weights
    nor tie them. `packed` are paths of the layers that are stored packed.

    Raises:
        CheckpointError: the head is stored as well.
        UnsupportedError: a head that is more than a product.
    """
    heads: dict[str, str] = {}
    tied = model.all_tied_weights_keys
    for target, source in list(tied.items()):
        head, table = target.removesuffix(".weight"), source.removesuffix(".weight")
        if table not in packed:
            continue
        if head in packed:
            raise CheckpointError(f"config.json ties {head} to {table}, but both are stored, and packed")
        layer = model.get_submodule(head)
        if type(layer) is not nn.Linear or getattr(layer, "bias", None) is not None:
            raise UnsupportedError(
                f"{head} is tied to a packed table, but is more than a product with it; "
                "qat.checkpoints.exported.load_exported reads it densely"
            )
        del tied[target]
        model.set_submodule(head, nn.Identity())
        heads[head] = table
    return heads


def put_table(
    model: "PreTrainedModel", path: str, matrix: nn.Module, heads: dict[str, str], dtype: torch.dtype
) -> None:
    """Look rows of a matrix up at `path`, and multiply with it where heads are tied to that.

    Args:
        model: as it will be served.
        path: of the embedding.
        matrix: a `PackedLinear`, or an `nn.Linear` where the format cannot be packed.
        heads: see `set_heads_aside`.
        dtype: of the activations.
    """
    if isinstance(matrix, PackedLinear):
        model.set_submodule(path, PackedEmbedding(matrix, dtype))
    else:
        assert isinstance(matrix, nn.Linear)
        with torch.device("meta"):
            dense = nn.Embedding(matrix.out_features, matrix.in_features)
        dense.weight = matrix.weight
        model.set_submodule(path, dense)
    for head in (head for head, table in heads.items() if table == path):
        model.set_submodule(head, matrix)
