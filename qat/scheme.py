"""Which tensors get which Format: ordered rules over module paths, first match wins, nothing is left unsaid.

Every module that owns a 2-D (or larger) weight must be matched by a rule, either with formats or with a reason to
skip it; a rule that matches nothing is an error. `fused` names the layers that serving engines merge into one matrix:
their members share the per-tensor scale, and the quantized input, while training.
"""

import fnmatch
import re
from typing import Literal

from pydantic import Field, model_validator

from qat.config import Strict
from qat.families import DEFAULT
from qat.init.ranges import Observer, Start
from qat.numbers.catalog import lookup
from qat.training.gradients import Estimator

ActivationRule = Literal["vllm", "compressed_tensors"]
Compensation = Literal["none", "gptq"]
Learn = Literal["none", "lsq", "dual_lsq"]
TiedPolicy = Literal["error", "share", "untie"]


class Rule(Strict):
    """One line of a scheme.

    `match` is a shell pattern on the module path (`*.self_attn.*_proj`), or a regular expression after `re:`. Give
    `weight` (and optionally `input`) formats, or `skip` with the reason, which the coverage report repeats.
    """

    match: str
    weight: str | None = None
    input: str | None = None
    skip: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Rule":
        if (self.weight is None) == (self.skip is None):
            raise ValueError(f"rule {self.match!r} needs exactly one of `weight: FORMAT` and `skip: REASON`")
        if self.input is not None and self.weight is None:
            raise ValueError(f"rule {self.match!r} skips its modules, so it cannot give them an `input` format")
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as error:
                raise ValueError(f"rule {self.match!r} is not a valid regular expression: {error}") from error
        for name in (self.weight, self.input):
            if name is not None:
                lookup(name)
        if self.input is not None and lookup(self.input).block[0] > 1:
            raise ValueError(f"rule {self.match!r}: {self.input} has 2-D blocks, which only weights can have")
        return self

    def matches(self, path: str) -> bool:
        """Whether this rule speaks of the module at `path`."""
        if self.match.startswith("re:"):
            return re.fullmatch(self.match[3:], path) is not None
        return fnmatch.fnmatchcase(path, self.match)


class Scheme(Strict):
    """Rules plus how scales start, whether they are learned, and whose activation arithmetic is trained.

    Attributes:
        start: weight scales at the start; see `qat.init.ranges.start_scales`.
        weighted_start: weigh the start's error by the mean square of each input channel (one calibration pass).
        smooth: above 0, moves magnitude between input channels and weight columns before anything is quantized, without
            changing what the model computes (see `qat.init.smooth`); 0.5 balances them. Needs calibration.
        compensate: "gptq" also moves the weights, so that each column makes up for what earlier ones lost in rounding.
            Calibration then keeps a float32 matrix of in_features^2 per distinct input.
        learn: "none" keeps the start; "lsq" learns one scale per block; "dual_lsq" learns separate scales for
            rounding and for dequantizing (only the second is stored).
        observer: how static activation ranges are found.
        activation_rule: whose arithmetic dynamic activations follow.
        estimator: gradient of rounding for inputs; weights always pass straight through.
        tied: what to do when one tensor serves as embedding and head and the rules treat the two differently.
        round_bf16: round dequantized weights to BF16 in the forward pass, as a BF16 server does.
    """

    rules: tuple[Rule, ...]
    start: Start = "auto"
    weighted_start: bool = True
    smooth: float = Field(default=0.0, ge=0.0, le=1.0)
    compensate: Compensation = "none"
    learn: Learn = "dual_lsq"
    observer: Observer = "minmax"
    activation_rule: ActivationRule = "vllm"
    estimator: Estimator = "clipped"
    fused: tuple[tuple[str, ...], ...] = DEFAULT.fused
    tied: TiedPolicy = "error"
    round_bf16: bool = True

    def rule_for(self, path: str) -> Rule | None:
        """The first rule that matches, or None."""
        return next((rule for rule in self.rules if rule.matches(path)), None)
