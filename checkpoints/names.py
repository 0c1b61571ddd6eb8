"""Between a model in memory and the names of its tensors on disk, which transformers keeps apart (fused experts,
renamed modules, a base model's prefix).

Names are read forwards, as transformers does when it loads: from each name in the file to its place in the model. Only
what the file does not hold, or holds in parts, is named backwards, as transformers does when it saves.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qat.families import stacks
from qat.float32 import own_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class StoredNames:
    """What the tensors of one file are to one model.

    Attributes:
        tensors: every tensor of the model by its checkpoint name, the file's where the file has it; tied ones twice.
            Those that are only renamed keep their identity, fused experts become one tensor per expert.
        origins: name in the model by checkpoint name, without those that are stored in parts.
        paths: checkpoint path of every linear layer and embedding by its path in the model; layers that are stored
            merged with others have none.
        parts: names of tensors that transformers puts together while it loads, such as fused experts.
        rows: of tensors that are rows of one stack (experts, rows, columns), or all of it: its name in the model, and
            which, its matrices one below the other.
        shadowed: names in the file of which transformers loads another one instead, and that one.
        unread: names in the file that belong to nothing in the model, and what transformers takes them for.
    """

    tensors: dict[str, Tensor]
    origins: dict[str, str]
    paths: dict[str, str]
    parts: frozenset[str]
    rows: dict[str, tuple[str, slice]]
    shadowed: dict[str, str]
    unread: dict[str, str]

    @property
    def modules(self) -> dict[str, str]:
        """Path in the model by checkpoint path."""
        return {stored: path for path, stored in self.paths.items()}

    def tied_to(self, paths: Collection[str]) -> dict[str, str]:
        """Checkpoint paths of layers whose weight is that of one of `paths` under another name, and that one."""
        own = {id(tensor): path for path in paths if (tensor := self.tensors.get(f"{path}.weight")) is not None}
        weights = {path: self.tensors[f"{path}.weight"] for path in self.paths.values() if path not in paths}
        return {path: own[id(tensor)] for path, tensor in weights.items() if id(tensor) in own}


def stored_names(model: "PreTrainedModel", names: Iterable[str] = ()) -> StoredNames:
    """How the tensors called `names` in a file become those of `model`; without a file, the names it would save."""
    from transformers.core_model_loading import dot_natural_key

    own, given = own_tensors(model), sorted(names, key=dot_natural_key)
    taken: dict[str, str] = {}  # name in the file by place
    parts: dict[tuple[str, str], list[str]] = defaultdict(list)  # names in the file that transformers puts together
    shadowed, unread = {}, {}
    for name, (place, merge) in _places(model, given, own).items():
        if place not in own:
            unread[name] = place
        elif merge is not None:
            parts[place, merge].append(name)
        elif place in taken:
            shadowed[name] = taken[place]
        else:
            taken[place] = name
    origins = {name: place for place, name in taken.items()}
    rest = {name: tensor for name, tensor in own.items() if name not in taken}
    # Placeholders, because tied layers share one tensor and identity must tell them apart.
    marks = {name: torch.empty_like(tensor, device="meta") for name, tensor in rest.items()}
    places = {id(mark): place for place, mark in marks.items()}
    renamed = {name: places[id(mark)] for name, mark in _revert(model, marks).items() if id(mark) in places}
    merged = {name: tensor for name, tensor in rest.items() if name not in renamed.values()}
    tensors = {name: own[place] for name, place in origins.items()}
    bare = _lacks_prefix(model, origins)
    for name, place in renamed.items():
        short = name.removeprefix(f"{model.base_model_prefix}.") if bare else name
        tensors[short], origins[short] = own[place], place
    apart = _in_parts(model, merged, parts, own)
    numbers = _row_numbers(merged)
    ends = {place: (int(each[0, 0, 0]), int(each[-1, -1, 0])) for place, each in numbers.items()}
    rows = _in_parts(model, numbers, parts, own)
    of_stacks = {name: rows_of for name, each in rows.items() if (rows_of := _rows_of(each, ends)) is not None}
    whole = set(stacks(model))
    of_stacks |= {name: (place, slice(None)) for name, place in origins.items() if place in whole}
    return StoredNames(
        {**tensors, **apart}, origins, _paths(model, origins), frozenset(apart), of_stacks, shadowed, unread
    )


def _places(
    model: "PreTrainedModel", names: Iterable[str], own: dict[str, Tensor]
) -> dict[str, tuple[str, str | None]]:
    """Where transformers loads each name: the name in the model, and the pattern by which it is put together with
    others, if it is; as `transformers.core_model_loading.convert_and_load_state_dict_in_model` decides."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    places: dict[str, tuple[str, str | None]] = {}
    for name in names:
        place = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if place[0] not in own and name in own:
            place = rename_source_key(name, [], [], model.base_model_prefix, own)
        places[name] = place
    return places


def _lacks_prefix(model: "PreTrainedModel", origins: dict[str, str]) -> bool:
    """Whether the file leaves the base model's prefix away, as files of the base model alone do."""
    inside = [name for name, place in origins.items() if place.startswith(f"{model.base_model_prefix}.")]
    return bool(inside) and not any(name.startswith(f"{model.base_model_prefix}.") for name in inside)


