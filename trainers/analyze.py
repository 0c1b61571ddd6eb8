"""Which weights of a model lose most in which format, before anything is trained (`qat analyze`).

Matrices are read from the checkpoint one at a time, rounded to the nearest number of each candidate, and compared: a
model of any size needs the memory of its largest matrix and a few slabs, and no class that runs it.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.analysis import candidates, decibels, energy, expected_qsnr, has_theory, loss, row_crest
from qat.checkpoints import packed
from qat.checkpoints.hf import ModelConfig, check_weights, read_json, resolve
from qat.checkpoints.progress import counted
from qat.checkpoints.shards import ShardReader
from qat.config import write_text_atomic
from qat.errors import CheckpointError, ConfigError, UnsupportedError
from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.numbers.numerics import width_problem
from qat.text import some


@dataclass(frozen=True)
class Loss:
    """What one format does to one matrix: sum of squared errors, QSNR in dB, what theory expects of normal numbers
    with this crest factor per block (None where there is no theory)."""

    error: float
    qsnr: float
    crest: float
    expected: float | None


@dataclass(frozen=True)
class WeightLoss:
    """One matrix: its shape, sum of squares, crest factor of whole rows, and `Loss` by format that divides it.

    `share` is its part of the squared error of all weights, the mean over the formats that hold it.
    """

    name: str
    shape: tuple[int, int]
    energy: float
    crest: float
    formats: dict[str, Loss]
    share: float = 0.0


@dataclass(frozen=True)
class Analysis:
    """All matrices of a model.

    Attributes:
        model: as the user named it.
        formats: (bits per weight, QSNR of the whole model as far as the format divides it) by name, least bits first.
        weights: those with the largest `share` first.
        notes: sentences about what was not analysed.
    """

    model: str
    formats: dict[str, tuple[float, float]]
    weights: list[WeightLoss]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is infinite or undefined is None."""
        formats = [
            {"name": name, "bits_per_weight": round(bits, 4), "qsnr": _finite(qsnr)}
            for name, (bits, qsnr) in self.formats.items()
        ]
        weights = [
            {
                "name": w.name,
                "shape": list(w.shape),
                "crest": _finite(w.crest),
                "share_of_error": w.share,
                "formats": {
                    name: {key: _finite(value) for key, value in asdict(one).items()} for name, one in w.formats.items()
                },
            }
            for w in self.weights
        ]
        return {"model": self.model, "formats": formats, "weights": weights, "notes": self.notes}


def analyze(model: str, formats: Iterable[str] = ()) -> Analysis:
    """Round every matrix of `model` to every format.

    Args:
        model: a folder, hub id, .gguf file or `embedded:...`, as in a job.
        formats: names in the catalogue; by default `qat.analysis.candidates`.

    Raises:
        CheckpointError: no model there, or a weight that is not finite.
        ConfigError, FormatError: a format is given twice, or unknown.
        UnsupportedError: the weights are quantized already.
    """
    selection = [lookup(name) for name in formats] or candidates()
    if len({fmt.name for fmt in selection}) < len(selection):
        raise ConfigError(f"a format is named twice: {', '.join(fmt.name for fmt in selection)}")
    folder = resolve(ModelConfig(id=model))
    if "quantization_config" in read_json(folder / "config.json") or packed.read(folder) is not None:
        raise UnsupportedError(f"{model} is quantized already; give the original BF16, FP16 or FP32 weights")
    check_weights(folder)
    with ShardReader(folder) as reader:
        names, others = matrices(reader)
        if not names:
            raise CheckpointError(f"{folder} holds no matrix called *.weight; there is nothing to analyse")
        counted_names = counted(names, f"rounding to {len(selection)} formats", len(names), "matrices")
        weights = [_measure(name, reader.get(name), selection) for name in counted_names]
    return _ranked(model, selection, weights, others)


