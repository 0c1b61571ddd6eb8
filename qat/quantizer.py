"""The module that stands on a site: fake quantization by one format, in one of three modes.

A `WeightQuantizer` owns scales: where they begin and, where they are learned, their logarithmic correction; the
parameter is then free of units, so one learning rate fits every layer. An `InputQuantizer` follows what passes through
it (layer inputs, keys, values); layers that read the same tensor share one instance, which also computes it once.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.errors import TrainingError
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales, finite_amax, quantize
from qat.observers import AnyObserver, Observer, observer_for
from qat.same_tensor import SameTensor
from qat.training.activations import ActivationRule, Reader, fake_quantize_input, held_range, moved_range, static_part
from qat.training.gradients import Estimator
from qat.training.ops import fake_quantize, quantized_linear
from qat.training.refit import refit
from qat.training.scales import effective_scales, parts_of, stored_minimum, stored_scales
from qat.training.step_weight import StepWeight

Learn = Literal["none", "lsq", "dual_lsq", "focus", "refit"]
LEARNED = ("log_scale", "log_divisor")  # the parameters of a weight's quantizer
Mode = Literal["quantized", "dense", "frozen"]
Transform = Callable[[Tensor], Tensor]


class Quantizer(nn.Module):
    """What every quantizer has.

    Attributes:
        format: of the codes.
        mode: "quantized" rounds at every call; "dense" leaves the rounding out; "frozen" rounds a weight once and
            gives the result again, for evaluation (inputs differ at every call, so to them it means "quantized").
        transforms: applied in order before rounding, in every mode, since the other side of the product expects it.
    """

    def __init__(self, fmt: Format) -> None:
        super().__init__()
        self.format = fmt
        self.mode: Mode = "quantized"
        self.transforms: tuple[Transform, ...] = ()

    def transformed(self, x: Tensor) -> Tensor:
        """x (..., columns) after the chain."""
        for transform in self.transforms:
            x = transform(x)
        return x


class WeightQuantizer(Quantizer):
    """Scales of one weight (rows, columns), or of a stack of them (experts, rows, columns), and its trip onto the grid.

    Args:
        fmt: the weight's format.
        scales: the initial ones; those of a stack have its matrices one below the other.
        learn: which corrections are parameters.
        round_bf16: see `Scheme.round_bf16`.

    Inside `qat.modes.held` it `holds` what `linear` made of its weight.
    """

    start: Tensor
    global_scale: Tensor | None
    zero_point: Tensor | None
    choice: Tensor | None
    minimum: Tensor | None
    minimum_scale: Tensor | None

    def __init__(self, fmt: Format, scales: Scales, learn: Learn, round_bf16: bool = True) -> None:
        super().__init__(fmt)
        self.learn, self.round_bf16 = learn, round_bf16
        for name in ("start", "global_scale", "zero_point", "choice", "minimum", "minimum_scale"):
            self.register_buffer(name, None)
        zeros = torch.zeros(scales.stored.shape, device=scales.stored.device)
        self.log_scale = nn.Parameter(zeros) if learn in ("lsq", "dual_lsq", "focus") else None
        self.parts = parts_of(fmt) or 1 if learn == "focus" else 1
        divided = learn in ("dual_lsq", "focus")
        self.log_divisor = nn.Parameter(zeros.repeat_interleave(self.parts, dim=1)) if divided else None
        self._value: Tensor | None = None
        self.holds = False
        self._held: StepWeight | None = None
        self.set_scales(scales)

    def set_scales(self, scales: Scales) -> None:
        """Begin (again) from these scales, with no learned correction."""
        self.global_scale = scales.global_scale
        if (below := scales.minimum) is not None:
            self.minimum, self.minimum_scale = below.effective().clone(), below.global_scale
        given = {"start": scales.effective().clone(), "zero_point": scales.zero_point, "choice": scales.choice}
        for name, values in given.items():
            own = self._parameters.get(name)  # of a divided model, see `qat.sharded`
            if own is None or values is None:
                setattr(self, name, values)
            else:
                own.data.copy_(values)
        for correction in (self.log_scale, self.log_divisor):
            if correction is not None:
                nn.init.zeros_(correction)

    @torch.no_grad()
    def refit(self, weight: Tensor, importance: Tensor | None = None) -> None:
        """Move the scales to where `weight` (..., rows, columns) loses least now, see `qat.training.refit`; in place.

        Args:
            importance: of each weight's error; unused where transforms mix the columns that it speaks of.
        """
        with torch.autocast(weight.device.type, enabled=False):
            importance = None if self.transforms else importance
            found = refit(self.transformed(weight), self.format, self._stored(self._latent()), importance)
            self.start.copy_(found.effective())
        if (own := self.zero_point if self.minimum is None else self.minimum) is not None and found.offset is not None:
            own.copy_(found.offset)

    def _latent(self) -> Tensor:
        return self.start if self.log_scale is None else self.start * self.log_scale.exp()

    def _stored(self, latent: Tensor) -> Scales:
        stored = stored_scales(latent, self.global_scale, self.format.name)
        return replace(stored, zero_point=self.zero_point, choice=self.choice, minimum=self._minimum())

    def _minimum(self, part: slice = slice(None)) -> Scales | None:
        return stored_minimum(self.minimum, self.minimum_scale, self.format, part)

    def in_force(self, held: tuple[Tensor, Tensor | None] | None = None) -> tuple[Tensor, Tensor | None]:
        """(multiplier, divisor), see `qat.training.scales`: what is stored multiplies; None where that also divides."""
        learned = self.log_scale, self.log_divisor
        return effective_scales(self.start, *learned, self.global_scale, self.format.name, held)

    def multiplier(self) -> Tensor:
        """float32 effective scale as it will be stored, (block rows, block columns); gradient passes the rounding."""
        return self.in_force()[0]

    def divisor(self) -> Tensor | None:
        """The scale that divides before rounding, where it is learned separately."""
        return self.in_force()[1]

    @torch.no_grad()
    def scales(self) -> Scales:
        """What an export stores (plus the divisor, which only matters until the codes are made)."""
        return replace(self._stored(self._latent()), divisor=self.divisor())

    @torch.no_grad()
    def of_rows(self, rows: slice) -> "WeightQuantizer":
        """The same for whole blocks of rows, of one matrix where this is a stack; nothing in it learns."""
        fmt, high = self.format, self.format.block[0]
        part = slice(rows.start // high, -(-rows.stop // high)) if high else slice(None)
        above = self.global_scale
        if above is not None and above.dim():
            above = above[part] if fmt.super_block else above[part][0, 0]
        zero, choice = (None if t is None else t[part] for t in (self.zero_point, self.choice))
        start, below = fmt.scale.store(self.start[part], above), self._minimum(part)
        scales = Scales(start, above, zero, choice, type=fmt.scale, minimum=below)
        one = WeightQuantizer(self.format, scales, self.learn, self.round_bf16)
        one.start, one.transforms = self.start[part], self.transforms
        for name in LEARNED:
            if (learned := getattr(self, name)) is not None:
                getattr(one, name).copy_(learned[part])
        return one

    def quantize(self, weight: Tensor) -> QTensor:
        """Codes and stored scales of `weight`: exactly the numbers that `forward` multiplies with."""
        return quantize(self.transformed(weight), self.format, self.scales())

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` (..., rows, columns) on its grid, in its dtype."""
        if self.mode == "frozen":
            if self._value is None:
                with torch.no_grad():
                    self._value = self._rounded(weight)
            return self._value
        return self.transformed(weight) if self.mode == "dense" else self._rounded(weight)

    def forget(self) -> None:
        """Drop the values that "frozen" and `holds` remember."""
        self._value = self._held = None

    def _rounded(self, weight: Tensor) -> Tensor:
        return self._on_grid(weight, self.in_force(), self._given())

    def _on_grid(self, weight: Tensor, scales: tuple[Tensor, Tensor | None], given: Scales) -> Tensor:
        multiplier, divisor = scales
        return fake_quantize(
            self.transformed(weight),
            self.format.name,
            given,
            multiplier=multiplier,
            divisor=divisor,
            round_bf16=self.round_bf16,
        )

    def one(self, weight: Tensor, index: int, log_scale: Tensor | None, log_divisor: Tensor | None) -> Tensor:
        """`forward` for one matrix (rows, columns) of a stack; "frozen" remembers nothing here.

        Args:
            index: of the matrix.
            log_scale, log_divisor: the rows of both that are about it.
        """
        if self.mode == "dense":
            return self.transformed(weight)
        high = self.format.grid_shape(*weight.shape)[0]
        part = slice(index * high, (index + 1) * high)
        every = (self.global_scale, self.zero_point, self.choice)
        above, zero, choice = (None if t is None else t[part] for t in every)
        given = Scales(self.start[part], above, zero, choice, minimum=self._minimum(part))
        scales = effective_scales(given.stored, log_scale, log_divisor, above, self.format.name)
        return self._on_grid(weight, scales, given)

    def _given(self) -> Scales:
        return Scales(self.start, self.global_scale, self.zero_point, self.choice, minimum=self._minimum())

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`linear(x, self(weight), bias)`; where gradients are wanted, keeping less for the backward pass."""
        if self.mode != "quantized" or not torch.is_grad_enabled():
            return functional.linear(x, self(weight), bias)
        if torch.is_autocast_enabled(x.device.type):  # which would cast the scales too, inside the operator
            x = x.to(torch.get_autocast_dtype(x.device.type))
        held = self._held_of(weight)
        scales = self.in_force(None if held is None else held.scales)
        y, value = self._product(x, weight, bias, scales, held)
        if self.holds and held is None and not torch.compiler.is_compiling():
            self._held = StepWeight.from_weight(weight, scales, value)
        return y

    def _held_of(self, weight: Tensor) -> StepWeight | None:
        """A recorded graph (`torch.compile`) takes what `hold` left, and asks no further."""
        fits = torch.compiler.is_compiling() or (self._held is not None and self._held.fits(weight))
        return self._held if fits else None

    @torch.no_grad()
    def hold(self, weight: Tensor) -> None:
        """Do now what inside `qat.modes.held` the first `linear` does."""
        scales = self.in_force()
        _, value = self._product(weight.new_zeros(1, weight.shape[-1]), weight, None, scales, None)
        self._held = StepWeight.from_weight(weight, scales, value)

    def _product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scales: tuple[Tensor, Tensor | None],
        held: StepWeight | None,
    ) -> tuple[Tensor, Tensor]:
        multiplier, divisor = scales
        return quantized_linear(
            x,
            self.transformed(weight),
            bias,
            self.format.name,
            self._given(),
            multiplier=multiplier,
            divisor=divisor,
            round_bf16=self.round_bf16,
            held=None if held is None else held.value,
        )

    def extra_repr(self) -> str:
        """What it does, for `print(model)` and for who compares models (`qat.init.kept`)."""
        return f"{self.format.name}, learn={self.learn}, round_bf16={self.round_bf16}"


class InputQuantizer(Quantizer):
    """Fake quantization of a tensor that follows the data, by the serving engine's rule.

    `amax` is the calibrated range (a float32 scalar, NaN until `calibrate`): static formats derive their scale from it,
    NVFP4-like formats their per-tensor scale; dynamic formats ignore it. Static formats with a zero point have the
    lowest and the highest value instead, and formats with a scale per column a range for each; `surgery` knows how
    many, and what the `reader` of the tensor is. With `learn` (static formats only) a logarithmic correction of it is a
    parameter, with LSQ's gradient; `limit` is then the range in force.
    """

    amax: Tensor
    reader: Reader = "layer"

    def __init__(
        self, fmt: Format, rule: ActivationRule, estimator: Estimator, observer: Observer, learn: bool = False
    ) -> None:
        super().__init__(fmt)
        self.log_range = nn.Parameter(torch.zeros(1)) if learn else None  # FSDP2 takes no scalar
        self.rule, self.estimator, self.observer_kind = rule, estimator, observer
        self.register_buffer("amax", torch.full((2,) if self.is_affine else (), math.nan))
        self._observer: AnyObserver | None = None
        self._same = SameTensor(readers=1)
        self._ready = False
        self._static: tuple[tuple[Tensor, int, int], Tensor | None] | None = None  # and what it was made of

    @property
    def consumers(self) -> int:
        """How many layers read the same tensor through this quantizer."""
        return int(self._same.readers)

    @consumers.setter
    def consumers(self, count: int) -> None:
        self._same.readers = count

    @property
    def needs_calibration(self) -> bool:
        """Whether the format has a static part."""
        return self.format.global_scale or self.format.is_static or self.format.is_columnwise

    @property
    def is_affine(self) -> bool:
        """Whether its range has two ends that are independent of each other."""
        return self.format.is_static and self.format.zero_point

    def range_of(self, x: Tensor, amax: Tensor) -> Tensor:
        """The range that calibration would find in x alone, whose largest magnitude is known to be `amax`."""
        if self.is_affine:
            return torch.stack(torch.aminmax(self.transformed(x).to(torch.float32)))
        return finite_amax(self.transformed(x)) if self.transforms else amax

    @property
    def limit(self) -> Tensor:
        """The range in force: calibrated, and learned where it is."""
        return moved_range(self.amax, self.log_range)

    def observe(self) -> None:
        """Pass inputs through unchanged and collect their range, until `freeze`."""
        self._observer = observer_for(self.observer_kind, self.format)

    @property
    def observer(self) -> AnyObserver | None:
        """What collects the range, between `observe` and `freeze`."""
        return self._observer

    def cancel(self) -> None:
        """Stop observing and keep the range there was."""
        self._observer = None
        self._same.forget()

    def freeze(self) -> None:
        """Fix the range from what was observed."""
        if self._observer is not None and self.needs_calibration:
            self.amax.copy_(held_range(torch.tensor(self._observer.range()).view_as(self.amax), self.format, self.rule))
            if self.log_range is not None:
                nn.init.zeros_(self.log_range)
        self.cancel()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., columns) on its grid. The second and later consumers of the same tensor get the first's result."""
        if self.mode == "dense":
            return self.transformed(x)
        if self._observer is not None:
            seen = self._same.seen(x) is not None  # observed once, however many layers read it
            self._same.remember(x, True, uses=-1)
            x = self.transformed(x)
            if not seen:
                self._observer.add(x)
            return x
        output: Tensor = self._same.once(x, self.quantize)
        return output

    def quantize(self, x: Tensor) -> Tensor:
        """x (..., columns) on its grid."""
        x, static = self.transformed(x), self.static()
        if self.log_range is None or static is None or not torch.is_grad_enabled():
            return fake_quantize_input(x, self.format, self.rule, self.estimator, static, self.reader)
        # LSQ's share of a scale that so many values have in common, so that it does not fill the gradient's norm.
        share = 1 / math.sqrt(max(1, x.numel()) * self.format.element.max)
        zero = (self.log_range - self.log_range.detach()).squeeze(0)  # exact, with the gradient
        moved = static * share * zero
        scales, multiplier = Scales(static.view(1, 1)), (static + moved).view(1, 1)
        return fake_quantize(x, self.format.name, scales, multiplier=multiplier, estimator=self.estimator)

    def static(self) -> Tensor | None:
        """What a checkpoint stores of it, see `qat.training.activations.static_part`."""
        self._check_calibrated()
        if not self.needs_calibration:
            return None
        if torch.compiler.is_compiling():
            recorded: Tensor = torch.ops.qat.static_part.default(self.amax, self.log_range, self.format.name)
            return recorded
        if self.log_range is not None or self.amax.is_inference():  # which have no version
            return static_part(self.format, self.limit)
        of = self.amax, self.amax._version, self.amax.data_ptr()
        if self._static is None or self._static[0][0] is not of[0] or self._static[0][1:] != of[1:]:
            self._static = of, static_part(self.format, self.amax)
        return self._static[1]

    def _check_calibrated(self) -> None:
        if self._ready or not self.needs_calibration:
            return
        if not bool(torch.isfinite(self.amax).all()):
            raise TrainingError(
                f"{self.format.name} inputs need a calibrated range; run qat.calibrate(model, batches) first"
            )
        self._ready = True

    def extra_repr(self) -> str:
        """See `WeightQuantizer`."""
        return f"{self.format.name}, rule={self.rule}, estimator={self.estimator}, observer={self.observer_kind}"