def _in_parts(
    model: "PreTrainedModel",
    merged: dict[str, Tensor],
    parts: dict[tuple[str, str], list[str]],
    own: dict[str, Tensor],
) -> dict[str, Tensor]:
    """`merged` as the file holds them, under the file's names where it has as many parts as transformers makes."""
    from transformers.core_model_loading import dot_natural_key

    made = _revert(model, merged)
    groups: dict[tuple[str, str | None], list[str]] = defaultdict(list)
    for name, where in _places(model, made, own).items():
        groups[where].append(name)
    tensors = {}
    for (place, merge), saved in groups.items():
        given = parts.get((place, merge or ""), [])
        names = given if len(given) == len(saved) else saved
        for name, other in zip(sorted(saved, key=dot_natural_key), names, strict=True):
            tensors[other] = made[name]
    return tensors


_TWICE = 2


def _row_numbers(merged: dict[str, Tensor]) -> dict[str, Tensor]:
    """For every stack the numbers of its rows, over all stacks; they go the way that the rows go. Each stands twice,
    because transformers 5.17 takes dimensions of one away."""
    numbers: dict[str, Tensor] = {}
    first = 0
    for place, tensor in merged.items():
        if tensor.dim() == 3:
            count = tensor.shape[0] * tensor.shape[1]
            own = torch.arange(first, first + count, device="cpu").view(*tensor.shape[:2], 1)
            numbers[place] = own.repeat(1, 1, _TWICE)
            first += count
    return numbers


def _rows_of(numbers: Tensor, ends: dict[str, tuple[int, int]]) -> tuple[str, slice] | None:
    """The stack that consecutive row numbers belong to (`ends` are its first and last), and which of its rows."""
    if numbers.shape[1:] != (_TWICE,) or not bool((numbers.diff(dim=0) == 1).all()):
        return None
    first, last = int(numbers[0, 0]), int(numbers[-1, 0])
    return next(
        ((place, slice(first - low, last - low + 1)) for place, (low, high) in ends.items() if low <= first <= high),
        None,
    )


def _paths(model: nn.Module, origins: dict[str, str]) -> dict[str, str]:
    stored = {place: name for name, place in origins.items() if name.endswith(".weight")}
    return {
        path: stored[f"{path}.weight"].removesuffix(".weight")
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear | nn.Embedding) and f"{path}.weight" in stored
    }


def _revert(model: "PreTrainedModel", tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the class saves, whatever this model was loaded from: a model without file gets the same names."""
    from transformers.core_model_loading import revert_weight_conversion

    used = vars(model).pop("_weight_conversions", None)
    try:
        with torch.no_grad():
            stored: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    finally:
        if used is not None:
            model._weight_conversions = used
    return stored


def lost_when_packed(model: "PreTrainedModel", layers: dict[str, str]) -> list[str]:
    """Of `layers` (path in the model by checkpoint path), those whose packed tensors transformers would not find,
    because it renames the tensor called `weight` only."""
    own = own_tensors(model)
    probes = {f"{stored}.{key}": f"{path}.{key}" for stored, path in layers.items() for key in _PACKED}
    own |= dict.fromkeys(probes.values(), torch.empty(0, device="meta"))
    places = _places(model, probes, own)
    return sorted({name.rpartition(".")[0] for name, wanted in probes.items() if places[name][0] != wanted})


def wanted_while_loading(model: "PreTrainedModel", paths: Collection[str]) -> list[str]:
    """Classes of `model` whose initialisation, which plain transformers runs while it loads, takes the weight of one of
    the layers at `paths`: packed layers have none, and it stops."""
    with torch.device("meta"):
        bare: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.bfloat16)
        for path in paths:
            bare.set_submodule(path, nn.Identity())
    classes: dict[str, None] = {}
    for module in bare.modules():
        try:
            if not isinstance(module, nn.Identity):
                bare._init_weights(module)
        except AttributeError as error:
            if "Identity" in str(error):
                classes[type(module).__name__] = None
    return list(classes)


def tables(model: "PreTrainedModel", names: StoredNames) -> set[str]:
    """Checkpoint paths of the embeddings."""
    return {stored for path, stored in names.paths.items() if isinstance(model.get_submodule(path), nn.Embedding)}


def missing_names(model: "PreTrainedModel", names: StoredNames, stored: Collection[str]) -> list[str]:
    """Names that transformers would miss in a file that holds `stored`: one of tied tensors is enough, and some of a
    class's tensors it makes itself."""
    tensors, places = set(), set()
    for name in stored:
        if name in names.tensors:
            tensors.add(id(names.tensors[name]))
            places.add(names.origins.get(name, name))
    for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        places |= set(pair) if places & set(pair) else set()
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    optional = re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or "(?!)")
    return [
        name
        for name, tensor in names.tensors.items()
        if id(tensor) not in tensors
        and (place := names.origins.get(name, name)) not in places
        and not optional.search(place)
    ]


def surplus_names(model: "PreTrainedModel", names: StoredNames) -> list[str]:
    """Names of `unread` that the class does not expect in its files either, as transformers decides that: something of
    the model would be ignored."""
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    buffers = [name for name, _ in model.named_buffers()]
    patterns += [r"rotary_emb\.inv_freq"] * any(name.endswith("rotary_emb.inv_freq") for name in buffers)
    patterns += [r"(^|\.)position_ids$"] * any(
        name.endswith("position_ids") for name in buffers
    )  # as transformers does
    expected = re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or "(?!)")
    return [name for name, place in names.unread.items() if not expected.search(place)]


_PACKED = ("weight_packed", "weight_scale")  # stand for what any layout stores of a quantized layer


def skeleton(config: "PretrainedConfig") -> "PreTrainedModel":
    """The architecture without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model
