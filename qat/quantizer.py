"""The modules a quantized model is made of: quantizers that own scales, and the layers that use them.

A `WeightQuantizer` holds a start scale and, where scales are learned, its logarithmic correction: the parameter is then
free of units, so one learning rate fits every layer. An `InputQuantizer` follows the data; layers that read the same
tensor share one instance, which also computes it once.
"""

import weakref
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.errors import TrainingError
from qat.init.ranges import Observer, RangeObserver
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor, Scales, quantize
from qat.scheme import ActivationRule, Learn
from qat.training.activations import dynamic_fake_quantize
from qat.training.gradients import Estimator
from qat.training.ops import fake_quantize, quantized_linear


class WeightQuantizer(nn.Module):
    """Scales of one weight, and the weight's trip onto the grid.

    Args:
        fmt: the weight's format.
        scales: where to start.
        learn: which corrections are parameters.
        round_bf16: see `Scheme.round_bf16`.
    """

    start: Tensor
    global_scale: Tensor | None
    zero_point: Tensor | None
    choice: Tensor | None

    def __init__(self, fmt: Format, scales: Scales, learn: Learn, round_bf16: bool = True) -> None:
        super().__init__()
        self.format, self.learn, self.round_bf16 = fmt, learn, round_bf16
        for name in ("start", "global_scale", "zero_point", "choice"):
            self.register_buffer(name, None)
        zeros = torch.zeros(scales.stored.shape, device=scales.stored.device)
        self.log_scale = nn.Parameter(zeros) if learn != "none" else None
        self.log_divisor = nn.Parameter(zeros.clone()) if learn == "dual_lsq" else None
        self.set_scales(scales)

    def set_scales(self, scales: Scales) -> None:
        """Start (again) from these scales, with no learned correction."""
        self.start = scales.effective().clone()
        self.global_scale, self.zero_point, self.choice = scales.global_scale, scales.zero_point, scales.choice
        for correction in (self.log_scale, self.log_divisor):
            if correction is not None:
                nn.init.zeros_(correction)

    def _latent(self) -> Tensor:
        return self.start if self.log_scale is None else self.start * self.log_scale.exp()

    def multiplier(self) -> Tensor:
        """float32 effective scale as it will be stored, (block rows, block columns); gradient passes the rounding."""
        latent = self._latent()
        return self._stored(latent.detach()).effective() + (latent - latent.detach())  # an exact zero with the gradient

    def _stored(self, latent: Tensor) -> Scales:
        stored = self.format.scale.store(latent, self.global_scale)
        return Scales(stored, self.global_scale, self.zero_point, self.choice, type=self.format.scale)

    def divisor(self) -> Tensor | None:
        """The scale that divides before rounding, where it is learned separately."""
        return None if self.log_divisor is None else self.start * self.log_divisor.exp()

    @torch.no_grad()
    def scales(self) -> Scales:
        """What an export stores (plus the divisor, which only matters until the codes are made)."""
        return replace(self._stored(self._latent()), divisor=self.divisor())

    def quantize(self, weight: Tensor) -> QTensor:
        """Codes and stored scales of `weight`: exactly the numbers that `forward` multiplies with."""
        return quantize(weight, self.format, self.scales())

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` (rows, columns) on its grid, in its dtype."""
        return fake_quantize(
            weight,
            self.format.name,
            self._given(),
            multiplier=self.multiplier(),
            divisor=self.divisor(),
            round_bf16=self.round_bf16,
        )

    def _given(self) -> Scales:
        return Scales(self.start, self.global_scale, self.zero_point, self.choice)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`linear(x, self(weight), bias)` in the dtype of x, keeping less for the backward pass."""
        return quantized_linear(
            x,
            weight,
            bias,
            self.format.name,
            self._given(),
            multiplier=self.multiplier(),
            divisor=self.divisor(),
            round_bf16=self.round_bf16,
        )

    def extra_repr(self) -> str:
        """Format and learning mode, for `print(model)`."""
        return f"{self.format.name}, learn={self.learn}"


class InputQuantizer(nn.Module):
    """Fake quantization of a layer's input by the serving engine's rule.

    `amax` is the calibrated range (a float32 scalar, NaN until `calibrate`): static formats derive their scale from it,
    NVFP4-like formats their per-tensor scale; dynamic formats ignore it.
    """

    amax: Tensor

    def __init__(self, fmt: Format, rule: ActivationRule, estimator: Estimator, observer: Observer) -> None:
        super().__init__()
        self.format, self.rule, self.estimator, self.observer_kind = fmt, rule, estimator, observer
        self.register_buffer("amax", torch.tensor(float("nan")))
        self.consumers = 1
        self._observer: RangeObserver | None = None
        self._input: weakref.ref[Tensor] | None = None
        self._output: Tensor | None = None
        self._uses = 0
        self._ready = False

    @property
    def needs_calibration(self) -> bool:
        """Whether the format has a static part."""
        return self.format.global_scale or self.format.is_static

    def observe(self) -> None:
        """Pass inputs through unchanged and collect their range, until `freeze`."""
        self._observer = RangeObserver(self.observer_kind, self.format)

    def cancel(self) -> None:
        """Stop observing and keep the range there was."""
        self._observer = None

    def freeze(self) -> None:
        """Fix the range from what was observed."""
        if self._observer is not None and self.needs_calibration:
            self.amax.fill_(self._observer.amax())
        self._observer = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., columns) on its grid. The second and later consumers of the same tensor get the first's result."""
        if self._observer is not None:
            if self._input is None or self._input() is not x:  # once, however many layers read it
                self._observer.add(x)
                self._input = weakref.ref(x)
            return x
        if self._output is None or self._input is None or self._input() is not x:
            self._output = self.quantize(x)
            self._input, self._uses = weakref.ref(x), 0
        output = self._output
        self._uses += 1
        if self._uses >= self.consumers:
            self._input = self._output = None
        return output

    def quantize(self, x: Tensor) -> Tensor:
        """x (..., columns) on its grid."""
        self._check_calibrated()
        return dynamic_fake_quantize(x, self.format, self.rule, self.estimator, self.amax)

    def _check_calibrated(self) -> None:
        if self._ready or not self.needs_calibration:
            return
        if not bool(torch.isfinite(self.amax)):
            raise TrainingError(
                f"{self.format.name} inputs need a calibrated range; run qat.calibrate(model, batches) first"
            )
        self._ready = True

    def extra_repr(self) -> str:
        """Format and rule, for `print(model)`."""
        return f"{self.format.name}, rule={self.rule}"


class QatLinear(nn.Linear):
    """A linear layer whose weight, and optionally input, is fake-quantized. Parameter names stay those of nn.Linear.

    `fused` are the paths of the set that is trained as one, this layer's among them.
    """

    weight_quantizer: WeightQuantizer
    input_quantizer: InputQuantizer | None
    fused: tuple[str, ...] = ()

    @classmethod
    def wrap(cls, linear: nn.Linear, weight: WeightQuantizer, input: InputQuantizer | None) -> "QatLinear":
        """A QatLinear that takes over the parameters of `linear`."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.weight_quantizer, layer.input_quantizer = weight, input
        layer.train(linear.training)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> (..., out_features)."""
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        quantizer = self.weight_quantizer
        if "forward" in vars(quantizer) or not torch.is_grad_enabled():  # `dense` and `served` override the weight
            return functional.linear(input, quantizer(self.weight), self.bias)
        if torch.is_autocast_enabled(input.device.type):  # which would cast the scales too, inside the operator
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return quantizer.linear(input, self.weight, self.bias)


class QatEmbedding(nn.Embedding):
    """An embedding whose table is fake-quantized."""

    weight_quantizer: WeightQuantizer
    fused: tuple[str, ...] = ()

    @classmethod
    def wrap(cls, embedding: nn.Embedding, weight: WeightQuantizer) -> "QatEmbedding":
        """A QatEmbedding that takes over the table of `embedding`."""
        with torch.device("meta"):
            layer = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        layer.weight, layer.weight_quantizer = embedding.weight, weight
        layer.train(embedding.training)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """input: token ids, any shape -> (..., embedding_dim)."""
        table = self.weight_quantizer(self.weight)
        return functional.embedding(input, table, self.padding_idx)


QatLayer = QatLinear | QatEmbedding
