"""What a job's models weigh before they are loaded: the architecture from config.json, parameters, work, memory.

The model is built without storage (torch's meta device). Where the hub cannot be reached, the configs of well-known
models in configs/architectures stand in. Formulas count what autograd keeps; tests hold them to a measured peak.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qat.checkpoints.architecture import check_config, empty_model, quiet
from qat.checkpoints.hf import ModelConfig, describe, is_local, resolve
from qat.errors import CheckpointError
from qat.init.blocks import STREAMS, BlockStep
from qat.init.gptq import PRODUCTS, Gptq
from qat.numbers.catalog import lookup
from qat.surgery import Coverage, report, trained_together
from qat.trainers import divided, lora_footprint, zero
from qat.trainers.evaluate import CHUNK
from qat.trainers.job import Job
from qat.trainers.optim import is_frozen, parameter_kinds
from qat.trainers.teacher import compare
from qat.training.losses import LOGIT_BYTES, chunk_tokens

ARCHITECTURES = Path(__file__).parent.parent / "configs" / "architectures"
FP32, BF16 = 4, 2
GIB = 2**30
# Libraries and device context, in bytes: a process after its imports; a CUDA context with cuBLAS's workspace.
RUNTIME = {"cpu": int(0.45 * GIB), "cuda": int(1.0 * GIB)}
# glibc serves blocks below 32 MiB from a heap that cannot give back what lies between live blocks. Measured share of
# what is kept and worked with that is lost so, without and with activation checkpointing.
HEAP_BLOCK, HEAP_LOSS = 32 * 2**20, {False: 0.6, True: 1.5}
# float32 chunks of logits alive at once in each loss (7 in one not listed), and in evaluation.
LOGIT_COPIES = {"cross_entropy": 3, "forward_kl": 5, "reverse_kl": 5, "jsd": 6}
OTHER_COPIES = EVALUATION_COPIES = 7
BACKWARD_COPIES = 5  # float32 copies of one weight while its fake quantization is differentiated


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder: hidden, all query heads, all key heads, active feed-forward; and how many of what.

    `norms` are the layer-wide ones of one layer; `head_norms` says whether queries and keys are normalised too.
    """

    layers: int
    hidden: int
    heads: int
    query: int
    key: int
    ffn: int
    vocabulary: int
    norms: float
    head_norms: bool


@dataclass(frozen=True)
class Architecture:
    """A model without weights: `multiplied` counts the parameters that each token is multiplied with (no embedding
    look-up, of experts only the active ones); `origin` says where its config was read."""

    model: nn.Module
    shape: Shape
    parameters: int
    multiplied: int
    origin: str


@dataclass(frozen=True)
class Facts:
    """What the formulas need to know of a job: both architectures, the scheme's coverage, the number of trained
    parameters (scales not counted), of block scales, whether the output layer is trained, adapters' parameters, and
    the bytes of master weights that are `saved` by holding them packed."""

    student: Architecture
    teacher: Architecture
    coverage: Coverage
    trainable: int
    blocks: int
    head_trained: bool
    adapters: int = 0
    notes: tuple[str, ...] = ()
    saved: int = 0

    @property
    def quantized(self) -> int:
        """Weights that a format covers."""
        return sum(m.parameters for m in self.coverage.modules if m.weight)

    @property
    def input_share(self) -> float:
        """Share of the layers' weights whose inputs are quantized too."""
        linears = [m for m in self.coverage.modules if m.shape[0] != self.student.shape.vocabulary]
        return sum(m.parameters for m in linears if m.input) / max(sum(m.parameters for m in linears), 1)

    @property
    def input_values(self) -> float:
        """Values per token that quantized inputs have in all layers; layers that engines fuse share theirs."""
        shape = self.student.shape
        return self.input_share * shape.layers * (2 * shape.hidden + shape.query + shape.ffn)

    def input_products(self, job: Job) -> int:
        """Values of the input product matrices that GPTQ needs; layers reading one tensor share one."""
        if not any(isinstance(step, Gptq) for step in job.scheme.init):
            return 0
        shapes = {
            m.path: m.shape for m in self.coverage.modules if m.weight and m.shape[0] != self.student.shape.vocabulary
        }
        shared = {path for members in trained_together(self.student.model, job.scheme, shapes) for path in members[1:]}
        return sum(shape[-1] ** 2 for path, shape in shapes.items() if path not in shared)


