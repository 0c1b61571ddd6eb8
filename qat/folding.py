"""What an NPU's product makes of a layer's bias and of its result: static integer products take the bias as a whole
number, which exports store (`quant_bias`), and every product gives numbers of the model's type.
"""

from torch import Tensor, nn

from qat.quantizer import InputQuantizer, WeightQuantizer
from qat.training.npu import NPU_RULES, folded_bias, folds_bias, held


def added_bias(bias: Tensor | None, weight: WeightQuantizer, input: nn.Module | None) -> Tensor | None:
    """What a layer adds in place of its bias (rows,), in its type; the bias itself where nothing is rounded now."""
    if bias is None or not isinstance(input, InputQuantizer) or not folds_bias(input.format):
        return bias
    if not _multiplies(weight, input):
        return bias
    static = input.static()
    assert static is not None
    return folded_bias(bias, weight.multiplier().flatten() * static[0]).to(bias.dtype)


def given_back(y: Tensor, weight: WeightQuantizer, input: nn.Module | None) -> Tensor:
    """The result of a layer's product (..., rows) as its engine passes it on, in y's own type."""
    return held(y, input.rule) if isinstance(input, InputQuantizer) and _multiplies(weight, input) else y


def _multiplies(weight: WeightQuantizer, input: InputQuantizer) -> bool:
    """Whether the layer computes an NPU's product now: it does not while it is dense or calibrated."""
    return input.rule in NPU_RULES and "dense" not in (weight.mode, input.mode) and input.observer is None
