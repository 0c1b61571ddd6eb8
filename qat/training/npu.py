"""How an Ascend NPU rounds inputs, as CANN documents the operators that vllm-ascend (0.23 to 0.30) calls; no NPU was
asked.

`npu_quantize` (static integers) multiplies with the reciprocal of the scale, which vllm-ascend computes in the model's
type (BF16; FP16 on a 310P), adds the offset and then rounds: the code is not always that of a division.
`npu_dynamic_mx_quant` takes the exponent of a block's maximum (the floor rule of OCP MX v1.0, whatever weights use),
saturates, and rounds 4-bit elements half away from zero (round_mode "round") and 8-bit ones half to even ("rint"). Of
experts it rounds both half to even, because vllm-ascend leaves the mode to the operator there.
`npu_dynamic_quant` (integers per token) divides by amax over the largest code, which is what every engine does. A
product of static inputs takes its bias as int32, in units of the scale that the sum is multiplied with. Products take
and give numbers of the model's type, whose sums are rounded once, and multiply integers before any scale. Cached keys
and values with a scale per channel (C8) are rounded in BF16 before they are written, and are BF16 numbers when read.
"""

import torch
from torch import Tensor

from qat.errors import UnsupportedError
from qat.numbers.catalog import E2M1, E4M3, INT8
from qat.numbers.element import Element
from qat.numbers.format import Format
from qat.numbers.numerics import block_amax, from_blocks, per_block, to_blocks
from qat.numbers.scale import E8M0, F32
from qat.training.half import RULE as HALF_RULE

NPU_RULES = {"ascend": torch.bfloat16, HALF_RULE: torch.float16}
"""The rules of NPUs, and the type of the models that they are for."""


def held(x: Tensor, rule: str) -> Tensor:
    """x as the operators of products take it and give it back, in numbers of the model's type, whatever type x itself
    has. The gradient passes unchanged."""
    if x.dtype == NPU_RULES[rule]:
        return x
    rounded = x.detach().to(NPU_RULES[rule]).to(x.dtype)
    return rounded + (x - x.detach()) if x.requires_grad else rounded  # an exact zero that carries the gradient


def multiplies_codes(weight: Format, input: Format) -> bool:
    """Whether a product takes the codes of integers and scales their sums: its weight is rounded to no other type."""
    return all(fmt.is_single and fmt.element.is_integer for fmt in (weight, input))


def is_dynamic_integer(fmt: Format) -> bool:
    """Whether `npu_dynamic_quant` makes this format: 4- or 8-bit integers with a scale per token."""
    integer = fmt.is_single and fmt.element.is_integer and not fmt.zero_point
    return integer and fmt.block == (1, 0) and fmt.scale is F32 and fmt.element.bits in (4, 8)


def has_operator(fmt: Format) -> bool:
    """Whether some operator makes this format."""
    integer = fmt.is_single and fmt.element.is_integer
    return is_dynamic_integer(fmt) or (fmt.is_static and integer) or _is_mx(fmt)


def fake_quantized(
    x: Tensor, fmt: Format, static: Tensor | None, model: torch.dtype = torch.bfloat16, experts: bool = False
) -> tuple[Tensor, Tensor]:
    """x (..., columns) on the grid of `fmt` as float32, and where it was not clipped.

    Args:
        static: as `qat.training.activations.static_part` returns it.
        model: the type that the engine computes a reciprocal in.
        experts: whether experts read x.

    Raises:
        UnsupportedError: no operator of the NPU makes this format.
    """
    if fmt.is_static and fmt.is_single and fmt.element.is_integer:
        assert static is not None
        codes, inside = static_codes(x, static, model)
        return (codes - offset_of(static)) * static[:1], inside
    if fmt.is_columnwise and fmt.is_single and fmt.element == INT8 and not fmt.zero_point:
        assert static is not None
        codes, inside = column_codes(x, static)
        return (codes * static).to(torch.bfloat16).to(torch.float32), inside
    if _is_mx(fmt):
        return _mx(x, fmt, experts)
    raise UnsupportedError(missing(fmt))


