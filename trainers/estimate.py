"""What a job will need, before any weight is loaded: memory per device, tokens per second, time (`--dry-run`).

Memory and work come from `footprint`, how fast devices are from `speeds`, other ways to run the job from `levers`.
"""

from dataclasses import asdict, dataclass
from typing import Any

from qat.checkpoints.hf import is_local, resolve
from qat.init.blocks import STREAMS, BlockStep
from qat.init.gptq import PRODUCTS
from qat.init.progressive import Progressive
from qat.init.rotate import Rotate
from qat.text import size
from qat.trainers import divided, limits
from qat.trainers.exportable import export_notes
from qat.trainers.footprint import BF16, FP32, Facts, flops_per_token, forward_flops, job_facts, memory, shards
from qat.trainers.job import Job
from qat.trainers.levers import HEADROOM, Way, launch_advice, memory_advice, ways
from qat.trainers.speeds import Machine, launch_seconds, machines, step_seconds
from qat.trainers.strategy import refusal, undividable
from qat.trainers.walking import initial_seconds
from qat.trainers.zero import missing


@dataclass(frozen=True)
class Plan:
    """The job on one kind of device.

    Attributes:
        kind: "cpu" or "cuda".
        device: its name; says so where it is assumed rather than here.
        precision: of forward and backward.
        memory: bytes per device, by purpose.
        capacity: bytes of the device, None if unknown.
        tokens_per_second: of training, over all devices.
        training_seconds, other_seconds: all steps; evaluation, calibration and the search for initial scales.
    """

    kind: str
    device: str
    precision: str
    memory: dict[str, int]
    capacity: int | None
    tokens_per_second: float
    training_seconds: float
    other_seconds: float

    @property
    def peak(self) -> int:
        """Bytes per device."""
        return sum(self.memory.values())

    def fits(self, capacity: int) -> bool:
        """Whether the peak leaves some headroom in `capacity` bytes."""
        return self.peak <= HEADROOM * capacity


