"""Which layers fall back to other formats (`Scheme.fallback`): measured on calibration text before training, and from
then on rules like any other, so that a run is reproducible and a resumed one decides nothing again."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from qat.adapters import candidates
from qat.errors import ConfigError
from qat.fallback import Fallback
from qat.scheme import Rule, Scheme
from qat.surgery import plan, trained_together
from qat.trainers.exportable import export_notes, student_without_numbers
from qat.trainers.job import Job
from qat.trainers.sensitivity import Measured, measure, ranked, value

REASON = "fallback: among the layers that suffer most from being quantized"


def decided(job: Job, source: Path, console: Console) -> Job:
    """The job with its fallback as rules; the same job where it has none.

    Raises:
        ConfigError: there are no more layers than would fall back.
        UnsupportedError: no export target holds the formats.
    """
    fallback = job.scheme.fallback
    if fallback is None:
        return job
    student = student_without_numbers(job, source)
    plain = job.scheme.model_copy(update={"fallback": None})
    rules = plan(student, plain)
    tables = {candidate.path for candidate in candidates(student) if candidate.slot.no_input}
    able = [path for path, rule in rules.items() if rule.weight is not None and path not in tables]
    first = next(iter(trained_together(student, plain, able)), able[:1])
    trial = _with(job, _fallen(student, plain, fallback, first))
    plan(student, trial.scheme)
    export_notes(trial, source, student)  # refused now, not after the measurement
    everything = measure(_with(job, plain), source, fallback.tokens, kl=fallback.by == "kl")
    measured = [one for one in everything if set(one.paths) <= set(able) and value(one, fallback.by) is not None]
    if fallback.count >= len(measured):
        raise ConfigError(
            f"scheme.fallback would take {fallback.count} of {len(measured)} layers (fused ones count as one); give a "
            "smaller level, or put the other format into `rules`"
        )
    chosen = ranked(measured, fallback.by)[: fallback.count]
    _say(chosen, fallback, console)
    return _with(job, _fallen(student, plain, fallback, [path for one in chosen for path in one.paths]))


def _with(job: Job, scheme: Scheme) -> Job:
    return job.model_copy(update={"scheme": scheme})


def _fallen(student: Any, scheme: Scheme, fallback: Fallback, paths: Iterable[str]) -> Scheme:
    return treated(student, scheme, dict.fromkeys(paths, (fallback.weight, fallback.input)), REASON)


def treated(model: nn.Module, scheme: Scheme, formats: Mapping[str, tuple[str | None, str | None]], why: str) -> Scheme:
    """The scheme with rules of their own for these weights, before all others; rules left without effect go.

    Args:
        model: without quantizers, or with.
        scheme: has a rule for each of the weights; what it says of `init` and `learn` goes on to hold.
        formats: of a weight and its input by the weight's path; None leaves either as it is.
        why: the reason to skip a weight without a format.
    """
    rules = []
    for path, (weight, input) in formats.items():
        module = next((c.module for c in candidates(model) if c.path == path), "")
        old = scheme.rule_for(path, module)
        rule = Rule(match=path, weight=weight, input=input, skip=None if weight else why)
        if old is not None and weight is not None:
            rule = rule.model_copy(update={"init": old.init, "learn": old.learn})
        rules.append(rule)
    first = scheme.model_copy(update={"rules": (*rules, *scheme.rules), "fallback": None})
    used = {id(first.rule_for(candidate.path, candidate.module, candidate.role)) for candidate in candidates(model)}
    return first.model_copy(update={"rules": tuple(rule for rule in first.rules if id(rule) in used)})


def _say(chosen: list[Measured], fallback: Fallback, console: Console) -> None:
    formats = f"{fallback.weight} with inputs {fallback.input or '-'}" if fallback.weight else "16 bits"
    console.print(f"these fall back to {formats}, by {fallback.by}:", highlight=False, markup=False, soft_wrap=True)
    for one in chosen:
        number = f"{value(one, fallback.by):.4g}"
        console.print(f"  {number:>10}  {one.name}", highlight=False, markup=False, soft_wrap=True)


def settled_before(job: Job, old: Job) -> Job:
    """A job whose fallback was decided when the run `old` began, with those rules; the same job where it has none.

    The rules of a decided fallback stand before the job's own, some of which may have lost their last layer.
    """
    fallback, rules = job.scheme.fallback, old.scheme.rules
    if fallback is None or old.scheme.fallback is not None:
        return job
    own = [rule for rule in rules if rule in job.scheme.rules]
    added = rules[: len(rules) - len(own)]
    expected = (fallback.weight, fallback.input)
    if list(rules) != [*added, *own] or not added or any((rule.weight, rule.input) != expected for rule in added):
        return job
    return _with(job, job.scheme.model_copy(update={"rules": rules, "fallback": None}))
