"""The export targets by the name users type. A new target is one file here and one line in `TARGETS`."""

from qat.checkpoints.targets import compressed_tensors, fp8, modelopt
from qat.checkpoints.targets.target import Target, TargetLayer
from qat.errors import ConfigError, nearest

TARGETS: dict[str, Target] = {"compressed-tensors": compressed_tensors, "modelopt": modelopt, "fp8": fp8}

__all__ = ["TARGETS", "Target", "TargetLayer", "find_target"]


def find_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        ConfigError: no such target; names the nearest.
    """
    try:
        return TARGETS[name]
    except KeyError:
        raise ConfigError(f"no export target called {name!r}; nearest: {nearest(name, TARGETS)}") from None