def _ranked(model: str, formats: list[Format], weights: list[WeightLoss], others: list[str]) -> Analysis:
    by_format = {fmt.name: [w for w in weights if fmt.name in w.formats] for fmt in formats}
    errors = {name: sum(w.formats[name].error for w in those) for name, those in by_format.items()}
    whole = {
        fmt.name: (
            fmt.bits_per_weight(4096, 4096),
            decibels(errors[fmt.name], sum(w.energy for w in by_format[fmt.name])),
        )
        for fmt in formats
    }

    def share(w: WeightLoss) -> float:
        shares = [one.error / errors[name] for name, one in w.formats.items() if one.error]
        return sum(shares) / len(shares) if shares else 0.0

    shared = [replace(w, share=share(w)) for w in weights]
    return Analysis(model, whole, sorted(shared, key=lambda w: -w.share), _notes(weights, formats, others))


def matrices(reader: ShardReader) -> tuple[list[str], list[str]]:
    """The weights of linear layers and embeddings by their names in the files, and other tensors of several
    dimensions."""
    several = [name for name in reader.names() if sum(size > 1 for size in reader.info(name).shape) > 1]
    names = [name for name in several if name.endswith(".weight") and len(reader.info(name).shape) == 2]
    return names, [name for name in several if name not in set(names)]


def _measure(name: str, tensor: Tensor, formats: list[Format]) -> WeightLoss:
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} holds NaN or infinity: the files are damaged; get them again")
    rows, columns = tensor.shape
    signal, losses = energy(tensor), {}
    for fmt in formats:
        if fmt.divides(columns):
            error, crest = loss(tensor, fmt)
            expected = expected_qsnr(fmt, crest) if has_theory(fmt) and math.isfinite(crest) else None
            losses[fmt.name] = Loss(error, decibels(error, signal), crest, expected)
    return WeightLoss(name, (rows, columns), signal, row_crest(tensor), losses)


def _notes(weights: list[WeightLoss], formats: list[Format], others: list[str]) -> list[str]:
    notes = []
    for fmt in formats:
        widths = sorted({w.shape[1] for w in weights if fmt.name not in w.formats})
        if widths:
            count = sum(fmt.name not in w.formats for w in weights)
            notes.append(f"{count} of {len(weights)} weights cannot be stored: {width_problem(fmt, widths[0])}")
    if others:
        notes.append(f"{len(others)} tensors are no matrices called *.weight and were left out: {some(others, 3)}")
    return notes


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# --- shown ----------------------------------------------------------------------------------------


def write(analysis: Analysis, folder: Path) -> list[Path]:
    """analysis.json and the pictures in `folder`; returns the files."""
    from qat.trainers.analysis_plots import draw

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "analysis.json"
    write_text_atomic(path, json.dumps(analysis.to_dict(), indent=1, allow_nan=False) + "\n")
    return [path, *draw(folder, analysis)]


def lines(analysis: Analysis, most: int) -> list[str]:
    """A table: the model in each format, then the `most` weights that lose most."""
    heads = [max(len(name), 6) for name in analysis.formats]
    shown = analysis.weights[:most]
    width = max(len(name) for name in ["weight", "bits per weight, with scales", *(w.name for w in shown)])

    def row(name: str, shape: str, crest: str, cells: Iterable[str], share: str) -> str:
        padded = "".join(f"  {cell:>{head}}" for cell, head in zip(cells, heads, strict=True))
        return f"{name:<{width}}  {shape:>12}  {crest:>6}{padded}  {share:>8}"

    text = [
        f"{analysis.model}: {len(analysis.weights)} weights; QSNR in dB of rounding to the nearest, higher is better",
        row("weight", "shape", "crest", analysis.formats, "of error"),
        row("bits per weight, with scales", "", "", (f"{bits:.2f}" for bits, _ in analysis.formats.values()), ""),
        row("all weights", "", "", (_cell(qsnr) for _, qsnr in analysis.formats.values()), "100%"),
    ]
    for w in shown:
        cells = (_cell(w.formats[name].qsnr) if name in w.formats else "–" for name in analysis.formats)
        text.append(row(w.name, "x".join(map(str, w.shape)), _cell(w.crest), cells, f"{w.share:.2%}"))
    if len(analysis.weights) > len(shown):
        text.append(f"and {len(analysis.weights) - len(shown)} more (--most, --json)")
    return [*text, *(f"note: {note}" for note in analysis.notes)]


def _cell(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "–"
