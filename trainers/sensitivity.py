"""What quantizing each layer costs, measured on a little of a job's calibration text: KL to the unquantized model with
one set of fused layers quantized, or all but one, and the cheap scores of `qat.sensitivity` beside it.

Weights are rounded to nearest with scales by search, after whatever the scheme does to the whole model (smoothing,
rotations): error compensation and training come later and help all layers.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat import sensitivity
from qat.checkpoints.hf import load_configured, load_tokenizer
from qat.checkpoints.origin import locate
from qat.checkpoints.progress import counted
from qat.config import write_text_atomic
from qat.errors import ConfigError
from qat.init.blocks import BlockStep
from qat.init.calibration import initialise, observe
from qat.init.scales import ScaleSearch
from qat.init.step import InitStep
from qat.modes import only
from qat.scheme import Scheme
from qat.sensitivity import Scores
from qat.sites import weights
from qat.surgery import apply
from qat.trainers.data import Blocks, load_blocks
from qat.trainers.evaluate import Evaluator
from qat.trainers.job import Job
from qat.trainers.packing import Batch, model_inputs

TOKENS = 512  # of the text, by default


@dataclass(frozen=True)
class Measured:
    """One set of layers that engines fuse, or a layer by itself.

    Attributes:
        paths: of its weights.
        weight, input: their formats.
        parameters: how many weights.
        kl: of the model with only this set quantized; with `others`, what leaving it unquantized saves of the KL with
            everything quantized. None where it was not measured.
        scores: the largest of the members', by name; NaN is not known.
    """

    paths: tuple[str, ...]
    weight: str
    input: str | None
    parameters: int
    kl: float | None
    scores: dict[sensitivity.Score, float]

    @property
    def name(self) -> str:
        """`model.layers.0.self_attn.{q,k,v}_proj` of several, with what they share said once."""
        return merged(self.paths)


def merged(paths: tuple[str, ...]) -> str:
    """Several paths that differ in their last part, as one name."""
    parents = {path.rpartition(".")[0] for path in paths}
    if len(paths) == 1 or len(parents) > 1:
        return " and ".join(paths)
    return f"{parents.pop()}.{{{','.join(path.rpartition('.')[2] for path in paths)}}}"


class Bench:
    """A job's model and some rows of its calibration text, to try schemes on.

    Args:
        job: gives the model, the text and the precision.
        source: the model's folder.
        tokens: how much of the text KL is measured on, rounded up to whole rows.
    """

    def __init__(self, job: Job, source: Path, tokens: int) -> None:
        self.job, self.source = job, source
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        mixed = job.precision == "bf16-mixed" or (job.precision == "auto" and self.device.type == "cuda")
        self.dtype = torch.bfloat16 if mixed else None
        self.model: Any = self._load()
        self.calibration = self._text()
        rows = min(-(-tokens // self.calibration.seq_len), len(self.calibration))
        self.blocks = replace(self.calibration, num_rows=rows)
        self.evaluator = Evaluator(self.model, self.blocks, job.eval.batch, self.device, self.dtype)

    def _load(self) -> nn.Module:
        model: nn.Module = load_configured(self.job.model, self.source)
        return model.to(self.device)

    def _text(self) -> Blocks:
        job = self.job
        config = job.calibration or job.data
        tokenizer = load_tokenizer(self.source, job.model.trust_remote_code)
        tokens = job.calibration_rows * config.seq_len
        if job.calibration is None:
            tokens = job.steps * job.rows * config.seq_len  # the run's own rows, which are read once for both
        return load_blocks(config, tokenizer, num_tokens=tokens, teacher=self.model)

    def batches(self, blocks: Blocks) -> Iterator[Batch]:
        """The model's inputs of `blocks`, as many rows as calibration takes."""
        size = self.job.micro_rows
        for start in range(0, min(len(blocks), self.job.calibration_rows), size):
            rows = blocks.rows(list(range(start, min(start + size, len(blocks)))))
            yield model_inputs({name: tensor.to(self.device) for name, tensor in rows.items()})

    def quantized(self, scheme: Scheme) -> nn.Module:
        """A model of its own under the scheme, rounded to nearest with searched scales."""
        model = apply(self._load(), scheme.model_copy(update={"fallback": None, "learn": "none"}), defer_init=True)
        rounding = _without_compensation(scheme)
        with self.autocast():
            batches = list(counted(self.batches(self.calibration), "calibrating", len(self.calibration), "batches"))
            initialise(model, batches, rounding, observe(model, batches))
        return model

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """What the job computes in."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def kl(self, model: nn.Module) -> float:
        """KL(unquantized || model) in nats per token."""
        return self.evaluator.score(model).kl

    def by_set(self, model: nn.Module, others: bool = False) -> dict[tuple[str, ...], float]:
        """KL of each set, see `Measured.kl`."""
        everything = self.kl(model) if others else 0.0
        sets = sensitivity.sets(model)
        found = {}
        for members in counted(sets, "one set of layers at a time", len(sets), "sets"):
            with only(model, members, others):
                kl = self.kl(model)
            found[members] = everything - kl if others else kl
        return found


def _without_compensation(scheme: Scheme) -> Scheme:
    """Steps that go over to other inputs (smoothing, rotations) stay; those that make scales or move weights for their
    rounding's sake become a plain search."""

    def steps(given: Iterable[InitStep]) -> tuple[InitStep, ...]:
        kept = (step for step in given if not step.MAKES_SCALES and not isinstance(step, BlockStep))
        return (*kept, ScaleSearch())

    rules = tuple(
        rule if rule.init is None else rule.model_copy(update={"init": steps(rule.init)}) for rule in scheme.rules
    )
    return scheme.model_copy(update={"init": steps(scheme.init), "rules": rules, "fallback": None})


