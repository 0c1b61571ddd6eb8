"""Checkpoint layouts, a folder each: `write.py` (the interface of `Target`), `read.py` (the independent `Reader`) and
`engines.py` (the rows of the support table: which engine loads what). A new one is its folder and its name in
`FOLDERS`."""

from importlib import import_module
from pathlib import Path

from qat.checkpoints.hf import read_json
from qat.checkpoints.layouts import support
from qat.checkpoints.layouts.reader import ExportedFolder
from qat.checkpoints.layouts.target import Target, TargetLayer
from qat.errors import CheckpointError, ConfigError, UnsupportedError, nearest
from qat.numbers.format import Format

FOLDERS = ("compressed_tensors", "modelopt", "fp8")

TARGETS: dict[str, Target] = {}
"""Writers by the name that users type, which is config.json's `quant_method`."""
READERS: dict[str, type[ExportedFolder]] = {}
"""Independent readers by the same name."""

for _folder in FOLDERS:
    _writer: Target = import_module(f"{__name__}.{_folder}.write")
    TARGETS[_writer.METHOD] = _writer
    READERS[_writer.METHOD] = import_module(f"{__name__}.{_folder}.read").Reader

__all__ = [
    "READERS",
    "TARGETS",
    "ExportedFolder",
    "Target",
    "TargetLayer",
    "check_layer",
    "find_target",
    "holders",
    "open_export",
    "table",
]


def find_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        ConfigError: no such target; names the nearest.
    """
    try:
        return TARGETS[name]
    except KeyError:
        raise ConfigError(f"no export target called {name!r}; nearest: {nearest(name, TARGETS)}") from None


def holders(weight: Format, input: Format | None) -> list[str]:
    """Names of the targets that hold a pair of formats."""
    return sorted(name for name, target in TARGETS.items() if support.find(target.ROWS, weight, input))


def check_layer(target: Target, layer: TargetLayer) -> None:
    """Refuse what the target cannot hold.

    Raises:
        UnsupportedError: names the layer, the nearest formats, and the targets that can.
    """
    able = holders(layer.weight, layer.input)
    if support.find(target.ROWS, layer.weight, layer.input) is None:
        reason = support.refusal(target.METHOD, target.ROWS, layer.weight, layer.input, able)
        raise UnsupportedError(f"{layer.path}: {reason}")
    target.check(layer)


def open_export(folder: Path) -> ExportedFolder:
    """The exported checkpoint in `folder`, read by the rules of the layout that its config.json names.

    Raises:
        CheckpointError: no config.json, no `quantization_config`, or one of a layout that is not known.
        UnsupportedError: a variant of a known layout that cannot be read.
    """
    quantization = read_json(folder / "config.json").get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method not in READERS:
        what = f"quant_method {method!r}" if method else "no quantization"
        raise CheckpointError(f"{folder / 'config.json'} describes {what}; readable: {', '.join(READERS)}")
    return READERS[method](folder)


def table() -> str:
    """The table of docs/export.md: which engine loads what, of every target."""
    return support.markdown({name: target.ROWS for name, target in TARGETS.items()})
