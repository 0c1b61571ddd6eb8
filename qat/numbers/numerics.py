"""The reference arithmetic of every Format: scales, codes, and back. Training, packing and kernels derive from here.

The contract that tests prove bit by bit: `fake_quantize(x, f) == quantize(x, f).dequantize()`. Everything is computed
in float32 whatever the input dtype, the scale is rounded to its stored dtype *before* it divides, and rounding is half
to even. A NaN or infinity makes its own block NaN (never a silent finite number) and leaves other blocks alone.

Shapes: x is (..., columns), flattened to (rows, columns). Blocked tensors are (block rows, rows per block, block
columns, columns per block); scale tensors are (block rows, block columns).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qat.errors import FormatError
from qat.numbers.element import EXPONENT_BIAS
from qat.numbers.format import ABOVE, Format
from qat.numbers.scale import TINY, ScaleType, ceil_log2, over, type_of


@dataclass(frozen=True)
class Scales:
    """The scales of one tensor.

    Attributes:
        stored: (block rows, block columns) as `Format.scale` stores it; what a checkpoint holds.
        global_scale: float32 power of two that multiplies `stored`, a scalar or of a shape that broadcasts, or None; of
            formats with super-blocks the FP16 number of each block's, of the shape of `stored`.
        zero_point: int8, same shape as `stored`, or None.
        choice: uint8, index of the element type per block, or None where the format has one.
        divisor: float32, same shape: divides before rounding where it differs from the stored scale (Dual-LSQ). It may
            have several columns to one of `stored`: blocks in equal parts, each divided by its own (FOCUS).
        type: how `stored` decodes; by default as its dtype says, see `qat.numbers.scale.type_of`.
        minimum: what is subtracted of each block, stored as scales are, or None.
    """

    stored: Tensor
    global_scale: Tensor | None = None
    zero_point: Tensor | None = None
    choice: Tensor | None = None
    divisor: Tensor | None = None
    type: ScaleType | None = None
    minimum: "Scales | None" = None

    @property
    def offset(self) -> Tensor | None:
        """What operators take where blocks do not begin at zero: zero points, in codes, or minima, float32 values."""
        return self.zero_point if self.minimum is None else self.minimum.effective()

    def effective(self) -> Tensor:
        """float32 multiplier per block: the stored scale decoded, times the global scale."""
        scale = (self.type or type_of(self.stored)).decode(self.stored)
        return scale if self.global_scale is None else scale * self.global_scale

    def of(self, fmt: Format) -> "Scales":
        """The same, known to be stored as `fmt` says where they have its dtype (other tools' may be wider floats)."""
        typed = self.type is not None or self.stored.dtype != fmt.scale.storage
        return self if typed else replace(self, type=fmt.scale)

    def rows(self, part: slice) -> "Scales":
        """Those of some block rows, where what is stored divides."""
        zero, choice = (None if t is None else t[part] for t in (self.zero_point, self.choice))
        above = self.global_scale
        if above is not None and above.dim() and len(above) == len(self.stored):
            above = above[part]
        minimum = None if self.minimum is None else self.minimum.rows(part)
        return Scales(self.stored[part], above, zero, choice, type=self.type, minimum=minimum)

    @staticmethod
    def joined(parts: "Sequence[Scales]") -> "Scales":
        """Those of tensors one below the other; each keeps its global scale, and what is stored divides."""
        if len(parts) == 1:
            return replace(parts[0], divisor=None)
        raw, dtype = [part.stored for part in parts], parts[0].stored.dtype
        if dtype.itemsize == 1:  # torch joins no floats of a byte
            raw = [stored.view(torch.uint8) for stored in raw]
        above = [_tall(part.global_scale, len(part.stored)) for part in parts if part.global_scale is not None]
        zeros = [part.zero_point for part in parts if part.zero_point is not None]
        choices = [part.choice for part in parts if part.choice is not None]
        top, zero, choice = (torch.cat(tensors) if tensors else None for tensors in (above, zeros, choices))
        minima = [part.minimum for part in parts if part.minimum is not None]
        minimum = Scales.joined(minima) if minima else None
        return Scales(torch.cat(raw).view(dtype), top, zero, choice, type=parts[0].type, minimum=minimum)


def _tall(global_scale: Tensor, rows: int) -> Tensor:
    """One, or one of each super-block, for each row."""
    return global_scale.expand(rows, global_scale.shape[-1] if global_scale.dim() else 1)


@dataclass(frozen=True)
class QTensor:
    """A quantized tensor: codes (uint8 bit patterns, one per element, unpacked) and scales. What servers and files hold
    are layouts of it, see `qat.serving`; this is the one way to dequantize."""

    format: Format
    codes: Tensor
    scales: Scales

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", self.scales.of(self.format))

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What is stored besides the codes, by name: scale and, where the format has them, the others."""
        scales = self.scales
        tensors = {"scale": scales.stored, "global_scale": scales.global_scale}
        tensors |= {"zero_point": scales.zero_point, "choice": scales.choice}
        if scales.minimum is not None:
            tensors |= {"minimum": scales.minimum.stored, "minimum_scale": scales.minimum.global_scale}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor this stands for."""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values (shape of the original); computed in float32 and rounded once to `dtype`."""
        blocked = to_blocks(self.codes, self.format)
        values = _decode(blocked, self.format, self.scales)
        return from_blocks(scaled_(values, self.scales), self.shape, self.format).to(dtype)


def to_blocks(x: Tensor, fmt: Format) -> Tensor:
    """View x (..., columns) as (block rows, rows per block, block columns, columns per block), zero-padded where a
    2-D block overhangs.

    Raises:
        FormatError: a group inside the row does not divide the width, or x has no dimension at all.
    """
    if x.dim() == 0:
        raise FormatError(f"{fmt.name}: a number without dimensions has no row to quantize; give it as shape (1,)")
    columns = x.shape[-1]
    if not fmt.divides(columns):
        raise FormatError(width_problem(fmt, columns))
    rows = x.numel() // columns if columns else 0
    block_rows, block_columns = fmt.block_for(rows, columns)
    grid_rows, grid_columns = fmt.grid_shape(rows, columns)
    flat = x.reshape(rows, columns)
    pad = (grid_columns * block_columns - columns, grid_rows * block_rows - rows)
    if any(pad):
        flat = torch.nn.functional.pad(flat, (0, pad[0], 0, pad[1]))
    return flat.view(grid_rows, block_rows, grid_columns, block_columns)


def from_blocks(blocked: Tensor, shape: torch.Size, fmt: Format) -> Tensor:
    """Undo `to_blocks`."""
    grid_rows, block_rows, grid_columns, block_columns = blocked.shape
    flat = blocked.reshape(grid_rows * block_rows, grid_columns * block_columns)
    rows = math.prod(shape[:-1])
    return flat[:rows, : shape[-1]].reshape(shape).contiguous()


def width_problem(fmt: Format, columns: int) -> str:
    """Why a row of `columns` cannot be split into this format's groups, and which group would work."""
    group = fmt.unit if fmt.group else columns
    works = [g for g in (16, 32, 64, 128, 256) if columns % g == 0]
    best = min(works, key=lambda g: (abs(math.log2(g / group)), -g)) if works else None
    advice = f"the nearest group that divides {columns} is {best}" if best else "no group of 16 to 256 divides it"
    what = "super-blocks" if fmt.super_block else "groups"
    return f"{fmt.name}: {what} of {group} do not divide a width of {columns}; {advice}, or use a channel scale"


def global_scale_for(amax: Tensor, fmt: Format) -> Tensor:
    """Power of two (float32 scalar) above which `amax` (scalar) fits block scales of at most the scale's maximum."""
    ratio = over(amax.to(torch.float32), fmt.element.max * fmt.scale.largest)
    field = (ceil_log2(ratio) + EXPONENT_BIAS).clamp(0, 2 * EXPONENT_BIAS)  # no pow: devices round it differently
    return (field.to(torch.int32) << 23).view(torch.float32).clamp_min(TINY)


def block_amax(blocked: Tensor) -> Tensor:
    """Largest magnitude per block; NaN where the block holds one."""
    return blocked.abs().amax(dim=(1, 3))


def finite_amax(x: Tensor) -> Tensor:
    """Largest finite magnitude (scalar), 0 for an empty tensor."""
    if not x.numel():
        return torch.zeros((), device=x.device)
    low, high = torch.aminmax(x.detach())
    amax = torch.maximum(-low, high).to(torch.float32)
    if amax.is_meta or torch.isfinite(amax):
        return amax
    magnitude = x.detach().to(torch.float32).abs()
    return torch.where(torch.isfinite(magnitude), magnitude, 0.0).amax()


def find_scales(x: Tensor, fmt: Format, global_scale: Tensor | None = None) -> Scales:
    """The format's own rule: one stored scale per block of x (..., columns).

    `global_scale` fixes the per-tensor scale (fused layers share one); by default it follows from x.
    """
    blocked = to_blocks(x.detach().to(torch.float32), fmt)
    if fmt.zero_point:
        return _affine_scales(blocked, fmt)
    if fmt.super_block:
        return _two_levels(blocked, fmt)
    amax = block_amax(blocked)
    if fmt.global_scale and global_scale is None:
        global_scale = global_scale_for(finite_amax(amax), fmt)
    scales = Scales(scale_from_amax(amax, fmt, global_scale, blocked), global_scale, type=fmt.scale)
    return scales if fmt.is_single else choose_elements(blocked, fmt, scales)


def unit_scales(shape: Sequence[int], fmt: Format, device: torch.device) -> Scales:
    """Scales of one, with which nothing is subtracted: all that a tensor (rows, columns), or a stack of matrices, each
    with a global scale of its own, will have in this format, for who sets them afterwards."""
    *stack, rows, columns = shape
    high, wide = fmt.grid_shape(rows, columns)
    ones = torch.ones(math.prod(stack) * high, wide, device=device)
    above = ones.clone() if fmt.super_block else None
    if fmt.global_scale:
        above = ones[:, :1].clone() if stack else torch.ones((), device=device)
    nothing = torch.zeros_like(ones)
    return Scales(
        fmt.scale.store(ones),
        above,
        zero_point=nothing.to(torch.int8) if fmt.zero_point else None,
        choice=None if fmt.is_single else nothing.to(torch.uint8),
        type=fmt.scale,
        minimum=None if fmt.minimum is None else Scales(fmt.minimum.store(nothing), ones.clone(), type=fmt.minimum),
    )


def scale_from_amax(amax: Tensor, fmt: Format, global_scale: Tensor | None, blocked: Tensor | None = None) -> Tensor:
    """Stored scale from the block maxima by `fmt.scale_rule`; "mean" needs the blocks themselves."""
    if fmt.scale_rule != "mean":
        return fmt.scale.from_amax(amax, fmt.element, fmt.scale_rule, global_scale)
    if blocked is None:
        raise FormatError(f"{fmt.name} needs the values, not only their maximum, to find its scale")
    return fmt.scale.store(blocked.abs().mean(dim=(1, 3)), global_scale)


def _affine_scales(blocked: Tensor, fmt: Format) -> Scales:
    """Asymmetric integers: the range, widened to hold 0, is cut into 2^bits - 1 steps; the zero point is an integer."""
    low = blocked.amin(dim=(1, 3)).clamp_max(0.0)
    high = blocked.amax(dim=(1, 3)).clamp_min(0.0)
    stored = fmt.scale.store((high - low) / (2**fmt.element.bits - 1))
    bottom = -(2 ** (fmt.element.bits - 1))
    zero = torch.nan_to_num(bottom - low / fmt.scale.decode(stored)).round().clamp(bottom, -bottom - 1)
    return Scales(stored, zero_point=zero.to(torch.int8), type=fmt.scale)


def _two_levels(blocked: Tensor, fmt: Format) -> Scales:
    """The range of a block, or its largest magnitude, over the element's; those of a super-block under one number."""
    if fmt.minimum is None:
        scales = in_super_blocks(over(block_amax(blocked), fmt.element.max), fmt, fmt.scale)
        return scales if fmt.is_single else choose_elements(blocked, fmt, scales)
    low, high = blocked.amin(dim=(1, 3)).clamp_max(0.0), blocked.amax(dim=(1, 3))
    scales = in_super_blocks(over(high - low, fmt.element.max), fmt, fmt.scale)
    return replace(scales, minimum=in_super_blocks(-low, fmt, fmt.minimum))


def in_super_blocks(wanted: Tensor, fmt: Format, type: ScaleType, above: Tensor | None = None) -> Scales:
    """float32 numbers, one of each block, as multiples of one number for each super-block (`above`, of the shape of
    `wanted`), of which the largest of them is the largest multiple. What is not finite becomes NaN by itself."""
    if above is None:
        blocks = fmt.super_block // fmt.block[1]
        finite = torch.where(torch.isfinite(wanted), wanted, 0.0)
        largest = finite.view(len(wanted), wanted.shape[1] // blocks, blocks).amax(dim=2)
        above = ABOVE.decode(ABOVE.store(over(largest, type.largest))).repeat_interleave(blocks, dim=1)
    return Scales(type.store(wanted, above), above, type=type)


def choose_elements(blocked: Tensor, fmt: Format, scales: Scales, error_weight: Tensor | None = None) -> Scales:
    """Per block, the element type with the smaller (weighted) squared error, in units of the scale, so that nothing
    under- or overflows when squared."""
    errors, unit = [], per_block(scales.effective())
    for index in range(len(fmt.elements)):
        trial = replace(scales, choice=torch.full_like(scales.stored, index, dtype=torch.uint8))
        values = scaled_(rounded(blocked, fmt, trial), trial)
        squares = values.sub_(blocked).div_(unit).square_()
        errors.append((squares if error_weight is None else squares.mul_(error_weight)).sum(dim=(1, 3)))
    return replace(scales, choice=torch.stack(errors).argmin(dim=0).to(torch.uint8))


def per_block(grid: Tensor) -> Tensor:
    """(block rows, block columns) -> broadcastable against a blocked tensor."""
    return grid[:, None, :, None]


def in_parts(blocked: Tensor, divisor: Tensor) -> Tensor:
    """A blocked tensor, viewed as `divisor` divides it: whole blocks, or equal parts of their columns."""
    if divisor.shape[1] == blocked.shape[2]:
        return blocked
    return blocked.reshape(*blocked.shape[:2], divisor.shape[1], -1)


def rounded(blocked: Tensor, fmt: Format, scales: Scales) -> Tensor:
    """Element values (zero point already subtracted) of a blocked float32 tensor; a new tensor."""
    divisor = scales.effective() if scales.divisor is None else scales.divisor
    if scales.minimum is not None:
        blocked = blocked + per_block(scales.minimum.effective())
    x = (in_parts(blocked, divisor) / per_block(divisor)).reshape(blocked.shape)
    zero, choice = (None if t is None else per_block(t) for t in (scales.zero_point, scales.choice))
    return to_elements_(x, fmt, None if zero is None else zero.to(torch.float32), choice)


def to_elements_(x: Tensor, fmt: Format, zero: Tensor | None, choice: Tensor | None) -> Tensor:
    """Round float32 numbers in units of their scale to element values, in place; zero points (float32) and choices of
    elements broadcast."""
    if zero is not None:
        half = 2 ** (fmt.element.bits - 1)
        return x.round_().add_(zero).clamp_(-half, half - 1).sub_(zero)
    if choice is None:
        return fmt.element.round_(x)
    return x.copy_(_pick([element.round(x) for element in fmt.elements], choice))


def _pick(options: list[Tensor], choice: Tensor) -> Tensor:
    result = options[0]
    for index, option in enumerate(options[1:], start=1):
        result = torch.where(choice == index, option, result)
    return result


def scaled_(values: Tensor, scales: Scales) -> Tensor:
    """Numbers of a blocked tensor of element values, as `rounded` gives them; in place. Where a minimum is subtracted,
    the product before it is exact, so that it does not matter whether a device fuses the two."""
    values.mul_(per_block(scales.effective()))
    return values if scales.minimum is None else values.sub_(per_block(scales.minimum.effective()))


def _encode(values: Tensor, fmt: Format, scales: Scales) -> Tensor:
    if scales.zero_point is not None:
        return fmt.element.encode(values + per_block(scales.zero_point).to(torch.float32))
    if scales.choice is None:
        return fmt.element.encode(values)
    return _pick([element.encode(values) for element in fmt.elements], per_block(scales.choice))


def _decode(codes: Tensor, fmt: Format, scales: Scales) -> Tensor:
    if scales.choice is not None:
        return _pick([element.decode(codes) for element in fmt.elements], per_block(scales.choice))
    values = fmt.element.decode(codes)
    return values if scales.zero_point is None else values - per_block(scales.zero_point).to(torch.float32)


def _poisoned(blocked: Tensor, scales: Scales) -> Scales:
    """Given scales with NaN for blocks that hold a NaN or infinity, as `find_scales` would have made them: few codes
    can say NaN, so without this a diverged weight would be stored as zeros."""
    bad = ~torch.isfinite(block_amax(blocked))
    if not bool(bad.any()):
        return scales
    return replace(scales, stored=(scales.type or type_of(scales.stored)).spoil(scales.stored, bad))


def quantize(x: Tensor, fmt: Format, scales: Scales | None = None) -> QTensor:
    """Codes and scales of x (..., columns), by the format's own rule or with given `scales`.

    Raises:
        FormatError: the format's groups do not divide the last dimension.
    """
    blocked = to_blocks(x.detach().to(torch.float32), fmt)
    scales = find_scales(x, fmt) if scales is None else _poisoned(blocked, scales.of(fmt))
    codes = _encode(rounded(blocked, fmt, scales), fmt, scales)
    return QTensor(fmt, from_blocks(codes, x.shape, fmt), scales)


def fake_quantize(x: Tensor, fmt: Format, scales: Scales | None = None) -> Tensor:
    """`quantize(x).dequantize()` without the codes: float32 values on the format's grid, without a gradient."""
    blocked = to_blocks(x.detach().to(torch.float32), fmt)
    scales = find_scales(x, fmt) if scales is None else _poisoned(blocked, scales.of(fmt))
    return from_blocks(scaled_(rounded(blocked, fmt, scales), scales), x.shape, fmt)


def qsnr(x: Tensor, quantized: Tensor) -> float:
    """Quantization signal-to-noise ratio in dB: -10 log10(|x - q|^2 / |x|^2)."""
    return qsnr_of_parts([(x, quantized)])


def qsnr_of_parts(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """`qsnr` of a tensor that comes in parts, each with what it was quantized to."""
    sums = []
    for x, quantized in pairs:
        x64, q64 = x.detach().to(torch.float64), quantized.detach().to(torch.float64)
        sums.append(torch.stack([(x64 - q64).square().sum(), x64.square().sum()]))
    noise, signal = torch.stack(sums).sum(dim=0)
    return float(-10 * torch.log10(noise / signal))
