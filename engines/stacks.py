"""Layers that read one input as one product: q, k and v, gate and up. A GPU waits less for few wide products than for
many narrow ones; numbers are those of the same rows in either.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qat.same_tensor import SameTensor
from qat.serving.packed import PackedLinear, PackedWeight, ordered
from qat.serving.panels import in_panels


class Part(nn.Module):
    """In the place of a layer: its rows of a stack, which multiplies for the first of its readers.

    Args:
        layer: that was here, with what is hooked on it.
        stack: the layers in one, kept by the first of them.
        product: of the input seen last.
        rows: of the stack that are this layer's.
    """

    def __init__(self, layer: PackedLinear, stack: PackedLinear, product: SameTensor, rows: slice) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.product, self.rows = product, rows
        if rows.start == 0:
            self.stack = stack
        else:  # known, but not a module of this one: what moves or counts modules meets the stack once
            self.__dict__["stack"] = stack
        self._forward_pre_hooks = layer._forward_pre_hooks

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        y: Tensor = self.product.once(x, self.stack)
        return y[..., self.rows]

    def extra_repr(self) -> str:
        """Which rows, for `print(model)`."""
        return f"rows {self.rows.start} to {self.rows.stop} of a stack"


def stack_readers(model: nn.Module, sets: Iterable[list[str]]) -> int:
    """Stack layers of `model` that read the same input, where they are alike; returns how many sets are.

    Args:
        model: in which the stacks take the layers' places.
        sets: paths of layers that read the same input.
    """
    stacked = 0
    for paths in sets:
        layers: list[Any] = [model.get_submodule(path) for path in paths]
        if not are_alike(layers):
            continue
        stack, product, first = stacked_layer(layers), SameTensor(len(layers)), 0
        for path, layer in zip(paths, layers, strict=True):
            rows = slice(first, first + layer.out_features)
            model.set_submodule(path, Part(layer, stack, product, rows).train(layer.training))
            first = rows.stop
        stacked += 1
    return stacked


def are_alike(layers: list[Any]) -> bool:
    """Whether one product serves them: packed alike, on one device, their inputs quantized by the same hook."""

    def kind(layer: PackedLinear) -> tuple[Any, ...]:
        tensors = layer.words.device, in_panels(layer.words), layer.zeros is None, layer.bias is None
        hooks = [id(hook) for hook in layer._forward_pre_hooks.values()]
        return layer.format, layer.in_features, layer.global_scale, tensors, hooks, len(layer._forward_hooks)

    same = all(type(layer) is PackedLinear for layer in layers) and len(layers) > 1
    return same and all(kind(layer) == kind(layers[0]) for layer in layers) and not layers[0]._forward_hooks


def stacked_layer(layers: list[PackedLinear]) -> PackedLinear:
    """The rows of all of them, in order."""
    words, scales, zeros, biases = ([getattr(layer, name) for layer in layers] for name in
                                    ("words", "scales", "zeros", "bias"))  # fmt: skip
    beside = scales[0].dim() == words[0].dim() > 2  # scales by rows, as words are, not by columns
    weight = PackedWeight(
        format=layers[0].format,
        columns=layers[0].in_features,
        words=torch.cat(words),
        scales=torch.cat(scales, dim=0 if beside else 1),
        zeros=None if zeros[0] is None else torch.cat(zeros, dim=1),
        global_scale=layers[0].global_scale,
    )
    weight = ordered(weight, weight.words.device.type)
    return PackedLinear(weight, None if biases[0] is None else torch.cat(biases)).train(layers[0].training)
