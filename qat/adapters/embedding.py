"""Embeddings: the table."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.quantizer import WeightQuantizer
from qat.sites import Quantized, Quantizers, Slot


class QatEmbedding(Quantized, nn.Embedding):
    """An embedding whose table is fake-quantized."""

    IS_TABLE = True
    weight_quantizer: WeightQuantizer
    fused: tuple[str, ...] = ()

    @classmethod
    def wrap(cls, embedding: nn.Embedding, weight: WeightQuantizer) -> "QatEmbedding":
        """A QatEmbedding that takes over the table of `embedding`."""
        with torch.device("meta"):
            layer = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        layer.weight, layer.weight_quantizer = embedding.weight, weight
        layer.train(embedding.training)
        return layer

    def quantizers(self) -> dict[str, Quantizers]:
        """By slot."""
        return {"weight": Quantizers(self.weight_quantizer, None, self.fused)}

    def forward(self, input: Tensor) -> Tensor:
        """input: token ids, any shape -> (..., embedding_dim)."""
        return functional.embedding(input, self.weight_quantizer(self.weight), self.padding_idx)


class EmbeddingAdapter:
    """See `qat.sites.Adapter`."""

    def takes(self, module: nn.Module) -> bool:
        """A plain embedding."""
        return type(module) in (nn.Embedding, QatEmbedding)

    def slots(self, module: nn.Module) -> list[Slot]:
        """Its table."""
        shape = tuple(module.get_parameter("weight").shape)
        return [Slot("weight", "weight", shape, no_input="an embedding: its input is token ids")]

    def attach(self, module: nn.Module, quantizers: Mapping[str, Quantizers]) -> nn.Module:
        """A `QatEmbedding`."""
        given = quantizers["weight"]
        assert isinstance(module, nn.Embedding) and isinstance(given.own, WeightQuantizer)
        layer = QatEmbedding.wrap(module, given.own)
        layer.fused = given.fused
        return layer


ADAPTER = EmbeddingAdapter()
