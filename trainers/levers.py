"""Other ways to run a job: what a device would hold under each strategy, what to change where the job does not fit, and
where a GPU would wait for its host."""

from dataclasses import dataclass
from typing import Any

from qat.errors import QatError
from qat.trainers.footprint import GIB, Facts, job_facts, memory
from qat.trainers.job import Job
from qat.trainers.speeds import MACHINE_GPUS, Machine, launch_seconds, step_seconds
from qat.trainers.zero import ZeroConfig

HEADROOM = 0.95  # share of a device's memory that may be planned for
MOST_DEVICES = 128  # that are proposed
LOW_RANK = "lora='{rank: 16}' scheme.learn=none"
UNDIVIDED = "undivided models, initialised"  # of `footprint.memory`: not yet loaded in shares
_ZERO = [*((f"ZeRO-{stage}", ZeroConfig.model_validate({"stage": stage})) for stage in (1, 2, 3))]
_ZERO += [("ZeRO-3, offloaded", ZeroConfig(stage=3, offload="all"))]
_WORTH = 1.1  # a proposal is at least so much faster


@dataclass(frozen=True)
class Way:
    """A strategy on so many devices: bytes per device at the peak, and tokens per second over all of them."""

    strategy: str
    devices: int
    peak: int
    tokens_per_second: float


def ways(job: Job, facts: Facts, machine: Machine) -> tuple[Way, ...]:
    """One device, and every strategy on those that the job asks for, or on one machine's."""
    count = job.devices if job.devices > 1 else MACHINE_GPUS
    one, ddp, fsdp = (
        changed(job, devices=devices, strategy=name) for devices, name in ((1, "auto"), (count, "ddp"), (count, "fsdp"))
    )
    rows = [("one device", one), ("ddp (auto)", ddp), ("fsdp", fsdp)]
    for name, zero in _ZERO:
        rows.append((f"deepspeed, {name}", changed(job, devices=count, strategy="deepspeed", deepspeed=zero)))
    return tuple(
        Way(name, other.devices, _peak(other, facts, machine), _speed(other, facts, machine)) for name, other in rows
    )


def changed(job: Job, **update: Any) -> Job:
    """`job` with other settings; rows become a multiple of what all devices read at once."""
    other = job.model_copy(update=update)
    together = other.micro_rows * other.devices
    return other.model_copy(update={"rows": -(-other.rows // together) * together})


def _peak(job: Job, facts: Facts, machine: Machine) -> int:
    return sum(memory(job, facts, machine.kind, machine.mixed).values())


def _speed(job: Job, facts: Facts, machine: Machine) -> float:
    return job.tokens_per_step / step_seconds(job, facts, machine)


def _fits(job: Job, facts: Facts, machine: Machine) -> bool:
    return machine.capacity is None or _peak(job, facts, machine) <= HEADROOM * machine.capacity


# --- where it does not fit ------------------------------------------------------------------------


def memory_advice(job: Job, facts: Facts, machine: Machine) -> list[str]:
    """What to change so that the job fits, with what it then needs; nothing where it fits."""
    if machine.capacity is None or _fits(job, facts, machine):
        return []
    room = f"{machine.capacity / GIB:,.0f} GiB of {machine.name}"
    divided = [{"strategy": "fsdp", "devices": count} for count in _counts(job)] if machine.kind == "cuda" else []
    found = [_first(job, facts, machine, [*_levers(job), *divided])]
    if "devices" in found[0] or not found[0]:
        adapted = _adapted(job)
        found += [_first(*adapted, machine, _levers(job), LOW_RANK)] if adapted is not None else []
    if any(found):
        return [f"does not fit into the {room}; it would with {', or with '.join(filter(None, found))}"]
    parts = memory(job, facts, machine.kind, machine.mixed)
    largest = max(parts, key=lambda name: parts[name])
    said = (
        f"does not fit into the {room}, with fewer rows, recomputed activations and more devices neither; the largest "
        f"part is {largest} ({parts[largest] / GIB:,.0f} GiB)"
    )
    step = sum(parts.values()) - parts.get(UNDIVIDED, 0)
    fits = UNDIVIDED in parts and step <= HEADROOM * machine.capacity
    return [said + f", without which a step would fit ({step / GIB:,.0f} GiB)" * fits]


def _levers(job: Job) -> list[dict[str, Any]]:
    """From the cheapest to the dearest."""
    levers: list[dict[str, Any]] = [{"micro_rows": 1}] if job.micro_rows > 1 else []
    levers += [] if job.activation_checkpointing else [{"activation_checkpointing": True}]
    return levers + ([] if job.loss_chunk is not None and job.loss_chunk <= 256 else [{"loss_chunk": 256}])


def _counts(job: Job) -> list[int]:
    counts = [max(job.devices, MACHINE_GPUS)]
    while 2 * counts[-1] <= MOST_DEVICES:
        counts.append(2 * counts[-1])
    return counts


def _adapted(job: Job) -> tuple[Job, Facts] | None:
    """The job with adapters instead of trained weights, where it goes with its other settings."""
    if job.lora is not None:
        return None
    scheme = job.scheme.model_copy(update={"learn": "none"})
    try:
        other = Job.model_validate({**job.model_dump(), "lora": {"rank": 16}, "scheme": scheme.model_dump()})
        return other, job_facts(other)
    except (QatError, ValueError):
        return None


def _first(job: Job, facts: Facts, machine: Machine, levers: list[dict[str, Any]], already: str = "") -> str:
    """The first levers together that are enough, without those that make no difference; "" where none are."""
    taken: dict[str, Any] = {}
    for lever in [{}, *levers]:
        taken |= lever
        if _fits(changed(job, **taken), facts, machine):
            break
    else:
        return ""
    for name in [name for name in taken if name not in ("strategy", "devices")]:
        rest = {key: value for key, value in taken.items() if key != name}
        if _fits(changed(job, **rest), facts, machine):
            taken = rest
    other = changed(job, **taken)
    said = [f"{key}={str(value).lower() if value is True else value}" for key, value in taken.items()]
    peak, speed = _peak(other, facts, machine) / GIB, _speed(other, facts, machine)
    return f"{' '.join(filter(None, [already, *said]))} ({peak:,.0f} GiB, {speed:,.0f} tokens/s)"


# --- where a GPU waits ----------------------------------------------------------------------------


def launch_advice(job: Job, facts: Facts, machine: Machine) -> list[str]:
    """A larger micro-batch, where a GPU would wait for its host to launch operations."""
    if machine.kind != "cuda":
        return []
    passes, now = job.rows / (job.micro_rows * job.devices), _speed(job, facts, machine)
    waits = passes * launch_seconds(job, facts, machine)
    if waits < 0.9 * step_seconds(job, facts, machine):
        return []
    best, speed, rows = job, now, job.micro_rows
    while (rows := 2 * rows) * job.data.seq_len <= 2**17:
        other = changed(job, micro_rows=rows)
        if not _fits(other, facts, machine) or _speed(other, facts, machine) < _WORTH * speed:
            break
        best, speed = other, _speed(other, facts, machine)
    if best is job:
        return []
    more = f" rows={best.rows}" if best.rows != job.rows else ""
    return [
        f"{machine.name} would wait for its host, which launches the operations of a pass in "
        f"{1000 * waits / passes:,.0f} ms; micro_rows={best.micro_rows}{more} would give {speed:,.0f} tokens/s instead "
        f"of {now:,.0f}"
    ]
