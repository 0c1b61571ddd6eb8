"""The initialisation step `rotate`: orthogonal matrices that learn, folded into the weights.

A rotation spreads outliers over the values of a block, and which one does it best depends on the model, so it is
learned (SpinQuant, arXiv 2405.16406) while the weights stay: Cayley steps keep it orthogonal, the loss is the KL
divergence from the unrotated, unquantized model, and the model that runs has rounded weights and inputs, with
gradients straight through. Then it is folded once. What the unquantized model computes stays, up to float32, and
nothing is added to the checkpoint. `qat.init.rotations` says where a matrix can stand.

The result competes: it is kept only where the KL on calibration text that is kept back is lower than without it.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from qat.errors import ConfigError, UnsupportedError
from qat.init.calibration import observe
from qat.init.permute import logits_of, tolerance
from qat.init.reconstruct import BETAS, KEPT_BACK, LOOKS, divergence, learning, shuffled
from qat.init.rotations import Folding, Start, polished, residual_rotation, start_of, value_rotations
from qat.init.scales import ScaleSearch
from qat.init.step import Calibration, InitStep
from qat.modes import dense
from qat.sites import weights

Sites = Literal["values", "residual"]
_PROBE = 16  # tokens that show what reads what, and that nothing else does


class Rotate(InitStep):
    """Learn rotations with the weights frozen, and fold them.

    Attributes:
        sites: `values` is one matrix per key-value head, `residual` one for the residual stream.
        start: where learning begins; `hadamard` has random signs.
        steps: 0 folds the start as it is.
        lr: how far a step turns a channel, in radians; falls to zero.
        untie: with `residual`, give a head that is the embedding a tensor of its own.
        seed: of `hadamard` and `random`, and of the order of the text.
    """

    WHOLE_MODEL = True

    kind: Literal["rotate"] = "rotate"
    sites: tuple[Sites, ...] = ("values",)
    start: Start = "identity"
    steps: int = Field(default=40, ge=0)
    lr: float = Field(default=0.05, gt=0.0)
    untie: bool = False
    seed: int = Field(default=0, ge=0)

    @field_validator("sites")
    @classmethod
    def _check_sites(cls, sites: tuple[Sites, ...]) -> tuple[Sites, ...]:
        if not sites or len(set(sites)) < len(sites):
            raise ValueError(f"sites names `values`, `residual` or both, once each, not {list(sites)}")
        return sites

    @model_validator(mode="after")
    def _check(self) -> "Rotate":
        if self.start == "identity" and not self.steps:
            raise ValueError("rotate with start: identity and steps: 0 does nothing; give it steps, or another start")
        if self.untie and "residual" not in self.sites:
            raise ValueError("untie: only rotating the residual stream needs that; leave it out, or add that site")
        return self

    @property
    def moves_stream(self) -> bool:
        """See `InitStep`."""
        return "residual" in self.sites

    def passes(self, rows: int) -> float:
        """What it costs, in forward passes over `rows` of calibration text (of which a step reads two rows): a step
        has one of the unquantized model, and a backward pass takes two."""
        return 4 * self.steps * 2 / rows + (1 + LOOKS) * bool(self.steps)

    def run(self, calibration: Calibration) -> str | None:
        """Learn, fold, and observe again what the model's layers read."""
        if any(site.input is not None and site.input.transforms for site in weights(calibration.model).values()):
            raise ConfigError("inputs are rotated by hadamard already, which rotate cannot see; put rotate before it")
        probe = calibration.batches[0]["input_ids"][:1, :_PROBE]
        folding = _folding(calibration.model, self.sites, probe)
        starts = [start_of(self.start, rotation, self.seed + n) for n, rotation in enumerate(folding.rotations)]
        _prove(calibration.model, folding, probe, self.seed)
        what = _described(folding)
        if not self.steps:
            folding.write(starts)
            calibration.mean_square = observe(calibration.model, calibration.batches)
            return f"rotated: {what} ({self.start}, not learned)"
        fit = _Fit(calibration, folding, starts, self)
        with torch.enable_grad(), learning(calibration.model, fit.names):
            fit.run()
        if fit.result:
            folding.write(fit.result)
        else:
            folding.restore()
        calibration.mean_square = observe(calibration.model, calibration.batches)
        found = f"KL {fit.tried:.4f} on the text kept back, {fit.first:.4f} without"
        return f"rotated: {what}, {found}" if fit.result else f"not rotated, since it is no better: {what}, {found}"


def _described(folding: Folding) -> str:
    counts, widths = Counter[str](), {rotation.name: rotation.width for rotation in folding.rotations}
    for rotation in folding.rotations:
        counts[rotation.name] += rotation.heads
    return " and ".join(f"{name} ({count} x {widths[name]})" for name, count in counts.items())


def _folding(model: nn.Module, sites: tuple[Sites, ...], probe: Tensor) -> Folding:
    rotations = value_rotations(model) if "values" in sites else []
    if "residual" not in sites:
        return Folding(rotations)
    stream, gains, norms = residual_rotation(model, probe)
    return Folding([*rotations, stream], gains, norms)