# --- architecture ---------------------------------------------------------------------------------


def job_facts(job: Job) -> Facts:
    """Read the architectures of `job` and lay its scheme over the student.

    Raises:
        CheckpointError: no config.json can be had.
        ConfigError, FormatError, UnsupportedError: the scheme does not fit the model, as `qat.surgery.plan` says.
        ConfigError: the teacher does not fit the student.
    """
    student = read_architecture(job.model)
    teacher = student if job.teacher is None else read_architecture(job.teacher)
    coverage = report(student.model, job.scheme)
    frozen = [n for n, kind in parameter_kinds(student.model).items() if is_frozen(n, kind, job.optim)]
    sizes = {name: parameter.numel() for name, parameter in student.model.named_parameters()}
    frozen_ids = {id(student.model.get_parameter(name)) for name in frozen}
    blocks = 0
    for module in coverage.modules:
        if module.weight is not None:
            *experts, rows, columns = module.shape
            blocks += math.prod((*experts, *lookup(module.weight).grid_shape(rows, columns)))
    head: Any = student.model.get_output_embeddings()  # type: ignore[operator]  # a transformers method
    trainable = sum(sizes.values()) - sum(sizes[name] for name in frozen)
    head_trained, added = id(head.weight) not in frozen_ids and job.lora is None, 0
    if job.lora is not None:
        added = lora_footprint.parameters(job.lora, student.model, coverage)
        trainable = added + job.lora.norms * sum(p.numel() for p in student.model.parameters() if p.dim() < 2)
    notes = _compared(job, student.model, teacher.model)
    held = lora_footprint.saved(job, student.model, coverage)
    return Facts(student, teacher, coverage, trainable, blocks, head_trained, added, notes, held)


def _compared(job: Job, student: Any, teacher: Any) -> tuple[str, ...]:
    if job.teacher is None:
        return ()
    try:
        source, reference = resolve(job.model, weights=False), resolve(job.teacher, weights=False)
        trusted = (job.model.trust_remote_code, job.teacher.trust_remote_code)
        return tuple(compare(source, reference, student, teacher, *trusted))
    except CheckpointError as error:  # an estimate needs no tokenizer; training does
        return (f"whether the teacher fits the student is not known: {error}",)


def read_architecture(config: ModelConfig) -> Architecture:
    """The model that `config` names, on the meta device."""
    config_of_model, origin = _hf_config(config)
    model = empty_model(config_of_model, config.id, config.attn_implementation, config.trust_remote_code)
    parameters = sum(p.numel() for p in model.parameters())
    return Architecture(model, _shape(config_of_model.get_text_config(), model), parameters, _multiplied(model), origin)


def _hf_config(config: ModelConfig) -> tuple[Any, str]:
    from transformers import AutoConfig

    if is_local(config):
        return describe(config)[1], f"{config.id} (local config.json)"
    try:
        with quiet():
            loaded = AutoConfig.from_pretrained(
                config.id, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
    except (OSError, ValueError) as error:
        shipped = shipped_architecture(config.id)
        if shipped is not None:
            return AutoConfig.from_pretrained(shipped), f"configs/architectures/{shipped.name} (the hub gave nothing)"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"no config.json for {config.id!r}: there is no such folder, and the hub says: {reason} An estimate needs "
            "only config.json: run this once with a network (and `hf auth login` for gated models), or put the model's "
            "config.json into a folder and set model.id to it"
        ) from error
    check_config(loaded.to_dict(), config.id, config.trust_remote_code)
    return loaded, f"config.json of the hub model {config.id}"


