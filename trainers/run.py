"""A run from job to report: load, calibrate, judge the baselines, train with Lightning, judge the best, report."""

import json
import logging
import platform
import warnings
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as lit
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from qat.calibration import begin, observe, prepare
from qat.checkpoints import resume
from qat.checkpoints.hf import load_configured, load_tokenizer, resolve
from qat.config import load_yaml, validate, write_text_atomic
from qat.errors import CheckpointError, ConfigError, UnsupportedError
from qat.numerics import qsnr
from qat.surgery import Coverage, apply, dense, layers, report
from qat.trainers.callbacks import Average, Keeper, StepLoop
from qat.trainers.data import Batches, Blocks, load_blocks
from qat.trainers.evaluate import Judge, gap_closed
from qat.trainers.exportable import export_notes
from qat.trainers.job import Job
from qat.trainers.memory import keep_freed_blocks, peak_bytes
from qat.trainers.module import QatModule
from qat.trainers.overlap import overlap
from qat.trainers.packing import LEAKS, leakage, model_inputs
from qat.trainers.report import RunReport, print_table, write_report
from qat.trainers.teacher import settled

CONTAMINATED = 0.01  # share of held-out 13-grams seen in training above which a warning is due


@dataclass
class Parts:
    """Everything a run holds in memory."""

    student: Any
    teacher: Any
    train: Blocks
    heldout: Blocks
    calibration: Blocks
    coverage: Coverage
    device: torch.device
    dtype: torch.dtype | None
    parameters: int  # of the model that is trained, without learned scales
    qsnr_start: dict[str, float] = field(default_factory=dict)


def train(job: Job, *, resume_run: bool = False, console: Console | None = None, table: bool = True) -> dict[str, Any]:
    """Run a job to its report; returns the report as written to report.json, and prints it unless `table` is False.

    Raises:
        CheckpointError: the run exists already, or there is nothing to resume.
        ConfigError: `--resume` with a job that differs from the one on disk.
    """
    console = console or Console(stderr=True)
    _quiet_lightning()
    keep_freed_blocks()
    if job.unproven:
        raise UnsupportedError(job.unproven)
    job, notes = settled(job)
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    run = job.folder
    saved = _claim(run, job, resume_run)
    lit.seed_everything(job.seed, verbose=False)
    parts = _load(job, console)
    _print_coverage(parts.coverage, console)
    judge = Judge(parts.teacher, parts.heldout, job.eval.batch, parts.device, parts.dtype)
    if not resume_run:
        saved = {"rows": _baselines(job, parts, judge, console)}
        keeper = Keeper(run, job, judge, {})
        keeper.best = {"step": 0, "kl": saved["rows"][-1]["kl"], "since": 0}
        resume.save_best(run, resume.student_tensors(parts.student), {**saved["rows"][-1], "step": 0})
    else:
        keeper = Keeper(run, job, judge, saved["best"])
    loop = _fit(job, parts, keeper, saved, resume_run)
    if loop.stopped_by == "SIGTERM":
        console.print(f"stopped by SIGTERM; continue with: qat train ... --resume (state in {run / 'checkpoints'})")
        raise SystemExit(143)
    if loop.stopped_by:
        console.print(f"stopped early: {loop.stopped_by}")
    return _finish(job, parts, keeper, saved, console, table)


def _claim(run: Path, job: Job, resume_run: bool) -> dict[str, Any]:
    """Create the run folder, or check that the one on disk is this job; returns the saved state when resuming."""
    text = yaml.safe_dump(json.loads(job.model_dump_json()), sort_keys=False)
    path = run / "job.yaml"
    if resume_run:
        state = resume.read_state(resume.last_state(run))
        old = validate(Job, load_yaml(path), str(path))
        changed = _differences(json.loads(old.model_dump_json()), json.loads(job.model_dump_json()))
        if changed:
            raise ConfigError(f"{run} was started with another job; resume with the same one. Differs: {changed}")
        return state
    if (run / "checkpoints").exists():  # without it, an earlier start failed before anything was worth keeping
        raise CheckpointError(f"{run} exists already; continue it with --resume, or choose another name=...")
    run.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, text)
    return {}


