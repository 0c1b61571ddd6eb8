"""A run from job to report: load, calibrate, evaluate baselines, train with Lightning, evaluate the best, report."""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as lit
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from qat.checkpoints import resume
from qat.checkpoints.hf import load_configured, load_tokenizer
from qat.checkpoints.initialised import Initialised
from qat.checkpoints.progress import counted, mute
from qat.errors import Interrupted
from qat.init.calibration import initialise, observe, unreached
from qat.modes import dense
from qat.numbers.numerics import qsnr_of_parts
from qat.sharded import is_divided, opened, read
from qat.sites import Site, weights
from qat.surgery import Coverage, apply, report, rotate_inputs
from qat.trainers import adapted, cached, claim, divided, fallback, limits, packed, rates, strategy, why
from qat.trainers.announced import print_coverage, print_texts
from qat.trainers.callbacks import Keeper
from qat.trainers.called import check_called
from qat.trainers.data import Batches, load_blocks
from qat.trainers.evaluate import Evaluator, gap_closed
from qat.trainers.exportable import export_notes, student_without_numbers
from qat.trainers.fit import fit, quiet_lightning
from qat.trainers.interrupts import Interruptions
from qat.trainers.job import Job
from qat.trainers.loggers import finish_loggers, start_loggers
from qat.trainers.machine import machine, repeatable, versions
from qat.trainers.memory import keep_freed_blocks, peak_bytes
from qat.trainers.optim import freeze
from qat.trainers.overlap import overlap
from qat.trainers.packing import model_inputs
from qat.trainers.parts import Parts
from qat.trainers.plots import read_metrics
from qat.trainers.report import RunReport, print_table, write_report
from qat.trainers.strategy import Ranks
from qat.trainers.teacher import settled
from qat.trainers.written import device_and_mixed, load_teacher


def train(job: Job, *, resume_run: bool = False, console: Console | None = None, table: bool = True) -> dict[str, Any]:
    """Run a job to its report; returns the report as written to report.json, and prints it unless `table` is False.

    A job for several devices runs in as many processes, each of which calls this; only the first one writes and prints.

    Raises:
        CheckpointError: the run exists already, or there is nothing to resume.
        ConfigError: `--resume` with a job that differs from the one on disk, or other processes than it asks for.
        UnsupportedError: a strategy that cannot be trained here.
    """
    console = console or Console(stderr=True)
    quiet_lightning()
    keep_freed_blocks()
    strategy.check(job)
    with strategy.joined(job) as ranks:
        if not ranks.first:
            console.quiet = True
            mute()
            warnings.simplefilter("ignore")
        built = _claimed(job, resume_run, console, ranks)
    if ranks.first:
        console.print(f"report: {job.folder / 'report.md'}", highlight=False, soft_wrap=True)
        if table:
            print_table(built, Console())
    return built.to_dict()


def _claimed(job: Job, resume_run: bool, console: Console, ranks: Ranks) -> RunReport:
    """`_train` by whoever may write the folder; a run that ends early says how to go on."""
    job = ranks.lead(lambda: _settled(job, console))
    run = job.folder
    with contextlib.ExitStack() as held, Interruptions(quiet=not ranks.first) as interruptions:
        if resume_run and not run.exists():
            resume.last_state(run)  # refused before a folder is made for the lock
        ranks.lead(lambda: held.enter_context(claim.locked(run)))
        try:
            return _train(job, resume_run, console, interruptions, ranks)
        except Interrupted:
            signal = interruptions.signal
            by = signal.name if signal is not None else "a signal"
            console.print(f"stopped by {by}; {claim.how_to_go_on(run)}", highlight=False, soft_wrap=True)
            raise
        except OSError:
            console.print(f"the run ended early; {claim.how_to_go_on(run)}", highlight=False, soft_wrap=True)
            raise


def _settled(job: Job, console: Console) -> Job:
    claim.check_there(job)
    job, notes = settled(job)
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    return job