def shipped_architecture(model_id: str) -> Path | None:
    """The file in configs/architectures for a hub id; instruction-tuned and base models share one."""
    for path in sorted(ARCHITECTURES.glob("*.json")):
        base = json.loads(path.read_text(encoding="utf-8"))["_name_or_path"].lower()
        if model_id.lower() in (base, f"{base}-instruct", f"{base}-base", f"{base}-it"):
            return path
    return None


def _shape(config: Any, model: nn.Module) -> Shape:
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    ffn = getattr(config, "intermediate_size", None) or 4 * hidden
    experts = getattr(config, "num_experts_per_tok", None)
    if experts:
        ffn = experts * (getattr(config, "moe_intermediate_size", None) or ffn)
    vectors = [(name, p) for name, p in model.named_parameters() if p.dim() == 1 and "norm" in name]
    norms = (sum(p.numel() == hidden for _, p in vectors) - 1) / layers  # one follows the last layer
    head_norms = any("q_norm" in name for name, _ in vectors)
    return Shape(
        layers, hidden, heads, heads * head_dim, keys * head_dim, ffn, config.vocab_size, max(norms, 2.0), head_norms
    )


def _multiplied(model: Any) -> int:
    config = model.config.get_text_config()
    active = getattr(config, "num_experts_per_tok", None)
    total = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    count = 0
    for parameter in model.parameters():
        if parameter.dim() >= 2 and (parameter is not embedding or parameter is head):
            share = active / total if parameter.dim() == 3 and active and total else 1.0
            count += int(parameter.numel() * share)
    return count


# --- work -----------------------------------------------------------------------------------------


def flops_per_token(job: Job, facts: Facts) -> float:
    """6 per multiplied parameter of the student (forward, and twice that backward), 2 of a teacher that the loss needs,
    2 more of the student where activations are recomputed; and attention, 4 x sequence x query width per forward."""
    student = forward_flops(facts.student, job.data.seq_len)
    recomputed = student - 2 * math.prod((facts.student.shape.hidden, facts.student.shape.vocabulary))
    teacher = forward_flops(facts.teacher, job.data.seq_len) if job.asks_teacher else 0.0
    return 3 * student + teacher + (recomputed if job.activation_checkpointing else 0.0)


def forward_flops(architecture: Architecture, sequence: int) -> float:
    """Per token of a forward pass; attention counts the whole square, because packed rows mask it."""
    shape = architecture.shape
    return 2.0 * architecture.multiplied + 4.0 * sequence * shape.query * shape.layers


# --- memory ---------------------------------------------------------------------------------------


def shards(job: Job) -> int:
    """Among how many devices the parameters are divided."""
    return job.devices if job.strategy == "fsdp" or (job.strategy == "deepspeed" and job.deepspeed.stage == 3) else 1


