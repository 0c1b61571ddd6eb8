"""What an architecture's names mean, in one place. A `Family` says it for all models of some `model_type`s; nearly all
need only `DEFAULT`, and a new family is one entry of `FAMILIES`.

What a class of transformers says of itself (its output layer, tied weights, what it keeps in float32) is asked there:
see `qat.float32` and `qat.checkpoints.names`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

Sets = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Family:
    """Names of one architecture, by the last part of a module's path.

    Attributes:
        fused: sibling layers that serving engines merge into one matrix.
        pairs: a linear layer whose rows can be divided because what follows is linear in them, and the layer that reads
            the result.
        positions: parts of the names of tables that hold one row per position.
        positions_key: key of the config that says how many positions the model builds a table for as it runs.
    """

    fused: Sets = (
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
        ("q_a_proj", "kv_a_proj_with_mqa"),
        ("w1", "w3"),
    )
    pairs: tuple[tuple[str, str], ...] = (("up_proj", "down_proj"), ("v_proj", "o_proj"))
    positions: tuple[str, ...] = ("pos", "wpe")
    positions_key: str | None = None

    def holds_positions(self, path: str) -> bool:
        """Whether a module or buffer of this path is a table of positions."""
        return any(part in path.rpartition(".")[2] for part in self.positions)


DEFAULT = Family()
FAMILIES: dict[str, Family] = {
    "mpt": Family(positions_key="max_seq_len"),  # of its ALiBi table
}
"""By config.json's `model_type`."""

_EXPERT = re.compile(r"(.+\.experts)\.\d+\..+")


def find_family(model_type: str | None) -> Family:
    """The family of a `model_type`, `DEFAULT` where it has no entry of its own."""
    return FAMILIES.get(model_type or "", DEFAULT)


def fused_sets(paths: Iterable[str], sets: Sets) -> list[list[str]]:
    """Two or more of `paths` that share a parent and whose last parts are in one of `sets`, in order."""
    groups: dict[tuple[str, int], list[str]] = {}
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        for index, leaves in enumerate(sets):
            if leaf in leaves:
                groups.setdefault((parent, index), []).append(path)
    return [members for members in groups.values() if len(members) > 1]


def expert_list(path: str) -> str | None:
    """The list of experts that a layer of one of them is in (`model.layers.0.mlp.experts`), or None."""
    match = _EXPERT.fullmatch(path)
    return None if match is None else match[1]


def is_outside(path: str) -> bool:
    """Whether a linear layer stands beside the body, as output layers do, which engines know by their names only."""
    return "." not in path


def stacks(model: nn.Module) -> list[str]:
    """Names of parameters that hold stacks of matrices, such as fused experts [expert, out, in]; without convolutions
    and vectors stored with extra dimensions of one."""
    convolution = nn.modules.conv._ConvNd
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if not isinstance(module, convolution)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 3 and min(parameter.shape[-2:]) > 1
    ]
