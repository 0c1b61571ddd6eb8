"""CUDA graphs of training passes: forward and backward of a micro-batch, recorded once and replayed.

A step of a small model issues thousands of kernels that run for microseconds each, and a GPU waits for the host that
launches them. A graph launches all of them at once. It reads and writes the same memory each time: a micro-batch is
copied to where the recorded one lay, and gradients are added where they were. A graph whose first replay does not give
the loss and the gradients of the pass that was run before is not used. Everything else of a step (clipping, the
optimizer, what follows it, evaluation) runs as ever, on parameters that stay where they are; should one move, graphs
are recorded again.

What is replayed must not depend on numbers that the host would have to see. The places of the tokens that carry a loss
do, by their number, so `padded` brings them to one of a few lengths: what is added has hidden states of zero in both
models, whose losses and gradients are zero.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.cuda_graph import WARM, record
from qat.errors import UnsupportedError
from qat.sharded import is_divided
from qat.training.heads import as_product

if TYPE_CHECKING:
    from qat.trainers.module import QatModule

LENGTHS = 8  # to one of which the number of learnt tokens is padded
SAME = 1e-2  # what a replayed pass's loss and gradients' norm may differ by from those of one that is run

Batch = dict[str, Tensor]
Work = Callable[[Batch], Tensor]
Say = Callable[[str], None]
Replay = Callable[[], None]
Record = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]


def padded(batch: Batch) -> Batch:
    """The batch with `kept` as `places`: at one of `LENGTHS` lengths, see `gaps` of `qat.training.losses.chunked`."""
    kept, tokens = batch["kept"], batch["targets"].numel()
    part = -(-tokens // LENGTHS)
    length = min(tokens, -(-max(len(kept), 1) // part) * part)
    rest = {name: tensor for name, tensor in batch.items() if name != "kept"}
    return {**rest, "places": torch.cat((kept, kept.new_full((length - len(kept),), -1)))}


def obstacle(module: "QatModule") -> str | None:
    """Why the passes of a run are not recorded, known before any of them, or None."""
    job, teacher, device = module.job, module.teacher, module.device
    if device.type != "cuda":
        return f"they need a CUDA device, and this run is on {device.type}"
    if module.ranks.size > 1 or is_divided(module.student) or job.strategy in ("fsdp", "deepspeed"):
        return "several processes train together"
    if job.activation_checkpointing:
        return "activation_checkpointing recomputes with the host's random state"
    if job.lora is not None and job.lora.base == "packed":
        return "lora.base: packed decodes by tables that come from the host"
    if job.lora is not None and job.lora.dropout:
        return "lora.dropout draws random numbers, which a resumed run has to draw again"
    if module.taught is not None:
        return "a cached teacher says another number of things of every batch"
    if getattr(job.objective, "hidden", 0.0):
        return "loss.hidden compares hidden states of tokens that are not there"
    if teacher is not None and any(p.device != device for p in teacher.parameters()):
        return "the teacher is elsewhere"
    for model in (module.student, teacher):
        if model is not None and (reason := _waits(model)) is not None:
            return reason
        if model is not None:
            head: Any = model.get_output_embeddings()  # type: ignore[operator] # of a causal LM
            product = as_product(head)
            if product is None or product.bias is not None:
                return f"the head of {type(model).__name__} is more than a product"
    return None


def _waits(model: nn.Module) -> str | None:
    """What in a model asks the GPU for numbers on the way, or draws them, as far as that can be known, or None."""
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    if "flash" in str(getattr(config, "_attn_implementation", "")):
        return f"flash attention counts the documents of {name}'s rows; model.attn_implementation=sdpa does not"
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if {"dynamic", "longrope"} & set(_words(rope)):
        return f"rotary positions of {name} depend on the longest sequence"
    if any(getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        return f"the path through {name} depends on which experts its tokens choose"
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()) or getattr(text, "attention_dropout", None):
        return f"{name} has dropout, whose random numbers a resumed run has to draw again"
    return None


def _words(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _words(value)
    elif isinstance(tree, str):
        yield tree


class _Pass:
    """A recorded pass: where its batch lies, how it is replayed, where its loss is."""

    def __init__(self, batch: Batch, replay: Replay, loss: Tensor) -> None:
        self.batch, self.replay, self.loss = batch, replay, loss

    def __call__(self, batch: Batch) -> Tensor:
        for name, tensor in self.batch.items():
            tensor.copy_(batch[name], non_blocking=True)
        self.replay()
        return self.loss.clone()


class Passes:
    """Forward and backward passes of one model.

    Args:
        work: the loss of a batch, whose backward pass is to be taken.
        model: whose parameters get gradients, and whose tensors must stay where they are.
        say: what to do with a sentence as soon as it is known.
        record: how one is recorded; by default as a CUDA graph.

    Attributes:
        active: whether passes are recorded; no longer after one could not be.
        sentences: what was recorded, and what was not and why.
    """

    def __init__(self, work: Work, model: nn.Module, say: Say, record: Record | None = None) -> None:
        self.work, self.model, self.say = work, model, say
        self.active, self.sentences = True, list[str]()
        self._record = record or self._as_graph
        self._passes: dict[Any, _Pass] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._fixed: list[Tensor] = []  # what graphs were recorded with, and where it was
        self._places: list[int] = []
        self._shared: tuple[Any, Any] | None = None  # the pool and the stream of all graphs

    def tell(self, sentence: str) -> None:
        """Say it, and keep it for the report."""
        self.sentences.append(sentence)
        self.say(sentence)

    def __call__(self, batch: Batch, first: bool) -> Tensor | None:
        """The loss of a batch, whose gradients `give` gives afterwards; None where it has to be run as it is.

        Args:
            batch: on the device.
            first: of the optimizer step: gradients begin at zero.
        """
        if not self.active:
            return None
        if self._passes and self._places != [tensor.data_ptr() for tensor in self._fixed]:
            self._passes, self._shared = {}, None
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(batch.items()))
        if key not in self._passes:
            before = [None if first or p.grad is None else p.grad.clone() for p in self.model.parameters()]
            try:
                self._passes[key] = self._recorded(batch)
            except Exception as error:  # whatever cannot be recorded can still be run
                self.active, self._passes, self._gradients, self._shared = False, {}, {}, None
                reason = (str(error).strip().splitlines() or [""])[0]
                self.tell(f"no CUDA graphs: {type(error).__name__}: {reason[:200]}")
            for parameter, gradient in zip(self.model.parameters(), before, strict=True):
                parameter.grad = gradient
        if not self.active:
            return None
        self._begin(first)
        return self._passes[key](batch)

    def _begin(self, first: bool) -> None:
        """What a pass adds to: nothing, or what the step's passes so far have given, recorded or not."""
        for parameter, gradient in self._gradients.items():
            if not first and parameter.grad is not None and parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
        blank = [g for p, g in self._gradients.items() if first or p.grad is None]
        if blank:
            torch._foreach_zero_(blank)

    def give(self) -> None:
        """Put the gradients, summed since the `first` pass, where an optimizer looks for them."""
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient

    def _recorded(self, batch: Batch) -> _Pass:
        own = {name: tensor.clone() for name, tensor in batch.items()}
        with self._on_side():
            for _ in range(WARM):
                self._cleared()
                expected = self._once(own)
        if not self._gradients:
            self._gradients = {p: p.grad.clone() for p in self.model.parameters() if p.grad is not None}
        norm = self._norm([p.grad for p in self.model.parameters()])
        self._cleared()
        self.give()  # recorded as additions to these
        replay, loss = self._record(lambda: self._once(own))
        torch._foreach_zero_(list(self._gradients.values()))
        replay()
        for run, again in ((expected, loss), (norm, self._norm(list(self._gradients.values())))):
            if not bool((run - again).abs() <= SAME * run.abs()):  # NaN is not
                raise UnsupportedError(f"a replayed pass gives {float(again):.6g} and one that is run {float(run):.6g}")
        if not self._passes:
            self._fixed = [*self.model.parameters(), *self.model.buffers()]
            self._places = [tensor.data_ptr() for tensor in self._fixed]
            self.tell(
                f"CUDA graphs: a forward and backward pass of {batch['input_ids'].numel():,} tokens is one launch"
            )
        return _Pass(own, replay, loss)

    def _once(self, batch: Batch) -> Tensor:
        loss = self.work(batch)
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
        return loss.detach()

    @staticmethod
    def _norm(gradients: list[Tensor | None]) -> Tensor:
        return torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])

    def _cleared(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    @contextlib.contextmanager
    def _on_side(self) -> Iterator[None]:
        """On a stream of its own, as a recording will be, with random numbers that nobody misses."""
        if self._record != self._as_graph:
            with torch.random.fork_rng(devices=[]):
                yield
            return
        if self._shared is None:
            self._shared = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        stream = self._shared[1]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream), torch.random.fork_rng(devices=[torch.cuda.current_device()]):
                yield
        finally:
            torch.cuda.current_stream().wait_stream(stream)

    def _as_graph(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        assert self._shared is not None
        return record(work, *self._shared)


def passes(module: "QatModule") -> Passes | None:
    """The passes of a run's micro-batches; None where they are not recorded, which is said where it was asked for."""
    if not module.job.cuda_graphs:
        return None
    if (reason := obstacle(module)) is not None:
        module.say(f"no CUDA graphs: {reason}")
        return None
    return Passes(module.share, module.student, module.say)