def measure(job: Job, source: Path, tokens: int = TOKENS, *, kl: bool = True, others: bool = False) -> list[Measured]:
    """Every set of layers that the job's scheme quantizes, those that suffer most first (by KL, or else by `mse`).

    Raises:
        ConfigError: `tokens` is not positive, or the scheme quantizes nothing.
    """
    if tokens < 1:
        raise ConfigError(f"tokens {tokens} must be positive")
    bench = Bench(job, source, tokens)
    model = bench.quantized(job.scheme)
    with bench.autocast():
        each = sensitivity.scores(model, bench.batches(bench.blocks))
    costs: dict[tuple[str, ...], float] = bench.by_set(model, others) if kl else {}
    found = [_measured(model, members, each, costs.get(members)) for members in sensitivity.sets(model)]
    if not found:
        raise ConfigError("the scheme quantizes nothing, so there is nothing to measure")
    return ranked(found, "kl" if kl else "mse")


def _measured(model: nn.Module, members: tuple[str, ...], each: dict[str, Scores], kl: float | None) -> Measured:
    sites = weights(model)
    first = sites[members[0]]
    parameters = sum({id(sites[path].parameter): sites[path].parameter.numel() for path in members}.values())
    scores = {name: sensitivity.of_set(members, each, name) for name in SCORES}
    return Measured(
        members, first.format.name, first.input.format.name if first.input else None, parameters, kl, scores
    )


SCORES: tuple[sensitivity.Score, ...] = ("mse", "quartile", "std", "kurtosis")


def value(one: Measured, by: str) -> float | None:
    """Its KL, or one of its scores; None where it is not known."""
    found = one.kl if by == "kl" else next(score for name, score in one.scores.items() if name == by)
    return None if found is None or found != found else found


def ranked(found: list[Measured], by: str) -> list[Measured]:
    """Those that suffer most first; those of whom it is not known last."""
    known = [(value(one, by), one) for one in found]
    return [one for _, one in sorted(known, key=lambda pair: math.inf if pair[0] is None else -pair[0])]


def agreement(found: list[Measured], by: str) -> float | None:
    """Spearman's rank correlation of a score with KL over the sets that have both; None for fewer than three."""
    both = [(one.kl, value(one, by)) for one in found if one.kl is not None and value(one, by) is not None]
    if len(both) < 3:
        return None
    first, second = (_ranks([pair[side] for pair in both]) for side in (0, 1))
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def _ranks(values: list[Any]) -> torch.Tensor:
    """Places in ascending order; equal values share the mean of theirs."""
    x = torch.tensor(values, dtype=torch.float64)
    below, equal = (x[:, None] > x).sum(1), (x[:, None] == x).sum(1)
    return below.double() + (equal.double() - 1) / 2


# --- shown ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What `qat analyze CONFIG` says.

    Attributes:
        name: of the job.
        measured: those that suffer most first.
        tokens: of the text.
        others: whether KL is what leaving a set unquantized saves.
    """

    name: str
    measured: list[Measured]
    tokens: int
    others: bool

    @property
    def agreements(self) -> dict[str, float]:
        """Spearman's rank correlation with KL, by score."""
        found = {score: agreement(self.measured, score) for score in SCORES}
        return {score: rank for score, rank in found.items() if rank is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is not known or infinite is None."""
        sets = [
            {
                "paths": list(one.paths),
                "weight": one.weight,
                "input": one.input,
                "parameters": one.parameters,
                "kl": one.kl,
                **{name: score if math.isfinite(score) else None for name, score in one.scores.items()},
            }
            for one in self.measured
        ]
        kind = "saved by leaving the set unquantized" if self.others else "with only the set quantized"
        return {"job": self.name, "tokens": self.tokens, "kl": kind, "sets": sets, "agreement": self.agreements}

    def lines(self, most: int) -> list[str]:
        """A table of the `most` that suffer most."""
        shown = self.measured[:most]
        width = max(len(one.name) for one in shown)
        formats = [f"{one.weight}/{one.input or '-'}" for one in shown]
        wide = max(*map(len, formats), 7)
        text = [
            f"{self.name}: {len(self.measured)} sets of layers on {self.tokens} tokens, those that suffer most first"
        ]
        text.append(f"{'layers':<{width}}  {'formats':<{wide}}  {'KL':>9}" + "".join(f"  {n:>9}" for n in SCORES))
        for one, name in zip(shown, formats, strict=True):
            cells = [one.kl, *(one.scores[score] for score in SCORES)]
            text.append(f"{one.name:<{width}}  {name:<{wide}}" + "".join(f"  {_cell(cell):>9}" for cell in cells))
        if len(self.measured) > len(shown):
            text.append(f"and {len(self.measured) - len(shown)} more (--most, --json)")
        if self.agreements:
            ranks = ", ".join(f"{score} {rank:.2f}" for score, rank in self.agreements.items())
            text.append(f"rank correlation with KL: {ranks}")
        return text


def analyze_job(job: Job, tokens: int, *, kl: bool, others: bool) -> Report:
    """What `qat analyze CONFIG` shows; arguments as in `measure`."""
    plain = job.model_copy(update={"scheme": job.scheme.model_copy(update={"fallback": None})})
    measured = measure(plain, locate(job.model), tokens, kl=kl, others=others)
    return Report(job.name, measured, tokens, others)


def _cell(number: float | None) -> str:
    return "–" if number is None or not math.isfinite(number) else f"{number:.3g}"


def write(found: Report, folder: Path) -> list[Path]:
    """sensitivity.json and sensitivity.png in `folder`; returns the files."""
    from qat.trainers.sensitivity_plot import draw

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sensitivity.json"
    write_text_atomic(path, json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
    return [path, draw(folder, found)]
