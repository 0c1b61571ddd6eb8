"""Which layer gets which format under a budget of bits (`qat assign`): KL of every set of layers in every candidate,
measured one at a time, and the choice that minimises their sum.

That KL is additive is an assumption; the chosen mixture is measured too, and both numbers are said.
"""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from torch import nn

from qat.adapters import candidates
from qat.checkpoints.export_plan import refusals
from qat.checkpoints.layouts import TARGETS
from qat.checkpoints.origin import locate
from qat.config import write_text_atomic
from qat.errors import ConfigError, UnsupportedError
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.scale import BF16, F32, ScaleType
from qat.scheme import Rule, Scheme
from qat.surgery import DENSE_BITS, apply, plan, report, rotate_inputs, trained_together
from qat.trainers.exportable import student_without_numbers
from qat.trainers.fallback import treated
from qat.trainers.job import Job
from qat.trainers.sensitivity import Bench, merged

DENSE = "bf16"
REASON = "assigned: it suffers most from every other format"

Pair = tuple[str | None, str | None]
Members = tuple[str, ...]


@dataclass(frozen=True)
class Option:
    """One set of layers in one candidate: all its bits, and what that costs."""

    pair: Pair
    bits: float
    kl: float


@dataclass(frozen=True)
class Assignment:
    """What was chosen, and what it costs.

    Attributes:
        job: the given one, with rules for what differs from its own formats.
        chosen: the option of each set.
        bits: per weight of the layers that were assigned.
        model_bits: per weight of the whole model.
        predicted, measured: KL: the sum over the sets, and of the model as a whole.
        uniform: by candidate, the sum and the measured KL with all layers in it.
    """

    job: Job
    chosen: dict[Members, Option]
    bits: float
    model_bits: float
    predicted: float
    measured: float
    uniform: dict[str, tuple[float, float]]

    def lines(self) -> list[str]:
        """For people."""
        text = [f"{'all layers in':<32}  {'sum of KL':>9}  {'measured':>9}"]
        for name, (total, kl) in self.uniform.items():
            text.append(f"{name:<32}  {total:>9.4f}  {kl:>9.4f}")
        text.append(
            f"{f'the mixture, {self.bits:.2f} bits per weight':<32}  {self.predicted:>9.4f}  {self.measured:>9.4f}"
        )
        for pair in dict.fromkeys(option.pair for option in self.chosen.values()):
            sets = [members for members, option in self.chosen.items() if option.pair == pair]
            text.append(f"{spelled(pair)}: {len(sets)} sets")
            text += [f"  {merged(members)}" for members in sets[:8]]
            text += [f"  and {len(sets) - 8} more"] if len(sets) > 8 else []
        return [*text, f"the whole model: {self.model_bits:.2f} bits per weight"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "bits_per_weight": self.bits,
            "model_bits_per_weight": self.model_bits,
            "kl": {"sum": self.predicted, "measured": self.measured},
            "uniform": {name: {"sum": total, "measured": kl} for name, (total, kl) in self.uniform.items()},
            "sets": [
                {"paths": list(members), "formats": spelled(option.pair), "kl": option.kl}
                for members, option in self.chosen.items()
            ],
        }


def parsed(name: str) -> Pair:
    """(weight, input) of `WEIGHT`, `WEIGHT/INPUT` or `bf16`.

    Raises:
        ConfigError, FormatError: more than two formats, or an unknown one.
    """
    if name == DENSE:
        return None, None
    weight, _, input = name.partition("/")
    if "/" in input:
        raise ConfigError(f"{name!r} is no candidate; write WEIGHT, WEIGHT/INPUT or {DENSE}")
    for each in filter(None, (weight, input)):
        lookup(each)
    return weight, input or None


def spelled(pair: Pair) -> str:
    """Undo `parsed`."""
    weight, input = pair
    return DENSE if weight is None else weight + (f"/{input}" if input else "")