def _taken(job: Job, resume_run: bool, console: Console) -> tuple[Job, Path, Path, dict[str, Any]]:
    """The job as recorded, the folders of its models, and the saved state of a run that is resumed."""
    run = job.folder
    if not resume_run:
        claim.refuse_restart(run)
    job, source, reference = claim.located(job)
    saved: dict[str, Any] = {}
    if resume_run:
        if job.scheme.fallback is not None:
            job = fallback.settled_before(job, claim.started(run))
        saved = claim.take_up(run, job, console)
    else:
        job = fallback.decided(job, source, console)
        claim.start(run, job, console)
    return job, source, reference, saved


def _train(job: Job, resume_run: bool, console: Console, interruptions: Interruptions, ranks: Ranks) -> RunReport:
    """`train` in a locked folder, with the signals handled."""
    run = job.folder
    job, source, reference, saved = ranks.lead(lambda: _taken(job, resume_run, console))
    loggers: list[Any] = []
    ranks.lead(lambda: loggers.extend(start_loggers(job)))
    lit.seed_everything(job.seed, verbose=False)
    parts = _load(job, source, reference, console, ranks)
    print_coverage(parts.coverage, console)
    text = {"data": parts.train.digest, "eval.data": parts.heldout.digest}
    if parts.chosen_apart:
        text["eval.choose"] = parts.choosing.digest
    reporting, choosing = cached.evaluators(job, parts)
    if not resume_run:
        before = adapted.fingerprints(job, parts)
        rows, chosen = _baselines(job, parts, reporting, choosing, console)
        adapted.begin(job, parts, before)
        saved = {"rows": rows, "choosing": chosen}
        keeper = Keeper(run, job, choosing, {})
        first = (chosen or rows)[-1]
        keeper.best = {"step": 0, "kl": first["kl"], "since": 0}
        if ranks.first or is_divided(parts.student):
            tensors = resume.student_tensors(parts.student, ranks.first)
            if ranks.first:
                resume.save_best(run, tensors, {**first, "step": 0}, job.lora)
                Initialised(run).clear()
            if job.eval.why:
                why.keep_start(run, parts.student, ranks.first)
    else:
        rotate_inputs(parts.student, job.scheme)
        adapted.take_up(job, parts)
        claim.check_text(saved, text, job.steps, console)
        keeper = Keeper(run, job, choosing, saved["best"])
    saved.update(text=text, steps=job.steps)
    strategy.divide(job, parts)
    job = rates.settled(job, parts, keeper.evaluator, saved, console)
    say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
    loop = fit(job, parts, keeper, saved, resume.last_state(run) if resume_run else None, interruptions, loggers, say)
    if interruptions.signal is not None:
        raise interruptions.stop()
    if loop.stopped_by:
        console.print(f"stopped early: {loop.stopped_by}")
    built = _finish(job, parts, keeper, reporting, saved)
    finish_loggers(loggers, run)
    return built


def _load(job: Job, source: Path, reference: Path, console: Console, ranks: Ranks) -> Parts:
    device, mixed = device_and_mixed(job)
    repeatable(device)
    tokenizer = load_tokenizer(source, job.model.trust_remote_code)
    for note in export_notes(job, source, student_without_numbers(job, source)):
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    store = cached.opened(job, tokenizer)
    early = divided.first(job, source)
    wanted = None if store is not None else reference
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):  # flash attention takes nothing wider
        load = divided.load if early else _whole
        student, teacher, coverage, parameters = load(job, source, wanted, device, ranks)
        models = [model for model in (student, teacher) if model is not None]
        with dense(student, inputs=True):
            read(student, lambda: limits.check_packing(job, *(models if job.teacher is not None else [student])))
    limits.warn(limits.check_lengths(job, *models))
    loaded = {
        name: load_blocks(config, tokenizer, num_tokens=wanted, teacher=teacher if store is None else store.writer)
        for name, (config, wanted) in job.texts.items()
    }
    train_rows, heldout = loaded["data"], loaded["eval.data"]
    choosing, calibration = loaded.get("eval.choose", heldout), loaded.get("calibration", train_rows)
    texts = {"data": train_rows, "eval.data": heldout, "eval.choose": choosing, "calibration": calibration}
    limits.check_rows(tokenizer, texts, *models)
    taught = None if store is None else cached.bound(job, store, texts, student)
    print_texts(train_rows, heldout, choosing, console)
    if not early:
        divided.checkpointed(job, student)
        apply(student, job.scheme, defer_init=True)
        adapted.hold_early(job, student)
        if job.lora is None:  # else once there are adapters
            freeze(student, job.optim)
    dtype = torch.bfloat16 if mixed else None
    rows = (train_rows, heldout, calibration, choosing)
    return Parts(student.to(device), teacher, *rows, coverage, device, dtype, parameters, ranks=ranks, taught=taught)


