"""`compile: true`: the decoder blocks of student and teacher, each one graph (`torch.compile`) while a run trains.

Blocks and not models: what is compiled once serves all blocks that are alike, and everything around them (embeddings,
the loss, reading along) stays as it is. What rounds is an operator of its own, which no compiler takes apart, so the
numbers that are trained are still those that are stored. Only passes of training are compiled: evaluation, calibration
and exports compute as ever, and when training ends the blocks are as they were.

Every block is tried with the run's first micro-batch, forward and backward, before training. One that cannot be
compiled stays as it is, which is said with its class and the reason.
"""

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from qat.checkpoints.progress import progress
from qat.modes import held
from qat.quantizer import InputQuantizer, WeightQuantizer
from qat.sharded import blocks
from qat.sites import sites
from qat.trainers.forward import hidden_states
from qat.training.activations import is_operator

if TYPE_CHECKING:
    from qat.trainers.module import QatModule
    from qat.trainers.parts import Parts

BACKEND = "inductor"
# Random numbers and roundings to BF16 are those of a model that is not compiled.
OPTIONS: dict[str, Any] = {"inductor": {"fallback_random": True, "emulate_precision_casts": True}}
GRAPHS = 64  # of one class of blocks: formats, shapes and modes that differ
FAILURES = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)
SHOWN = 200  # characters of a reason

Batch = dict[str, Any]
Say = Callable[[str], None]


def _quiet(_: str) -> None:
    """Say nothing."""


class Compiled:
    """The compiled blocks of a run's models.

    Attributes:
        on: whether passes go through the graphs now; outside of training steps they do not.
        sentences: what was compiled, and what was not and why.
    """

    def __init__(self, say: Say) -> None:
        self.on = False
        self.say, self.sentences = say, list[str]()
        self.weights: list[Any] = []  # sites of compiled blocks whose layers can hold a step's weight

    def tell(self, sentence: str) -> None:
        """Say it, and keep it for the report."""
        self.sentences.append(sentence)
        self.say(sentence)

    def begin(self, first: bool) -> None:
        """A pass of training begins, the `first` of its step or a later one."""
        self.on = True
        if first:
            self.hold()

    def hold(self) -> None:
        """Put the weights of a step on their grids, see `qat.modes.held`: a graph keeps nothing for the next."""
        for site in self.weights:
            site.quantizer.hold(site.weight)


