"""The processes of a run that asks for several devices: how they start, what they share, and what Lightning is given.

Lightning and torch do the work. torch's elastic agent (which is torchrun) starts and watches processes, unless torchrun
or SLURM started them already; `DistributedDataParallel` sums gradients. What is left for this file: where a process
stands (`Ranks`), and the rule for everything outside the steps. Whatever reads or writes the run's folder is done by
rank 0, which tells the others (`lead`). Models are loaded and initialised by every rank, which takes no longer than on
one, and rank 0's numbers are then sent to all (`share`), so that nothing rests on two devices rounding alike; or they
are divided first, and no rank ever holds them (`qat.trainers.divided`).
"""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, distributed, nn

from qat import sharded
from qat.errors import ConfigError, Interrupted, QatError, TrainingError, UnsupportedError
from qat.trainers import zero
from qat.zero import forget_group

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from qat.trainers.job import Job
    from qat.trainers.parts import Parts

T = TypeVar("T")

WAITING = timedelta(hours=2)  # for rank 0, which may download a model or write text meanwhile
SAVING_SECONDS = 600  # after a signal, before the agent kills what has not ended
APART = 5.0  # seconds: what went wrong on every rank is said by the first one, which ends the others
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGUSR1"  # that the agent passes on; see `qat.trainers.interrupts`