def usual(pairs: set[Pair]) -> list[Pair]:
    """Candidates of a scheme that has these pairs: those, 8 bits per row in the same manner (FP8 where inputs are
    quantized, else integers), and 16."""
    inputs = any(input for _, input in pairs)
    weight = _rowwise(BF16, "minifloat" if inputs else "integer")
    eight = (weight, _rowwise(F32, "minifloat") if inputs else None)
    return [*sorted(pairs, key=spelled), *([] if eight in pairs else [eight]), (None, None)]


def _rowwise(scale: ScaleType, kind: str) -> str:
    """The format of 8 bits with one scale per row: stored in BF16 for weights, in float32 for inputs."""
    able = (fmt for fmt in CATALOG.values() if fmt.scale is scale and fmt.block == (1, 0) and not fmt.zero_point)
    return next(fmt.name for fmt in able if fmt.element.kind == kind and fmt.element.bits == 8)


# --- the choice -----------------------------------------------------------------------------------


def choose(options: list[list[Option]], budget: float) -> list[Option]:
    """One option of each set, with the least sum of KL that greedy steps find within `budget` bits.

    Every set begins at its cheapest option. Again and again the set moves that saves most KL per bit, as long as the
    bits last; options above the lower hull of a set are passed over by that, as they are by any mixture of two others.

    Raises:
        ConfigError: not even the cheapest options fit.
    """
    now = [min(each, key=lambda o: (o.bits, o.kl)) for each in options]
    left = budget - sum(option.bits for option in now)
    if left < 0:
        least = sum(option.bits for option in now)
        raise ConfigError(f"the budget is {budget:.4g} bits, but the smallest candidates take {least:.4g} already")
    while True:
        steps = [
            ((current.kl - option.kl) / (option.bits - current.bits), index, option)
            for index, (current, each) in enumerate(zip(now, options, strict=True))
            for option in each
            if option.kl < current.kl and 0 < option.bits - current.bits <= left
        ]
        if not steps:
            return now
        _, index, option = max(steps, key=lambda step: (step[0], -step[1]))
        left -= option.bits - now[index].bits
        now[index] = option


# --- measured -------------------------------------------------------------------------------------


def assign(
    job: Job,
    *,
    bits: float | None = None,
    size: int | None = None,
    formats: list[str],
    tokens: int,
    console: Console,
) -> Assignment:
    """Choose formats for the layers that the job's scheme quantizes, tables aside.

    Args:
        bits: budget per weight of these layers, scales included.
        size: budget in bytes for all weights of the model instead.
        formats: candidates, see `parsed`; by default `usual`.
        tokens: of the calibration text.
        console: says what is measured.

    Raises:
        ConfigError: no budget, or one that no mixture meets.
        UnsupportedError: no export target holds the candidates together.
    """
    if (bits is None) == (size is None):
        raise ConfigError("give one budget: --bits per weight, or --bytes of the model's weights")
    source = locate(job.model)
    student = student_without_numbers(job, source)
    scheme = job.scheme.model_copy(update={"fallback": None})
    rules = _assignable(student, scheme)
    pairs = [parsed(name) for name in formats] or usual({(rule.weight, rule.input) for rule in rules.values()})
    _check_together(student, scheme, source, list(rules), pairs)
    bench = Bench(job, source, tokens)
    costs: dict[Pair, dict[Members, float]] = {}
    uniform = {}
    for pair in [pair for pair in pairs if pair[0] is not None]:
        console.print(f"measuring {spelled(pair)}", highlight=False)
        model = bench.quantized(treated(student, scheme, dict.fromkeys(rules, pair), REASON))
        found = {members: kl for members, kl in bench.by_set(model).items() if set(members) <= rules.keys()}
        costs[pair], uniform[spelled(pair)] = found, (sum(found.values()), bench.kl(model))
    sizes, names = _sizes(student), list(next(iter(costs.values()), {}))
    options = [[_option(members, pair, costs, sizes) for pair in pairs] for members in names]
    weights = sum(_count(members, sizes) for members in names)
    chosen = choose(options, bits * weights if bits is not None else _rest(student, scheme, set(rules), size or 0))
    mixture = dict(zip(names, chosen, strict=True))
    by_path = {path: option.pair for members, option in mixture.items() for path in members}
    differing = {path: pair for path, pair in by_path.items() if pair != (rules[path].weight, rules[path].input)}
    final = treated(student, scheme, differing, REASON)
    return Assignment(
        job=job.model_copy(update={"scheme": final}),
        chosen=mixture,
        bits=sum(option.bits for option in chosen) / weights,
        model_bits=report(student, final).bits_per_weight,
        predicted=sum(option.kl for option in chosen),
        measured=bench.kl(bench.quantized(final)),
        uniform=uniform,
    )


