"""GPT-2's Conv1D: a linear layer whose weight is stored (columns, rows), transposed."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qat.folding import added_bias, given_back
from qat.quantizer import WeightQuantizer
from qat.sites import Quantized, Quantizers, Slot


class QatConv1D(Quantized):
    """A Conv1D whose weight, and optionally input, is fake-quantized along the dimension it sums over."""

    TRANSPOSED = True
    weight_quantizer: WeightQuantizer
    fused: tuple[str, ...] = ()

    def __init__(self, layer: Any, weight: WeightQuantizer, input: nn.Module | None) -> None:
        super().__init__()
        self.weight, self.bias, self.nf, self.nx = layer.weight, layer.bias, layer.nf, layer.nx
        self.weight_quantizer, self.input_quantizer = weight, input
        self.train(layer.training)

    def quantizers(self) -> dict[str, Quantizers]:
        """By slot."""
        return {"weight": Quantizers(self.weight_quantizer, self.input_quantizer, self.fused)}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., columns) -> (..., rows)."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        bias = added_bias(self.bias, self.weight_quantizer, self.input_quantizer)
        y = self.weight_quantizer.linear(x, self.matrix("weight"), bias)
        return given_back(y, self.weight_quantizer, self.input_quantizer)


class Conv1DAdapter:
    """See `qat.sites.Adapter`. The class is transformers', so it is known by its name and its sizes."""

    def takes(self, module: nn.Module) -> bool:
        """A Conv1D of transformers."""
        return type(module).__name__ in ("Conv1D", "QatConv1D") and hasattr(module, "nf") and hasattr(module, "nx")

    def slots(self, module: nn.Module) -> list[Slot]:
        """Its weight."""
        columns, rows = module.get_parameter("weight").shape
        return [Slot("weight", "weight", (rows, columns), transposed=True)]

    def attach(self, module: nn.Module, quantizers: Mapping[str, Quantizers]) -> nn.Module:
        """A `QatConv1D`."""
        given = quantizers["weight"]
        assert isinstance(given.own, WeightQuantizer)
        layer = QatConv1D(module, given.own, given.input)
        layer.fused = given.fused
        return layer


ADAPTER = Conv1DAdapter()
