"""Between a model in memory and the names of its tensors on disk, which transformers keeps apart (fused experts,
renamed modules), and what the names say about layers that engines fuse."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qat.scheme import FUSED_DEFAULT

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_QUANTIZERS = ("weight_quantizer", "input_quantizer")


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by its name in the model, without quantizer state; tied ones twice."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if not any(part in _QUANTIZERS for part in name.split("."))}


def stored_tensors(model: "PreTrainedModel") -> dict[str, Tensor]:
    """`own_tensors` under their checkpoint names. Those that are only renamed keep their identity; fused experts
    become one tensor per expert."""
    return _revert(model, own_tensors(model))


def stored_paths(model: "PreTrainedModel") -> dict[str, str]:
    """Checkpoint path of every linear layer and embedding, by its path in the model."""
    # Placeholders, because tied layers share one tensor and identity must tell them apart.
    marks = {name: torch.empty_like(tensor, device="meta") for name, tensor in own_tensors(model).items()}
    stored = {id(mark): name for name, mark in _revert(model, marks).items()}
    paths = {}
    for path, module in model.named_modules(remove_duplicate=False):
        mark = marks.get(f"{path}.weight")
        if isinstance(module, nn.Linear | nn.Embedding) and id(mark) in stored:
            paths[path] = stored[id(mark)].removesuffix(".weight")
    return paths


def _revert(model: "PreTrainedModel", tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad():
        stored: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return stored


def skeleton(config: "PretrainedConfig") -> "PreTrainedModel":
    """The architecture without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def fused_groups(paths: list[str]) -> list[list[str]]:
    """Sets of two or more sibling layers that serving engines merge into one matrix."""
    groups: dict[tuple[str, int], list[str]] = {}
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        for index, leaves in enumerate(FUSED_DEFAULT):
            if leaf in leaves:
                groups.setdefault((parent, index), []).append(path)
    return [members for members in groups.values() if len(members) > 1]
