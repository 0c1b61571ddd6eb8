"""State dicts of a quantized model that other trainers save and load: every tensor once, and none missing.

Layers that are trained as one share a quantizer, so its tensors have several names; `save_pretrained` refuses to write
one tensor twice. And trainers load with `strict=False`, which leaves what a file does not hold as it was: a checkpoint
without scales would train on from wrong ones and say nothing. Both are hooks of the model itself, so that it does not
matter who saves and who loads. Files keep the names that the model has: trainers load them without the renaming, and
the stacking of experts, by which `from_pretrained` undoes that of `save_pretrained`.
"""

from typing import Any

from torch import nn

from qat.errors import CheckpointError
from qat.quantizer import Quantizer
from qat.text import some

_READ = "_qat_read"  # names of the state dicts loaded since the last forward pass


def keep_whole(model: nn.Module) -> None:
    """Put the hooks on a model that a scheme was applied to."""
    model._weight_conversions = []  # type: ignore[assignment] # of transformers' models: what saving would undo
    model.register_state_dict_post_hook(_leave_out_second_names)
    model.register_load_state_dict_pre_hook(_remember)
    model.register_forward_pre_hook(_check)


def second_names(model: nn.Module) -> set[str]:
    """Names of quantizer tensors that another name comes before."""
    seen: set[int] = set()
    doubled: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Quantizer):
            if id(module) in seen:
                doubled |= {f"{path}.{name}" for name in module.state_dict()}
            seen.add(id(module))
    return doubled


def _leave_out_second_names(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in second_names(model):
        state.pop(prefix + name, None)


def _remember(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Note what is loaded (shards come in several calls), and give tensors with several names all of them."""
    read = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    setattr(model, _READ, getattr(model, _READ, set()) | read)
    for names in _names_of_tensors(model):
        found = next((name for name in names if name in read), None)
        if found is not None:
            state.update({prefix + name: state[prefix + found] for name in names if name not in read})


def _names_of_tensors(model: nn.Module) -> list[list[str]]:
    """All names of each parameter and persistent buffer."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = [*module.named_parameters(path, recurse=False), *module.named_buffers(path, recurse=False)]
        for name, tensor in own:
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _check(model: nn.Module, _: Any) -> None:
    read = getattr(model, _READ, None)
    if read is None:
        return
    names = _names_of_tensors(model)
    missing = [of_one[0] for of_one in names if read.isdisjoint(of_one)]
    surplus = sorted(read.difference(*names))
    if missing or surplus:
        lacks = f"lacks {some(missing)}" if missing else f"also holds {some(surplus)}"
        raise CheckpointError(
            f"the state that was loaded into this prepared model {lacks}, so its weights or scales are not those that "
            "were saved; load a checkpoint of the same model and scheme, or `qat.load_prepared(FOLDER)`"
        )
    delattr(model, _READ)
