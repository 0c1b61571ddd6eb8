"""A model's weights as an engine loads them, packed, without a file in between: for engines that answer while it trains
(reinforcement learning), and whose answers must come from the weights that are trained.

The engine starts from an export of the same model, which brings the configuration and what training never touches.
Names, types and bytes are those that an export would write.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat.checkpoints.caches import cache_offsets, cache_tensors
from qat.checkpoints.export_plan import DEFAULT_TARGET, ExportPlan, check_values, plan_export
from qat.checkpoints.layouts import READERS, find_target
from qat.checkpoints.wrapped import carrying, inner, unwrapped, wrapping
from qat.errors import CheckpointError
from qat.numbers.scale import broken

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackedWeights:
    """(name, tensor) of every stored tensor of a model, made anew from its present weights by each iteration.

    Args:
        model: a Hugging Face model with fake-quantized layers, on any device, where the tensors will be; adapters that
            peft put around it, before or later, are merged into what is pushed.
        target: name of the file layout, see `qat.checkpoints.layouts`.
        source: folder of the unquantized model, for its tensor names; by default they are those of the model's class.

    Raises:
        UnsupportedError: a format, or pair of formats, that the target cannot hold.
    """

    def __init__(self, model: "PreTrainedModel", target: str = DEFAULT_TARGET, source: Path | None = None) -> None:
        self._model = inner(model)
        with unwrapped(model) as plain:
            own: Any = plain
            self._plan: ExportPlan = plan_export(own, source, find_target(target))
        self._paths = {matrix.name: path for path, matrix in self._plan.linears.items()}

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """As `load_weights` of vLLM takes them.

        Raises:
            CheckpointError: a weight or scale is not a finite number, or ranges were not calibrated.
        """
        plan, layers = self._plan, wrapping(self._model)
        check_values(plan)
        for name in plan.order:
            if name in self._paths:
                yield from self._packed(self._paths[name], layers)
            elif name in plan.dense:
                yield name, _checked(name, self._dense(name))
        for name, scale in cache_tensors(plan.caches, plan.target).items():
            yield name, _checked_scale(name, scale)
        yield from cache_offsets(plan.caches, plan.target).items()

    def _packed(self, path: str, layers: dict[int, Any]) -> Iterator[tuple[str, Tensor]]:
        layer, site, layout = self._plan.layer(path), self._plan.linears[path], READERS[self._plan.target.METHOD]
        amax = site.input.limit if site.input is not None else None
        with carrying(layers.get(id(site.site.owner)), reading=True):
            q = site.quantize()
        packed = self._plan.target.pack(q, layer.input, amax)
        if (placed := getattr(self._plan.target, "placed", None)) is not None:
            packed = placed(packed, path)
        for key, tensor in packed.items():
            name = layout.tensor_name(path, key)
            yield name, _checked_scale(name, tensor) if key in layout.SCALES else tensor

    def _dense(self, name: str) -> Tensor:
        tensor = self._plan.dense[name].detach()
        if (table := self._plan.embeddings.get(name.removesuffix(".weight"))) is not None:
            tensor = table.quantizer(tensor)
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.float32 if name in self._plan.wide else torch.bfloat16)


def _checked(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} holds NaN or infinity; nothing more was pushed")
    return tensor


def _checked_scale(name: str, scale: Tensor) -> Tensor:
    if broken(scale):
        raise CheckpointError(f"{name} must be finite and positive everywhere, but is not; nothing more was pushed")
    return scale
