"""A layer of an FP8 checkpoint as vllm-ascend 0.30 runs it. No operator of an NPU takes scales per block of 128 x 128,
so when it has loaded the tensors it multiplies codes with scales, in float32, and rounds to BF16. On A2 and A3 that is
the weight, and inputs are not quantized. On 950 `npu_dynamic_mx_quant` makes MXFP8 of it, and of inputs.

Simulated like `qat.checkpoints.layouts.ascend.simulate`; inputs and outputs are BF16.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qat.checkpoints.layouts.ascend.simulate import SimulatedLinear
from qat.checkpoints.layouts.ascend.types import TYPES
from qat.checkpoints.layouts.kinds import mx
from qat.checkpoints.layouts.npu import A5
from qat.numbers.catalog import CATALOG, E4M3
from qat.numbers.format import Format
from qat.serving import npu

_MODEL = torch.bfloat16
_MX = next(fmt for fmt in CATALOG.values() if mx(fmt, E4M3))
_GROUP = _MX.block[1]
_TYPE = next(kind for kind in TYPES if kind.applies(_MX, _MX))


class DenseLinear(nn.Module):
    """A product in BF16, summed in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(_MODEL).float())
        self.register_buffer("added", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) of any float type; the same type comes out."""
        bias = self.added.float() if isinstance(self.added, Tensor) else None
        y = nn.functional.linear(x.to(_MODEL).float(), self.get_buffer("weight"), bias)
        return y.to(_MODEL).to(x.dtype)


def rounds_again(device: str, columns: int) -> Format | None:
    """The format that weights and inputs of so many columns are rounded to on a device, None where they are dense."""
    return _MX if device in A5 and columns % _GROUP == 0 else None


def simulated(
    tensors: Mapping[str, Tensor], block: Sequence[int], device: str, bias: Tensor | None = None
) -> SimulatedLinear | DenseLinear:
    """One layer on a device.

    Args:
        tensors: `weight` (rows, columns) and `weight_scale_inv`, one for each block of `block` rows and columns.
    """
    rows, columns = tensors["weight"].shape
    scale = tensors["weight_scale_inv"].float()
    for dim, size in enumerate(block):
        scale = scale.repeat_interleave(size, dim=dim)
    weight = (tensors["weight"].float() * scale[:rows, :columns]).to(_MODEL)
    if rounds_again(device, columns) is None:
        return DenseLinear(weight, bias)
    codes, pairs = npu.dynamic_mx_quant(weight, E4M3.bits)
    again = {"weight": codes, "weight_scale": pairs.flatten(-2)[:, : columns // _GROUP]}
    return SimulatedLinear(_TYPE, again, bias)
