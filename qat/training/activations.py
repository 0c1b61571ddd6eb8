"""How activations are quantized on the fly, by the arithmetic of the engine that will do it.

The rule is named after who runs it. "vllm" computes in float32, as vLLM's reference functions do (equal up to exact
ties, which its kernels break by multiplying with an approximate reciprocal). "compressed_tensors" is what plain
transformers simulates, mostly in BF16; it is reproduced bit for bit (the sign of a zero aside), so that an exported
checkpoint can be compared with an exact difference of zero. For a float32 input it computes what the BF16 model would.
"ascend" is what an NPU does, see `qat.training.npu`, "ascend_310p" what one does whose models are FP16 (see
`qat.training.half`). "llama_cpp" is what its quantized products do to any input, asked or not: INT8 per 32 values
(before K types per 256), multiplied with a float32 reciprocal, and afterwards with the scale in FP16 (in float32).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from qat.errors import UnsupportedError
from qat.numbers.catalog import CATALOG, E2M1, INT8, lookup
from qat.numbers.element import EXPONENT_BIAS, Element
from qat.numbers.format import Format
from qat.numbers.numerics import (
    Scales,
    block_amax,
    find_scales,
    from_blocks,
    global_scale_for,
    per_block,
    to_blocks,
)
from qat.numbers.scale import BF16, E8M0, F16, F32, TINY, UE4M3, MinifloatScale, over
from qat.training import half, npu, phases
from qat.training.gradients import Estimator
from qat.training.ops import fake_quantize, fake_quantize_reference, operator

_VLLM_TOKEN_FLOOR = 512  # scaled_fp8_quant: a token's scale is at least 1 / (element max x 512)
_VLLM_GROUP_FLOOR = 1e-10  # per_token_group_quant_fp8: a group's maximum counts at least this
_MANTISSA = 7  # of BF16

ActivationRule = Literal["vllm", "compressed_tensors", "ascend", "ascend_310p", "llama_cpp"]
Reader = Literal["layer", "experts", "second"]
"""What reads an input: a layer, experts, or their second matrices what the gate before them gives."""
_Rule = Callable[[Tensor, Format, Tensor | None, Estimator], Tensor]


def dynamic_fake_quantize(x: Tensor, fmt: Format, rule: str, estimator: Estimator, amax: Tensor) -> Tensor:
    """x (..., columns) on the grid of `fmt`, in x's dtype; scales follow x (or `amax`, where the format is static)."""
    return fake_quantize_input(x, fmt, rule, estimator, static_part(fmt, amax))


def static_part(fmt: Format, amax: Tensor) -> Tensor | None:
    """What a checkpoint stores of an input quantizer, float32 [1]: the scale of a static format, the divisor above E4M3
    block scales (the reciprocal of our power-of-two multiplier), or None where everything follows the data. A static
    format with a zero point has [2], scale and zero point, of a range that is [2] as well, lowest and highest value;
    one with a scale per column has [columns], of a range that is as long."""
    if fmt.is_static and fmt.zero_point:
        affine = find_scales(amax.detach().reshape(1, 2), fmt)
        assert affine.zero_point is not None
        return torch.cat([affine.effective().reshape(1), affine.zero_point.to(torch.float32).reshape(1)])
    if fmt.is_static or fmt.is_columnwise:
        return fmt.scale.decode(fmt.scale.store(over(amax.detach(), fmt.element.max).reshape(-1)))
    if fmt.global_scale:
        return global_scale_for(amax.detach(), fmt).reciprocal().reshape(1)
    return None


def held_range(range: Tensor, fmt: Format, rule: str) -> Tensor:
    """The calibrated range that whoever runs the rule can hold: a wider one where scales have few bits.

    Raises:
        FormatError: none; says why.
    """
    return half.held_range(range, fmt) if rule == half.RULE else range


def moved_range(amax: Tensor, log_range: Tensor | None) -> Tensor:
    """The calibrated range with what is learned of it, without a gradient."""
    return amax if log_range is None else amax * log_range.detach().exp().squeeze(0)


def static_part_reference(amax: Tensor, log_range: Tensor | None, format: str) -> Tensor:
    """What `qat::static_part` means: `static_part` of the range in force, of formats that have one; one operator, so
    that no compiler rounds it otherwise than an export does."""
    static = static_part(lookup(format), moved_range(amax, log_range))
    assert static is not None
    return static


@operator("static_part", static_part_reference)
def _(amax: Tensor, *args: Any) -> Tensor:
    return amax.new_empty(max(1, amax.numel()))


