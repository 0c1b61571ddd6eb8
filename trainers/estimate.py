"""What a job will need, before any weight is loaded: memory per device, tokens per second, time (`--dry-run`).

Memory and work come from `footprint`. Speed comes from the device: a CPU is measured for a second, a GPU is looked up
by name, and where none is here an H100 is assumed, and said to be.
"""

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qat.checkpoints.hf import is_local, resolve
from qat.init.blocks import STREAMS, BlockStep
from qat.init.gptq import PRODUCTS
from qat.init.rotate import Rotate
from qat.init.scales import initial_scales
from qat.numbers.catalog import lookup
from qat.numbers.hadamard import BlockHadamard
from qat.numbers.numerics import find_scales
from qat.quantizer import InputQuantizer, WeightQuantizer
from qat.scheme import Rule, Scheme
from qat.text import size
from qat.trainers import limits
from qat.trainers.exportable import export_notes
from qat.trainers.footprint import BF16, FP32, GIB, Facts, flops_per_token, forward_flops, job_facts, memory, shards
from qat.trainers.job import Job
from qat.trainers.memory import keep_freed_blocks
from qat.trainers.strategy import refusal
from qat.training.losses import chunk_tokens

HEADROOM = 0.95  # share of a device's memory that may be planned for
# Part of the name -> (dense BF16 FLOP/s, memory bytes/s, GiB), from the makers' data sheets; the first match wins.
GPUS: dict[str, tuple[float, float, int]] = {
    "B200": (2250e12, 8.0e12, 180),
    "H200": (989e12, 4.8e12, 141),
    "H100 PCIe": (756e12, 2.0e12, 80),
    "H100 NVL": (835e12, 3.9e12, 94),
    "H100": (989e12, 3.35e12, 80),
    "A100": (312e12, 2.0e12, 80),
    "MI300X": (1307e12, 5.3e12, 192),
    "L40S": (362e12, 0.86e12, 48),
    "RTX 5090": (209e12, 1.79e12, 32),
    "RTX 4090": (165e12, 1.0e12, 24),
    "RTX 3090": (71e12, 0.94e12, 24),
    "A10": (125e12, 0.6e12, 24),
    "L4": (121e12, 0.3e12, 24),
}
ASSUMED = "H100"
# Share that a step reaches of the peak (GPU), or of one measured product of the feed-forward layer (CPU).
UTILISATION = {"cuda": 0.35, "cpu": 0.7}
# Memory traffic, in bytes per value: unfused fake quantization forward and backward; the search for initial scales,
# once; clipping and AdamW.
WEIGHT_TRAFFIC, INPUT_TRAFFIC, SEARCH_TRAFFIC, OPTIMIZER_TRAFFIC = 150, 100, 2000, 40
# How often elementwise work goes over the stored activations, and over float32 logits with a teacher and without.
ACTIVATION_PASSES, LOGIT_PASSES = 12, {True: 15, False: 12}
LAUNCH_SECONDS = 600 * 5e-6  # per layer and pass on a GPU: about 600 unfused kernels, which no small batch can hide
SIDE, MEASURE_SECONDS = 1024, 0.3


@dataclass(frozen=True)
class Machine:
    """A device and its speeds, in seconds: per FLOP in training, per value of each kind of elementwise work, per byte
    of work on activations and on logits, per layer and pass at least."""

    kind: str
    name: str
    mixed: bool
    capacity: int | None
    per_flop: float
    per_weight: float
    per_input: float
    per_search: float
    per_update: float
    per_activation_byte: float
    per_logit_byte: float
    per_layer: float


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
    plans = tuple(_plan(job, facts, machine) for machine in _machines(job, facts))
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
        notes=(
            *facts.notes,
            *_notes(job, plans),
            *_export_notes(job, facts),
            *limits.dry_run(job, facts.student.model, facts.teacher.model),
        ),
    )


def _export_notes(job: Job, facts: Facts) -> list[str]:
    folder = resolve(job.model) if is_local(job.model) else None  # an estimate downloads no weights
    return export_notes(job, folder, facts.student.model)


def _notes(job: Job, plans: tuple[Plan, ...]) -> list[str]:
    notes = [reason] if (reason := refusal(job)) else []
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
    if any(plan.capacity is not None and not plan.fits(plan.capacity) for plan in plans):
        levers = ["activation_checkpointing: true"] * (not job.activation_checkpointing)
        levers += ["micro_rows: 1"] * (job.micro_rows > 1)
        levers += ["a smaller loss_chunk", "a shorter data.seq_len", "more devices"]
        notes.append("what lowers memory: " + ", ".join(levers))
    return notes


