"""Linear layers: the weight, and what it is multiplied with."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat.folding import added_bias, given_back
from qat.quantizer import InputQuantizer, WeightQuantizer
from qat.sites import Quantized, Quantizers, Slot
from qat.training.heads import Product
from qat.training.recomputed import recomputed_linear


class QatLinear(Quantized, nn.Linear):
    """A linear layer whose weight, and optionally input, is fake-quantized. Parameter names stay those of nn.Linear.

    `fused` are the paths of the set that is trained as one, this layer's among them. `lora` is a trained update: of the
    weight before rounding, or of what the layer gives, by its input before rounding. `held` is the weight itself where
    it is held packed; there is no parameter then.
    """

    weight_quantizer: WeightQuantizer
    input_quantizer: InputQuantizer | None
    fused: tuple[str, ...] = ()
    lora: Any  # a LowRank, what stands for one, or None
    held: Any  # a `qat.serving.held.HeldWeight`, or None

    @classmethod
    def wrap(cls, linear: nn.Linear, weight: WeightQuantizer, input: InputQuantizer | None) -> "QatLinear":
        """A QatLinear that takes over the parameters of `linear`."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.weight_quantizer, layer.input_quantizer = weight, input
        layer.lora = layer.held = None
        layer.train(linear.training)
        return layer

    def quantizers(self) -> dict[str, Quantizers]:
        """By slot."""
        return {"weight": Quantizers(self.weight_quantizer, self.input_quantizer, self.fused)}

    def matrix(self, slot: str) -> Tensor:
        """The weight with its update; not a view of the parameter where there is one."""
        return self._matrix()

    def shape(self, slot: str) -> tuple[int, ...]:
        """(rows, columns)."""
        return self.out_features, self.in_features

    def _matrix(self, drawn: Tensor | None = None) -> Tensor:
        weight: Tensor = self.weight if self.held is None else self.held.dequantize()
        return self.lora.merged(weight, drawn) if self._merges else weight

    @property
    def _merges(self) -> bool:
        return self.lora is not None and self.lora.merges

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> (..., out_features)."""
        if self.lora is None or self._merges:
            return self._product(input)
        return self._product(input) + self.lora.beside(input)

    def _product(self, input: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        if self.held is not None and self.weight_quantizer.mode == "quantized" and torch.is_grad_enabled():
            y = self._recomputed(input)
        else:
            y = self.weight_quantizer.linear(input, self.matrix("weight"), self._added())
        return given_back(y, self.weight_quantizer, self.input_quantizer)

    def _recomputed(self, input: Tensor) -> Tensor:
        """The same, the weight made from its codes again in the backward pass."""
        drawn = self.lora.drawn() if self._merges else None
        learned = [*(self.lora.parameters() if self._merges else ()), *self.weight_quantizer.parameters()]
        return recomputed_linear(input, lambda: self.weight_quantizer(self._matrix(drawn)), self._added(), learned)

    def _added(self) -> Tensor | None:
        return added_bias(self.bias, self.weight_quantizer, self.input_quantizer)

    def as_product(self) -> Product:
        """See `qat.training.heads.as_product`."""
        return Product(self.weight_quantizer(self.matrix("weight")), self._added(), self.input_quantizer)


class LinearAdapter:
    """See `qat.sites.Adapter`. Subclasses of nn.Linear may do anything, so they are not taken."""

    def takes(self, module: nn.Module) -> bool:
        """A plain linear layer."""
        return type(module) in (nn.Linear, QatLinear)

    def slots(self, module: nn.Module) -> list[Slot]:
        """Its weight."""
        assert isinstance(module, nn.Linear)
        return [Slot("weight", "weight", (module.out_features, module.in_features), low_rank=True)]

    def attach(self, module: nn.Module, quantizers: Mapping[str, Quantizers]) -> nn.Module:
        """A `QatLinear`."""
        given = quantizers["weight"]
        assert isinstance(module, nn.Linear) and isinstance(given.own, WeightQuantizer)
        assert given.input is None or isinstance(given.input, InputQuantizer)
        layer = QatLinear.wrap(module, given.own, given.input)
        layer.fused = given.fused
        return layer


ADAPTER = LinearAdapter()
