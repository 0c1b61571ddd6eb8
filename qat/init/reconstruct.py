"""The initialisation step `reconstruct`: each block is fitted to the outputs of the dense block.

What enters is what the quantized blocks before give, what should leave is what the dense model has there. Between them
the rounding of the weights, their scales and the block's norms are learned by gradient, through the fake quantization
that training uses (the class of AutoRound, arXiv 2309.05516, and of EfficientQAT's Block-AP, 2407.11062). A weight may
move by one step of its grid at most: a short text decides how it is rounded, not what it is.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from qat.init.blocks import Block, BlockStep
from qat.modes import frozen
from qat.numbers.numerics import from_blocks, per_block, to_blocks
from qat.sites import Site

BETAS = (0.9, 0.99)
FURTHEST = 1.0  # steps of the grid that a weight may move
LOOKS = 4  # times at which the text that is kept back is looked at
KEPT_BACK = 8  # one batch of so many judges, and is not learned from


class Reconstruct(BlockStep):
    """Fit each block to its dense outputs; what is no better on text that is kept back stays as it was.

    Attributes:
        steps: per block.
        lr: of the weights, in steps of their grid.
        scale_lr: relative change of a learned scale per step.
        norm_lr: relative change of the block's vectors (weights of norms, biases) per step.
        rows: of calibration text per step.
    """

    kind: Literal["reconstruct"] = "reconstruct"
    steps: int = Field(default=60, ge=1)
    lr: float = Field(default=0.01, ge=0.0)
    scale_lr: float = Field(default=1e-3, ge=0.0)
    norm_lr: float = Field(default=1e-3, ge=0.0)
    rows: int = Field(default=2, ge=1)

    def passes(self) -> float:
        """See `BlockStep`: those that judge; steps are training, not passes."""
        return (1 + LOOKS) / KEPT_BACK

    def run_block(self, block: Block) -> Counter[str]:
        """See `BlockStep`."""
        fit = _Fit(block)
        with torch.enable_grad(), learning(block.module, set(fit.start)):
            fit.run(self)
        fit.write()
        return Counter(
            blocks=1, improved=int(fit.best < fit.first), permille=round(1000 * fit.best / max(fit.first, 1e-30))
        )

    def sentence(self, counts: Counter[str]) -> str | None:
        """See `BlockStep`."""
        if not counts["blocks"]:
            return None
        left = counts["permille"] / counts["blocks"] / 10
        return (
            f"reconstruct: {counts['improved']} of {counts['blocks']} blocks improved on the text kept back, "
            f"to {left:.0f}% of their error on average"
        )


@contextlib.contextmanager
def learning(module: nn.Module, names: set[str]) -> Iterator[None]:
    """Only these parameters get gradients inside this context."""
    before = {name: (p, p.requires_grad) for name, p in module.named_parameters()}
    try:
        for name, (parameter, _) in before.items():
            parameter.requires_grad_(name in names)
        yield
    finally:
        for parameter, learned in before.values():
            parameter.requires_grad_(learned)
            parameter.grad = None


class _Fit:
    """Learns parameters of one block, each as `start + unit * moved`."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.parameters = dict(block.module.named_parameters())
        self.weights, self.scales, self.vectors = self._units()
        self.unit = {**self.weights, **self.scales, **self.vectors}
        self.start = {name: self.parameters[name].detach().clone() for name in self.unit}
        self.moved = {name: torch.zeros_like(start) for name, start in self.start.items()}
        count = len(block.target)
        self.kept_back = list(range(0, count, KEPT_BACK))
        self.learned_from = [index for index in range(count) if index not in self.kept_back] or self.kept_back
        self.first = self.best = self.judge()
        self.result = dict(self.start)

    def _units(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """In which weights, scales and vectors move, by name."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        weights, scales = {}, {}
        for site in self.block.sites.values():
            weights[names[id(site.parameter)]] = spacing(site)
            for scale in (site.quantizer.log_scale, site.quantizer.log_divisor):
                if scale is not None:
                    scales[names[id(scale)]] = torch.ones_like(scale)
        free = {n: p.detach().abs() for n, p in self.parameters.items() if p.dim() == 1 and p.requires_grad}
        return weights, scales, {name: size.clamp_min(0.1 * float(size.mean())) for name, size in free.items()}

    def loss(self, index: int) -> Tensor:
        """Squared error of the block's output in parts of its square, mean over the tokens of a batch."""
        output = self.block.run(self.block.served[index], index).float()
        return error(output, self.block.target[index].float())

    @torch.no_grad()
    def judge(self) -> float:
        """Loss on the text that is kept back, for which each weight is put on its grid once."""
        with frozen(self.block.module):
            return float(torch.stack([self.loss(index) for index in self.kept_back]).mean())

    def run(self, settings: Reconstruct) -> None:
        """Adam with a rate that falls to zero."""
        rates = ((self.weights, settings.lr), (self.scales, settings.scale_lr), (self.vectors, settings.norm_lr))
        groups = [{"params": [self.moved[name] for name in names], "lr": rate} for names, rate in rates if names]
        optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
        order = shuffled(self.learned_from)
        together = max(1, settings.rows // len(self.block.target[0]))
        for step in range(1, settings.steps + 1):
            for _ in range(together):
                (self.loss(next(order)) / together).backward()
            self._move(optimizer)
            falling.step()
            if step * LOOKS % settings.steps < LOOKS and (loss := self.judge()) < self.best:
                self.best = loss
                self.result = {name: self.parameters[name].detach().clone() for name in self.start}

    @torch.no_grad()
    def _move(self, optimizer: torch.optim.Optimizer) -> None:
        for name, moved in self.moved.items():
            gradient = self.parameters[name].grad
            moved.grad = None if gradient is None else gradient.mul_(self.unit[name])
            self.parameters[name].grad = None
        optimizer.step()
        for name, moved in self.moved.items():
            if name in self.weights:
                moved.clamp_(-FURTHEST, FURTHEST)
            torch.addcmul(self.start[name], self.unit[name], moved, out=self.parameters[name].data)

    @torch.no_grad()
    def write(self) -> None:
        """Put the best of what was seen into the block."""
        for name, value in self.result.items():
            self.parameters[name].copy_(value)


def error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |output - target|^2 / |target|^2: what follows normalises each token."""
    return ((output - target).square().sum(-1) / target.square().sum(-1)).mean()


def divergence(model: Any, batch: dict[str, Any], before: contextlib.AbstractContextManager[None]) -> Tensor:
    """KL divergence of a model's predictions on a batch from its own inside `before`, mean over tokens."""
    with torch.no_grad(), before:
        wanted = model(**batch).logits.float().log_softmax(-1).flatten(0, -2)
    got = model(**batch).logits.float().log_softmax(-1).flatten(0, -2)
    return functional.kl_div(got, wanted, log_target=True, reduction="batchmean")


def shuffled(indices: list[int], seed: int = 0) -> Iterator[int]:
    """Endless: all of them in a new order each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for place in torch.randperm(len(indices), generator=generator).tolist():
            yield indices[place]


def spacing(site: Site) -> Tensor:
    """Distance between the two values of the grid around each weight, of the parameter's shape."""
    fmt, weight = site.format, site.weight.detach().float()
    unit = per_block(site.quantizer.scales().effective())
    grid = torch.tensor(fmt.element.grid, device=weight.device)
    above = torch.bucketize((to_blocks(weight, fmt) / unit).contiguous(), grid).clamp(1, len(grid) - 1)
    gaps = from_blocks(grid.diff()[above - 1] * unit, weight.shape, fmt)
    return gaps.transpose(-1, -2).contiguous() if site.owner.TRANSPOSED else gaps
