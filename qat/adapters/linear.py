"""Linear layers: the weight, and what it is multiplied with."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qat.quantizer import InputQuantizer, WeightQuantizer
from qat.sites import Quantized, Quantizers, Slot
from qat.training.heads import Product
from qat.training.low_rank import LowRank


class QatLinear(Quantized, nn.Linear):
    """A linear layer whose weight, and optionally input, is fake-quantized. Parameter names stay those of nn.Linear.

    `fused` are the paths of the set that is trained as one, this layer's among them; `lora` is a trained update of the
    weight, added before rounding.
    """

    weight_quantizer: WeightQuantizer
    input_quantizer: InputQuantizer | None
    fused: tuple[str, ...] = ()
    lora: LowRank | None

    @classmethod
    def wrap(cls, linear: nn.Linear, weight: WeightQuantizer, input: InputQuantizer | None) -> "QatLinear":
        """A QatLinear that takes over the parameters of `linear`."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.weight_quantizer, layer.input_quantizer = weight, input
        layer.lora = None
        layer.train(linear.training)
        return layer

    def quantizers(self) -> dict[str, Quantizers]:
        """By slot."""
        return {"weight": Quantizers(self.weight_quantizer, self.input_quantizer, self.fused)}

    def matrix(self, slot: str) -> Tensor:
        """The weight with its update; not a view of the parameter where there is one."""
        return self.weight if self.lora is None else self.lora.merged(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> (..., out_features)."""
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        return self.weight_quantizer.linear(input, self.matrix("weight"), self.bias)

    def as_product(self) -> Product:
        """See `qat.training.heads.as_product`."""
        return Product(self.weight_quantizer(self.matrix("weight")), self.bias, self.input_quantizer)


class LinearAdapter:
    """See `qat.sites.Adapter`. Subclasses of nn.Linear may do anything, so they are not taken."""

    def takes(self, module: nn.Module) -> bool:
        """A plain linear layer."""
        return type(module) in (nn.Linear, QatLinear)

    def slots(self, module: nn.Module) -> list[Slot]:
        """Its weight."""
        return [Slot("weight", "weight", tuple(module.get_parameter("weight").shape), low_rank=True)]

    def attach(self, module: nn.Module, quantizers: Mapping[str, Quantizers]) -> nn.Module:
        """A `QatLinear`."""
        given = quantizers["weight"]
        assert isinstance(module, nn.Linear) and isinstance(given.own, WeightQuantizer)
        assert given.input is None or isinstance(given.input, InputQuantizer)
        layer = QatLinear.wrap(module, given.own, given.input)
        layer.fused = given.fused
        return layer


ADAPTER = LinearAdapter()