def _whole(
    job: Job, source: Path, reference: Path | None, device: torch.device, _: Ranks
) -> tuple[nn.Module, nn.Module | None, Coverage, int]:
    """What `divided.load` gives, but nothing is quantized or divided yet."""
    teacher = None if reference is None else load_teacher(job, reference)
    place = adapted.first_place(job, source, device)
    student: nn.Module = load_configured(job.model, source, device=place)
    coverage = report(student, job.scheme)
    check_called(student.to(place), coverage)
    strategy.check_models(job, *(model for model in (student, teacher) if model is not None))
    return student, teacher, coverage, sum(p.numel() for p in student.parameters())


def _baselines(
    job: Job, parts: Parts, reporting: Evaluator, choosing: Evaluator, console: Console
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Evaluate BF16, RTN, and the PTQ initialisation that training begins from; leaves the student there.

    Returns:
        The rows on the held-out text, and the quantized ones on the choosing text where that is another.
    """
    rows: list[dict[str, Any]] = []
    chosen: list[dict[str, Any]] = []

    def evaluate(model: nn.Module, name: str) -> None:
        row = reporting.score(model, f"evaluating {name}").row(name)
        text = f"{name:>9}: held-out KL {row['kl']:.4f}  NLL {row['nll']:.4f}  top-1 {row['top1']:.1%}"
        rows.append(row)
        if choosing is not reporting and name != "bf16":
            chosen.append(choosing.score(model, f"evaluating {name} on the choosing text").row(name))
            text += f"  choosing KL {chosen[-1]['kl']:.4f}"
        console.print(text, highlight=False, soft_wrap=True)

    with dense(parts.student, inputs=True):
        own = job.teacher is not None and not packed.continues(parts.student)  # whose middles of cells are no better
        evaluate(parts.student if own or parts.teacher is None else parts.teacher, "bf16")
    batches = _calibration(job, parts)
    autocast = torch.autocast(parts.device.type, parts.dtype or torch.bfloat16, enabled=parts.dtype is not None)
    with autocast:
        mean_square = observe(parts.student, batches)
    for sentence in unreached(parts.student):
        console.print(sentence, highlight=False)
    rtn = job.scheme.rtn()
    initialise(parts.student, batches, rtn, mean_square, _tracked)
    for sentence in packed.put(parts.student):
        console.print(sentence, highlight=False, soft_wrap=True)
    parts.ranks.share(parts.student)
    evaluate(parts.student, "ptq")
    if rtn == job.scheme:
        for scores in (rows, chosen):
            scores += [{**row, "name": "best_ptq"} for row in scores[-1:]]
    else:
        with autocast:
            store = Initialised(job.folder, parts.ranks.first)
            sentences = initialise(parts.student, batches, job.scheme, mean_square, _tracked, store)
        parts.ranks.share(parts.student)
        for sentence in sentences:
            console.print(sentence, highlight=False)
        evaluate(parts.student, "best_ptq")
    parts.qsnr_start = _site_qsnrs(parts.student)
    return rows, chosen


def _calibration(job: Job, parts: Parts) -> list[dict[str, Any]]:
    batches = Batches(parts.calibration, job.micro_rows, job.seed)
    count = -(-job.calibration_rows // job.micro_rows)
    if is_divided(parts.student):  # each rank reads as many
        count = -(-count // parts.ranks.size) * parts.ranks.size
    on_device = ({k: v.to(parts.device) for k, v in batches.batch(index).items()} for index in range(count))
    return _Counted(model_inputs(batch) for batch in on_device)


class _Counted(list[dict[str, Any]]):
    """Batches that show how far each pass over them has come."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return counted(super().__iter__(), "calibrating", len(self), "batches")


def _tracked(sites: dict[str, Site]) -> Iterator[tuple[str, Site]]:
    return counted(sites.items(), "initialising weights", len(sites), "layers")


def _finish(job: Job, parts: Parts, keeper: Keeper, reporting: Evaluator, saved: dict[str, Any]) -> RunReport:
    """Evaluate the best student again, from disk, and write the report."""
    run, ranks = job.folder, parts.ranks
    best = run / "checkpoints" / resume.BEST
    ranks.wait()
    resume.restore_student(parts.student, load_file(best / resume.STUDENT))
    rows = [*saved["rows"], reporting.score(parts.student, "the student reads held-out text").row("student")]
    measured: dict[str, Any] = {}
    if job.eval.why:
        measured = {
            "lora": job.lora is not None and job.lora.merge,
            "gap": why.gap(reporting, parts.student, rows[-1]["kl"]),
            "disagreement": why.disagreement(
                read_metrics(run / claim.METRICS), (saved.get("choosing") or saved["rows"])[-1]["kl"]
            ),
            "moved": why.moved(run, parts.student),
        }
    after = _site_qsnrs(parts.student)
    return ranks.lead(lambda: _written(job, parts, keeper, saved, rows, measured, after))


def _written(job: Job, parts: Parts, *found: Any) -> RunReport:
    built = _report(job, parts, *found)
    write_report(job.folder, built)
    return built


def _report(
    job: Job,
    parts: Parts,
    keeper: Keeper,
    saved: dict[str, Any],
    rows: list[dict[str, Any]],
    measured: dict[str, Any],
    after: dict[str, float],
) -> RunReport:
    chosen = saved.get("choosing") or []
    if chosen:
        best = resume.read_state(job.folder / "checkpoints" / resume.BEST)
        chosen = [*chosen, {**{key: best[key] for key in chosen[0]}, "name": "student"}]
    texts = {"training": parts.train, "held-out": parts.heldout} | ({"choosing": parts.choosing} if chosen else {})
    by_name = {row["name"]: row for row in rows}
    rtn, initial, student, bf16 = (by_name[name] for name in ("ptq", "best_ptq", "student", "bf16"))
    count = parts.parameters
    other = count - sum(m.parameters for m in parts.coverage.modules)
    covered = sum(m.parameters * m.bits for m in parts.coverage.modules) / 8
    return RunReport(
        name=job.name,
        method=job.method,
        rows=rows,
        gap_closed={key: gap_closed(bf16[key], rtn[key], student[key]) for key in ("kl", "nll")},
        gap_closed_over_best_ptq={key: gap_closed(bf16[key], initial[key], student[key]) for key in ("kl", "nll")},
        bits_per_weight=parts.coverage.bits_per_weight,
        model_bytes=int(covered + 2 * other),
        dense_bytes=2 * count,
        tokens=saved.get("tokens", 0),
        seconds=saved.get("seconds", 0.0),
        tokens_per_second=saved.get("tokens", 0) / max(saved.get("seconds", 0.0), 1e-9),
        peak_memory_bytes=peak_bytes(parts.device),
        seed=job.seed,
        steps=job.steps,
        best_step=keeper.best["step"],
        eval_hash=parts.heldout.digest,
        data_hash=parts.train.digest,
        texts={name: blocks.summary for name, blocks in texts.items()},
        choosing=chosen,
        choosing_hash=parts.choosing.digest,
        why=measured,
        overlap=overlap(parts.train, parts.heldout),
        scheme=parts.coverage.by_format(),
        caches=parts.coverage.by_cache(),
        machine=machine(parts.device, parts.ranks.size),
        versions=versions(),
        precision="bf16-mixed" if parts.dtype is torch.bfloat16 else "fp32",
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        qsnr=[(path, parts.qsnr_start.get(path, value), value) for path, value in after.items()],
        rates=saved.get("rates", []),
        compiled=saved.get("compiled", []),
        graphs=saved.get("graphs", []),
    )


@torch.no_grad()
def _site_qsnrs(student: nn.Module) -> dict[str, float]:
    """QSNR in dB of every weight as it is against itself quantized, by layer."""
    found = weights(student)
    measured = {
        site.path: qsnr_of_parts((weight, quantizer(weight)) for weight, quantizer in site.parts())
        for site in opened(student, list(found.values()))
    }
    return {path: measured[path] for path in found}