def _assignable(student: nn.Module, scheme: Scheme) -> dict[str, Rule]:
    every = {
        c.path: student.get_submodule(c.module).get_parameter(c.slot.name)
        for c in candidates(student)
        if c.role == "weight"
    }
    tables = {id(every[c.path]) for c in candidates(student) if c.slot.no_input}
    found = {
        path: rule for path, rule in plan(student, scheme).items() if rule.weight and id(every[path]) not in tables
    }
    if not found:
        raise ConfigError("the scheme quantizes no layer, so there is nothing to assign; give a format in its rules")
    return found


def _check_together(student: Any, scheme: Scheme, source: Path, paths: list[str], pairs: list[Pair]) -> None:
    """Refuse candidates that no checkpoint can hold side by side, before minutes of measuring."""
    if len(set(pairs)) < 2 or all(weight is None for weight, _ in pairs):
        raise ConfigError(f"give two or more candidates, one of them quantized; given {', '.join(map(spelled, pairs))}")
    set_of = {path: members[0] for members in trained_together(student, scheme, paths) for path in members}
    order = list(dict.fromkeys(set_of.get(path, path) for path in paths))
    formats = {path: pairs[order.index(set_of.get(path, path)) % len(pairs)] for path in paths}
    mixture = treated(student, scheme, formats, REASON)
    bare: Any = rotate_inputs(apply(copy.deepcopy(student), mixture, blank=True), mixture)
    _, refused = refusals(bare, source)
    if len(refused) == len(TARGETS):
        raise UnsupportedError(
            "no target holds these candidates in one checkpoint:\n  " + "\n  ".join(refused.values())
        )


def _sizes(student: nn.Module) -> dict[str, tuple[int, ...]]:
    return {candidate.path: candidate.slot.shape for candidate in candidates(student) if candidate.role == "weight"}


def _count(members: Members, sizes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(sizes[path]) for path in members)


def _option(
    members: Members, pair: Pair, costs: dict[Pair, dict[Members, float]], sizes: dict[str, tuple[int, ...]]
) -> Option:
    bits = sum(_count((path,), sizes) * bits_of(pair[0], sizes[path]) for path in members)
    return Option(pair, bits, 0.0 if pair[0] is None else costs[pair][members])


def bits_of(weight: str | None, shape: tuple[int, ...]) -> float:
    """Stored bits per weight."""
    return DENSE_BITS if weight is None else lookup(weight).bits_per_weight(*shape[-2:])


def _rest(student: nn.Module, scheme: Scheme, assigned: set[str], size: int) -> float:
    """Bits that are left of `size` bytes for the assigned layers."""
    others = sum(m.parameters * m.bits for m in report(student, scheme).modules if m.path not in assigned)
    return 8 * size - others


def write(found: Assignment, out: Path) -> None:
    """The job as a config file, with what was found at its head."""
    given = json.loads(found.job.model_dump_json(exclude_unset=True, exclude_none=True))
    head = (
        f"# Assigned by `qat assign`: {found.bits:.3f} bits per weight of its layers, {found.model_bits:.3f} of all.\n"
        f"# KL before error compensation and training: {found.measured:.4f} measured, {found.predicted:.4f} as a sum.\n"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out, head + yaml.safe_dump(given, sort_keys=False))
