"""Models of a run with `strategy: fsdp` that are never whole anywhere: divided before they have any numbers.

A process reads the checkpoint as mapped files, of which only what it touches lies in memory, gives one block after
another its numbers and keeps its share of each. Scales begin by the format's own rule; the steps of the initialisation
then work on one block at a time (`qat.init.together`). Where one of them, or something else in the job, needs whole
models, they are divided afterwards (`qat.trainers.strategy.divide`), and the plan of the job says so.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat import sharded
from qat.checkpoints import packed
from qat.checkpoints.hf import ModelConfig, load_configured
from qat.checkpoints.shards import ShardReader
from qat.init.scales import search_scales, share_global_scales
from qat.init.step import Calibration
from qat.quantizer import InputQuantizer, Quantizer
from qat.sites import weights
from qat.surgery import Coverage, apply, report
from qat.trainers import strategy
from qat.trainers.optim import freeze
from qat.trainers.written import teacher_dtype

if TYPE_CHECKING:
    from qat.trainers.footprint import Facts
    from qat.trainers.job import Job
    from qat.trainers.strategy import Ranks

FP32 = 4
COPIES = 3  # of a block while it is worked on: as it is, as it was, and on its grid
FACTORS = 4 * 8 + 2 * 4  # bytes per value of a matrix of input products: float64 steps to its inverse, and float32


def obstacle(job: "Job", source: Path | None = None) -> str | None:
    """Why the models of a divided job are whole on every device until they are initialised, or None.

    Args:
        source: the student's folder, where it is known.
    """
    if job.strategy == "deepspeed":
        return "DeepSpeed divides models that are whole"
    if job.lora is not None:
        return "lora puts its adapters on whole models"
    steps = [step for init in (job.scheme.init, *(rule.init for rule in job.scheme.rules)) for step in init or ()]
    if needing := [step.kind for step in steps if not step.divides]:
        return f"{needing[0]} of scheme.init works on whole models"
    if any(part.source == "teacher" for config, _ in job.texts.values() for part in config.parts):
        return "the teacher writes text"
    if source is not None and packed.read(source) is not None:
        return f"{job.model.id} is packed"
    return None


def first(job: "Job", source: Path | None = None) -> bool:
    """Whether the job divides its models before they have numbers."""
    return strategy.divides(job) and obstacle(job, source) is None


def load(
    job: "Job", source: Path, reference: Path | None, device: torch.device, ranks: "Ranks"
) -> tuple[nn.Module, nn.Module | None, Coverage, int]:
    """Student (with the scheme applied) and teacher, divided; what is quantized; parameters of the student.

    Args:
        reference: the teacher's folder; None where there is none to load.

    Raises:
        CheckpointError, ConfigError, UnsupportedError: as loading and applying do, or models cannot be divided.
    """
    student, values = _emptied(job.model, source, torch.float32)
    strategy.check_models(job, student)
    coverage = report(student, job.scheme)
    parameters = sum(p.numel() for p in student.parameters())
    checkpointed(job, student)
    apply(student, job.scheme, defer_init=True)
    freeze(student, job.optim)
    sharded.divide(student, device, ranks.size, _Fill(student, values, device))
    teacher: nn.Module | None = None
    if reference is not None:
        dtype = teacher_dtype(job)
        teacher, values = _emptied(job.teacher or job.model, reference, dtype)
        strategy.check_models(job, teacher)
        sharded.divide(teacher.requires_grad_(False), device, ranks.size, _Fill(teacher, values, device))
    return student, teacher, coverage, parameters


def checkpointed(job: "Job", student: Any) -> None:
    """Have the student recompute activations where the job says so."""
    if job.activation_checkpointing:
        # transformers 5.23 renamed the method; 5.17 only knows the old name.
        name = "activation_checkpointing_enable"
        getattr(student, name if hasattr(student, name) else "gradient_checkpointing_enable")({"use_reentrant": False})


def _emptied(config: ModelConfig, folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """A model whose parameters have no numbers, and what they are by name, in mapped files where those allow it."""
    exact = dtype is torch.float32
    model: Any = _mapped(config, folder) if exact else load_configured(config, folder, dtype)
    values = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    made: dict[int, nn.Parameter] = {}  # tied ones stay so
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in made:
            empty = torch.empty(parameter.shape, dtype=dtype if exact else parameter.dtype, device="meta")
            made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, made[id(parameter)])
    model.config.dtype = dtype
    return model, values


def _mapped(config: ModelConfig, folder: Path) -> Any:
    """A model on the CPU in the type that its files have, so that weights take no memory until they are read; in
    float32, and in memory, where only that gives the exact numbers: files that hold other types than BF16, and classes
    that compute with the type they are loaded in."""
    reader = ShardReader(folder)
    if {code for name in reader.names() if (code := reader.info(name).code).startswith(("F", "BF"))} == {"BF16"}:
        model = load_configured(config, folder, torch.bfloat16)
        stored = model.state_dict()
        if not any(b.dtype is torch.bfloat16 for name, b in model.named_buffers() if name not in stored):
            return model
    return load_configured(config, folder)


class _Fill:
    """Gives a block its numbers on a device, and its quantizers scales by their formats' own rule."""

    def __init__(self, model: nn.Module, values: dict[str, Tensor], device: torch.device) -> None:
        self.model, self.device = model, device
        self.values = {
            id(p): values[name] for name, p in model.named_parameters(remove_duplicate=False) if name in values
        }
        self.filled: dict[int, nn.Parameter] = {}

    def __call__(self, block: nn.Module) -> None:
        quantizers = {id(m) for m in block.modules() if isinstance(m, Quantizer) and _is_empty(m)}
        for module in block.modules():
            if id(module) in quantizers:
                _begin(module, self.device)
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in self.values:
                    module._parameters[name] = self._parameter(parameter)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)
        sites = {path: site for path, site in weights(self.model).items() if id(site.quantizer) in quantizers}
        share_global_scales(Calibration(self.model, [], sites, {}))
        for site in sites.values():
            search_scales(site, "amax")

    def _parameter(self, empty: nn.Parameter) -> nn.Parameter:
        if id(empty) not in self.filled:
            values = self.values[id(empty)].to(self.device, empty.dtype, copy=True)
            self.filled[id(empty)] = nn.Parameter(values, requires_grad=empty.requires_grad)
        return self.filled[id(empty)]


