"""Exports as raw tensors in the orders that a device reads, for engines that want re-ordering done once and for all:
`qat convert`. One file per tensor, little-endian and row-major, and blobs.json, which describes each.

No public engine loads these folders: checkpoints stay in the plain order (ND), and engines re-order after loading.
Every blob is read back and put into the plain order again before the folder takes its name.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.checkpoints.folders import atomic_folder
from qat.checkpoints.hf import read_json
from qat.checkpoints.layouts import TARGETS, ExportedFolder, open_export
from qat.checkpoints.layouts.arguments import input_format, weight_format
from qat.errors import CheckpointError, ConfigError, UnsupportedError
from qat.numbers.format import Format
from qat.numbers.numerics import QTensor
from qat.serving.layouts import LAYOUTS, Layout, find_layout
from qat.text import some

DESCRIPTION = "blobs.json"
VERSION = 1
PLAIN = "nd"  # what the description calls the plain order


@dataclass(frozen=True)
class Blob:
    """One tensor as it is written, and how it comes back."""

    tensor: Tensor
    layout: str
    plain: Tensor
    bits: int

    def describe(self, file: str) -> dict[str, Any]:
        """Its entry of blobs.json."""
        return {
            "file": file,
            "layout": self.layout,
            "dtype": _name(self.tensor.dtype),
            "shape": list(self.tensor.shape),
            "bits": self.bits,
            "plain_dtype": _name(self.plain.dtype),
            "plain_shape": list(self.plain.shape),
        }


def convert(folder: Path, out: Path, names: Sequence[str]) -> dict[str, Any]:
    """Write the export in `folder` as blobs; returns their description.

    Args:
        folder: an exported checkpoint of any target.
        out: must not exist, or be empty.
        names: of layouts, at most one for codes and one for scales; what has none keeps the plain order.

    Raises:
        ConfigError: no such layout, or two for the same part.
        UnsupportedError: a layer that a layout does not take; names it.
        CheckpointError: the export is damaged, or `out` is in the way.
    """
    layouts = _chosen(names)
    exported = open_export(folder)
    _refuse(exported, layouts)
    description: dict[str, Any] = {"version": VERSION, "source": folder.resolve().name, "layers": {}, "tensors": {}}
    with atomic_folder(out) as building:
        for path in exported.modules:
            description["layers"][path] = _layer_entry(exported, path)
        for name, blob in _blobs(exported, layouts):
            file = f"{len(description['tensors']):06}.bin"
            _write(building / file, blob.tensor)
            description["tensors"][name] = blob.describe(file)
            if not torch.equal(_bytes(_plain(building, description["tensors"][name])), _bytes(blob.plain)):
                raise CheckpointError(f"{name}: {blob.layout} does not give back what went in; please report this")
        (building / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return description


def read_blob(folder: Path, name: str) -> Tensor:
    """A tensor of a converted folder in its plain order.

    Raises:
        CheckpointError: no such tensor, a version or layout that this release does not know, or a file of another size.
    """
    description = read_json(folder / DESCRIPTION)
    if description.get("version") != VERSION:
        raise CheckpointError(f"{folder / DESCRIPTION}: version {description.get('version')}; readable: {VERSION}")
    if name not in description["tensors"]:
        raise CheckpointError(f"{folder}: no tensor called {name}")
    return _plain(folder, description["tensors"][name])


def _chosen(names: Sequence[str]) -> dict[str, Layout]:
    """Layouts by the part that they order."""
    chosen: dict[str, Layout] = {}
    for name in names:
        layout = find_layout(name)
        if layout.part in chosen:
            raise ConfigError(f"--layout {chosen[layout.part].name} and {name} both order {layout.part}; give one")
        chosen[layout.part] = layout
    return chosen


def _refuse(exported: ExportedFolder, layouts: dict[str, Layout]) -> None:
    if not exported.modules:
        raise CheckpointError(f"{exported.folder} holds no quantized layer")
    for layout in layouts.values():
        bad: dict[str, list[str]] = {}
        for path in exported.modules:
            reason = layout.problem(_format(exported, path))
            if reason is not None:
                bad.setdefault(reason, []).append(path)
        for reason, paths in bad.items():
            raise UnsupportedError(f"{some(paths)}: {layout.name} does not take {layout.part} there: {reason}")


def _format(exported: ExportedFolder, path: str) -> Format:
    return weight_format(exported.modules[path].weights)


def _layer_entry(exported: ExportedFolder, path: str) -> dict[str, Any]:
    module = exported.modules[path]
    input = None if module.input is None else input_format(module.input).name
    return {"weight": _format(exported, path).name, "input": input, "rotation": module.rotation}


def _blobs(exported: ExportedFolder, layouts: dict[str, Layout]) -> Iterator[tuple[str, Blob]]:
    for path, module in exported.modules.items():
        q = TARGETS[exported.METHOD].unpack(module, exported.layer(path))
        for part, plain in _parts(q).items():
            yield f"{path}.{part}", _blob(plain, layouts.get(part), q)
        static = exported.static_input(path)
        if static is not None:
            yield f"{path}.input_static", Blob(static, PLAIN, static, 8 * static.itemsize)
    for name in sorted(exported.names - exported.quantized_names):
        tensor = exported.reader.get(name)
        yield name, Blob(tensor, PLAIN, tensor, 8 * tensor.itemsize)


def _parts(q: QTensor) -> dict[str, Tensor]:
    """Plain tensors of a layer: codes of its shape, scales (..., block rows, block columns)."""
    fmt, lead = q.format, q.codes.shape[:-2]
    parts = {"codes": q.codes}
    for name, tensor in q.parameters.items():
        if name == "scale":
            name, tensor = "scales", fmt.scale.to_bytes(tensor)
        grid = name != "global_scale" and lead and tensor.shape[0] % math.prod(lead) == 0
        parts[name] = tensor.unflatten(0, (*lead, -1)) if grid else tensor
    return parts


def _blob(plain: Tensor, layout: Layout | None, q: QTensor) -> Blob:
    if layout is None:
        return Blob(plain, PLAIN, plain, 8 * plain.itemsize)
    bits = q.format.element.bits if layout.part == "codes" else 8
    return Blob(layout.from_plain(plain, bits), layout.name, plain, bits)


def _write(path: Path, tensor: Tensor) -> None:
    path.write_bytes(_bytes(tensor).numpy().tobytes())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _plain(folder: Path, entry: dict[str, Any]) -> Tensor:
    dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
    raw = (folder / entry["file"]).read_bytes()
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{folder / entry['file']} has {len(raw)} bytes, not those of {entry['dtype']} {shape}")
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    tensor = flat.view(dtype).view(shape)
    if entry["layout"] == PLAIN:
        return tensor
    if entry["layout"] not in LAYOUTS:
        raise CheckpointError(f"{folder / DESCRIPTION}: layout {entry['layout']!r} is not one of {', '.join(LAYOUTS)}")
    rows, columns = entry["plain_shape"][-2:]
    return LAYOUTS[entry["layout"]].to_plain(tensor, entry["bits"], rows, columns)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
