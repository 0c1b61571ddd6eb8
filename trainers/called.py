"""Whether quantized layers are called, seen while the model reads a few tokens.

Some architectures multiply with a layer's weight themselves (Mamba's `dt_proj.weight @ x`, fused kernels): then the
layer neither quantizes in training nor has a weight to give once it is packed, and nothing would say so.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qat.adapters import candidates
from qat.errors import UnsupportedError
from qat.surgery import Coverage
from qat.text import some
from qat.trainers.packing import evaluating, model_inputs

PROBE_TOKENS = 4


def check_called(model: nn.Module, coverage: Coverage) -> None:
    """Let `model` read a few tokens and refuse quantized layers whose weights it uses without calling them.

    Args:
        model: not quantized yet; without storage (meta) what cannot run there is left to the run.
        coverage: what will be quantized.

    Raises:
        UnsupportedError: names the layers, or says why the model cannot read tokens at all.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    tokens = torch.arange(PROBE_TOKENS, device=device).view(1, -1)
    batch = {"input_ids": tokens % config.get_text_config().vocab_size, "position_ids": tokens}
    quantized = {covered.path for covered in coverage.modules if covered.weight}
    weights = {
        id(model.get_submodule(each.module).get_parameter(each.slot.name)): each.path
        for each in candidates(model)
        if each.role == "weight" and each.path in quantized
    }
    # With a shared weight all modules that own it.
    layers = [module for module in model.modules() if any(id(p) in weights for p in module._parameters.values())]
    with WeightUses(weights) as uses, evaluating(model), torch.no_grad():
        hooks = [hook for layer in layers for hook in uses.watch(layer)]
        try:
            model(**model_inputs(batch))
        except Exception as error:  # sizes of config.json that do not fit each other, code that came with the model
            if device.type == "meta":
                return
            reason = str(error).strip() or type(error).__name__
            raise UnsupportedError(f"{type(model).__name__} cannot read {PROBE_TOKENS} tokens: {reason}") from error
        finally:
            for hook in hooks:
                hook.remove()
    if uses.names:
        paths, kind = list(uses.names), type(model.get_submodule(next(iter(uses.names)).rpartition(".")[0])).__name__
        raise UnsupportedError(
            f"{kind} uses the weight of {some(paths, 1)} without calling the layer, so it would be neither quantized "
            "in training nor served packed; give these layers a rule with `skip:` and a reason"
        )


class WeightUses(TorchFunctionMode):
    """Watches every operation for weights (path by identity) that come from outside their layers."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self._weights, self._inside = weights, 0
        self.names: dict[str, None] = {}

    def watch(self, layer: nn.Module) -> list[Any]:
        """Hooks that know when a layer is at work."""
        return [layer.register_forward_pre_hook(self._enter), layer.register_forward_hook(self._leave)]

    def _enter(self, *_: Any) -> None:
        self._inside += 1

    def _leave(self, *_: Any) -> None:
        self._inside -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation itself; what gives no tensor (a weight's type, its device) uses no numbers."""
        result = func(*args, **(kwargs or {}))
        if not self._inside and isinstance(result, Tensor):
            arguments = [*args, *(kwargs or {}).values()]
            arguments += [item for each in arguments if isinstance(each, list | tuple) for item in each]
            self.names.update((self._weights[id(item)], None) for item in arguments if id(item) in self._weights)
        return result