@dataclass(frozen=True)
class Estimate:
    """What `qat train --dry-run` prints; bytes, seconds and counts as their names say."""

    name: str
    origin: str
    parameters: int
    quantized_share: float
    bits_per_weight: float
    scheme: list[tuple[str, str, int, int, float]]
    model_bytes: int
    dense_bytes: int
    flops_per_token: float
    tokens: int
    steps: int
    devices: int
    plans: tuple[Plan, ...]
    ways: tuple[Way, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plans = [{**asdict(plan), "peak_bytes": plan.peak} for plan in self.plans]
        return {**asdict(self), "plans": plans}


def estimate(job: Job) -> Estimate:
    """Memory and time of `job`, without loading weights.

    Raises:
        CheckpointError: no config.json can be had.
        ConfigError, FormatError, UnsupportedError: the scheme does not fit the model, as `qat.surgery.plan` says.
        ConfigError, DataError: a text does not fit the model, or cannot be read.
    """
    facts = job_facts(job)
    weights, parameters = facts.coverage.modules, facts.student.parameters
    vectors = parameters - sum(m.parameters for m in weights)
    devices = machines(job, facts)
    plans = tuple(_plan(job, facts, machine) for machine in devices)
    return Estimate(
        name=job.name,
        origin=facts.student.origin,
        parameters=parameters,
        quantized_share=facts.coverage.quantized_share,
        bits_per_weight=facts.coverage.bits_per_weight,
        scheme=facts.coverage.by_format(),
        model_bytes=int(sum(m.parameters * m.bits for m in weights) / 8) + BF16 * vectors,
        dense_bytes=BF16 * parameters,
        flops_per_token=flops_per_token(job, facts),
        tokens=job.steps * job.tokens_per_step,
        steps=job.steps,
        devices=job.devices,
        plans=plans,
        ways=ways(job, facts, devices[-1]),
        notes=(
            *facts.notes,
            *undividable(job, facts.student.model, facts.teacher.model),
            *_notes(job, facts, devices),
            *_export_notes(job, facts),
            *limits.dry_run(job, facts.student.model, facts.teacher.model),
        ),
    )


def _export_notes(job: Job, facts: Facts) -> list[str]:
    folder = resolve(job.model) if is_local(job.model) else None  # an estimate downloads no weights
    return export_notes(job, folder, facts.student.model)


def _notes(job: Job, facts: Facts, devices: list[Machine]) -> list[str]:
    notes = [reason] if (reason := refusal(job)) else []
    if shards(job) > 1 and (reason := divided.obstacle(job)):
        notes.append(f"{reason}, so every device holds the undivided models until they are initialised, then its share")
    if job.strategy == "deepspeed" and (reason := missing()):
        notes.append(reason)
    if (fallback := job.scheme.fallback) is not None:
        notes.append(f"which {fallback.count} layers fall back is decided when training begins, and not counted here")
    texts = [*job.data.parts, *(job.calibration.parts if job.calibration is not None else ())]
    if any(text.source == "teacher" for text in texts):
        notes.append("the time in which the teacher writes text is not counted")
    if job.teacher_cache is not None:
        each = job.teacher_cache.bytes_per_token
        most = size(job.steps * job.tokens_per_step * each * job.objective.needs_teacher)
        notes.append(f"the teacher's cache takes {each} bytes per learned token, here at most {most}; asking it "
                     "(qat teacher CONFIG) is not counted")  # fmt: skip
    if shards(job) > 1 and not job.activation_checkpointing:
        notes.append(
            f"{job.strategy} shards weights, but quantized copies stay whole on every device until the backward pass; "
            "activation_checkpointing: true drops them"
        )
    for machine in devices:
        notes += [*memory_advice(job, facts, machine), *launch_advice(job, facts, machine)]
    return notes


# --- time -----------------------------------------------------------------------------------------


def _plan(job: Job, facts: Facts, machine: Machine) -> Plan:
    tokens = job.steps * job.tokens_per_step
    training = job.steps * step_seconds(job, facts, machine)
    precision = "bf16-mixed" if machine.mixed else "fp32"
    parts = memory(job, facts, machine.kind, machine.mixed)
    return Plan(
        kind=machine.kind,
        device=machine.name,
        precision=precision,
        memory=parts,
        capacity=machine.capacity,
        tokens_per_second=tokens / training,
        training_seconds=training,
        other_seconds=_other_seconds(job, facts, machine),
    )


def _other_seconds(job: Job, facts: Facts, machine: Machine) -> float:
    """Evaluating (BF16, two initialisations, every so many steps, the end and what is left of the gap), calibrating,
    searching, walking; GPTQ multiplies inputs with themselves."""
    student, teacher = (forward_flops(a, job.eval.data.seq_len) for a in (facts.student, facts.teacher))
    least = launch_seconds(job, facts, machine) / 3  # a forward pass has no backward
    head = 2.0 * facts.teacher.shape.hidden * facts.teacher.shape.vocabulary
    during = job.steps // job.eval.every if job.eval.every else 1
    often = 3 + during + 2 * (job.eval.choose is not None) + 3 * job.eval.why
    evaluation = job.eval.tokens * (2 * teacher * (job.teacher_cache is None) + often * (student + head))
    passes = often * job.eval.tokens / (job.eval.batch * job.eval.data.seq_len)
    values = often * job.eval.tokens * facts.input_values
    text, products = job.calibration or job.data, facts.input_products(job)
    observed = sum(step.WHOLE_MODEL or step.kind == "hadamard" for step in job.scheme.init)
    walks = [step for step in job.scheme.init if isinstance(step, BlockStep) and step.by_block]
    in_blocks = sum(step.passes() for step in walks) + STREAMS * bool(walks)
    learning = [step for step in job.scheme.init if isinstance(step, Rotate | Progressive)]
    learned = sum(step.passes(job.calibration_rows) for step in learning)
    reads = 1 + observed + in_blocks + learned + -(-FP32 * products // PRODUCTS)  # of the calibration text
    per_token = reads * forward_flops(facts.student, text.seq_len) + 2.0 * products
    calibrated = job.calibration_rows * text.seq_len * per_token
    # A forward pass alone is about half of forward and backward of the fake quantization.
    quantizing = 0.5 * (passes * facts.quantized * machine.per_weight + values * machine.per_input)
    searching = facts.quantized * machine.per_search + initial_seconds(job, facts, machine)
    return max((evaluation + calibrated) * machine.per_flop + quantizing, passes * least) + searching
