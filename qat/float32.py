"""Which of a model's numbers stay in float32 when it is served in BF16 or FP16: what its class keeps so, such as the
correction biases of routers; and which of the two it is. Evaluation, export and verify ask here, so that they round the
same tensors to the same type."""

import copy
import re
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizer import InputQuantizer, Quantizer
from qat.training.half import RULE as HALF_RULE

_names: "weakref.WeakKeyDictionary[nn.Module, frozenset[str]]" = weakref.WeakKeyDictionary()


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by its name in the model, without quantizer state; tied ones twice."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    quantizers = {path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, Quantizer)}
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in quantizers}


def stored_dtype(model: nn.Module) -> torch.dtype:
    """What a checkpoint stores of the model that is not quantized: FP16 where inputs are rounded as on a 310P."""
    rules = {module.rule for module in model.modules() if isinstance(module, InputQuantizer)}
    return torch.float16 if HALF_RULE in rules else torch.bfloat16


def float32_names(model: nn.Module) -> frozenset[str]:
    """Names of the tensors that the model's class makes in float32 whatever type is asked for, or asks loaders to keep
    (`_keep_in_fp32_modules`, `_keep_in_fp32_modules_strict`); none where the class is not transformers'."""
    if model not in _names:
        _names[model] = frozenset(_made_by_class(model) | _named_by_class(model))
    return _names[model]


def _made_by_class(model: nn.Module) -> set[str]:
    make: Any = getattr(type(model), "_from_config", None)
    if make is None:
        return set()
    with torch.device("meta"):
        bare: nn.Module = make(copy.deepcopy(model.config), dtype=torch.bfloat16)
    return {name for name, tensor in own_tensors(bare).items() if tensor.dtype == torch.float32}


def _named_by_class(model: nn.Module) -> set[str]:
    lists = (getattr(model, name, None) or () for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    patterns = [part.replace("*", ".*") for parts in lists for part in parts]  # as transformers reads them
    names = own_tensors(model) if patterns else {}
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