def _differences(old: Any, new: Any, path: str = "") -> str:
    """'key: was x, now y' for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = [_differences(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in {**old, **new}]
        return "; ".join(part for part in found if part)
    return "" if old == new else f"{path} was {old!r}, now {new!r}"


def _load(job: Job, console: Console) -> Parts:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mixed = job.precision == "bf16-mixed" or (job.precision == "auto" and device.type == "cuda")
    source = resolve(job.model)
    tokenizer = load_tokenizer(source, job.model.trust_remote_code)
    for note in export_notes(job, source):
        console.print(f"export: {note}", highlight=False, soft_wrap=True, markup=False)
    teacher_dtype = torch.bfloat16 if mixed and device.type == "cuda" else torch.float32
    teacher: nn.Module = load_configured(job.teacher or job.model, teacher_dtype)
    student: nn.Module = load_configured(job.model)
    coverage = report(student, job.scheme)
    _check_packing(job, student, *([teacher] if job.teacher is not None else []))
    parameters = sum(p.numel() for p in student.parameters())
    train_rows = load_blocks(job.data, tokenizer, num_tokens=job.steps * job.rows * job.data.seq_len, teacher=teacher)
    heldout = load_blocks(job.eval.data, tokenizer, num_tokens=job.eval.tokens)
    calibration = train_rows
    if job.calibration is not None:
        tokens = job.calibration_rows * job.calibration.seq_len
        calibration = load_blocks(job.calibration, tokenizer, num_tokens=tokens, teacher=teacher)
    shared = overlap(train_rows, heldout)
    if shared > CONTAMINATED:
        console.print(f"[yellow]warning: {shared:.1%} of the held-out 13-grams also occur in the training text")
    if job.activation_checkpointing:
        # transformers 5.23 renamed the method; 5.17 only knows the old name.
        name = "activation_checkpointing_enable"
        getattr(student, name if hasattr(student, name) else "gradient_checkpointing_enable")({"use_reentrant": False})
    apply(student, job.scheme, defer_start=True)
    _freeze(student, job)
    dtype = torch.bfloat16 if mixed else None
    rows = (train_rows, heldout, calibration)
    return Parts(student.to(device), teacher.to(device), *rows, coverage, device, dtype, parameters)


def _check_packing(job: Job, *models: Any) -> None:
    texts = {"data": job.data, "eval.data": job.eval.data, "calibration": job.calibration}
    packed = [name for name, text in texts.items() if text is not None and text.pack]
    for model in models if packed else ():
        leak = leakage(model)
        if leak > LEAKS:
            raise UnsupportedError(
                f"{type(model).__name__} with {model.config._attn_implementation} attention lets packed documents see "
                f"each other (leakage {leak:.2f}); set {' and '.join(f'{name}.pack' for name in packed)} to false"
            )


def _freeze(student: nn.Module, job: Job) -> None:
    from fnmatch import fnmatchcase

    for pattern in job.optim.freeze:
        matched = [p for name, p in student.named_parameters() if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(f"optim.freeze pattern {pattern!r} matches no parameter")
        for parameter in matched:
            parameter.requires_grad_(False)


def _print_coverage(coverage: Coverage, console: Console) -> None:
    console.print(
        f"{coverage.quantized_share:.1%} of the weights are quantized, {coverage.bits_per_weight:.2f} bits per weight:",
        highlight=False,
        soft_wrap=True,
    )
    for weight, input, modules, parameters, bits in coverage.by_format():
        console.print(
            f"  {weight:<40} inputs {input:<10} {modules:>5} modules {parameters / 1e6:>9.2f} M weights"
            f" {bits:>6.2f} bits",
            highlight=False,
            soft_wrap=True,
        )


def _baselines(job: Job, parts: Parts, judge: Judge, console: Console) -> list[dict[str, Any]]:
    """Judge BF16, plain rounding, and the start that training begins from; leaves the student at that start."""
    rows: list[dict[str, Any]] = []

    def judged(model: nn.Module, name: str) -> None:
        row = judge.score(model, f"judging {name}").row(name)
        console.print(
            f"{name:>9}: held-out KL {row['kl']:.4f}  NLL {row['nll']:.4f}  top-1 {row['top1']:.1%}",
            highlight=False,
            soft_wrap=True,
        )
        rows.append(row)

    with dense(parts.student, inputs=True):
        judged(parts.student if job.teacher is not None else parts.teacher, "bf16")
    batches = _calibration(job, parts)
    autocast = torch.autocast(parts.device.type, parts.dtype or torch.bfloat16, enabled=parts.dtype is not None)
    with autocast:
        mean_square = observe(parts.student, batches)
    without = {"start": "amax", "weighted_start": False, "smooth": 0.0, "compensate": "none"}
    plain = job.scheme.model_copy(update=without)
    begin(parts.student, plain, mean_square)
    judged(parts.student, "ptq")
    if plain == job.scheme:
        rows.append({**rows[-1], "name": "best_ptq"})
    else:
        with autocast:
            folds = prepare(parts.student, batches, job.scheme, mean_square)
        if job.scheme.smooth:
            smoothed, count = len({path for fold in folds for path in fold.readers}), len(layers(parts.student))
            console.print(f"smoothed the inputs of {smoothed} of {count} layers", highlight=False)
        judged(parts.student, "best_ptq")
    parts.qsnr_start = {path: _layer_qsnr(layer) for path, layer in layers(parts.student).items()}
    return rows


def _calibration(job: Job, parts: Parts) -> list[dict[str, Any]]:
    batches = Batches(parts.calibration, job.micro_rows, job.seed)
    count = -(-job.calibration_rows // job.micro_rows)
    found = ({k: v.to(parts.device) for k, v in batches.batch(index).items()} for index in range(count))
    return [model_inputs(batch) for batch in found]


def _fit(job: Job, parts: Parts, keeper: Keeper, saved: dict[str, Any], resume_run: bool) -> StepLoop:
    folder = resume.last_state(job.folder) if resume_run else None
    start = 0
    if folder is not None:
        start = int(resume.read_state(folder)["step"])
        resume.restore_student(parts.student, load_file(folder / resume.STUDENT))
    teacher = parts.teacher if job.objective.needs_teacher else None
    module = QatModule(parts.student, teacher, job, Batches(parts.train, job.rows, job.seed), start)
    average = Average(parts.student, job.optim.ema) if job.optim.ema else None
    loop = StepLoop(job.folder, job, keeper, average, saved)
    if start >= job.steps:
        return loop
    restore = _Restore(folder, average)
    trainer = lit.Trainer(
        max_steps=job.steps - start,
        accumulate_grad_batches=job.rows // (job.micro_rows * job.devices),
        precision="bf16-mixed" if parts.dtype is torch.bfloat16 else "32-true",
        accelerator=parts.device.type,
        devices=job.devices,
        strategy=job.strategy,
        callbacks=[restore, loop],
        logger=_loggers(job),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    parts.student.train()
    trainer.fit(module)
    return loop


class _Restore(lit.Callback):
    """Loads the saved state once the optimizer exists."""

    def __init__(self, folder: Path | None, average: Average | None) -> None:
        self.folder, self.average = folder, average

    def on_train_start(self, trainer: lit.Trainer, pl_module: lit.LightningModule) -> None:
        """Bring back parameters, moments, averages and random state."""
        if self.folder is None:
            return
        assert isinstance(pl_module, QatModule)
        optimizer: Any = pl_module.optimizers()
        _, values = resume.restore_state(self.folder, pl_module.student, optimizer.optimizer)
        if self.average is not None and values is not None:
            self.average.values = {n: t.to(self.average.values[n].device) for n, t in values.items()}


def _loggers(job: Job) -> Any:
    if job.wandb is None:
        return False
    try:
        from lightning.pytorch.loggers import WandbLogger
    except ModuleNotFoundError as error:
        raise ConfigError(f"the job asks for wandb, which is not installed: pip install wandb ({error})") from error
    return WandbLogger(
        project=job.wandb.project, name=job.name, offline=job.wandb.offline, save_dir=job.folder, log_model=False
    )


def _finish(
    job: Job, parts: Parts, keeper: Keeper, saved: dict[str, Any], console: Console, table: bool
) -> dict[str, Any]:
    """Judge the best student again, from disk, and write the report."""
    best = job.folder / "checkpoints" / resume.BEST
    resume.restore_student(parts.student, load_file(best / resume.STUDENT))
    rows = [*saved["rows"], keeper.judge.score(parts.student, "the student reads held-out text").row("student")]
    built = _report(job, parts, keeper, saved, rows)
    write_report(job.folder, built)
    if table:
        print_table(built, Console())
    console.print(f"report: {job.folder / 'report.md'}", highlight=False)
    return built.to_dict()


def _report(job: Job, parts: Parts, keeper: Keeper, saved: dict[str, Any], rows: list[dict[str, Any]]) -> RunReport:
    by_name = {row["name"]: row for row in rows}
    plain, start, student, dense = (by_name[name] for name in ("ptq", "best_ptq", "student", "bf16"))
    count = parts.parameters
    other = count - sum(m.parameters for m in parts.coverage.modules)
    covered = sum(m.parameters * m.bits for m in parts.coverage.modules) / 8
    return RunReport(
        name=job.name,
        method=job.method,
        rows=rows,
        gap_closed={key: gap_closed(dense[key], plain[key], student[key]) for key in ("kl", "nll")},
        gap_closed_over_best_ptq={key: gap_closed(dense[key], start[key], student[key]) for key in ("kl", "nll")},
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
        overlap=overlap(parts.train, parts.heldout),
        scheme=parts.coverage.by_format(),
        machine=_machine(parts.device),
        versions=_versions(),
        precision="bf16-mixed" if parts.dtype is torch.bfloat16 else "fp32",
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        qsnr=_qsnr(parts),
    )


@torch.no_grad()
def _qsnr(parts: Parts) -> list[tuple[str, float, float]]:
    """(layer, QSNR at the start, QSNR after training) in dB, both against the weights being quantized."""
    after = {path: _layer_qsnr(layer) for path, layer in layers(parts.student).items()}
    return [(path, parts.qsnr_start.get(path, value), value) for path, value in after.items()]


def _layer_qsnr(layer: Any) -> float:
    return qsnr(layer.weight, layer.weight_quantizer(layer.weight))


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = {"torch": "torch", "transformers": "transformers", "lightning": "lightning", "qat": "qat-native"}
    return {"python": platform.python_version(), **{key: version(name) for key, name in names.items()}}


def _quiet_lightning() -> None:
    """Lightning's tips and warnings about things this trainer does on purpose."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
