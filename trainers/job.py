"""The Job: one YAML file that says everything a run does. Read this file first to know what can be configured."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from qat.checkpoints.hf import ModelConfig
from qat.checkpoints.layouts import npu
from qat.checkpoints.layouts.reader import HALF_RULE, NPU_RULE
from qat.config import Strict, load_yaml, override, validate
from qat.errors import ConfigError
from qat.lora import LoraConfig
from qat.numbers.catalog import lookup
from qat.scheme import Scheme, upgraded
from qat.trainers.data import DataConfig
from qat.trainers.evaluate import EvalConfig
from qat.trainers.logitcache import TeacherCache
from qat.trainers.optim import OptimConfig
from qat.trainers.packed import completed
from qat.trainers.sources import overlapping
from qat.trainers.zero import ZeroConfig
from qat.training.objectives import CrossEntropy, ForwardKL, Loss

JOB = "job.yaml"  # of a run's folder
Precision = Literal["auto", "fp32", "bf16-mixed"]
Strategy = Literal["auto", "ddp", "fsdp", "deepspeed"]


class Wandb(Strict):
    """Weights & Biases, in addition to metrics.csv. `offline` keeps everything on disk."""

    project: str
    offline: bool = False


class Job(Strict):
    """One run.

    Attributes:
        name: the run lives in `<runs>/<name>/`.
        method: "qad" distils a teacher; "qat" trains on the next token.
        model: the student before quantization.
        teacher: whom to imitate and to be compared with; by default the student's own BF16 weights.
        teacher_cache: train on what the teacher said earlier (`qat teacher` asks it), without loading it.
        engine, device: an engine on an Ascend NPU (vllm-ascend, sglang-ascend, mindie) and the chip (a2, a3, 950): what
            it does not load is refused before training, see docs/ascend.md.
        scheme: which weights and inputs get which format; a file whose model is quantized already may leave its rules
            out (`qat.trainers.packed`).
        lora: train low-rank updates of frozen weights instead of the weights.
        loss: by default forward KL for qad and cross-entropy for qat.
        steps: optimizer steps.
        rows: rows of `data.seq_len` tokens per optimizer step, over all devices.
        micro_rows: rows per forward pass and device; the rest is gradient accumulation.
        calibration: text that sets activation ranges and initial scales; by default the training text. What the teacher
            writes (`source: teacher`) is closer to what a model will be asked than a narrow training set.
        calibration_rows: how much of it.
        checkpoint_every: steps between resumable checkpoints, 0 for only at the end.
        precision: "auto" is bf16-mixed on GPUs and fp32 on CPUs. Master weights are always fp32.
        compile: run the decoder blocks of training passes as graphs made by `torch.compile`, see
            `qat.trainers.compile`; a block that cannot be compiled runs as it is, and is named.
        cuda_graphs: launch the forward and backward pass of a micro-batch at once, on one GPU, see
            `qat.trainers.cuda_graphs`; what stands against it is named.
        strategy: how several devices share the work. "ddp": each holds the whole model and reads its share of the
            rows; "auto" is ddp where there are several devices. "fsdp" and "deepspeed" divide what a device holds.
        deepspeed: how that strategy divides, see `qat.trainers.zero`.
        devices: over all machines; one process each. Without GPUs they are processes on the CPU.
        loss_chunk: tokens whose logits exist at once; by default `qat.training.losses.chunk_tokens`.
        activation_checkpointing: recompute activations in the backward pass to save memory.
        hold_weights: put each linear layer's weight on its grid once per step, for all micro-batches and recomputed
            activations, which keeps two bytes per quantized weight. By default where a step has several micro-batches
            and neither activation_checkpointing nor sharding saves just that memory.
        log_every: steps between two readings of the losses, at each of which a GPU waits for the host; metrics.csv
            has every step all the same. A step with a gradient that is not finite is left out, and ends the run when
            it is read.
        wandb, tensorboard: who receives the metrics besides metrics.csv, what quantizers do (flipped codes, clipped
            weights, drift of scales, QSNR by layer; at evaluations) and the report's plots. TensorBoard's files are in
            the run's `tensorboard/`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    method: Literal["qad", "qat"] = "qad"
    model: ModelConfig
    teacher: ModelConfig | None = None
    teacher_cache: TeacherCache | None = None
    engine: npu.Engine | None = None
    device: npu.Device | None = None
    scheme: Scheme
    lora: LoraConfig | None = None
    data: DataConfig = DataConfig()
    loss: Loss | None = None
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    steps: int = Field(ge=1)
    rows: int = Field(default=2, ge=1)
    micro_rows: int = Field(default=2, ge=1)
    calibration: DataConfig | None = None
    calibration_rows: int = Field(default=8, ge=1)
    checkpoint_every: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    precision: Precision = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    strategy: Strategy = "auto"
    deepspeed: ZeroConfig = ZeroConfig()
    devices: int = Field(default=1, ge=1)
    loss_chunk: int | None = Field(default=None, ge=1)
    activation_checkpointing: bool = False
    hold_weights: bool | None = None
    log_every: int = Field(default=1, ge=1)
    wandb: Wandb | None = None
    tensorboard: bool = False
    runs: Path = Path("runs")

    @field_validator("runs")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return value.expanduser()  # `~` in a YAML file, which no shell has seen

    @model_validator(mode="after")
    def _on_npu(self) -> "Job":
        if (self.engine is None) != (self.device is None):
            raise ValueError(
                f"engine ({self.engine}) and device ({self.device}) go together: an engine on an NPU and the chip, as "
                "vllm-ascend and a2; or leave both out"
            )
        rule = HALF_RULE if self.device == npu.HALF else NPU_RULE
        if self.engine is not None and self.scheme.activation_rule != rule:
            raise ValueError(
                f"{self.engine} on {self.device} rounds inputs by the NPU's rule, but scheme.activation_rule is "
                f"{self.scheme.activation_rule}; set scheme.activation_rule: {rule}, or leave engine out"
            )
        return self

    @model_validator(mode="after")
    def _knows_prompts(self) -> "Job":
        mixed = [rule.input for rule in self.scheme.rules if rule.input is not None and lookup(rule.input).prompt]
        for name in ("activation_checkpointing", "compile"):
            if mixed and getattr(self, name):
                raise ValueError(
                    f"{mixed[0]} inputs ask each pass which tokens are a prompt, and {name} computes some of it when "
                    "that is not known; leave it out, or train with int8_tensor_asym inputs"
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "Job":
        if self.method == "qat" and self.loss is not None and self.loss.needs_teacher:
            raise ValueError(f"method qat trains on the next token, but loss {self.loss.kind} needs a teacher; use qad")
        if self.method == "qad" and self.loss is not None and not self.loss.needs_teacher:
            raise ValueError(f"method qad imitates a teacher, but loss {self.loss.kind} ignores it; use method: qat")
        cache = self.teacher_cache
        if cache is not None and (beyond := self.objective.beyond(cache.kind != "topk", cache.k)):
            raise ValueError(f"{beyond}; or leave teacher_cache out")
        moving = [step.kind for step in self.scheme.init if step.moves_stream]
        beside: float = getattr(self.loss, "hidden", 0.0)
        if moving and beside:
            raise ValueError(
                f"loss.hidden compares final hidden states with the teacher's, but {moving[0]} in scheme.init puts "
                "their channels elsewhere; leave one of the two out"
            )
        if self.lora is not None and self.optim.train != "all":
            raise ValueError(
                f"optim.train: {self.optim.train} beside lora, which says itself what is trained: adapters, learned "
                "scales and with lora.norms the norms; leave optim.train out"
            )
        if self.lora is not None and self.optim.cage.strength:
            raise ValueError("optim.cage moves weights, which lora leaves frozen; leave one of the two out")
        apart = self.scheme.learn in ("dual_lsq", "focus") and any(s.kind == "reconstruct" for s in self.scheme.init)
        if self.lora is not None and self.lora.base == "packed" and apart:
            raise ValueError(
                f"lora.base: packed after reconstruct with scheme.learn: {self.scheme.learn}: its scales for rounding "
                "and for dequantizing come apart, so that codes alone do not say where training begins; use learn: "
                "none, or base: dense"
            )
        if self.strategy != "deepspeed" and self.deepspeed != ZeroConfig():
            raise ValueError(
                f"deepspeed is set, but strategy is {self.strategy}; set strategy: deepspeed, or leave it out"
            )
        if self.deepspeed.offload == "all" and self.deepspeed.stage < 3:
            raise ValueError(
                f"deepspeed.offload: all moves parameters, which stage {self.deepspeed.stage} does not divide; use "
                "stage: 3, or offload: optimizer"
            )
        if self.devices > self.rows:
            raise ValueError(
                f"devices ({self.devices}) are more than rows ({self.rows}), and each reads at least one row per step; "
                f"give rows={self.devices} or more, or fewer devices"
            )
        if self.rows % (self.micro_rows * self.devices):
            raise ValueError(
                f"rows ({self.rows}) must be a multiple of micro_rows x devices ({self.micro_rows} x {self.devices})"
            )
        for key, text in (("eval.data", self.eval.data), ("eval.choose", self.eval.choose)):
            if text is not None and overlapping(self.data, text):
                both = f"both {text.source!r}" if text.source == self.data.source else "the same documents"
                raise ValueError(f"data and {key} are {both}: evaluate on text that is not trained on")
        return self

    @property
    def objective(self) -> Any:
        """The loss in force."""
        return self.loss or (ForwardKL() if self.method == "qad" else CrossEntropy())

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher reads along in every step."""
        return bool(self.objective.needs_teacher) and self.teacher_cache is None

    @property
    def holds(self) -> bool:
        """`hold_weights`, settled."""
        if self.hold_weights is not None:
            return self.hold_weights
        whole = self.strategy in ("auto", "ddp")
        return whole and self.rows > self.micro_rows * self.devices and not self.activation_checkpointing

    @property
    def folder(self) -> Path:
        """Where this run writes."""
        return self.runs / self.name

    @property
    def texts(self) -> dict[str, tuple[DataConfig, int]]:
        """The texts of the job by the keys that configure them, and how many tokens of each are wanted."""
        texts = {
            "data": (self.data, self.steps * self.tokens_per_step),
            "eval.data": (self.eval.data, self.eval.tokens),
        }
        if self.eval.choose is not None:
            texts["eval.choose"] = (self.eval.choose, self.eval.tokens)
        if self.calibration is not None:
            texts["calibration"] = (self.calibration, self.calibration_rows * self.calibration.seq_len)
        return texts

    @property
    def tokens_per_step(self) -> int:
        """Tokens read by one optimizer step, padding included."""
        return self.rows * self.data.seq_len


def recorded(data: dict[str, Any]) -> dict[str, Any]:
    """A job as a run of this or an earlier release recorded it, in today's keys."""
    return {**data, "scheme": upgraded(data["scheme"])} if isinstance(data.get("scheme"), dict) else data


def load_job(path: str | Path, overrides: list[str] | None = None) -> Job:
    """Read and check a job file. The job.yaml of a run means the run it lies in, wherever that was moved.

    Raises:
        ConfigError: with the path of the key, the value, and what is allowed.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        hint = f"; give {path / JOB}" if (path / JOB).is_file() else "; give a YAML file in it"
        raise ConfigError(f"{path} is a folder, not a config file{hint}")
    data = load_yaml(path)
    if path.name == JOB and (path.parent / "checkpoints").is_dir():
        folder = path.parent.absolute()
        data = {**recorded(data), "name": folder.name, "runs": str(folder.parent)}
    return validate(Job, completed(override(data, overrides or [])), str(path))