def is_operator(fmt: Format, rule: str) -> bool:
    """Whether all that rounds inputs of this format is inside of operators, which no compiler takes apart."""
    return rule == "vllm" and (fmt.is_static or _is_one(fmt))


def _is_one(fmt: Format) -> bool:
    return fmt.is_rowwise and not fmt.zero_point and fmt.minimum is None and fmt.is_single


def fake_quantize_input(
    x: Tensor, fmt: Format, rule: str, estimator: Estimator, static: Tensor | None, reader: Reader = "layer"
) -> Tensor:
    """`dynamic_fake_quantize` from the stored scale or divisor (see `static_part`) instead of a range. For experts an
    engine may round otherwise than for layers. The rules of NPUs take x in the model's type first; but in
    BF16 models the gate between two products of experts makes integers of float32.

    Raises:
        UnsupportedError: no such rule, or one that has no arithmetic for this format.
    """
    if rule not in RULES:
        raise UnsupportedError(f"no activation rule {rule!r}; there are {', '.join(RULES)}")
    if (fmt.prompt or fmt.is_columnwise) and rule != "ascend":
        what = "caches" if fmt.is_columnwise else "inputs"
        raise UnsupportedError(f"{fmt.name} {what} have activation_rule: ascend, not {rule}: no other engine has them")
    own = _OF_EXPERTS.get(rule) if reader != "layer" else None
    if rule in npu.NPU_RULES and not (rule == "ascend" and reader == "second" and npu.is_dynamic_integer(fmt)):
        x = npu.held(x, rule)
    return (own or RULES[rule])(x, fmt, static, estimator)


# --- vLLM -------------------------------------------------------------------------------------------------------------


def _vllm(x: Tensor, fmt: Format, static: Tensor | None, estimator: Estimator) -> Tensor:
    if _is_one(fmt):
        if x.requires_grad and torch.is_grad_enabled():
            through: Tensor = _FakeQuantizeInput.apply(x, static, fmt.name, estimator)
            return through
        y: Tensor = _OPERATOR(x, static, fmt.name, "ste")[0]
        return y
    with torch.no_grad():
        scales = vllm_scales(x.detach(), fmt, static)
    return fake_quantize(x, fmt.name, scales, estimator=estimator)


def fake_quantize_input_reference(
    x: Tensor, static: Tensor | None, format: str, estimator: str
) -> tuple[Tensor, Tensor]:
    """What `qat::fake_quantize_input` means: (x on its grid, the scales for clipping in the backward pass, or nothing).
    For formats whose blocks are tokens or groups, of one element type and without zero points or minima."""
    scale = vllm_scales(x.detach(), lookup(format), static).effective()
    y = fake_quantize_reference(x, None, scale, None, None, format, estimator, False)
    return y, scale if estimator == "clipped" else scale.new_empty(0)


@operator("fake_quantize_input", fake_quantize_input_reference)
def _(x: Tensor, static: Tensor | None, format: str, estimator: str) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    shape = lookup(format).grid_shape(rows, x.shape[-1]) if estimator == "clipped" else (0,)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(shape, dtype=torch.float32)


_OPERATOR = torch.ops.qat.fake_quantize_input.default


