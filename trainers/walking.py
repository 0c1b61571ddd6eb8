"""How long the steps of an initialisation take that are no passes over text: GPTQ's walk over columns, which a CPU is
timed at and a GPU waits for its host in, and the reconstruction of blocks, which is training."""

import torch

from qat.init.columns import refitted
from qat.init.gptq import Gptq, compensated, damped, inverse
from qat.init.reconstruct import Reconstruct
from qat.init.scales import initial_scales
from qat.numbers.catalog import lookup
from qat.surgery import Covered, trained_together
from qat.trainers.footprint import Facts, forward_flops, memory
from qat.trainers.job import Job
from qat.trainers.speeds import ACTIVATION_PASSES, Machine, launch_seconds, timed

# Launches per column, of the walk, of choosing scales on arrival, and of each round of refitting. (A test counts them.)
WALK_LAUNCHES, ARRIVAL_LAUNCHES, REFIT_LAUNCHES = 12, 15, 16
FLOAT32_SHARE = 1 / 15  # of a GPU's dense BF16 peak; float64, in which matrices are inverted, half of it
INVERSE_FLOPS = 3  # times the cube of the width
COLUMNS, ROWS = 96, (64, 768)  # of what a CPU is timed at
SIDE = 512


def initial_seconds(job: Job, facts: Facts, machine: Machine) -> float:
    """Of all walks over columns and of all reconstruction that the scheme's initialisation holds."""
    seconds = 0.0
    for step in job.scheme.init:
        if isinstance(step, Gptq):
            seconds += _walks(step, job, facts, machine)
        elif isinstance(step, Reconstruct):
            seconds += step.steps * _learning(step.rows, job, facts, machine)
    return seconds


def _walks(step: Gptq, job: Job, facts: Facts, machine: Machine) -> float:
    """Weights that read one tensor are walked as one. Products: those with the rows still to come, and the errors under
    the Hessian, before and after refitting and in each round."""
    per_flop = _float32_flop(machine)
    speeds: dict[str, tuple[float, float]] = {}
    seconds = 0.0
    for members in _groups(job, facts):
        name, columns = str(members[0].weight), members[0].shape[-1]
        values = sum(member.parameters for member in members)
        if name not in speeds:
            speeds[name] = _host(step, machine) if machine.kind == "cuda" else measured(step, name)
        per_column, per_value = speeds[name]
        products = 1 + 2 * (step.refit + 2) * (step.refit > 0)
        flops = products * values * columns + 2 * INVERSE_FLOPS * columns**3
        seconds += columns * per_column + values * per_value + flops * per_flop
    return seconds


def _groups(job: Job, facts: Facts) -> list[list[Covered]]:
    """Quantized weights that blocks multiply with, by the tensor that they read."""
    vocabulary = facts.student.shape.vocabulary
    covered = {m.path: m for m in facts.coverage.modules if m.weight and m.shape[0] != vocabulary}
    covered = {path: m for path, m in covered.items() if lookup(str(m.weight)).is_rowwise}
    shapes = {path: m.shape for path, m in covered.items()}
    fused = [paths for paths in trained_together(facts.student.model, job.scheme, shapes) if len(paths) > 1]
    merged = {path for paths in fused for path in paths}
    alone = ([path] for path in covered if path not in merged)
    return [[covered[path] for path in paths] for paths in (*fused, *alone)]


def _host(step: Gptq, machine: Machine) -> tuple[float, float]:
    launches = WALK_LAUNCHES + ARRIVAL_LAUNCHES * (step.choose == "arrival") + REFIT_LAUNCHES * step.refit
    return launches * machine.per_launch, 0.0


def measured(step: Gptq, name: str) -> tuple[float, float]:
    """Seconds on this CPU per column and, beyond that, per value of a weight, from walks over a low and a high one."""
    fmt = lookup(name)
    columns = -(-COLUMNS // (fmt.group or 1)) * (fmt.group or 1)
    generator = torch.Generator().manual_seed(0)
    factor = inverse(gram := torch.eye(columns))
    matrix = damped(gram, factor)

    def seconds(rows: int) -> float:
        weight = torch.randn(rows, columns, generator=generator)
        scales = initial_scales(weight, fmt, "amax")

        def work() -> None:
            latent, found = compensated(weight, fmt, scales, factor, step.choose == "arrival")
            if step.refit:
                refitted(weight, latent, fmt, found, matrix, step.refit)

        return timed(work)

    low, high = map(seconds, ROWS)
    per_value = max(0.0, high - low) / (columns * (ROWS[1] - ROWS[0]))
    return max(0.0, low / columns - ROWS[0] * per_value), per_value


def _float32_flop(machine: Machine) -> float:
    if machine.kind == "cuda":
        return machine.per_flop / FLOAT32_SHARE
    side = torch.randn(SIDE, SIDE)
    return timed(lambda: side @ side) / (2 * SIDE**3)


def _learning(rows: int, job: Job, facts: Facts, machine: Machine) -> float:
    """One step on every block: training without logits and without a teacher."""
    text, shape = job.calibration or job.data, facts.student.shape
    tokens = rows * text.seq_len
    head = 2.0 * shape.hidden * shape.vocabulary
    kept = memory(job, facts, machine.kind, machine.mixed)["activations"] * tokens / (job.micro_rows * job.data.seq_len)
    seconds = (
        3 * tokens * (forward_flops(facts.student, text.seq_len) - head) * machine.per_flop
        + facts.quantized * machine.per_weight
        + tokens * facts.input_values * machine.per_input
        + ACTIVATION_PASSES[machine.kind] * kept * machine.per_activation_byte
        + facts.quantized * machine.per_update
    )
    return max(seconds, launch_seconds(job, facts, machine))
