"""Decoder blocks one after another, for the steps of an initialisation that work on one block at a time.

Two streams of hidden states go through the model: that of the dense model, and that of the blocks that are quantized
already. A step finds both at the entrance of its block, so that it can make up for what the blocks before it lost. In
memory are the two streams, the block's dense outputs, and a copy of its weights as they were; what is finished may be
kept on disk (`qat.init.kept`). Of a model that is divided among processes (`qat.sharded`), one block at a time is
whole, and each process has streams of its own part of the text.
"""

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UnsupportedError
from qat.init.kept import Kept
from qat.init.step import Calibration, InitStep
from qat.init.together import Together
from qat.modes import dense, frozen
from qat.sharded import edited, is_divided, read
from qat.sites import Site

STREAMS = 3  # of hidden states: what enters a block twice, and what leaves it; each is one pass over the text
_HIDDEN = "hidden_states"
_INSTEAD = "take steps that do not go block by block (gptq without `sequential`, no reconstruct)"
Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a block without its hidden states


class _Reached(Exception):
    """The rest of a forward pass is not needed."""


@dataclass(eq=False)
class Block:
    """One decoder block and what enters it.

    Attributes:
        path, module: of the block.
        calibration: of the whole model, with the sites of this block.
        calls: its other arguments, by batch.
        dense, served: hidden states that enter it, by batch: of the dense model, and of the quantized blocks before.
        original: its parameters before any step.
        target: what the dense block makes of `dense`, by batch.
    """

    path: str
    module: nn.Module
    calibration: Calibration
    calls: list[Call]
    dense: list[Tensor]
    served: list[Tensor]
    original: dict[str, Tensor] = field(init=False)
    target: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.original = {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}
        with self.unquantized():
            self.target = [self.run(hidden, index) for index, hidden in enumerate(self.dense)]

    @property
    def sites(self) -> dict[str, Site]:
        """Its quantized weights, by path."""
        return self.calibration.sites

    def run(self, hidden: Tensor, index: int) -> Tensor:
        """What the block as it is now makes of hidden states of batch `index`."""
        args, kwargs = self.calls[index]
        if _HIDDEN in kwargs:
            kwargs = {**kwargs, _HIDDEN: hidden}
        else:
            args = (hidden, *args)
        # Of a divided model the block is whole as long as it is worked on, and would not be after a call.
        output = (self.module.forward if is_divided(self.module) else self.module)(*args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @contextlib.contextmanager
    def unquantized(self) -> Iterator[None]:
        """The block as it was before any step, its weights and inputs dense."""
        parameters = dict(self.module.named_parameters())
        now = {name: parameters[name].data for name in self.original}
        try:
            for name, tensor in self.original.items():
                parameters[name].data = tensor
            torch.clear_autocast_cache()  # it holds BF16 copies of the others
            with dense(self.module, inputs=True):
                yield
        finally:
            for name, tensor in now.items():
                parameters[name].data = tensor
            torch.clear_autocast_cache()

    def groups(self) -> list[list[Site]]:
        """Sites that read one tensor together, in the order in which they read."""
        seen: list[tuple[Tensor, list[Site]]] = []

        def note(site: Site, x: Tensor) -> None:
            known = next((members for tensor, members in seen if tensor is x), None)
            if known is None:
                seen.append((x, [site]))
            elif site not in known:
                known.append(site)

        handles = [site.watch(partial(note, site)) for site in self.sites.values()]
        try:
            for index, hidden in enumerate(self.served):
                self.run(hidden, index)
                if len({site.path for _, members in seen for site in members}) == len(self.sites):
                    break
                seen = [(torch.empty(0), members) for _, members in seen]  # experts that other batches reach
        finally:
            for handle in handles:
                handle.remove()
        first: dict[str, int] = {}
        for number, (_, members) in enumerate(seen):
            for site in members:
                first.setdefault(site.path, number)
        found = ([site for site in members if first[site.path] == n] for n, (_, members) in enumerate(seen))
        return self._agreed([members for members in found if members])

    def _agreed(self, groups: list[list[Site]]) -> list[list[Site]]:
        """The same in every process: the first one's, and what only text of others reached."""
        together = Together(self.calibration.model)
        if together.size == 1:
            return groups
        told: dict[str, None] = {}
        agreed: list[list[Site]] = []
        for own in together.gather([[site.path for site in members] for members in groups]):
            fresh = [[path for path in paths if path not in told] for paths in own]
            agreed += [[self.sites[path] for path in paths] for paths in fresh if paths]
            told.update(dict.fromkeys(path for paths in own for path in paths))
        return agreed

    def reads(self, site: Site, dense: bool = True) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """What a weight is multiplied with, (tokens, columns) before it is quantized, by batch: in the dense model (if
        asked for), and after the quantized blocks and layers before it. None where no token of the batch reaches it."""
        with frozen(self.module):
            for index, hidden in enumerate(self.served):
                wanted = None
                if dense:
                    with self.unquantized():
                        wanted = self._read(site, self.dense[index], index)
                yield wanted, self._read(site, hidden, index)

    def _read(self, site: Site, hidden: Tensor, index: int) -> Tensor | None:
        seen: list[Tensor] = []

        def see(x: Tensor) -> None:
            seen.append(x.detach().flatten(0, -2))
            raise _Reached

        handle = site.watch(see)
        try:
            with contextlib.suppress(_Reached):
                self.run(hidden, index)
        finally:
            handle.remove()
        return seen[0] if seen else None


class BlockStep(InitStep):
    """A step that goes through the model block by block; those that follow each other share one walk."""

    @property
    def by_block(self) -> bool:
        """Whether it does so with these settings; if not, `run` is called."""
        return True

    def passes(self) -> float:
        """What it costs, in forward passes over the calibration text."""
        raise NotImplementedError

    def run_outside(self, calibration: Calibration) -> None:
        """Initialise the sites that lie in no block, before the walk."""

    def run_block(self, block: Block) -> Counter[str]:
        """Change the block in place; returns what is to be added up over blocks."""
        raise NotImplementedError

    def sentence(self, counts: Counter[str]) -> str | None:
        """What is worth telling of the sums."""
        return None


@torch.no_grad()
def walk(calibration: Calibration, steps: Sequence[BlockStep]) -> list[str | None]:
    """Run the steps on each block, those before it being quantized.

    Raises:
        UnsupportedError: hidden states do not simply go from one numbered block to the next.
    """
    model, together = calibration.model, Together(calibration.model)
    batches = [_without_cache(model, batch) for batch in together.rows(calibration.batches)]
    modules = dict(model.named_modules())
    lists = {parent for parent, _, number in map(_parted, map(block_of, calibration.sites)) if number.isdecimal()}
    blocks = {path: m for path, m in modules.items() if _parted(path)[0] in lists and _parted(path)[2].isdecimal()}
    calls, dense_stream = _record(model, batches, blocks)
    by_block: dict[str, dict[str, Site]] = {path: {} for path in calls}
    outside: dict[str, Site] = {}
    for path, site in calibration.sites.items():
        by_block.get(block_of(path), outside)[path] = site
    for step in steps:
        step.run_outside(replace(calibration, sites=outside))
    first = blocks[next(iter(calls))]
    served = read(model, lambda: [_entering(model, first, batch)[0] for batch in batches])
    counts: list[Counter[str]] = [Counter() for _ in steps]
    tracked: dict[str, Any] = {path: blocks[path] for path in calls}
    kept = Kept(calibration.store, steps, [*dense_stream, *served], together)
    for path, module in calibration.track(tracked):
        own = replace(calibration, sites=by_block[path])
        with edited(module):
            block = Block(path, module, own, calls.pop(path), dense_stream, served)
            for total, more in zip(counts, _done(block, steps, kept) if own.sites else (), strict=False):
                total.update(more)
            dense_stream, run = block.target, block.run
            block.original = {}
            with frozen(module):
                served = [run(hidden, index) for index, hidden in enumerate(served)]
            del block, run
    return [step.sentence(total) for step, total in zip(steps, counts, strict=True)]


def _done(block: Block, steps: Sequence[BlockStep], kept: Kept) -> list[Counter[str]]:
    """Run the steps on one block, or take what they made of it before; returns the sums of each."""
    sums = kept.restore(block.path, block.module)
    if sums is None:
        sums = []
        for step in steps:
            sums.append(step.run_block(block))
            torch.clear_autocast_cache()
        kept.keep(block.path, block.module, sums)
    torch.clear_autocast_cache()
    return sums


def _without_cache(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """A cache would grow at every further call of a block."""
    return {**batch, "use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else batch


def _record(
    model: nn.Module, batches: Sequence[dict[str, Any]], blocks: dict[str, nn.Module]
) -> tuple[dict[str, list[Call]], list[Tensor]]:
    """How the dense model calls its blocks, by path in their order, and the hidden states that enter the first."""
    calls: dict[str, list[Call]] = {}
    entering: list[Tensor] = []
    order: list[str] = []
    between: list[Tensor | None] = [None]  # what the block before gave

    def before(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = _taken_apart(args, kwargs)
        if not order:
            entering.append(hidden)
        elif not last and (between[0] is None or not torch.equal(hidden, between[0])):  # one batch tells
            raise UnsupportedError(f"{path} does not read what {order[-1]} gives; {_INSTEAD}")
        if path in order:
            raise UnsupportedError(f"{path} is called twice in one forward pass; {_INSTEAD}")
        order.append(path)
        calls.setdefault(path, []).append(call)

    def after(path: str, output: Any) -> None:
        between[0] = output[0] if isinstance(output, tuple) else output
        if path == last and not divided:  # whose passes must end as they do for torch
            raise _Reached

    divided = is_divided(model)
    last = ""  # not known in the first batch

    def pass_through() -> None:
        nonlocal last
        for batch in batches:
            order.clear()
            with contextlib.suppress(_Reached):
                model(**batch)
            last = order[-1] if order else ""

    handles = []
    for path, block in blocks.items():
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs, path=path: before(path, args, kwargs), with_kwargs=True
            )
        )
        handles.append(block.register_forward_hook(lambda _, args, output, path=path: after(path, output)))
    try:
        with dense(model, inputs=True):
            read(model, pass_through)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise UnsupportedError(f"{type(model).__name__} calls no numbered blocks with quantized weights; {_INSTEAD}")
    return calls, entering


def _entering(model: nn.Module, first: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """The hidden states that enter the first block of the model as it is now."""
    found: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_taken_apart(args, kwargs)[0])
        if not is_divided(model):
            raise _Reached

    handle = first.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with contextlib.suppress(_Reached):
            model(**batch)
    finally:
        handle.remove()
    return found


def _taken_apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Hidden states, and the rest."""
    if _HIDDEN in kwargs:
        return kwargs[_HIDDEN].detach(), (args, {**kwargs, _HIDDEN: None})
    return args[0].detach(), (args[1:], kwargs)


def block_of(path: str) -> str:
    """ "model.layers.3" of everything below it; a layer outside of numbered blocks is one by itself."""
    names = path.split(".")
    number = next((index for index, name in enumerate(names) if name.isdecimal()), len(names))
    return ".".join(names[: number + 1])


def _parted(path: str) -> tuple[str, str, str]:
    return path.rpartition(".")
