"""Which channels of a model may change places: found by watching one forward pass.

Every dimension of every parameter begins as an axis of its own. Operations join axes: a sum of two tensors makes their
channels the same channels, a linear layer reads one axis and makes another. What an operation does to its channels is
known for those that treat all alike (`_ALIKE`, sums over channels, products); any other one fixes the order of what it
reads, and so says why. What is never fixed is free: the residual stream, and the channels inside of feed-forwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

Axes = tuple[int | None, ...]  # of each dimension; None where its order means nothing (batch, or size 1)

_ACTIVATIONS = ("elu", "gelu", "hardswish", "leaky_relu", "mish", "relu", "relu6", "sigmoid", "silu", "tanh")
_ARITHMETIC = ("add", "addcmul", "sub", "mul", "div", "truediv", "true_divide", "pow", "square", "sqrt", "rsqrt", "exp")
_MORE = ("log", "erf", "abs", "neg", "positive", "reciprocal", "clamp", "clip", "maximum", "minimum", "where")
_COPIES = ("to", "type", "type_as", "float", "half", "bfloat16", "clone", "contiguous", "detach", "dropout")
_EVENLY = ("softplus", "zeros_like", "ones_like", "empty_like", "nan_to_num", "softmax", "log_softmax", "normalize")
_ALIKE = frozenset((*_ACTIVATIONS, *_ARITHMETIC, *_MORE, *_COPIES, *_EVENLY))
_SUMS = frozenset(("mean", "sum", "var", "std", "norm", "amax", "vector_norm"))
_VIEWS = frozenset(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"))
_SWAPS = frozenset(("transpose", "swapaxes", "permute", "t"))


@dataclass(frozen=True)
class Member:
    """One dimension of a parameter that goes through channels: `groups` x `repeats` x `width` of them; `read` where a
    product sums over it."""

    parameter: Tensor
    dim: int
    read: bool = False


@dataclass(frozen=True)
class Channels:
    """Channels that are one set wherever they appear.

    Attributes:
        members: where their order is stored.
        why: what fixes their order; "" where nothing does.
    """

    members: tuple[Member, ...]
    why: str = ""


@torch.no_grad()
def channels(model: nn.Module, probe: Tensor) -> list[Channels]:
    """All sets of channels of a model that runs unquantized.

    Args:
        probe: (1, tokens) ids that are run through it.
    """
    watch = _Watch(model)
    with watch:
        model(input_ids=probe)
    found: dict[int, list[Member]] = {}
    for parameter, axes in watch.parameters:
        for dim, axis in enumerate(axes):
            if axis is not None:
                found.setdefault(watch.root(axis), []).append(Member(parameter, dim, axis in watch.read))
    return [Channels(tuple(members), watch.fixed.get(root, "")) for root, members in found.items()]


class _Watch(TorchFunctionMode):
    """Joins axes while a model runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parents: list[int] = []
        self.fixed: dict[int, str] = {}  # by root: which operation
        self.read: set[int | None] = set()  # axes of matrices that products sum over, not by root
        self.axes: Any = WeakTensorKeyDictionary()
        self.parameters: list[tuple[nn.Parameter, Axes]] = []
        for parameter in model.parameters():
            axes = tuple(self._new() if size > 1 else None for size in parameter.shape)
            self.axes[parameter] = axes
            self.parameters.append((parameter, axes))

    def root(self, axis: int) -> int:
        while self.parents[axis] != axis:
            self.parents[axis] = axis = self.parents[self.parents[axis]]
        return axis

    def _new(self) -> int:
        self.parents.append(len(self.parents))
        return len(self.parents) - 1

    def _fixed(self, why: str) -> int:
        axis = self._new()
        self.fixed[axis] = why
        return axis

    def _fix(self, axes: Axes, why: str) -> None:
        for axis in axes:
            if axis is not None:
                self.fixed.setdefault(self.root(axis), why)

    def _join(self, a: int | None, b: int | None, why: str) -> int | None:
        """The axis that both are; one that meets an order of its own is fixed."""
        if a is None or b is None:
            self._fix((a, b), why)
            return a if b is None else b
        first, second = self.root(a), self.root(b)
        if first != second:
            self.parents[second] = first
            if second in self.fixed:
                self.fixed.setdefault(first, self.fixed.pop(second))
        return first

    def _of(self, tensor: Tensor) -> Axes:
        """A tensor that did not come from parameters has an order of its own in every dimension."""
        known: Axes | None = self.axes.get(tensor)
        return (None,) * tensor.dim() if known is None else known

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        tensors = [t for t in _tensors((args, kwargs)) if any(axis is not None for axis in self._of(t))]
        if tensors and _tensors((output,)):
            follow = self._rule(name)
            axes = None if follow is None else follow(name, output, args, kwargs)
            if axes is None:
                for tensor in tensors:
                    self._fix(self._of(tensor), name)
                for made in _tensors((output,)):
                    self.axes[made] = tuple(self._fixed(name) if size > 1 else None for size in made.shape)
            elif isinstance(output, Tensor):
                self.axes[output] = axes
        return output

    def _rule(self, name: str) -> Callable[[str, Any, tuple[Any, ...], dict[str, Any]], Axes | None] | None:
        plain = name[1:] if name[:1] in ("r", "i") and name[1:] in _ALIKE else name
        for names, rule in (
            (_ALIKE, self._alike),
            (_SUMS, self._sums),
            (_VIEWS, self._viewed),
            (_SWAPS, self._swapped),
        ):
            if plain in names:
                return rule
        own = {"linear": self._linear, "matmul": self._product, "mm": self._product, "addmm": self._addmm}
        own |= {"grouped_mm": self._grouped, "grouped_mm_fallback": self._grouped}
        own |= {"embedding": self._embedding, "layer_norm": self._norm, "rms_norm": self._norm}
        return {**own, "getitem": self._picked, "index_add": self._index_add}.get(name)

    def _alike(self, name: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Axes | None:
        """Elementwise, or over all channels the same way: dimensions that meet are the same."""
        if not isinstance(output, Tensor):
            return None
        axes: list[int | None] = [None] * output.dim()
        begun = [False] * output.dim()
        for tensor in _tensors((args, kwargs)):
            for place, (size, axis) in enumerate(zip(reversed(tensor.shape), reversed(self._of(tensor)), strict=True)):
                if size == 1 or place >= output.dim():
                    continue
                index = output.dim() - 1 - place
                axes[index] = self._join(axes[index], axis, name) if begun[index] else axis
                begun[index] = True
        return tuple(axes)

    def _sums(self, name: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Axes | None:
        x = args[0]
        dim = kwargs.get("dim", args[1] if len(args) > 1 and not isinstance(args[1], torch.dtype) else None)
        if not isinstance(output, Tensor) or isinstance(dim, float) or (dim is None and name == "norm"):
            return None
        dims = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
        gone = {d % x.dim() for d in dims}
        if output.dim() == x.dim():
            return tuple(None if d in gone else axis for d, axis in enumerate(self._of(x)))
        return tuple(axis for d, axis in enumerate(self._of(x)) if d not in gone)

    def _viewed(self, name: str, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Axes | None:
        """A dimension that keeps its size and what lies below it is still there."""
        x = args[0]
        places = {(size, step): axis for size, step, axis in zip(x.shape, _below(x), self._of(x), strict=True)}
        if name == "expand":
            return (None,) * (output.dim() - x.dim()) + self._of(x)
        axes = [places.get(key) for key in zip(output.shape, _below(output), strict=True)]
        lost = [axis for axis in self._of(x) if axis is not None and axis not in axes]
        self._fix(tuple(lost), name)
        for dim, (size, axis) in enumerate(zip(output.shape, axes, strict=True)):
            if lost and axis is None and size > 1:
                axes[dim] = self._fixed(self.fixed[self.root(lost[-1])])
        return tuple(axes)

    def _swapped(self, name: str, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Axes | None:
        axes = list(self._of(args[0]))
        if name == "permute":
            order = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
            return tuple(axes[d] for d in (kwargs.get("dims") or order))
        first, second = (0, 1) if name == "t" else (*args[1:3], *kwargs.values())
        if len(axes) > 1:
            axes[first], axes[second] = axes[second], axes[first]
        return tuple(axes)

    def _linear(self, name: str, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Axes | None:
        x, weight, bias = _named(args, kwargs, "input", "weight", "bias")
        rows, columns = self._of(weight)
        self.read.add(columns)
        self._join(self._of(x)[-1], columns, name)
        if bias is not None:
            rows = self._join(rows, self._of(bias)[0], name)
        return (*self._of(x)[:-1], rows)

    def _product(self, name: str, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Axes | None:
        a, b = args[:2]
        if a.dim() < 2 or b.dim() < 2:
            return None
        self._join(self._of(a)[-1], self._of(b)[-2], name)
        self.read.add(self._of(b)[-2])
        for tensor in (a, b):
            self._fix(self._of(tensor)[:-2], name)
        return (*(None,) * (output.dim() - 2), self._of(a)[-2], self._of(b)[-1])

    def _grouped(self, name: str, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Axes | None:
        """Rows with the matrix of a stack (experts, columns, rows) that each was sent to."""
        x, stack = args[:2]
        if x.dim() != 2 or stack.dim() != 3:
            return None
        self._fix(self._of(stack)[:1], name)
        self._join(self._of(x)[1], self._of(stack)[1], name)
        self.read.add(self._of(stack)[1])
        return None, self._of(stack)[2]

    def _addmm(self, name: str, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Axes | None:
        bias, a, b = args[:3]
        self._join(self._of(a)[1], self._of(b)[0], name)
        self.read.add(self._of(b)[0])
        return self._of(a)[0], self._join(self._of(b)[1], self._of(bias)[-1], name)

    def _embedding(self, name: str, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Axes | None:
        ids, table = _named(args, kwargs, "input", "weight")
        self._fix(self._of(table)[:1], name)
        return (*(None,) * ids.dim(), self._of(table)[1])

    def _norm(self, name: str, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Axes | None:
        x, _, weight, bias = _named(args, kwargs, "input", "normalized_shape", "weight", "bias")
        axis = self._of(x)[-1]
        for tensor in (weight, bias):
            if isinstance(tensor, Tensor):
                if tensor.dim() != 1:
                    return None
                axis = self._join(axis, self._of(tensor)[0], name)
        return (*self._of(x)[:-1], axis)

    def _picked(self, name: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Axes | None:
        """Some of the leading dimensions; the others stay."""
        x, index = args
        indices = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis not in [i for i in indices if not isinstance(i, Tensor)] and len(indices) == x.dim():
            while indices and isinstance(indices[-1], slice) and indices[-1] == slice(None):
                indices.pop()
        if any(i is None or i is Ellipsis or (isinstance(i, Tensor) and i.dtype == torch.bool) for i in indices):
            return None
        kept = self._of(x)[len(indices) :]
        if not isinstance(output, Tensor) or not kept:
            return None
        self._fix(self._of(x)[: len(indices)], name)
        return (*(None,) * (output.dim() - len(kept)), *kept)

    def _index_add(self, name: str, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Axes | None:
        x, dim, _, source = args[:4]
        if dim % x.dim() == x.dim() - 1:
            return None
        return (*self._of(x)[:-1], self._join(self._of(x)[-1], self._of(source)[-1], name))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, (list, tuple)) else []


def _named(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    """Arguments that may be given either way; None where they are left out."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _below(x: Tensor) -> list[int]:
    """For each dimension, how many numbers lie between two of its neighbours in a contiguous tensor."""
    steps = [1]
    for size in reversed(x.shape[1:]):
        steps.append(steps[-1] * size)
    return steps[::-1] if x.dim() else []