class _FakeQuantizeInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, static: Tensor | None, format: str, estimator: str) -> Tensor:
        y, scale = _OPERATOR(x, static, format, estimator)
        ctx.format, ctx.estimator = format, estimator
        if estimator == "clipped":
            ctx.save_for_backward(x, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if ctx.estimator == "clipped":
            x, scale = ctx.saved_tensors
            needs = [True, False, False]
            (grad,) = torch.ops.qat.fake_quantize_backward.default(
                grad, x, None, None, scale, None, ctx.format, ctx.estimator, needs
            )
        return grad, None, None, None


def floors(fmt: Format) -> tuple[float, float]:
    """What a block's maximum and its scale count at least, in vLLM's rule (scales of E4M3 and E8M0 have their own)."""
    if not _has_floors(fmt):
        return 0.0, TINY
    return (_VLLM_GROUP_FLOOR, TINY) if fmt.group else (0.0, 1 / (fmt.element.max * _VLLM_TOKEN_FLOOR))


def _has_floors(fmt: Format) -> bool:
    return fmt.element.is_minifloat and fmt.scale is F32


def vllm_scales(x: Tensor, fmt: Format, static: Tensor | None) -> Scales:
    """The scales of x (..., columns) by the "vllm" rule; `static` as `static_part` returns it."""
    element = fmt.element
    if fmt.is_static:
        assert static is not None
        scale = static[:1].view(1, 1).to(torch.float32)  # ours are BF16 numbers; other tools' need not be
        return Scales(scale, zero_point=static[1:].view(1, 1).to(torch.int8) if fmt.zero_point else None)
    if isinstance(fmt.scale, MinifloatScale) and fmt.is_single:
        assert static is not None
        amax = block_amax(to_blocks(x.to(torch.float32), fmt))
        relative = static * (amax * (1 / element.max))
        stored = fmt.scale.element.round(relative)
        # A block whose scale rounds to zero comes out as zero; under the largest scale, such small values do.
        stored = torch.where(stored == 0, fmt.scale.largest, stored)
        return Scales(stored.to(fmt.scale.storage), static.reciprocal().view(()), type=fmt.scale)
    if _has_floors(fmt):
        amax_floor, scale_floor = floors(fmt)
        amax = block_amax(to_blocks(x.to(torch.float32), fmt)).clamp_min(amax_floor)
        return Scales(fmt.scale.store(over(amax, element.max).clamp_min(scale_floor)), type=fmt.scale)
    return find_scales(x, fmt, static.reciprocal().view(()) if static is not None else None)


# --- compressed-tensors -----------------------------------------------------------------------------------------------


def _compressed_tensors(x: Tensor, fmt: Format, static: Tensor | None, estimator: Estimator) -> Tensor:
    with torch.no_grad():
        y, inside = _ct_values(x.detach().to(torch.bfloat16), fmt, static)
    return _with_gradient(x, y.to(x.dtype), inside, estimator)


def _ct_values(x: Tensor, fmt: Format, static: Tensor | None) -> tuple[Tensor, Tensor]:
    """BF16 result for BF16 `x`, and where x is not clipped. Every operator rounds once to its dtype, on purpose."""
    _check_ct(fmt)
    xg = x.unflatten(-1, (-1, fmt.group)) if fmt.group else x
    if isinstance(fmt.scale, MinifloatScale):
        assert static is not None
        scale = _ct_minifloat_scale(xg, fmt, fmt.scale, static)
        xg = xg.to(torch.float32)
    elif fmt.scale is E8M0:
        scale = _ct_e8m0_scale(_amax(xg, -1), fmt)
    elif fmt.is_static:
        assert static is not None
        scale = static.to(torch.bfloat16)
    else:
        amax = _amax(xg, -1) if fmt.group else _amax(x, _ct_token_dims(x))
        scale = amax / _ct_half_range(fmt.element)
        scale = torch.where(scale == 0, torch.finfo(torch.bfloat16).eps, scale)
    relative = xg / scale
    y = (_ct_round(relative, fmt.element) * scale).to(torch.bfloat16)
    inside = relative.abs() <= fmt.element.max
    return (y.flatten(-2), inside.flatten(-2)) if fmt.group else (y, inside)


def _check_ct(fmt: Format) -> None:
    floats = fmt.scale.is_one_of(F32, BF16)
    plain = not fmt.needs_table and fmt.follows_amax and fmt.block[0] in (0, 1)
    if not plain or not (floats or (fmt.element.is_minifloat and fmt.scale.is_one_of(UE4M3, E8M0))):
        raise UnsupportedError(
            f"compressed-tensors does not simulate {fmt.name} inputs; use activation_rule: vllm, or an integer or "
            "float input format per token, per tensor, or of the MX or NV family"
        )


def _amax(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    return x.abs().amax(dim=dims, keepdim=True)


def _ct_token_dims(x: Tensor) -> tuple[int, ...]:
    """A "token" is one index of the first two dimensions; a 2-D input is therefore one token as a whole."""
    return tuple(range(2, x.ndim)) or tuple(range(x.ndim))


def _ct_half_range(element: Element) -> float:
    """What the maximum maps to: half of the 2^b - 1 steps of an integer, so 0.5 beyond our symmetric range."""
    return element.max + 0.5 if element.is_integer else element.max


def _ct_round(t: Tensor, element: Element) -> Tensor:
    if element.is_integer:
        return t.clamp(-element.max - 1, element.max).round()
    return element.round(t.to(torch.float32)).to(t.dtype)


def _ct_minifloat_scale(xg: Tensor, fmt: Format, scale: MinifloatScale, divisor: Tensor) -> Tensor:
    """float32 scale per block: only the quotient of the block's maximum is rounded to BF16."""
    stored = scale.element.round(divisor * (_amax(xg, -1) / fmt.element.max).to(torch.float32))
    return torch.where(stored == 0, 2.0**-scale.element.mantissa_bits, stored) / divisor


def _ct_e8m0_scale(amax: Tensor, fmt: Format) -> Tensor:
    """BF16 power of two: E2M1's rounding threshold (mantissa 1.75) moves the exponent up, whatever the element."""
    field = (amax.view(torch.int16).to(torch.int32) + (1 << (_MANTISSA - E2M1.mantissa_bits - 1))) >> _MANTISSA
    infinite = 2 * EXPONENT_BIAS + 1
    byte = torch.where(field < infinite, (field - fmt.element.max_exponent).clamp_min(0), infinite)
    bits = torch.where(byte == 0, 1 << (_MANTISSA - 1), byte << _MANTISSA)  # 2^-127 is subnormal
    return bits.to(torch.int16).view(torch.bfloat16)


def _ascend(x: Tensor, fmt: Format, static: Tensor | None, estimator: Estimator, experts: bool = False) -> Tensor:
    if npu.is_dynamic_integer(fmt):  # amax over the largest code, as everywhere
        return _vllm(x, fmt, static, estimator)
    with torch.no_grad():
        y, inside = npu.fake_quantized(x.detach(), fmt, static, experts=experts)
    answers = _with_gradient(x, y.to(x.dtype), inside, estimator)
    return phases.either(x, answers, lambda: _ascend(x, lookup(fmt.prompt), None, estimator)) if fmt.prompt else answers


def _ascend_310p(x: Tensor, fmt: Format, static: Tensor | None, estimator: Estimator) -> Tensor:
    """The two types that its loader has: INT8 per token, and INT8 with one scale, whose reciprocal is FP16."""
    if not npu.in_half(fmt):
        raise UnsupportedError(
            f"activation_rule: {half.RULE} has no operator for {fmt.name} inputs; it has int8_token, int8_tensor and "
            "int8_tensor_asym"
        )
    if npu.is_dynamic_integer(fmt):
        return _vllm(x, fmt, static, estimator)
    with torch.no_grad():
        y, inside = npu.fake_quantized(x.detach(), fmt, static, torch.float16)
    return _with_gradient(x, y.to(x.dtype), inside, estimator)


def _with_gradient(x: Tensor, y: Tensor, inside: Tensor, estimator: Estimator) -> Tensor:
    if not x.requires_grad:
        return y
    through = x if estimator == "ste" else torch.where(inside, x, 0.0)
    return y + (through - through.detach())  # adds an exact zero that carries the gradient


# --- llama.cpp --------------------------------------------------------------------------------------------------------


_LLAMA_CPP = {F16: 32, F32: 256}  # the values of a block of inputs, by how its scale is stored: Q8_0 and Q8_K


def llama_cpp_input(weight: Format) -> Format:
    """What llama.cpp rounds the inputs of products with such weights to: super-blocks have Q8_K, all else Q8_0."""
    scale = F32 if weight.super_block else F16
    return next(fmt for fmt in CATALOG.values() if fmt.scale is scale and _is_llama_cpps(fmt))


def _is_llama_cpps(fmt: Format) -> bool:
    return fmt.elements == (INT8,) and not fmt.zero_point and _LLAMA_CPP.get(fmt.scale) == fmt.group


def _llama_cpp(x: Tensor, fmt: Format, static: Tensor | None, estimator: Estimator) -> Tensor:
    """quantize_row_q8_0 and quantize_row_q8_K of ggml, as its CPU code for x86 and Arm computes them: times a
    reciprocal, half to even. Code without vector instructions and that for GPUs differ from the first in exact ties.
    The second gives the scale the sign that puts the block's end at -127, which changes no value."""
    if not _is_llama_cpps(fmt):
        raise UnsupportedError(
            f"llama.cpp does not round inputs to {fmt.name}; use another activation_rule, or as the input format "
            "q8_0, before K types q8_k"
        )
    with torch.no_grad():
        blocked = to_blocks(x.detach().to(torch.float32), fmt)
        amax = block_amax(blocked)
        inverse = torch.full_like(amax, fmt.element.max) / amax
        if fmt.scale is F16:
            scale = over(amax, fmt.element.max).to(F16.storage).to(torch.float32)  # zero where none is as small
        else:
            scale = torch.ones_like(inverse) / inverse  # zero where the reciprocal is no number
        inverse = torch.where(scale == 0, 0.0, inverse)
        y = (blocked * per_block(inverse)).round_().mul_(per_block(scale))
        y = from_blocks(y, x.shape, fmt)
    return _with_gradient(x, y.to(x.dtype), torch.ones_like(x, dtype=torch.bool), estimator)


RULES: dict[str, _Rule] = {
    "vllm": _vllm,
    "compressed_tensors": _compressed_tensors,
    "ascend": _ascend,
    half.RULE: _ascend_310p,
    "llama_cpp": _llama_cpp,
}
_OF_EXPERTS: dict[str, _Rule] = {"ascend": partial(_ascend, experts=True)}
