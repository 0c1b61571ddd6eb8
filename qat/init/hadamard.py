"""The initialisation step `hadamard`: quantized inputs are rotated in groups, their weights were rotated once.

The rotation is folded into the weight (W becomes W H), so training, scales, error compensation and export see an
ordinary weight. What remains is online: the input's quantizer rotates before it rounds, and so must a server. Without
rounding the model computes what it did, up to float32. What moves magnitude between layers (`smooth`) comes before.
"""

from typing import Literal

import torch
from pydantic import Field, field_validator

from qat.errors import ConfigError
from qat.init.calibration import observe
from qat.init.step import Calibration, InitStep
from qat.numbers.hadamard import BlockHadamard, size_problem


class Hadamard(InitStep):
    """Rotate quantized inputs by a block Hadamard, and their weights once.

    Attributes:
        size: of a block, a power of two that divides the widths; the input format's own group is a good one.
    """

    kind: Literal["hadamard"] = "hadamard"
    size: int = Field(default=32)

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: int) -> int:
        if problem := size_problem(size):
            raise ValueError(problem)
        return size

    def run(self, calibration: Calibration) -> str | None:
        """Fold, and observe again what the layers read. Layers that are rotated already stay as they are."""
        rotate = BlockHadamard(self.size)
        sites = {path: site for path, site in calibration.sites.items() if site.input is not None}
        fresh = {path: site for path, site in sites.items() if site.input is not None and not site.input.transforms}
        if not sites:
            raise ConfigError("hadamard rotates quantized inputs, and none of its layers has any; leave it out of init")
        for site in fresh.values():
            site.weight.copy_(rotate(site.weight, torch.float64))
        self.take_up(calibration)
        torch.clear_autocast_cache()  # it holds BF16 copies of the weights as they were, if the caller has autocast on
        calibration.mean_square = observe(calibration.model, calibration.batches)
        return f"rotated the inputs of {len(fresh)} of {len(calibration.sites)} layers in blocks of {self.size}"

    def take_up(self, calibration: Calibration) -> None:
        """See `InitStep`."""
        for site in calibration.sites.values():
            if site.input is not None:
                site.input.transforms = site.input.transforms or (BlockHadamard(self.size),)
