"""How fast devices are, and how long a step takes on one: a CPU is measured for a second, a GPU is looked up by name
and taken at stated shares of its data sheet. Where no GPU is here an H100 is assumed, and said to be."""

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qat.init.scales import initial_scales
from qat.numbers.catalog import lookup
from qat.numbers.hadamard import BlockHadamard
from qat.numbers.numerics import find_scales
from qat.quantizer import InputQuantizer, WeightQuantizer
from qat.scheme import Rule, Scheme
from qat.trainers import zero
from qat.trainers.footprint import BF16, FP32, GIB, Facts, flops_per_token, memory, shards
from qat.trainers.job import Job
from qat.trainers.memory import keep_freed_blocks
from qat.training.losses import chunk_tokens

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

# How often elementwise work goes over stored activations, and over float32 logits without a teacher and with one. On a
# GPU activations are written and read, read again and their gradients written and read; losses have a kernel.
ACTIVATION_PASSES = {"cpu": 12, "cuda": 5}
LOGIT_PASSES = {"cpu": (12, 15), "cuda": (4, 5)}
# What is assumed of a GPU, where a CPU is measured. Share of the peak that products reach, small ones among them.
UTILISATION = 0.45
# Bytes of memory traffic: of the Triton kernels, per quantized weight and pass and per quantized input value, as timed
# on an H100 (docs/measurements.md: 53 + 77 us for 16.8 M weights; 52 us, and as much backward, for 33.5 M values);
# of the search for initial scales, which has no kernel, once; of clipping and AdamW.
WEIGHT_TRAFFIC, INPUT_TRAFFIC, SEARCH_TRAFFIC, OPTIMIZER_TRAFFIC = 26, 10, 2000, 40
# Seconds of the host per kernel that PyTorch launches, and per operator of ours, which Python runs (100 to 200 us were
# measured on an H100's host for one with a server's checks). Launches of a linear layer, forward and backward under
# autocast; operators besides, where it is quantized; launches of what else is in a decoder layer.
LAUNCH_SECONDS, OPERATOR_SECONDS = 5e-6, 50e-6
LINEAR_LAUNCHES, LINEAR_OPERATORS, OTHER_LAUNCHES = 18, 5, 70
# Bytes per second and device in which weights and gradients travel: NVLink inside a machine, a 400 Gb/s card beyond.
NVLINK, NETWORK, MACHINE_GPUS = 300e9, 40e9, 8
# What is assumed of a CPU: the share of one measured product of the feed-forward layer that all products reach.
CPU_UTILISATION = 0.7
SIDE, MEASURE_SECONDS = 1024, 0.3


@dataclass(frozen=True)
class Machine:
    """A device and its speeds, in seconds.

    Attributes:
        kind, name, mixed, capacity: "cpu" or "cuda", what it is called, whether it computes in BF16, and its bytes.
        per_flop: of the products of training.
        per_weight, per_input: of fake quantization, forward and backward, per value.
        per_search: of the search for initial scales, per weight.
        per_update: of the optimizer, per parameter.
        per_activation_byte, per_logit_byte: of one elementwise pass.
        per_launch, per_operator: of the host, see `launch_seconds`.
        per_sent_byte: between devices.
    """

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
    per_launch: float = 0.0
    per_operator: float = 0.0
    per_sent_byte: float = 0.0


def step_seconds(job: Job, facts: Facts, machine: Machine) -> float:
    """Of one optimizer step on each device: products, fake quantization of the weights once per pass and of the inputs,
    the other elementwise work, and the update; a pass takes no less than its launches, nor than what devices send
    meanwhile."""
    tokens = job.micro_rows * job.data.seq_len
    logits = LOGIT_PASSES[machine.kind][job.asks_teacher] * FP32 * tokens * facts.student.shape.vocabulary
    activations = ACTIVATION_PASSES[machine.kind] * memory(job, facts, machine.kind, machine.mixed)["activations"]
    one_pass = (
        tokens * flops_per_token(job, facts) * machine.per_flop
        + facts.quantized * machine.per_weight
        + tokens * facts.input_values * machine.per_input
        + activations * machine.per_activation_byte
        + logits * machine.per_logit_byte
    )
    passes = job.rows / (job.micro_rows * job.devices)
    each, once = (count * machine.per_sent_byte for count in sent_bytes(job, facts))
    least = max(launch_seconds(job, facts, machine), each)
    seconds = passes * max(one_pass, least) + once
    if job.strategy != "deepspeed":
        return seconds + facts.trainable / shards(job) * machine.per_update
    host = zero.host_seconds(job.deepspeed, facts.trainable, facts.student.parameters, job.devices, passes)
    return seconds + (host or facts.trainable / job.devices * machine.per_update)


