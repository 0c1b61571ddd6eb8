"""Two students that must compute the same: one whose experts are held packed, and one whose weights are dense and what
those decode to."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qat.lora import LoraConfig, attach, is_adapter
from qat.sites import weights
from tests.checkpoints.exports import quantized
from tests.qat.adapters.test_experts import KINDS
from tests.tiny import tiny_model

EXPERTS = LoraConfig(rank=4, alpha=8, targets=("*.experts.*", "*q_proj"))


def packed_and_dense(folder: Path, kind: str, rules: list[Any], learn: Any, config: LoraConfig = EXPERTS) -> list[Any]:
    """A student with packed experts, and one whose dense base is what those decode to; adapters differ from zero."""
    source = tiny_model(kind, folder / "model", **{**KINDS[kind], "num_hidden_layers": 1})
    pair = [quantized(source, rules, learn=learn) for _ in range(2)]
    for each in pair:
        each.config._experts_implementation = "grouped_mm"
        for site in weights(each).values():
            for parameter in site.quantizer.parameters():
                torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        for site in weights(pair[1]).values():
            middle = site.quantizer.quantize(site.weight).dequantize()
            site.parameter.copy_(middle.transpose(-1, -2) if site.owner.TRANSPOSED else middle)
    for each, base in zip(pair, ("packed", "dense"), strict=True):
        torch.manual_seed(4)
        attach(each, config.model_copy(update={"base": base}))
        torch.manual_seed(5)
        with torch.no_grad():
            for name, parameter in each.named_parameters():
                if is_adapter(name) and name.endswith("B"):
                    parameter.normal_(0, 0.02)
                elif "log_" in name:
                    parameter.normal_(0, 0.05)
                elif name.endswith("proj_bias"):  # which a fresh model has at zero
                    parameter.normal_(0, 0.5)
    return pair


class Alive(TorchDispatchMode):
    """The most tensors of at least `size` floating-point values that were there at once, and the largest of all."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.most, self.largest = size, 0, 0
        self.seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() >= self.size:
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage)
                self.largest = max(self.largest, tensor.numel())
        self.seen = {key: storage for key, storage in self.seen.items() if not storage.expired()}
        self.most = max(self.most, len(self.seen))
        return result
