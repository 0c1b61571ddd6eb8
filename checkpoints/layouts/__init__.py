"""Checkpoint layouts, a folder each: `write.py` (the interface of `Target`), `read.py` (the independent `Reader`) and
`engines.py` (the rows of the support table: which engine loads what). A new one is its folder."""

from importlib import import_module
from pathlib import Path

from qat.checkpoints.hf import read_json
from qat.checkpoints.layouts import support
from qat.checkpoints.layouts.reader import ExportedFolder
from qat.checkpoints.layouts.target import Target, TargetLayer
from qat.errors import CheckpointError, ConfigError, UnsupportedError, nearest
from qat.numbers.format import Format
from qat.training.half import RULE as HALF_RULE

_FIRST = "compressed_tensors"  # the default target leads every list
_FOUND = sorted(path.parent.name for path in Path(__file__).parent.glob("*/write.py"))
FOLDERS = tuple(sorted(_FOUND, key=lambda folder: folder != _FIRST))

TARGETS: dict[str, Target] = {}
"""Writers by the name that users type, which is config.json's `quant_method`."""
READERS: dict[str, type[ExportedFolder]] = {}
"""Independent readers by the same name, of the layouts that are folders."""
FILES: dict[str, str] = {}
"""How the files of the other layouts are called at their end."""

for _folder in FOLDERS:
    _writer: Target = import_module(f"{__name__}.{_folder}.write")
    TARGETS[_writer.METHOD] = _writer
    if suffix := getattr(_writer, "FILE", ""):
        FILES[_writer.METHOD] = suffix
    else:
        READERS[_writer.METHOD] = import_module(f"{__name__}.{_folder}.read").Reader