def launch_seconds(job: Job, facts: Facts, machine: Machine) -> float:
    """That the host needs to launch one forward and backward pass, which no small batch can hide; a third of it for a
    teacher's forward pass, two thirds more where activations are recomputed."""
    linears = len(facts.coverage.modules)
    quantized = sum(module.weight is not None for module in facts.coverage.modules)
    launches = LINEAR_LAUNCHES * linears + OTHER_LAUNCHES * facts.student.shape.layers
    operators = LINEAR_OPERATORS * quantized
    share = 1 + 2 / 3 * job.activation_checkpointing
    teacher = launches / 3 * job.asks_teacher
    return (share * launches + teacher) * machine.per_launch + share * operators * machine.per_operator


def sent_bytes(job: Job, facts: Facts) -> tuple[float, float]:
    """By each device, per pass and per step. Divided weights are gathered in float32 for the forward and the backward
    pass (a teacher's in BF16, once) and gradients scattered; otherwise gradients are summed, once a step."""
    if job.devices == 1:
        return 0.0, 0.0
    others = (job.devices - 1) / job.devices
    if job.strategy == "deepspeed" and job.deepspeed.stage == 2:  # which sums after every pass
        return FP32 * facts.trainable * others, FP32 * facts.trainable * others
    if shards(job) == 1:
        return 0.0, 2 * FP32 * facts.trainable * others
    gathered = 2 * FP32 * facts.student.parameters + BF16 * facts.teacher.parameters * job.asks_teacher
    return (gathered + FP32 * facts.trainable) * others, 0.0


def machines(job: Job, facts: Facts) -> list[Machine]:
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
    return Machine(
        kind="cuda",
        name=name,
        mixed=job.precision != "fp32",
        capacity=capacity,
        per_flop=1 / (peak * UTILISATION),
        per_weight=WEIGHT_TRAFFIC / bandwidth,
        per_input=INPUT_TRAFFIC / bandwidth,
        per_search=SEARCH_TRAFFIC / bandwidth,
        per_update=OPTIMIZER_TRAFFIC / bandwidth,
        per_activation_byte=1 / bandwidth,
        per_logit_byte=1 / bandwidth,
        per_launch=LAUNCH_SECONDS,
        per_operator=OPERATOR_SECONDS,
        per_sent_byte=1 / (NVLINK if job.devices <= MACHINE_GPUS else NETWORK),
    )


def _cpu(job: Job, facts: Facts) -> Machine:
    """This CPU, measured with the formats of the job; means over formats are weighted by parameters."""
    keep_freed_blocks()  # as a run does, or fresh memory would cost more here
    mixed = job.precision == "bf16-mixed"
    shape, tokens = facts.student.shape, job.micro_rows * job.data.seq_len
    dtype = torch.bfloat16 if mixed else torch.float32
    rows = min(tokens, max(16, SIDE**3 // (shape.hidden * shape.ffn)))  # enough to be typical, few enough to be quick
    left, right = torch.randn(rows, shape.hidden, dtype=dtype), torch.randn(shape.hidden, shape.ffn, dtype=dtype)
    per_flop = timed(lambda: left @ right) / (2 * rows * shape.hidden * shape.ffn * CPU_UTILISATION)
    large = torch.randn(16 * SIDE, SIDE)  # larger than caches
    per_update = timed(lambda: large.mul_(1.0)) / (2 * FP32 * large.numel()) * OPTIMIZER_TRAFFIC
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
    speeds = (per_flop, per_weight, per_input, per_search, per_update, per_activation_byte, per_logit_byte)
    return Machine("cpu", name, mixed, _ram(), *speeds)


def _byte_seconds(values: int) -> float:
    """Of one elementwise operation into fresh memory, per byte: above 32 MiB the system has to find that memory."""
    x = torch.randn(min(values, 16 * SIDE**2))
    return timed(lambda: x * x) / (FP32 * x.numel())


def _weight_seconds(scheme: Scheme, name: str) -> float:
    """Of fake quantization, forward and backward, per weight."""
    fmt, leaf = lookup(name), torch.randn(SIDE, SIDE).requires_grad_()
    quantizer = WeightQuantizer(fmt, find_scales(leaf, fmt), scheme.learn, scheme.round_bf16)
    return timed(lambda: quantizer(leaf).sum().backward()) / leaf.numel()


def _input_seconds(scheme: Scheme, name: str | None, rotated: int) -> float:
    if name is None:
        return 0.0
    leaf = torch.randn(SIDE, SIDE).requires_grad_()
    quantizer = InputQuantizer(lookup(name), scheme.activation_rule, scheme.estimator, scheme.observer)
    quantizer.amax.fill_(float(leaf.detach().abs().amax()))
    quantizer.transforms = (BlockHadamard(rotated),) if rotated else ()
    return timed(lambda: quantizer(leaf).sum().backward()) / leaf.numel()


def _search_seconds(scheme: Scheme, name: str) -> float:
    fmt, part, search = lookup(name), torch.randn(SIDE // 8, SIDE), scheme.search_of(Rule(match="*", weight=name))
    return timed(lambda: initial_scales(part, fmt, search)) / part.numel()


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call: the median of as many as fit into MEASURE_SECONDS, at least two, after one to warm up."""
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
