"""Checkpoints that are quantized already, as models to train: unpacked to BF16 once, kept in a cache, scales beside.

Every weight becomes what a server multiplies with, the middle of its cell; quantized again with the scales that the
checkpoint stores it gives the same codes, which is checked here for every layer. So training begins exactly at the
packed model, and all that reads models (loading, names, exports) reads an ordinary folder.
"""

import copy
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.checkpoints.hf import read_json, source_files
from qat.checkpoints.layouts import READERS, TARGETS, ExportedFolder, described_by, open_export
from qat.checkpoints.layouts.arguments import input_format
from qat.checkpoints.names import stored_names
from qat.checkpoints.origin import fingerprint
from qat.checkpoints.progress import progress
from qat.checkpoints.record import RECORD
from qat.checkpoints.shards import ShardReader, ShardWriter
from qat.errors import CheckpointError, UnsupportedError
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import QTensor, Scales, quantize
from qat.sites import Site, sites
from qat.training.activations import static_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARKER, SCALES = ".qat-packed.json", "packed_scales.safetensors"
_VERSION = 1  # raise it when the same checkpoint would be unpacked to something else
_DESCRIPTIONS = [target.DESCRIPTION for target in TARGETS.values() if target.DESCRIPTION is not None]
_OF_PACKED = (RECORD, "hf_quant_config.json", *_DESCRIPTIONS)  # files that describe the packed weights
_STEPS = 4  # float32 numbers on each side of a global scale that are tried
_INSTEAD = "give the original BF16, FP16 or FP32 weights"

Treatment = tuple[str, str | None]  # formats of a weight and of its input


def is_packed(folder: Path) -> bool:
    """Whether `folder` is a checkpoint that `convert` reads."""
    return described_by(folder)[0] in READERS


# --- unpacking ------------------------------------------------------------------------------------


def convert(folder: Path, cache: Path) -> Path:
    """The folder with the dense BF16 model of a packed checkpoint; made only the first time.

    Args:
        folder: the checkpoint.
        cache: holds one folder per checkpoint, named after its content.

    Raises:
        CheckpointError: it is damaged.
        UnsupportedError: it cannot be trained from exactly where it is; names the layer.
    """
    from filelock import FileLock

    content = hashlib.sha256(fingerprint(folder).encode())
    for file in source_files(folder):
        content.update(f"{file.name} ".encode() + file.read_bytes())
    name = f"{re.sub(r'[^A-Za-z0-9._-]', '-', folder.resolve().name)}-{content.hexdigest()[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{name}.lock"):  # processes started together unpack once
        if not _usable(cache / name):
            _unpack(open_export(folder), cache / name)
    return cache / name


def _usable(folder: Path) -> bool:
    try:
        ShardReader(folder).verify_complete()
        return read_json(folder / MARKER).get("version") == _VERSION and (folder / SCALES).is_file()
    except CheckpointError:
        return False