def _is_empty(quantizer: Quantizer) -> bool:
    return any(tensor.is_meta for tensor in (*quantizer.parameters(), *quantizer.buffers()))


@torch.no_grad()
def _begin(quantizer: nn.Module, device: torch.device) -> None:
    quantizer.to_empty(device=device)
    if isinstance(quantizer, InputQuantizer):
        quantizer.amax.fill_(float("nan"))
        if quantizer.log_range is not None:
            quantizer.log_range.zero_()


def initial_bytes(job: "Job", facts: "Facts", parts: dict[str, int]) -> int:
    """Of one device while models are divided, loaded and initialised: its shares, what no block owns, and the larger of
    a block that is worked on (with GPTQ's factors) and the logits of calibration text."""
    shape = facts.student.shape
    shares = sum(parts[name] for name in ("master weights", "scales", "teacher"))
    outside = 2 * FP32 * shape.hidden * shape.vocabulary
    block = FP32 * max(0, facts.student.parameters - 2 * shape.hidden * shape.vocabulary) // shape.layers
    widest = max((m.shape[-1] for m in facts.coverage.modules if m.weight), default=0)
    largest = max((m.parameters for m in facts.coverage.modules if m.weight), default=0)
    factors = FACTORS * widest**2 if facts.input_products(job) else 0
    logits = FP32 * job.micro_rows * (job.calibration or job.data).seq_len * shape.vocabulary
    return shares + outside + max(COPIES * block + factors + COPIES * FP32 * largest, 2 * block + logits)