def _prove(model: nn.Module, folding: Folding, probe: Tensor, seed: int) -> None:
    """Any rotation leaves alone what the unquantized model computes; leaves it as it was."""
    before = logits_of(model, probe)
    folding.write([start_of("random", rotation, seed) for rotation in folding.rotations])
    change = float((logits_of(model, probe) - before).abs().max() / before.abs().max())
    folding.restore()
    if not change <= tolerance(model):
        raise UnsupportedError(
            f"rotating changed the outputs of {type(model).__name__} by {change:.1%}: something reads channels that "
            "was not seen to; leave `rotate` out of scheme.init for this model"
        )


class _Matrix(nn.Module):
    """Matrices (heads, width, width) that stay orthogonal: the start times Cayley's map of what is learned."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.float())
        with torch.no_grad(), torch.autocast(start.device.type, enabled=False):
            parametrizations.orthogonal(self, "weight", orthogonal_map="cayley", use_trivialization=True)
            setattr(self, "weight", start.float())  # noqa: B010  # by the parametrization, which takes a tensor

    def value(self) -> Tensor:
        """The matrices in float32, whatever the caller's autocast: BF16 products would not stay orthogonal."""
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return self.weight


class _Fit:
    """Learns the matrices of a folding."""

    def __init__(self, calibration: Calibration, folding: Folding, starts: list[Tensor], settings: Rotate) -> None:
        self.calibration, self.folding, self.settings = calibration, folding, settings
        self.model = calibration.model
        self.matrices = [_Matrix(start) for start in starts]
        self.names = {name for name, p in self.model.named_parameters() if id(p) in folding.parameters}
        self.scales = _changed(calibration, folding)
        count = len(calibration.batches)
        self.kept_back = list(range(0, count, KEPT_BACK))
        self.learned_from = [index for index in range(count) if index not in self.kept_back] or self.kept_back
        ScaleSearch(search="amax", weighted=False).run(self.scales)
        self.first = self.best = self.judge()
        self.tried = float("inf")
        self.result: list[Tensor] = []

    def loss(self, index: int) -> Tensor:
        """KL divergence from the unquantized model, mean over tokens."""
        return divergence(self.model, self.calibration.batches[index], dense(self.model, inputs=True))

    @torch.no_grad()
    def judge(self) -> float:
        """Loss on the text that is kept back."""
        return float(torch.stack([self.loss(index) for index in self.kept_back]).mean())

    @torch.no_grad()
    def put(self, matrices: list[Tensor], ranges: bool) -> None:
        """The model with these matrices, and scales (and with `ranges` those of inputs) that fit it."""
        self.folding.write(matrices)
        ScaleSearch(search="amax", weighted=False).run(self.scales)
        if ranges:
            observe(self.model, self.calibration.batches)

    def run(self) -> None:
        """Adam with a rate that falls to zero; what was seen to be best is the result."""
        steps = self.settings.steps
        groups = [
            {"params": list(matrix.parameters()), "lr": self.settings.lr / rotation.width**0.5}
            for matrix, rotation in zip(self.matrices, self.folding.rotations, strict=True)
        ]
        optimizer = torch.optim.Adam(groups, betas=BETAS, foreach=True)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        order = shuffled(self.learned_from, self.settings.seed)
        self.look()
        for step, _ in self._counted(steps):
            self.backward(next(order))
            optimizer.step()
            optimizer.zero_grad()
            falling.step()
            last = step * LOOKS % steps < LOOKS
            if last:
                self.look()
            else:
                self.put([matrix.value().detach() for matrix in self.matrices], ranges=False)

    def _counted(self, steps: int) -> Iterator[tuple[int, str]]:
        names = {f"step {step}": step for step in range(1, steps + 1)}
        return ((step, name) for name, step in self.calibration.track(names))

    def backward(self, index: int) -> None:
        """Gradients of the matrices, from those of the weights that they are in."""
        self.loss(index).backward()
        made = [matrix.value() for matrix in self.matrices]
        with torch.autocast(made[0].device.type, enabled=False):
            leaves = [each.detach().requires_grad_() for each in made]
            for key, parameter in self.folding.parameters.items():
                if parameter.grad is not None:
                    self.folding.folded(key, leaves).backward(parameter.grad.float())
                    parameter.grad = None
            for each, leaf in zip(made, leaves, strict=True):
                if leaf.grad is not None:
                    each.backward(leaf.grad)

    @torch.no_grad()
    def look(self) -> None:
        """Judge the matrices as they are now."""
        now = [polished(matrix.value().detach()) for matrix in self.matrices]
        self.put(now, ranges=True)
        loss = self.judge()
        self.tried = min(self.tried, loss)
        if loss < self.best:
            self.best, self.result = loss, now


def _changed(calibration: Calibration, folding: Folding) -> Calibration:
    """Calibration of the weights whose scales a rotation changes: those it is in, and all that share a scale."""
    sites = weights(calibration.model)
    own = {path for path, site in sites.items() if id(site.parameter) in folding.parameters}
    paths = own | {path for path, site in sites.items() if own & set(site.fused)}
    return Calibration(calibration.model, [], {path: sites[path] for path in sites if path in paths}, {})