class Block:
    """A block, and its graph."""

    def __init__(self, block: Any, of: Compiled, path: str) -> None:
        self.block, self.of, self.path = block, of, path
        self.reason: str | None = _obstacle(block)
        self.plain = block.forward
        self.recompute = getattr(block, "_gradient_checkpointing_func", None) if _recomputes(block) else None
        if self.recompute is not None:  # around the graph instead of in it, which cannot hold its side effects
            block.gradient_checkpointing = False
        options = OPTIONS.get(BACKEND)
        self.graph: Callable[..., Any] = torch.compile(self.plain, backend=BACKEND, fullgraph=True, options=options)

    @property
    def kind(self) -> str:
        """Name of its class."""
        return type(self.block).__name__

    def put(self) -> None:
        """Have the block's calls go through its graph, while that is on."""

        @functools.wraps(self.plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.recompute is not None and self.block.training:
                return self.recompute(functools.partial(self._run, **kwargs), *args)
            return self._run(*args, **kwargs)

        self.block.forward = forward  # an attribute: names of tensors, hooks and the class stay

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.of.on and self.reason is None:
            try:
                return self.graph(*args, **kwargs)
            except FAILURES as error:  # what the first micro-batch did not show
                self.reason = _first_line(error)
                self.of.tell(f"no longer compiled: {self.path} ({self.kind}): {self.reason}")
        return self.plain(*args, **kwargs)

    def take_off(self) -> None:
        """The block as it was."""
        self.block.__dict__.pop("forward", None)
        if self.recompute is not None:
            self.block.gradient_checkpointing = True

    def attempt(self, args: Any, kwargs: Any) -> str | None:
        """Compile both directions for these arguments; gives why that cannot be done."""
        args, kwargs = tree_map(_apart, (args, kwargs))
        try:
            found = [t for t in tree_leaves(self.graph(*args, **kwargs)) if _learns(t)]
            wanted = [t for t in (*tree_leaves((args, kwargs)), *self.block.parameters()) if _learns(t)]
            if found and wanted:
                torch.autograd.grad(found, wanted, [torch.zeros_like(t) for t in found], allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler raises: without it, the same call has just gone well
            self.reason = _first_line(error)
        return self.reason


def _recomputes(block: Any) -> bool:
    return bool(getattr(block, "gradient_checkpointing", False))


def _apart(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def _learns(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:SHOWN]


def _obstacle(block: nn.Module) -> str | None:
    """Why a block would not compute what is exported, or cannot be recorded, known before it is tried."""
    for module in block.modules():
        if isinstance(module, WeightQuantizer) and module.transforms:
            return "weights that are rotated before rounding, which a compiler may round otherwise than an export"
        if isinstance(module, InputQuantizer) and not is_operator(module.format, module.rule):
            return (
                f"{module.format.name} inputs by the rule {module.rule}, which round between operations that a "
                "compiler joins"
            )
        if getattr(module, "held", None) is not None:
            return "weights that are held packed, which are made again in the backward pass"
    return None


@contextlib.contextmanager
def compiled(module: "QatModule", parts: "Parts", say: Say = _quiet) -> Iterator[list[str]]:
    """Compile the blocks of a module's models inside this context, if its job says so; gives what is worth telling.

    Args:
        module: its student stands where training begins, in the mode of training.
        parts: of the run.
        say: what to do with a sentence as soon as it is known.
    """
    if not module.job.compile:
        yield []
        return
    of = Compiled(say)
    models = {"student": module.student, "teacher": module.teacher}
    every = {name: blocks_of(model, name, of) for name, model in models.items() if model is not None}
    with torch._dynamo.config.patch(recompile_limit=GRAPHS, optimize_ddp=False):
        try:
            _compile(module, parts, every, of)
            module.compiled = of
            yield of.sentences
        finally:
            of.on, module.compiled = False, None
            for block in (block for each in every.values() for block in each):
                block.take_off()


def blocks_of(model: nn.Module, name: str, of: Compiled) -> list[Block]:
    """The blocks of a model, none of them compiled yet; sentences call it `name`."""
    paths = {id(child): path for path, child in model.named_modules()}
    return [Block(block, of, f"{name}.{paths[id(block)]}") for block in blocks(model)]


def _compile(module: "QatModule", parts: "Parts", every: dict[str, list[Block]], of: Compiled) -> None:
    began = time.monotonic()
    if module.teacher is not None:  # as it will be: a graph holds for the mode and the gradients that it was made with
        module.teacher.to(parts.device).eval().requires_grad_(False)
    batch = module.first_batch(parts.device)
    how = {"enabled": parts.dtype is not None, "cache_enabled": parts.dtype is None}  # as Lightning has it
    autocast = torch.autocast(parts.device.type, parts.dtype or torch.bfloat16, **how)
    devices = [parts.device] if parts.device.type == "cuda" else []
    with torch.random.fork_rng(devices), autocast, contextlib.ExitStack() as stack:
        for name, found in every.items():
            model = module.student if name == "student" else module.teacher
            assert model is not None
            if name == "student" and module.job.holds:
                stack.enter_context(held(model))
                of.weights = _held_weights(model, found)
                of.hold()
            with torch.set_grad_enabled(name == "student"):
                try_blocks(model, name, found, batch)
    _summarise(every, of, time.monotonic() - began)
    for block in (block for found in every.values() for block in found):
        block.put() if block.reason is None else block.take_off()
    of.weights = _held_weights(module.student, every["student"]) if module.job.holds else []


def _held_weights(model: nn.Module, found: list[Block]) -> list[Any]:
    """Sites in compiled blocks whose layer multiplies with its parameter, rounded, in one operator."""
    inside = {id(m) for block in found if block.reason is None for m in block.block.modules()}
    own = [site for site in sites(model, "weight") if id(site.owner) in inside and not site.is_table]
    return [s for s in own if getattr(s.owner, "lora", None) is None and s.weight.dim() == 2]


def try_blocks(model: Any, name: str, found: list[Block], batch: Batch) -> None:
    """Compile every block in turn, with what it is called with; one failure speaks for its class."""
    failed: dict[str, str] = {}
    with progress(f"compiling the {name}'s blocks", len(found)) as advance, contextlib.ExitStack() as hooks:

        def attempt(block: Block, args: Any, kwargs: Any) -> None:
            block.reason = block.reason or failed.get(block.kind)
            if block.reason is None and (reason := block.attempt(args, kwargs)) is not None:
                failed[block.kind] = reason
            advance(1)

        for block in found:
            handle = block.block.register_forward_hook(
                lambda _, args, kwargs, __, block=block: attempt(block, args, kwargs), with_kwargs=True
            )
            hooks.callback(handle.remove)
        hidden_states(model, batch)


def _summarise(every: dict[str, list[Block]], of: Compiled, seconds: float) -> None:
    for name, found in every.items():
        done = Counter(block.kind for block in found if block.reason is None)
        if done:
            said = ", ".join(f"{count} {kind}" for kind, count in done.items())
            of.tell(f"compiled of the {name}: {said} ({BACKEND}; {seconds:.0f} s for all)")
        left = Counter((block.kind, block.reason) for block in found if block.reason is not None)
        for (kind, reason), count in left.items():
            of.tell(f"not compiled of the {name}: {count} {kind}: {reason}")
