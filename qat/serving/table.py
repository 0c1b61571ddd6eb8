"""Embeddings as a server holds them: the packed weight of a linear layer, of which rows are looked up and dequantized.
A head that is tied to the table multiplies with that very layer, so that both are in memory once."""

import torch
from torch import Tensor, nn

from qat.serving import panels
from qat.serving.packed import PackedLinear, PackedWeight, unpack


def take_rows(weight: PackedWeight, numbers: Tensor) -> PackedWeight:
    """Rows of a weight, in either order of its words, as a packed weight that has no others.

    Args:
        weight: see `qat.serving.packed.pack`.
        numbers: (n,) integers, of rows of the weight.
    """
    words, scales, zeros = weight.words, weight.scales, weight.zeros
    scales = _of_panels(scales, numbers) if panels.in_panels(scales) else scales.index_select(1, numbers)
    words = _of_panels(words, numbers) if panels.in_panels(words) else words.index_select(0, numbers)
    zeros = None if zeros is None else zeros.index_select(1, numbers)
    return PackedWeight(weight.format, weight.columns, words, scales, zeros, weight.global_scale)


def _of_panels(tensor: Tensor, numbers: Tensor) -> Tensor:
    """(panels, tiles, rows of a panel, width) -> (n, tiles, 1, width): panels of a row each."""
    return tensor[numbers // panels.ROWS, :, numbers % panels.ROWS].unsqueeze(2)


class PackedEmbedding(nn.Module):
    """An embedding for inference whose table stays packed; rows are dequantized to their BF16 values, in the module's
    floating type. `matrix` is its weight, and may be the head of the model as well.

    Args:
        matrix: the packed table (num_embeddings, embedding_dim); a bias of it is the head's.
        dtype: of what it returns.
    """

    like: Tensor  # nothing, in the type that `model.half()` and the like give the module

    def __init__(self, matrix: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = matrix
        self.num_embeddings, self.embedding_dim = matrix.out_features, matrix.in_features
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=matrix.words.device), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """input: token ids, any shape -> (..., embedding_dim)."""
        numbers = input.reshape(-1)
        if not numbers.numel():
            return self.like.new_empty(*input.shape, self.embedding_dim)
        values = unpack(take_rows(self.matrix.packed, numbers)).dequantize(torch.bfloat16)
        return values.view(*input.shape, self.embedding_dim).to(self.like.dtype)

    def extra_repr(self) -> str:
        """Shape and format, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.matrix.format}"