@dataclass(frozen=True)
class Ranks:
    """The processes of a run and this one's place among them.

    Attributes:
        rank, size: among all.
        local_rank, local_size: among those of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run's folder and speaks to the user."""
        return self.rank == 0

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on every rank; the others wait for it.

        Raises:
            QatError, OSError: of `work`, on rank 0. The others end without a word.
        """
        if self.size == 1:
            return work()
        told: list[Any] = [None, True]
        if self.first:
            try:
                told = [work(), False]
            except (QatError, OSError):
                distributed.broadcast_object_list(told, src=0, device=torch.device("cpu"))
                raise
        distributed.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if told[1]:
            raise Interrupted(2)
        result: T = told[0]
        return result

    def wait(self) -> None:
        """Until rank 0 is here, so that what it wrote can be read."""
        self.lead(lambda: None)

    def sum(self, values: Tensor) -> Tensor:
        """`values` (on the CPU) added over ranks, in the same order and so to the same bits on every rank."""
        if self.size == 1:
            return values
        found = [torch.empty_like(values) for _ in range(self.size)]
        distributed.all_gather(found, values)
        return torch.stack(found).sum(0)

    def most(self, value: int) -> int:
        """The largest of every rank's value."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        return int(largest)

    @torch.no_grad()
    def share(self, model: nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0's `model`; of what is divided each has its own."""
        tensors = (*model.parameters(), *model.buffers()) if self.size > 1 else ()
        for tensor in (tensor for tensor in tensors if not sharded.is_share(tensor)):
            values = tensor.detach().contiguous()
            distributed.broadcast(values.view(-1).view(torch.uint8), 0)
            if values.data_ptr() != tensor.data_ptr():
                tensor.copy_(values)
            torch.autograd.graph.increment_version(tensor)  # a broadcast does not say that it writes


ALONE = Ranks()


# --- what can be trained here ---------------------------------------------------------------------


def refusal(job: "Job") -> str | None:
    """Why `train` refuses this job's strategy wherever it runs, or None."""
    if (divides(job) or job.strategy == "deepspeed") and job.lora is not None and job.lora.base == "packed":
        return (
            f"lora.base: packed holds codes, which strategy {job.strategy} does not divide; use lora.base=dense or "
            "strategy=ddp"
        )
    if job.compile and (divides(job) or job.strategy == "deepspeed"):
        return (
            f"compile: true makes graphs of whole blocks, whose parameters strategy {job.strategy} gathers only while "
            "they run; use compile=false or strategy=ddp"
        )
    return None


def check(job: "Job") -> None:
    """Refuse what cannot be trained on this machine.

    Raises:
        UnsupportedError: the strategy.
        ConfigError: fewer GPUs than processes.
    """
    if (reason := refusal(job)) is not None:
        raise UnsupportedError(reason)
    if job.strategy == "deepspeed" and (reason := zero.missing()):
        raise UnsupportedError(reason)
    placed = _placed()
    here = job.devices if placed is None else placed.local_size
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if job.devices > 1 and 0 < gpus < here:
        raise ConfigError(f"devices is {job.devices}, of which {here} on this machine, but it has {gpus} GPUs; "
                          f"set devices={gpus}, or CUDA_VISIBLE_DEVICES= to train with processes on CPUs")  # fmt: skip


# --- starting -------------------------------------------------------------------------------------


def _placed() -> Ranks | None:
    """Where a launcher put this process, or None where there was none."""
    given = os.environ
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= given.keys():  # torchrun
        size = int(given["WORLD_SIZE"])
        local = int(given.get("LOCAL_WORLD_SIZE", size))
        return Ranks(int(given["RANK"]), size, int(given["LOCAL_RANK"]), local)
    # A batch script sees its job's variables too, before srun started anything.
    script = given.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in given
    if not {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"} <= given.keys() or script:
        return None
    size = int(given.get("SLURM_STEP_NUM_TASKS", given["SLURM_NTASKS"]))
    nodes = int(given.get("SLURM_STEP_NUM_NODES", given.get("SLURM_NNODES", "1")))
    return Ranks(int(given["SLURM_PROCID"]), size, int(given["SLURM_LOCALID"]), size // nodes) if size > 1 else None


def must_launch(job: "Job") -> bool:
    """Whether nobody has started the processes that this job asks for."""
    return job.devices > 1 and _placed() is None


def is_first(job: "Job") -> bool:
    """Whether this process speaks for its run."""
    placed = _placed() if job.devices > 1 else None
    return placed is None or placed.first


def launch(job: "Job", arguments: list[str]) -> int:
    """Run `qat ARGUMENTS` as `job.devices` processes of this machine and wait for them; returns the exit status.

    Raises:
        TrainingError: a rank died without a word; says which.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from qat.trainers.claim import how_to_go_on
    from qat.trainers.interrupts import STATUS

    check(job)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_SECONDS))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // job.devices)))
    where: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(os.getpid())}
    config = LaunchConfig(1, 1, job.devices, max_restarts=0, monitor_interval=0.1, signals_to_handle=SIGNALS, **where)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each rank would advise against `find_unused_parameters`
    _quiet_agent()
    try:
        elastic_launch(config, sys.executable)("-m", "qat.cli", *arguments)
    except SignalException as error:
        return STATUS.get(error.sigval, 128 + error.sigval)
    except ChildFailedError as error:
        rank, failure = _cause(error.failures)
        if failure.exitcode in (2, *STATUS.values()):
            return int(failure.exitcode)  # with a message of its own
        how = f"ended with status {failure.exitcode}"
        if failure.exitcode < 0:
            how = f"was ended by {signal.Signals(-failure.exitcode).name}"
        raise TrainingError(
            f"rank {rank} (process {failure.pid}) {how}, and the others with it; {how_to_go_on(job.folder)}"
        ) from error
    return 0


def _cause(failures: "dict[int, ProcessFailure]") -> "tuple[int, ProcessFailure]":
    """Which rank ended the others: one that a signal ended, whom the others lost and said so; SIGTERM comes last, with
    which the agent ends those that are left once a rank has said what is wrong."""

    def order(item: "tuple[int, ProcessFailure]") -> tuple[bool, bool, int]:
        status = item[1].exitcode
        return status == -signal.SIGTERM, status > 0, item[1].timestamp

    return min(failures.items(), key=order)


def _quiet_agent() -> None:
    """The agent reports every failed process in a page of its own; `launch` says it in a line. Each of its files sets
    the level of its own logger when it is imported, which `launch` has done."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def joined(job: "Job") -> Iterator[Ranks]:
    """This process among those of the job, connected.

    Raises:
        ConfigError: nobody started them, or another number of them.
        TrainingError: the connection was lost, because another rank ended.
    """
    if job.devices == 1:
        with _connected(ALONE) if job.strategy == "deepspeed" else contextlib.nullcontext():
            yield ALONE
        return
    ranks = _placed()
    if ranks is None:
        raise ConfigError(
            f"the job asks for {job.devices} devices, and this is one process; start it with `qat train`, or with "
            f"torchrun --nproc-per-node {job.devices}"
        )
    if ranks.size != job.devices:
        raise ConfigError(
            f"{ranks.size} processes were started, but devices is {job.devices}; set devices={ranks.size}"
        )
    with _connected(ranks):
        yield ranks


@contextlib.contextmanager
def _connected(ranks: Ranks) -> Iterator[None]:
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if "MASTER_ADDR" not in os.environ and ranks.size > 1:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = _meeting_point()
    store = distributed.HashStore() if ranks.size == 1 else None  # type: ignore[attr-defined] # not in its __all__
    distributed.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=WAITING)
    try:
        yield
    except QatError as error:
        if not ranks.first:
            time.sleep(APART)
            error.args = (f"rank {ranks.rank}: {error}",)
        raise
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise TrainingError(f"rank {ranks.rank} lost another one ({str(error).splitlines()[0][:200]})") from error
    finally:
        forget_group()
        distributed.destroy_process_group()


def _meeting_point() -> tuple[str, str]:
    """Address and port of rank 0 under SLURM: the first machine, and a port that follows from the job's number."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    given = os.environ
    lists = (given.get(f"SLURM_{what}NODELIST") for what in ("STEP_", "JOB_", ""))
    machines = next((names for names in lists if names), "127.0.0.1")
    port = 15000 + int(given.get("SLURM_JOB_ID", "0")) % 10000
    return SLURMEnvironment.resolve_root_node_address(machines), given.get("MASTER_PORT", str(port))


# --- Lightning ------------------------------------------------------------------------------------


class Placed(LightningEnvironment):
    """Tells Lightning where this process stands, whatever SLURM, torchrun or MPI left in the environment.

    Lightning would take ranks and sizes from their variables, and under SLURM put handlers of its own on signals.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self.set_global_rank(ranks.rank)
        self.set_world_size(ranks.size)

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning starts none."""
        return self.ranks.size > 1

    def local_rank(self) -> int:
        """Among the processes of this machine."""
        return self.ranks.local_rank

    def node_rank(self) -> int:
        """Of this machine."""
        return self.ranks.rank // self.ranks.local_size

    def teardown(self) -> None:
        """Leave the launcher's variables as they are: Lightning would take WORLD_SIZE out."""


def divides(job: "Job") -> bool:
    """Whether the job trains a divided model; one device has nothing to divide."""
    return job.strategy == "fsdp" and job.devices > 1


def _needs_blocks(job: "Job") -> bool:
    """Whether every process must reach all of every block."""
    return job.strategy in ("fsdp", "deepspeed") and job.devices > 1


def undividable(job: "Job", *models: nn.Module) -> list[str]:
    """Why models cannot be divided as the job wants."""
    reasons = (sharded.refusal(model, job.strategy) for model in (models if _needs_blocks(job) else ()))
    return [reason for reason in reasons if reason]


def check_models(job: "Job", *models: nn.Module) -> None:
    """Refuse models that the job's strategy cannot train.

    Raises:
        UnsupportedError: with the reason.
    """
    if reasons := undividable(job, *models):
        raise UnsupportedError(reasons[0])


def divide(job: "Job", parts: "Parts") -> None:
    """Divide the models of a run among its devices where its strategy says so."""
    if job.strategy == "fsdp" and divides(job):
        sharded.divide(parts.student, parts.device, parts.ranks.size)
    third = job.strategy == "deepspeed" and job.deepspeed.stage == 3 and job.devices > 1
    if parts.teacher is not None and (third or divides(job)):  # the student's engine divides it when training begins
        sharded.divide(parts.teacher.requires_grad_(False), parts.device, parts.ranks.size)
    if parts.device.type == "cuda":
        torch.cuda.empty_cache()  # of the whole tensors


def trainer_arguments(job: "Job", ranks: Ranks, mixed: bool = False) -> dict[str, Any]:
    """What `lightning.Trainer` is told of the devices and the precision."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    rank_zero_only.rank = ranks.rank  # type: ignore[attr-defined]  # Lightning read a launcher's variables on import
    where = {"plugins": [Placed(ranks)], "devices": ranks.local_size, "num_nodes": ranks.size // ranks.local_size}
    if job.strategy == "deepspeed":
        from qat.trainers.zero_strategy import ZeroStrategy

        deepspeed = ZeroStrategy(job.deepspeed, job.optim.clip, mixed, WAITING)
        return {**where, "strategy": deepspeed, "precision": "32-true"}  # its engine casts, see `qat.trainers.zero`
    where["precision"] = "bf16-mixed" if mixed else "32-true"
    if ranks.size == 1:
        return {**where, "strategy": "auto"}
    if job.strategy == "fsdp":
        sizes: dict[str, Any] = {"data_parallel_size": ranks.size, "tensor_parallel_size": 1}
        return {**where, "strategy": ModelParallelStrategy(**sizes, timeout=WAITING)}
    # Experts and towers that a batch does not reach have no gradient; buffers are the same everywhere and stay so.
    ddp = DDPStrategy(
        find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True, timeout=WAITING
    )
    return {**where, "strategy": ddp}