def memory(job: Job, facts: Facts, device: str, mixed: bool) -> dict[str, int]:
    """Bytes on one device at the worst moment of a step, by purpose: the end of a forward pass, when gradients of the
    step before are still there (Lightning clears them just before the backward pass).

    States, divided by the devices under fsdp (else `zero.divided`), with P parameters, P' trained, S learned scales:
        masters 4 P (LoRA: 4 P' more; what is held packed its codes and scales); gradients 4 (P' + S), under ddp too,
        whose buckets they lie in; moments 8 (P' + S); scales 4 S, and their start 4 per block; average 4 (P' + S);
        teacher 2 P, on CPUs 4 P.
    Kept for the backward pass, T tokens per device and forward pass:
        quantized weights 2 per weight (4 unless rounded to BF16), up to 12 per scale; activations as in `_per_token`;
        with activation checkpointing, one layer of both and 4 x hidden x T per layer.
    Working space, the larger of: float32 chunks of logits with two gradients of the output layer; 5 copies of
        the largest quantized weight with the gradients of one feed-forward layer; evaluation instead of training.
    On CPUs, while tensors are smaller than 32 MiB, holes in the heap (HEAP_LOSS). Before that, weights that are held
        packed later are dense, unless a packed checkpoint gave them, and GPTQ keeps a matrix of 4 x width^2 per input,
        with models divided later, or before (`divided`), where that exceeds the above.

    Args:
        device: "cuda" or "cpu".
        mixed: whether the forward pass computes in BF16.
    """
    whole = _states(job, facts, device)
    parts = {name: count // shards(job) for name, count in whole.items()}
    parts = zero.divided(job.deepspeed, job.devices, whole) if job.strategy == "deepspeed" else parts
    saved_weights = _saved_weights(job, facts, mixed)
    activations = _activations(job, facts, mixed)
    evaluating = _evaluation_space(job, facts) - saved_weights - activations
    working = max(_training_space(job, facts, device, mixed), evaluating)
    layers = facts.student.parameters // facts.student.shape.layers
    working += 2 * FP32 * layers * (shards(job) > 1)  # the one at work is gathered whole, and the next one with it
    small = FP32 * job.micro_rows * job.data.seq_len * facts.student.shape.ffn < HEAP_BLOCK
    heap = HEAP_LOSS[job.activation_checkpointing] if device == "cpu" and small else 0.0
    training = {
        **parts,
        "quantized weights for backward": saved_weights,
        "activations": activations,
        "logits and other working space": working,
        "holes in the heap": int(heap * (saved_weights + activations + working)),
    }
    products = min(FP32 * facts.input_products(job), PRODUCTS)
    models = whole["master weights"] + whole["scales"] + whole["teacher"]  # divided afterwards
    dense = facts.saved * lora_footprint.dense_first(job)
    models = divided.initial_bytes(job, facts, parts) if (first := divided.first(job)) else models + dense
    what = "initialisation, beyond that" if first or shards(job) == 1 else "undivided models, initialised"
    beyond = max(0, models + products + _streams(job, facts) - sum(training.values()))
    return {**training, what: beyond, "libraries and device context": RUNTIME[device]}


def _streams(job: Job, facts: Facts) -> int:
    """Hidden states of the calibration text, where a step of the initialisation goes block by block."""
    if not any(isinstance(step, BlockStep) and step.by_block for step in job.scheme.init):
        return 0
    text = job.calibration or job.data
    rows = -(-job.calibration_rows // (job.devices if divided.first(job) else 1))
    return STREAMS * FP32 * rows * text.seq_len * facts.student.shape.hidden


def _states(job: Job, facts: Facts, device: str) -> dict[str, int]:
    learned = {"lsq": 1, "dual_lsq": 2, "focus": 5}.get(job.scheme.learn, 0) * facts.blocks
    trained = facts.trainable + learned
    head = facts.teacher.shape.hidden * facts.teacher.shape.vocabulary  # all that a cached one leaves, for evaluation
    teacher = (BF16 if device == "cuda" else FP32) * (head if job.teacher_cache else facts.teacher.parameters)
    return {
        "master weights": FP32 * (facts.student.parameters + facts.adapters) - facts.saved,
        "scales": FP32 * (learned + facts.blocks),
        "gradients": FP32 * trained,
        "Adam moments": 2 * FP32 * trained,
        "average of weights": FP32 * trained if job.optim.ema else 0,
        "teacher": teacher,
    }


def _saved_weights(job: Job, facts: Facts, mixed: bool) -> int:
    """The quantized copies that linear layers keep; under autocast also the BF16 copies of unquantized layers."""
    quantized = 0 if facts.saved else facts.quantized  # what is held packed is made again in the backward pass
    rounds = job.scheme.rounds_bf16
    wide = sum(m.parameters for m in facts.coverage.modules if m.weight and not rounds(m.weight, m.input))
    per_block = FP32 * {"dual_lsq": 2, "focus": 3}.get(job.scheme.learn, 1)
    total = BF16 * quantized + ((FP32 - BF16) * wide + per_block * facts.blocks) * (not facts.saved)
    if job.lora is not None and (job.lora.dora or job.scheme.learn in ("lsq", "dual_lsq", "focus")):
        total += FP32 * quantized  # the merged weights, which no parameter holds
    if job.activation_checkpointing and not job.holds:
        total //= facts.student.shape.layers
    return total + BF16 * max(facts.student.multiplied - facts.quantized, 0) * mixed


def _activations(job: Job, facts: Facts, mixed: bool) -> int:
    shape, tokens = facts.student.shape, job.micro_rows * job.data.seq_len
    layer = tokens * _per_token(job, facts, BF16 if mixed else FP32)
    ends = tokens * 9 * FP32 * shape.hidden  # the last norm, both models' hidden states, copies in the loss
    if job.activation_checkpointing:
        return int(layer + ends + shape.layers * tokens * FP32 * shape.hidden)
    return int(layer * shape.layers + ends)


def _per_token(job: Job, facts: Facts, a: int) -> float:
    """Bytes that autograd keeps per token of one layer, with `a` bytes per computed number (4, or 2 in bf16).

    H hidden, Q and K query and key widths, F feed-forward, S sequence. Every norm keeps its input and the normalised
    input in float32: 8 H. Its output feeds three linear layers (attention) or two (feed-forward): 4 H each time in
        fp32, one cast copy per layer in bf16. Attention: a (2 Q + 2 K) without a mask, a (4 Q + S) with one, since
        masked heads are repeated; no square of S unless eager. Feed-forward: 4 a F. Quantized inputs add the copy
        before (or after) rounding: 8 H if its gradient is clipped, a Q (twice if rotated and clipped), a F if clipped,
        and two scales per block.
    """
    shape = facts.student.shape
    hidden, query, key, ffn = shape.hidden, shape.query, shape.key, shape.ffn
    norms = shape.norms * 2 * FP32 * hidden + (FP32 + a) * (query + key) * shape.head_norms
    fed = 2 * FP32 * hidden if a == FP32 else 5 * a * hidden
    config: Any = facts.student.model.config
    implementation = str(config._attn_implementation)
    masked = job.data.pack and "flash" not in implementation
    attention = a * (4 * query + job.data.seq_len if masked else 2 * query + 2 * key) + FP32 * shape.heads
    if implementation == "eager":
        attention += (FP32 + a) * shape.heads * job.data.seq_len
    inputs = [m for m in facts.coverage.modules if m.input]
    quantized = 0.0
    if inputs:
        clipped = job.scheme.estimator == "clipped"
        columns = lookup(str(inputs[0].input)).block_for(1, hidden)[1]
        rotated = any(m.rotation for m in inputs)  # then what is clipped is no longer the output that attention keeps
        quantized = a * query * (1 + (clipped and rotated)) + (2 * FP32 * hidden + a * ffn) * clipped
        quantized += 2 * FP32 * (2 * hidden + query + ffn) / columns + lora_footprint.inputs(job, shape, a)
    return norms + fed + attention + 4 * a * ffn + facts.input_share * quantized


def _training_space(job: Job, facts: Facts, device: str, mixed: bool) -> int:
    shape, tokens = facts.student.shape, job.micro_rows * job.data.seq_len
    copies = LOGIT_COPIES.get(job.objective.kind, OTHER_COPIES) * shape.vocabulary
    if device == "cuda" and job.loss_chunk is None:
        logits = min(copies * BF16 * tokens, LOGIT_BYTES)
    else:
        logits = copies * FP32 * min(job.loss_chunk or chunk_tokens(0, 0, None), tokens)
    head = 2 * FP32 * shape.hidden * shape.vocabulary if facts.head_trained else 0
    largest = lora_footprint.largest(job, facts.coverage)
    backward = BACKWARD_COPIES * FP32 * largest + 4 * (BF16 if mixed else FP32) * tokens * shape.ffn
    return max(logits + head, backward)


def _evaluation_space(job: Job, facts: Facts) -> int:
    """BF16-valued copies of what is not quantized, and the logits of both models."""
    plain = sum(m.parameters for m in facts.coverage.modules if not m.weight)
    chunk = min(CHUNK, job.eval.batch * job.eval.data.seq_len)
    return FP32 * plain + EVALUATION_COPIES * FP32 * chunk * facts.student.shape.vocabulary