def _unpack(exported: ExportedFolder, out: Path) -> None:
    if exported.cache_names:
        warnings.warn(
            f"{exported.folder} quantizes cached keys and values; training does so where a rule says `key` and `value`",
            stacklevel=3,
        )
    layers: dict[str, _Layer] = {}
    with (
        ShardWriter(out, overwrite=True) as writer,
        progress(f"unpacking {exported.folder.name} (once)", len(exported.dense_names)) as advance,
    ):
        for name, tensor in exported.dense_tensors():
            if name in exported.weights:
                layers[name] = _layer(exported, exported.weights[name], tensor)
            writer.add(name, tensor)
            advance(1)
        _with_lowest_codes(layers)
        kept = {f"{name} {key}": t for name, layer in layers.items() for key, t in layer.tensors().items()}
        save_file(kept, writer.folder / SCALES)
        for file in source_files(exported.folder):
            place = writer.folder / file.relative_to(exported.folder)
            if file.name not in _OF_PACKED:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
        config = {key: v for key, v in read_json(exported.folder / "config.json").items() if key != _KEY}
        marker = {"version": _VERSION, "layers": {name: layer.treatment for name, layer in layers.items()}}
        for file_name, value in {"config.json": config, MARKER: marker}.items():
            (writer.folder / file_name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


_KEY = "quantization_config"


@dataclass
class _Layer:
    """What is kept of one quantized tensor of the checkpoint; `lowest` counts codes that symmetric formats lack."""

    format: str
    input: str | None
    scales: Scales
    static: Tensor | None
    lowest: int = 0

    @property
    def treatment(self) -> Treatment:
        return self.format, self.input

    def tensors(self) -> dict[str, Tensor]:
        own = {"scale": self.scales.stored, "global_scale": self.scales.global_scale}
        own |= {"zero_point": self.scales.zero_point, "static": self.static}
        return {key: tensor.contiguous().clone() for key, tensor in own.items() if tensor is not None}


def _layer(exported: ExportedFolder, path: str, dense: Tensor) -> _Layer:
    module = exported.modules[path]
    if module.rotation:
        raise UnsupportedError(f"{path}: its inputs are rotated, which training cannot take over; {_INSTEAD}")
    q = TARGETS[exported.METHOD].unpack(module, exported.layer(path))
    fmt, scales = q.format, q.scales
    narrow = scales.stored.to(fmt.scale.storage)
    if narrow.dtype != scales.stored.dtype and not torch.equal(narrow.to(scales.stored.dtype), scales.stored):
        raise UnsupportedError(
            f"{path}: its scales ({scales.stored.dtype}) are not exact in {fmt.scale}, as which {fmt.name} is trained "
            f"and stored, so training would not begin at this checkpoint; {_INSTEAD}"
        )
    lowest = int((q.codes == 1 << (fmt.element.bits - 1)).sum()) if fmt.element.is_integer else 0
    zeros: Tensor | None
    if lowest and scales.zero_point is None:
        fmt = _asymmetric(q, path)
        zeros = torch.zeros(scales.stored.shape, dtype=torch.int8)
    else:
        zeros, lowest = scales.zero_point, 0
    scales = Scales(narrow, scales.global_scale, zeros, type=fmt.scale)
    as_multiplied = dense.transpose(-1, -2) if exported.TRANSPOSED else dense
    settled = _settled(as_multiplied, replace(q, format=fmt, scales=scales), path)
    input = None if module.input is None else input_format(module.input).name
    return _Layer(fmt.name, input, settled, exported.static_input(path), lowest)


def _asymmetric(q: QTensor, path: str) -> Any:
    """Symmetric formats here round down to -7, other tools' to -8; with zero points, all of them zero, that fits."""
    name = f"{q.format.name}_asym"
    if name not in CATALOG:
        raise UnsupportedError(f"{path} holds the lowest code of {q.format.name}, which no rounding gives; {_INSTEAD}")
    return lookup(name)


def _with_lowest_codes(layers: dict[str, _Layer]) -> None:
    """Layers of one format stay of one format."""
    asymmetric = {layer.format for layer in layers.values() if layer.lowest}
    for layer in layers.values():
        if f"{layer.format}_asym" in asymmetric:
            layer.format += "_asym"
            layer.scales = replace(layer.scales, zero_point=torch.zeros(layer.scales.stored.shape, dtype=torch.int8))


def _settled(dense: Tensor, q: QTensor, path: str) -> Scales:
    """The layer's scales, with which `dense` rounds to itself. Other tools store divisors, whose reciprocal is not
    always the number that gives the BF16 values of the division; a neighbour of it then is."""
    for above in _neighbours(q.scales.global_scale):
        scales = replace(q.scales, global_scale=above)
        if torch.equal(quantize(dense, q.format, scales).dequantize(torch.bfloat16), dense):
            return scales
    raise UnsupportedError(f"{path}: rounding its weights with the stored scales changes them; {_INSTEAD}")


def _neighbours(above: Tensor | None) -> Iterator[Tensor | None]:
    yield above
    for goal in (torch.inf, 0.0) if above is not None else ():
        assert above is not None
        near = above
        for _ in range(_STEPS):
            near = torch.nextafter(near, torch.full_like(near, goal))
            yield near


# --- what training begins with --------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """What an unpacked folder says of the checkpoint it was made from: formats by name of the dense tensor."""

    folder: Path
    layers: dict[str, Treatment] = field(default_factory=dict)

    def places(self, model: "PreTrainedModel") -> dict[str, list[str]]:
        """Names of the quantized tensors that each parameter of `model` is made of, in the order of its rows.

        Raises:
            CheckpointError: the model has no place for one.
        """
        with ShardReader(self.folder) as reader:
            names = stored_names(model, reader.names())
        found: dict[str, list[tuple[int, str]]] = {}
        for name in self.layers:
            place, rows = names.rows.get(name) or (names.origins.get(name), slice(None))
            if place is None:
                raise CheckpointError(f"{name} is stored, but {type(model).__name__} has no such weight")
            found.setdefault(place, []).append((rows.start or 0, name))
        return {place: [name for _, name in sorted(pieces)] for place, pieces in found.items()}

    def treatments(self, model: "PreTrainedModel") -> dict[str, Treatment]:
        """Formats by parameter.

        Raises:
            UnsupportedError: the matrices of one stack differ; names it.
        """
        every = {place: {self.layers[name] for name in names} for place, names in self.places(model).items()}
        if apart := [place for place, kinds in every.items() if len(kinds) > 1]:
            raise UnsupportedError(f"{apart[0]}: its experts are quantized in different ways; {_INSTEAD}")
        return {place: kinds.pop() for place, kinds in every.items()}

    @torch.no_grad()
    def put(self, model: "PreTrainedModel") -> list[str]:
        """Put the quantized layers of `model` at the stored scales and ranges; returns what is worth telling."""
        stored = load_file(self.folder / SCALES)
        with torch.device("meta"):  # one whose weights are all there, whatever became of this one's
            bare: Any = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.bfloat16)
        places, fresh = self.places(bare), []
        for site in sites(model, "weight"):
            names = places.get(f"{site.module}.{site.slot}")
            if names is not None:
                _put_scales(site, [_part(stored, name) for name in names])
                if not _put_range(site, stored.get(f"{names[0]} static")):
                    fresh.append(site.path)
        if not fresh:
            return []
        return [
            f"the ranges of {len(fresh)} quantized inputs were calibrated: the checkpoint has none that this "
            f"arithmetic can represent ({fresh[0]})"
        ]


