"""The bias of a quantized layer as its engine adds it: static integer products on an NPU take a whole number.

Exports store the same number (`quant_bias`), so that what is trained is what is served.
"""

from torch import Tensor, nn

from qat.quantizer import InputQuantizer, WeightQuantizer
from qat.training.npu import NPU_RULES, folded_bias, folds_bias


def added_bias(bias: Tensor | None, weight: WeightQuantizer, input: nn.Module | None) -> Tensor | None:
    """What a layer adds in place of its bias (rows,), in its type; the bias itself where nothing is rounded now."""
    if bias is None or not isinstance(input, InputQuantizer) or not folds_bias(input.format):
        return bias
    if input.rule not in NPU_RULES:
        return bias
    if "dense" in (weight.mode, input.mode) or input.observer is not None:
        return bias
    static = input.static()
    assert static is not None
    return folded_bias(bias, weight.multiplier().flatten() * static[0]).to(bias.dtype)