# --- devices --------------------------------------------------------------------------------------


def _machines(job: Job, facts: Facts) -> list[Machine]:
    """The device that would train here; without a GPU also an assumed one, alone if the job wants several devices."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        capacity = int(torch.cuda.get_device_properties(0).total_memory)
        known_as = listed(name)
        if known_as is None:
            return [_gpu(job, f"{name} (speed unknown, taken as an {ASSUMED} SXM)", ASSUMED, capacity)]
        return [_gpu(job, name, known_as, capacity)]
    assumed = _gpu(job, f"assumed {ASSUMED} SXM", ASSUMED, GPUS[ASSUMED][2] * GIB)
    return [assumed] if job.devices > 1 else [_cpu(job, facts), assumed]


def listed(name: str) -> str | None:
    """The entry of GPUS for a device's own name, such as "NVIDIA H100 80GB HBM3"."""
    return next((key for key in GPUS if key.lower() in name.lower()), None)


def _gpu(job: Job, name: str, known_as: str, capacity: int) -> Machine:
    peak, bandwidth, _ = GPUS[known_as]
    traffic = (WEIGHT_TRAFFIC, INPUT_TRAFFIC, SEARCH_TRAFFIC, OPTIMIZER_TRAFFIC, 1, 1)
    speeds = (1 / (peak * UTILISATION["cuda"]), *(count / bandwidth for count in traffic), LAUNCH_SECONDS)
    return Machine("cuda", name, job.precision != "fp32", capacity, *speeds)