def read(folder: Path) -> Packed | None:
    """What `folder` was unpacked from, None where it is any other model."""
    if not (folder / MARKER).is_file():
        return None
    layers = read_json(folder / MARKER)["layers"]
    return Packed(folder, {name: (weight, input) for name, (weight, input) in layers.items()})


def _part(stored: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    keys = ("scale", "global_scale", "zero_point")
    return {key: stored[f"{name} {key}"] for key in keys if f"{name} {key}" in stored}


def _put_scales(site: Site, parts: list[dict[str, Tensor]]) -> None:
    quantizer, device = site.quantizer, site.quantizer.start.device
    joined = {key: torch.cat([p[key] for p in parts]) for key in ("scale", "zero_point") if key in parts[0]}
    above = parts[0].get("global_scale")
    if above is not None and len(site.shape) > 2:  # as `shared_global_scale` lays those of a stack
        above = torch.cat([p["global_scale"].reshape(1, 1).expand(len(p["scale"]), 1) for p in parts])
    above, zeros = (None if t is None else t.to(device) for t in (above, joined.get("zero_point")))
    quantizer.set_scales(Scales(joined["scale"].to(device), above, zeros, type=site.format.scale))


def _put_range(site: Site, static: Tensor | None) -> bool:
    """Whether the input's range is the stored one now, or needs none."""
    input = site.input
    if input is None or not input.needs_calibration:
        return True
    if static is None:
        return False
    fmt, stored = input.format, static.to(input.amax.device)
    amax = stored * fmt.element.max if fmt.is_static else fmt.element.max * fmt.scale.largest / stored
    if input.is_affine:
        half = fmt.element.max + 1
        amax = (torch.tensor([-half, half - 1], device=stored.device) - stored[1]) * stored[0]
    amax = amax.view_as(input.amax)
    again = static_part(fmt, amax)
    if again is None or not torch.equal(again, stored):
        return False
    input.amax.copy_(amax)
    return True
