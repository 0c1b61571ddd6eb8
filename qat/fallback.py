"""Falling back: the layers that suffer most from a scheme's formats get others. Which ones is decided once, before
training, and written into the run's job as ordinary rules (`qat.trainers.fallback`)."""

import re
from typing import Literal

from pydantic import Field, model_validator

from qat.config import Strict
from qat.numbers.catalog import lookup
from qat.sensitivity import Score

LEVEL = re.compile(r"L[1-9][0-9]*")


class Fallback(Strict):
    """How many layers fall back, and to what.

    Attributes:
        level: `L10` is the ten layers that suffer most. Layers that engines fuse count, and fall, as one.
        layers: the same as a number; one of the two.
        weight, input: their formats; without `weight` they are not quantized.
        by: what they are ranked by: "kl" of the model with one layer quantized, or a score of one pass over the
            text, see `qat.sensitivity.Scores`.
        tokens: of the calibration text that are looked at.
    """

    level: str | None = None
    layers: int | None = Field(default=None, ge=1)
    weight: str | None = None
    input: str | None = None
    by: Literal["kl"] | Score = "kl"
    tokens: int = Field(default=512, ge=16)

    @model_validator(mode="after")
    def _check(self) -> "Fallback":
        if (self.level is None) == (self.layers is None):
            raise ValueError("fallback needs exactly one of `level: L10` and `layers: 10`")
        if self.level is not None and not LEVEL.fullmatch(self.level):
            raise ValueError(f"level {self.level!r} is no level; write L and the number of layers, for example L10")
        if self.input is not None and self.weight is None:
            raise ValueError("fallback has no `weight` format, so it takes no `input` format either")
        for name in (self.weight, self.input):
            if name is not None:
                lookup(name)
        return self

    @property
    def count(self) -> int:
        """How many layers fall back, fused ones counted as one."""
        return self.layers or int((self.level or "L0")[1:])
