"""Decoding on a GPU without the host: a step of one token is recorded as a CUDA graph, one per batch size.

A step of an 8B model issues some thousand operations, which take the host longer than the GPU; replaying a graph of
them is one. A graph needs tensors that stay where they are: transformers' `StaticCache` is one, which `generate` takes
as it takes any cache, and what else goes into a step is copied to the recorded step's own inputs. Where that is not
possible the model decodes as without this file, which says why, once. CPUs have no graphs.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import Cache, StaticLayer

from qat.cuda_graph import WARM, record
from qat.engines.cache import quantized_cache
from qat.errors import UnsupportedError

LEAST, MOST = 256, 8192  # positions of a cache; attention goes through all of them, used or not
_STEPS = 8  # recorded at a time
SAME = 1e-2  # of the largest logit: what a replayed step may differ by from one that is run
Run = Callable[[], Any]
Record = Callable[[Run, Callable[[], None]], Run]


def wanted() -> bool:
    """Whether steps are recorded where nobody says how: `$QAT_CUDA_GRAPHS` is 1. No GPU has run it yet."""
    return os.environ.get("QAT_CUDA_GRAPHS") == "1"


class Decoding:
    """Gives a model's caches for `generate`, and replays its steps on those that allow it.

    Args:
        model: whose `forward` this takes the place of.
        record: makes a recorded step of a step and of what undoes it; by default a CUDA graph, on a GPU, if `wanted`.
    """

    def __init__(self, model: Any, record: Record | None = None) -> None:
        self._model, self._forward = model, model.forward
        self._record = record or (cuda_graph if model.device.type == "cuda" and wanted() else None)
        self._problem = problem(model) if self._record else None
        self._caches: dict[int, tuple[int, StaticCache]] = {}  # capacity and cache, by batch size
        self._steps: dict[Any, _Step] = {}
        self._empty: StaticCache | None = None  # a cache that waits for its prompt, which may be one token, but no step
        if self._record and self._problem is None:
            model.forward = functools.wraps(model.forward)(lambda *args, **given: self._decode(*args, **given))

    def cache(self, positions: int, batch: int = 1) -> Cache | None:
        """An empty cache for so many positions, which is valid until the next; None where transformers' own serves."""
        quantized = quantized_cache(self._model)
        if self._record is None:
            return quantized
        reason = self._problem
        if quantized is not None:
            reason = "quantized keys and values grow"
        elif reason is None and positions > MOST:
            reason = f"{positions} positions are asked for, {MOST} at most are kept ready"
        if reason is not None:
            self._tell(reason)
            return quantized
        capacity, cache = self._caches.get(batch, (0, None))
        if cache is None or capacity < positions:
            self._steps = {key: step for key, step in self._steps.items() if key[0] != id(cache)}
            capacity = max(LEAST, 1 << (positions - 1).bit_length())
            cache = StaticCache(config=self._model.config, max_cache_len=capacity)
            self._caches[batch] = capacity, cache
        cache.reset()
        self._empty = cache
        return cache

    def _decode(self, *args: Any, **given: Any) -> Any:
        """In the place of the model's `forward`."""
        cache: Any = given.get("past_key_values")
        ids, empty = given.get("input_ids"), self._empty is cache
        self._empty = None
        ours = any(cache is own for _, own in self._caches.values())
        if args or not ours or empty or ids is None or ids.shape[1] != 1 or torch.is_grad_enabled() or self._problem:
            return self._forward(*args, **given)
        on_gpu = ids.device.type == "cuda"  # which a thread that serves need not have made the current one
        with torch.cuda.device(ids.device) if on_gpu else contextlib.nullcontext():
            return self._step(cache, given)

    def _step(self, cache: Any, given: dict[str, Any]) -> Any:
        key = id(cache), *((name, value) for name, value in _signature(given) if value is not cache)
        if key not in self._steps:
            if len(self._steps) == _STEPS:
                self._steps.clear()
            try:
                assert self._record is not None
                self._steps[key] = _Step(self._forward, given, cache, self._record)
            except Exception as error:  # whatever a graph cannot hold; the step itself is then taken as any other
                self._problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                self._tell(self._problem)
                return self._forward(**given)
        return self._steps[key](given)

    def _tell(self, reason: str) -> None:
        warnings.warn(f"decoding without CUDA graphs, which is slower: {reason}", stacklevel=4)


class _Step:
    """A recorded step; its inputs are copied to where it reads them."""

    def __init__(self, forward: Callable[..., Any], given: dict[str, Any], cache: Any, record: Record) -> None:
        lengths = [layer.cumulative_length for layer in cache.layers]
        before = [length.clone() for length in lengths]
        with torch.inference_mode(False):
            self._inputs = {path: tensor.clone() for path, tensor in _tensors(given)}
        placed = _placed(given, self._inputs)

        def undo() -> None:  # a step writes one place of the cache, which the next step at the same place overwrites
            for length, old in zip(lengths, before, strict=True):
                length.copy_(old)

        try:
            self._replay = record(lambda: forward(**placed), undo)
        finally:
            undo()

    def __call__(self, given: dict[str, Any]) -> Any:
        for path, tensor in _tensors(given):
            self._inputs[path].copy_(tensor, non_blocking=True)
        return self._replay()


def cuda_graph(run: Run, undo: Callable[[], None]) -> Run:
    """`run`, recorded; it gives its results where it gave the first ones.

    Raises:
        UnsupportedError: replayed, it gives other logits than when it is run.
    """
    beside, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # libraries make their workspaces and kernels are compiled outside of the graph
        for _ in range(WARM):
            expected = run()
            undo()
    torch.cuda.current_stream().wait_stream(beside)
    again, results = record(run, pool, beside)

    def replay() -> Any:
        again()
        return results

    check(expected, replay())
    return replay


def check(expected: Any, replayed: Any) -> None:
    """Refuse a recorded step whose logits are not those of the step that was run.

    Raises:
        UnsupportedError: they differ by more than what another order of sums explains.
    """
    run, again = expected.logits.float(), replayed.logits.float()
    apart, size = (run - again).abs().max(), run.abs().max()
    if not bool(apart <= SAME * size):  # NaN is not
        raise UnsupportedError(
            f"a replayed step gives logits that are {float(apart):.3g} from those of one that is run"
        )


def problem(model: Any) -> str | None:
    """Why steps of this model are not recorded, or None."""
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"{type(model).__name__} does not decode from a static cache"
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        return f"the model is spread over {', '.join(sorted(map(str, devices)))}"
    kinds = {type(layer) for layer in StaticCache(config=model.config, max_cache_len=1).layers} - {StaticLayer}
    if kinds:
        return f"layers keep a {', '.join(sorted(kind.__name__ for kind in kinds))}"
    return None


def _tensors(given: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """What goes into a step, masks by kind of layer among it."""
    for name, value in given.items():
        if isinstance(value, Tensor):
            yield (*path, name), value
        elif isinstance(value, dict):
            yield from _tensors(value, (*path, name))


def _placed(given: dict[str, Any], inputs: dict[Any, Tensor], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """`given` with a step's own inputs."""
    return {
        name: _placed(value, inputs, (*path, name)) if isinstance(value, dict) else inputs.get((*path, name), value)
        for name, value in given.items()
    }


def _signature(given: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """What a recorded step depends on."""
    for name, value in given.items():
        if isinstance(value, Tensor):
            yield name, (value.shape, value.dtype, value.device)
        elif isinstance(value, dict):
            yield name, tuple(_signature(value))
        else:
            yield name, value
