"""`transform_config`, by which compressed-tensors says that layers read rotated inputs: written and read.

One group per size of block: `weight_input` is what happened to the stored weights, `input` is what a loader has to do
to whatever reaches the layer, before it is quantized. Nothing is stored: the matrix is Sylvester's.
"""

from typing import Any

from qat.errors import CheckpointError, UnsupportedError
from qat.numbers.hadamard import size_problem

KEY = "transform_config"
_READ = {"type": "hadamard", "randomize": False, "precision": "torch.float32"}
_ONLINE, _FOLDED = "input", "weight_input"


def transform_config(targets: dict[int, list[str]]) -> dict[str, Any]:
    """Value of the key, by the size of blocks and the patterns of the layers that have it."""
    groups = {
        f"hadamard_{size}": {
            **_READ,
            "head_dim": size,
            "requires_grad": False,
            "apply": [
                {"targets": names, "location": _FOLDED, "inverse": True, "ignore": []},
                {"targets": names, "location": _ONLINE, "inverse": False, "ignore": []},
            ],
        }
        for size, names in targets.items()
    }
    return {"config_groups": groups}


def rotations(config: Any, where: str) -> list[tuple[int, list[str], list[str]]]:
    """(size, targets, ignored) of each rotation of inputs.

    Raises:
        CheckpointError: not a table of groups as the format has them.
        UnsupportedError: a transform that changes results and is not implemented; names it.
    """
    groups = (config or {}).get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(f"{where} is {config!r}, not a table of config_groups")
    found = []
    for name, group in groups.items():
        place = f"{where}: {name}"
        for key, readable in _READ.items():
            if (value := group.get(key, readable)) != readable:
                raise UnsupportedError(f"{place}.{key} is {value!r}; readable: {readable!r}")
        size = group.get("head_dim")
        if not isinstance(size, int) or (problem := size_problem(size)):
            problem = problem if isinstance(size, int) else "blocks need a size"
            raise UnsupportedError(f"{place}.head_dim is {size!r}: {problem}")
        sides: dict[str, tuple[list[str], list[str]]] = {}
        for part in group.get("apply") or []:
            location = part.get("location")
            if location not in (_ONLINE, _FOLDED):
                raise UnsupportedError(f"{place} applies to {location!r}; readable: {_ONLINE!r}, {_FOLDED!r}")
            sides[location] = _names(part.get("targets")), _names(part.get("ignore"))
        if sides.get(_ONLINE) != sides.get(_FOLDED):
            raise UnsupportedError(f"{place} rotates other weights than inputs, so the rest is folded elsewhere")
        found += [(size, *sides[_ONLINE])] if sides else []
    return found


def _names(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else list(given or [])


def online(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration without what happened to stored weights: what is left to do to a loaded model."""
    groups = {
        name: {**group, "apply": [part for part in group["apply"] if part["location"] == _ONLINE]}
        for name, group in config["config_groups"].items()
    }
    return {"config_groups": groups}