def _cpu(job: Job, facts: Facts) -> Machine:
    """This CPU, measured with the formats of the job; means over formats are weighted by parameters."""
    keep_freed_blocks()  # as a run does, or fresh memory would cost more here
    mixed = job.precision == "bf16-mixed"
    shape, tokens = facts.student.shape, job.micro_rows * job.data.seq_len
    dtype = torch.bfloat16 if mixed else torch.float32
    rows = min(tokens, max(16, SIDE**3 // (shape.hidden * shape.ffn)))  # enough to be typical, few enough to be quick
    left, right = torch.randn(rows, shape.hidden, dtype=dtype), torch.randn(shape.hidden, shape.ffn, dtype=dtype)
    per_flop = _seconds(lambda: left @ right) / (2 * rows * shape.hidden * shape.ffn * UTILISATION["cpu"])
    large = torch.randn(16 * SIDE, SIDE)  # larger than caches
    per_update = _seconds(lambda: large.mul_(1.0)) / (2 * FP32 * large.numel()) * OPTIMIZER_TRAFFIC
    per_activation_byte = _byte_seconds(tokens * shape.ffn)
    per_logit_byte = _byte_seconds(min(job.loss_chunk or chunk_tokens(0, 0, None), tokens) * shape.vocabulary)
    counts: Counter[tuple[str, str | None, int]] = Counter()
    for module in facts.coverage.modules:
        if module.weight is not None:
            counts[module.weight, module.input, module.rotation] += module.parameters
    sums, total = [0.0, 0.0, 0.0], counts.total()
    for (weight, input, rotated), count in counts.items():
        measured = (
            _weight_seconds(job.scheme, weight),
            _input_seconds(job.scheme, input, rotated),
            _search_seconds(job.scheme, weight),
        )
        sums = [s + count * seconds for s, seconds in zip(sums, measured, strict=True)]
    threads = torch.get_num_threads()
    name = f"this CPU, {threads} thread{'s' if threads > 1 else ''}"
    per_weight, per_input, per_search = (value / max(total, 1) for value in sums)
    speeds = (per_flop, per_weight, per_input, per_search, per_update, per_activation_byte, per_logit_byte, 0.0)
    return Machine("cpu", name, mixed, _ram(), *speeds)


def _byte_seconds(values: int) -> float:
    """Of one elementwise operation into fresh memory, per byte: above 32 MiB the system has to find that memory."""
    x = torch.randn(min(values, 16 * SIDE**2))
    return _seconds(lambda: x * x) / (FP32 * x.numel())


def _weight_seconds(scheme: Scheme, name: str) -> float:
    """Of fake quantization, forward and backward, per weight."""
    fmt, leaf = lookup(name), torch.randn(SIDE, SIDE).requires_grad_()
    quantizer = WeightQuantizer(fmt, find_scales(leaf, fmt), scheme.learn, scheme.round_bf16)
    return _seconds(lambda: quantizer(leaf).sum().backward()) / leaf.numel()


def _input_seconds(scheme: Scheme, name: str | None, rotated: int) -> float:
    if name is None:
        return 0.0
    leaf = torch.randn(SIDE, SIDE).requires_grad_()
    quantizer = InputQuantizer(lookup(name), scheme.activation_rule, scheme.estimator, scheme.observer)
    quantizer.amax.fill_(float(leaf.detach().abs().amax()))
    quantizer.transforms = (BlockHadamard(rotated),) if rotated else ()
    return _seconds(lambda: quantizer(leaf).sum().backward()) / leaf.numel()


def _search_seconds(scheme: Scheme, name: str) -> float:
    fmt, part, search = lookup(name), torch.randn(SIDE // 8, SIDE), scheme.search_of(Rule(match="*", weight=name))
    return _seconds(lambda: initial_scales(part, fmt, search)) / part.numel()


def _seconds(work: Callable[[], object]) -> float:
    """Of one call: the median of as many as fit into MEASURE_SECONDS, at least two, after one to warm up."""
    work()
    end = time.perf_counter() + MEASURE_SECONDS
    calls: list[float] = []
    while len(calls) < 2 or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        calls.append(time.perf_counter() - began)
    return statistics.median(calls)


def _ram() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None


# --- time -----------------------------------------------------------------------------------------


def _plan(job: Job, facts: Facts, machine: Machine) -> Plan:
    tokens = job.steps * job.tokens_per_step
    training = job.steps * _step_seconds(job, facts, machine)
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


def _step_seconds(job: Job, facts: Facts, machine: Machine) -> float:
    """Of one optimizer step on each device: products, fake quantization of the weights once per pass and of the inputs,
    the other elementwise work, and the update; a pass takes no less than its launches."""
    tokens = job.micro_rows * job.data.seq_len
    logits = LOGIT_PASSES[job.asks_teacher] * FP32 * tokens * facts.student.shape.vocabulary
    activations = ACTIVATION_PASSES * memory(job, facts, machine.kind, machine.mixed)["activations"]
    one_pass = (
        tokens * flops_per_token(job, facts) * machine.per_flop
        + facts.quantized * machine.per_weight
        + tokens * facts.input_values * machine.per_input
        + activations * machine.per_activation_byte
        + logits * machine.per_logit_byte
    )
    passes = job.rows / (job.micro_rows * job.devices)
    least = facts.student.shape.layers * machine.per_layer
    return passes * max(one_pass, least) + facts.trainable / shards(job) * machine.per_update


def _other_seconds(job: Job, facts: Facts, machine: Machine) -> float:
    """Evaluating (BF16, two initialisations, every so many steps, the end and what is left of the gap), calibrating,
    searching; GPTQ multiplies inputs with themselves, and every weight with its row of products."""
    student, teacher = (forward_flops(a, job.eval.data.seq_len) for a in (facts.student, facts.teacher))
    least = facts.student.shape.layers * machine.per_layer / 3  # a forward pass has no backward
    head = 2.0 * facts.teacher.shape.hidden * facts.teacher.shape.vocabulary
    during = job.steps // job.eval.every if job.eval.every else 1
    often = 3 + during + 2 * (job.eval.choose is not None) + 3 * job.eval.why
    evaluation = job.eval.tokens * (2 * teacher * (job.teacher_cache is None) + often * (student + head))
    passes = often * job.eval.tokens / (job.eval.batch * job.eval.data.seq_len)
    values = often * job.eval.tokens * facts.input_values
    text, products = job.calibration or job.data, facts.input_products(job)
    observed = sum(step.WHOLE_MODEL or step.kind == "hadamard" for step in job.scheme.init)
    walks = [step for step in job.scheme.init if isinstance(step, BlockStep) and step.by_block]
    in_blocks = sum(step.passes(job.calibration_rows) for step in walks) + STREAMS * bool(walks)
    learned = sum(step.passes(job.calibration_rows) for step in job.scheme.init if isinstance(step, Rotate))
    reads = 1 + observed + in_blocks + learned + -(-FP32 * products // PRODUCTS)  # of the calibration text
    per_token = reads * forward_flops(facts.student, text.seq_len) + 2.0 * products
    calibrated = job.calibration_rows * text.seq_len * per_token
    if products:
        calibrated += sum(2.0 * m.parameters * m.shape[-1] for m in facts.coverage.modules if m.weight)
    # A forward pass alone is about half of forward and backward of the fake quantization.
    quantizing = 0.5 * (passes * facts.quantized * machine.per_weight + values * machine.per_input)
    searching = facts.quantized * machine.per_search
    return max((evaluation + calibrated) * machine.per_flop + quantizing, passes * least) + searching
