"""What FP16 models on an Ascend 310P ask of ranges: scales of static inputs that an operator there can multiply with.

It takes `deq_scale`, the product of the input's and the weight's scale, as a 64-bit integer that holds a float32
number, of which the hardware reads the upper 19 bits: sign, exponent and 10 of the mantissa (CANN's documents of
aclnnTransQuantParamV2: scale & 0xFFFFE000, cut off and not rounded). So a product of more than 11 significant bits is
another number when served. Weights' scales have 8 (BF16 numbers). Here an input's scale gets the 3 that are left,
always rounded up, so that nothing is clipped that was not. Then the cut changes nothing, whatever the weights' scales
learn, and training needs no second scale per row. It costs a step that is 10% larger on average and 25% at most; a
power of two would cost 44% and 100%.
"""

import torch
from torch import Tensor

from qat.errors import FormatError
from qat.numbers.format import Format
from qat.numbers.scale import BF16, F16, over

RULE = "ascend_310p"
READ_BITS = 11
"""Significant bits of a `deq_scale` that the hardware reads."""
SCALE_BITS = READ_BITS - BF16.significant_bits
"""Those left for the scale of a static input, beside the weight's."""
_SMALLEST = torch.finfo(torch.float16).tiny  # normal number, whose reciprocal FP16 holds, too


def held_range(range: Tensor, fmt: Format) -> Tensor:
    """The next wider range of a static input, float32, (scalar) or [2], whose scale has `SCALE_BITS` significant bits.

    Raises:
        FormatError: it is beyond what FP16 holds.
    """
    if not fmt.is_static:
        return range
    if bool((range.abs() > F16.largest).any()):
        raise FormatError(
            f"its range {range.tolist()} is beyond FP16, whose largest number is {F16.largest:.0f}: a model on this "
            "device cannot compute it; leave it out with `skip:`, or smooth it"
        )
    if not fmt.zero_point:
        return _rounded_up(over(range, fmt.element.max)) * fmt.element.max
    steps = 2**fmt.element.bits - 1
    low, high = range[:1].clamp_max(0.0), range[1:].clamp_min(0.0)
    scale = _rounded_up(over(high - low, steps))
    below = (-low / scale).nan_to_num().round().clamp(0, steps)  # whole steps on this side of zero
    return torch.cat([-below * scale, (steps - below) * scale])


def _rounded_up(scale: Tensor) -> Tensor:
    if bool(((scale > 0) & (scale < _SMALLEST)).any()):
        raise FormatError(
            f"its scale {float(scale):.3g} is below FP16's normal numbers ({_SMALLEST:.3g}), in which the engine "
            "holds it; use int8_token inputs"
        )
    significand, exponent = torch.frexp(scale)
    steps = 2.0**SCALE_BITS
    return torch.ldexp(torch.ceil(significand * steps) / steps, exponent)