__all__ = [
    "FILES",
    "READERS",
    "TARGETS",
    "ExportedFolder",
    "Target",
    "TargetLayer",
    "check_layer",
    "described_by",
    "find_target",
    "holders",
    "no_layout",
    "npu_table",
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


def holders(weight: Format, input: Format | None, stacks_of: str = "") -> list[str]:
    """Names of the targets that hold a pair of formats: in matrices, or in the stacked experts of a `model_type`."""
    able = (name for name, target in TARGETS.items() if support.find(target.ROWS, weight, input))
    return sorted(name for name in able if _holds(TARGETS[name], stacks_of))


def no_layout(layer: TargetLayer) -> str:
    """Why no target at all holds the layer, or ""."""
    if (reason := _not_stored(layer)) or holders(layer.weight, layer.input, layer.stacks_of):
        return reason
    pair = layer.weight.name + (f" with {layer.input.name} inputs" if layer.input else "")
    return f"no export target holds {pair}" + (f" in the experts of {layer.stacks_of}" if layer.stacks_of else "")


def check_layer(target: Target, layer: TargetLayer) -> None:
    """Refuse what the target cannot hold.

    Raises:
        UnsupportedError: names the layer, the nearest formats, and the targets that can.
    """
    stacks_of = layer.stacks_of
    able = holders(layer.weight, layer.input, stacks_of)
    if reason := _not_stored(layer):
        raise UnsupportedError(f"{layer.path} can be trained and evaluated, but not exported: {reason}")
    if layer.half and not hasattr(target, "in_half"):
        others = " or ".join(name for name in able if hasattr(TARGETS[name], "in_half"))
        raise UnsupportedError(
            f"{layer.path} is of an FP16 model (activation_rule: {HALF_RULE}), which {target.METHOD} does not write"
            + (f"; use --target {others}" if others else "")
        )
    if layer.is_table and target.TABLES is None:
        others = " or ".join(name for name in able if TARGETS[name].TABLES is not None)
        instead = f", or use --target {others}" if others else ""
        raise UnsupportedError(
            f"{layer.path}: no loader of {target.METHOD} checkpoints reads packed tables; leave --pack-tables out, "
            f"which stores the values of their grid in BF16{instead}"
        )
    if layer.rotation and target.ROTATED is None:
        others = " or ".join(name for name in able if TARGETS[name].ROTATED is not None)
        instead = f"export it with --target {others}, or " if others else ""
        raise UnsupportedError(
            f"{layer.path}: {target.METHOD} cannot say that inputs are rotated; {instead}leave hadamard out of init"
        )
    if not _holds(target, stacks_of):
        raise UnsupportedError(f"{layer.path}: {_other_kind(target, layer, able)}")
    if support.find(target.ROWS, layer.weight, layer.input) is None:
        reason = support.refusal(target.METHOD, target.ROWS, layer.weight, layer.input, able)
        raise UnsupportedError(f"{layer.path}: {reason}")
    target.check(layer)


def _not_stored(layer: TargetLayer) -> str:
    """Why no target holds the layer, whatever its formats, or ""."""
    if layer.transposed and not layer.stacks_of:
        return "no layout holds matrices that are stored transposed"
    if not any(_holds(target, layer.stacks_of) for target in TARGETS.values()):
        return f"no layout holds the experts of {layer.stacks_of}, which are stored as whole stacks"
    return ""


def _other_kind(target: Target, layer: TargetLayer, able: list[str]) -> str:
    """Why a target of matrices does not hold a stack, or the other way round, and what to do."""
    instead = f"export it with --target {' or '.join(able)}"
    if target.STACKS_OF:
        what = f"{target.METHOD} holds the experts of {', '.join(target.STACKS_OF)} only; skip this layer"
        return f"{what}, or {instead}" if able else what
    if not able:
        other = next(each for each in TARGETS.values() if _holds(each, layer.stacks_of))
        instead = support.refusal(other.METHOD, other.ROWS, layer.weight, layer.input)
    return f"{target.METHOD} holds matrices, but {layer.stacks_of} stores its experts as whole stacks; {instead}"


def _holds(target: Target, stacks_of: str) -> bool:
    """Whether a target is for the stacked experts of that `model_type`, or for matrices where it is ""."""
    return stacks_of in target.STACKS_OF if stacks_of else not target.STACKS_OF


def open_export(folder: Path) -> ExportedFolder:
    """The exported checkpoint in `folder`, read by the rules of the layout that its config.json names.

    Raises:
        CheckpointError: no config.json, no `quantization_config`, or one of a layout that is not known.
        UnsupportedError: a variant of a known layout that cannot be read.
    """
    method, file = described_by(folder)
    if method not in READERS:
        what = f"quant_method {method!r}" if method else "no quantization"
        raise CheckpointError(f"{folder / 'config.json'} describes {what}; readable: {', '.join(READERS)}")
    exported = READERS[method](folder)
    if file is not None and (other := _configured(folder)) is not None:
        _check_agree(exported, other, file)
    return exported


def described_by(folder: Path) -> tuple[str | None, str | None]:
    """Name of the layout of a folder, None where nothing says that it is quantized; and the file of its own that says
    so, None where config.json does. Engines that know such files look for them first."""
    for name, target in TARGETS.items():
        if target.DESCRIPTION is not None and (folder / target.DESCRIPTION).is_file():
            return name, target.DESCRIPTION
    return _configured(folder), None


def _configured(folder: Path) -> str | None:
    given = read_json(folder / "config.json").get("quantization_config") or {}
    return given.get("quant_method") if isinstance(given, dict) else None


def _check_agree(exported: ExportedFolder, method: str, file: str) -> None:
    """Some engines go by one description and some by the other: both must say the same of every layer.

    Raises:
        CheckpointError: they do not; names the first layer, or what cannot be read.
    """
    other = READERS[method](exported.folder).modules if method in READERS else {}
    for path in sorted(exported.modules.keys() | other.keys()):
        kinds = [
            (m.weights, m.input) if (m := each.get(path)) is not None else None for each in (exported.modules, other)
        ]
        if kinds[0] != kinds[1]:
            raise CheckpointError(
                f"{exported.folder}: {file} and config.json ({method}) do not agree about {path}, and engines read "
                "either; remove the one that the tensors do not follow"
            )


def npu_table() -> str:
    """The table of docs/ascend.md: which engine on an NPU loads what, of every target."""
    caches = {name: layout for name, target in TARGETS.items() if (layout := target.CACHES) is not None}
    return support.npu_markdown({name: target.ROWS for name, target in TARGETS.items()}, caches)


def table() -> str:
    """The table of docs/export.md: which engine loads what, of every target."""
    besides = {name: [row for row in (t.ROTATED, t.TABLES) if row is not None] for name, t in TARGETS.items()}
    return support.markdown({name: target.ROWS for name, target in TARGETS.items()}, besides)