def missing(fmt: Format) -> str:
    """What to say of a format that no operator makes."""
    return (
        f"activation_rule: ascend has no operator for {fmt.name} inputs; it has int8_token, int4_token, int8_tensor, "
        "int8_tensor_asym, mxfp8 and mxfp4. Leave activation_rule and `engine` out, or choose one of those"
    )


def _is_mx(fmt: Format) -> bool:
    return fmt.is_single and fmt.element in (E2M1, E4M3) and fmt.scale is E8M0 and bool(fmt.group)


def folds_bias(fmt: Format) -> bool:
    """Whether layers with such inputs add their bias as a whole number, before the product is scaled (`quant_bias`)."""
    return fmt.is_static and fmt.is_single and fmt.element.is_integer and not fmt.prompt


def folded_bias(bias: Tensor, deq_scale: Tensor) -> Tensor:
    """What an engine adds in place of `bias` (rows,): the nearest int32 multiple of `deq_scale` (rows,), the product of
    the weight's and the input's scale, as float32. The gradient passes unchanged."""
    value = bias_codes(bias.detach(), deq_scale) * deq_scale.detach()
    return value + (bias - bias.detach()) if bias.requires_grad else value


def bias_codes(bias: Tensor, deq_scale: Tensor) -> Tensor:
    """`bias` in units of `deq_scale`: whole numbers, as float32, within int32."""
    limit = 2.0**31 - 2.0**7  # the largest float32 number that is an int32
    return (bias.to(torch.float32) / deq_scale.detach()).round().clamp(-limit, limit)


def in_half(fmt: Format) -> bool:
    """Whether products of FP16 models on a 310P take inputs of this format: INT8 per token, or with one scale."""
    return fmt.is_single and fmt.element == INT8 and (is_dynamic_integer(fmt) or folds_bias(fmt))


def offset_of(static: Tensor) -> Tensor:
    """The zero point, float32 [1]; 0 of a symmetric format."""
    return static[1:] if static.numel() > 1 else torch.zeros_like(static)


def static_codes(x: Tensor, static: Tensor, model: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """int8 codes, as float32, and where they were not clipped: round(x / scale + offset)."""
    reciprocal = static[:1].to(model).reciprocal().to(torch.float32)
    wide = (x.to(torch.float32) * reciprocal + offset_of(static)).round_()
    low, high = torch.iinfo(torch.int8).min, torch.iinfo(torch.int8).max
    return wide.clamp(low, high), (wide >= low) & (wide <= high)


def column_codes(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of x (..., columns) under scales (columns,), as float32, and where they were not clipped. vllm-ascend
    computes them in torch, in the model's BF16: the reciprocal, the product with it, and only then the whole number."""
    reciprocal = scale.to(torch.bfloat16).reciprocal().to(torch.float32)
    product = (x.to(torch.bfloat16).to(torch.float32) * reciprocal).to(torch.bfloat16)
    wide = product.to(torch.float32).round_()
    low, high = torch.iinfo(torch.int8).min, torch.iinfo(torch.int8).max
    return wide.clamp(low, high), (wide >= low) & (wide <= high)


def mx_scales(blocked: Tensor, fmt: Format) -> Tensor:
    """Stored scales (block rows, block columns) of an MX input."""
    return fmt.scale.from_amax(block_amax(blocked), fmt.element, "floor")


def mx_round(x: Tensor, element: Element, experts: bool = False) -> Tensor:
    """Float32 numbers in units of their scale, rounded to the element as its operator does, saturating."""
    if experts or element.bits == E4M3.bits:
        return element.round(x)
    grid = torch.tensor([value for value in element.grid if value >= 0], device=x.device)
    nearest = grid[torch.bucketize(x.abs(), (grid[1:] + grid[:-1]) / 2, right=True)]
    return torch.where(torch.isnan(x), x, nearest.copysign(x))


def _mx(x: Tensor, fmt: Format, experts: bool) -> tuple[Tensor, Tensor]:
    blocked = to_blocks(x.to(torch.float32), fmt)
    scale = per_block(fmt.scale.decode(mx_scales(blocked, fmt)))
    relative = blocked / scale
    values, inside = mx_round(relative, fmt.element, experts) * scale, relative.abs() <= fmt.element.max
    return from_blocks(values, x.shape, fmt), from_blocks(inside, x.shape, fmt)
