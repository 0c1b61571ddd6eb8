"""qat: train a model in the numbers it will be served in.

    qat.formats()                              the catalogue, name -> Format
    qat.quantize(x, "nvfp4").dequantize()      codes and scales, and back
    qat.fake_quantize(x, "nvfp4")              the same values without the codes
    qat.apply(model, scheme); qat.report(model)
    qat.train(qat.load_job("configs/quickstart.yaml"))
    qat.export(run, out, "compressed-tensors")
    qat.prepare(model, "nvfp4"); trainer.train(); qat.export(model, out)   inside other trainers

Nothing is imported until it is used, not even torch: the command imports this package before it can say that it is
starting, or be interrupted.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qat.checkpoints.pushed import PackedWeights
    from qat.init.calibration import calibrate
    from qat.modes import served
    from qat.numbers.format import Format
    from qat.numbers.numerics import QTensor
    from qat.scheme import Rule, Scheme
    from qat.surgery import Coverage, apply, report
    from qat.trainers.job import Job
    from qat.trainers.prepared import load_prepared, prepare

__all__ = [
    "Coverage",
    "Format",
    "PackedWeights",
    "QTensor",
    "Rule",
    "Scheme",
    "apply",
    "calibrate",
    "export",
    "fake_quantize",
    "formats",
    "load_job",
    "load_prepared",
    "parameter_groups",
    "prepare",
    "quantize",
    "report",
    "served",
    "train",
]

_HOMES = {
    "calibrate": "init.calibration",
    "Format": "numbers.format",
    "QTensor": "numbers.numerics",
    "Rule": "scheme",
    "Scheme": "scheme",
    "Coverage": "surgery",
    "apply": "surgery",
    "report": "surgery",
    "served": "modes",
    "PackedWeights": "checkpoints.pushed",
    "load_prepared": "trainers.prepared",
    "prepare": "trainers.prepared",
}


def __getattr__(name: str) -> Any:
    """What other files define, when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def formats() -> "dict[str, Format]":
    """Every number format by name."""
    from qat.numbers.catalog import CATALOG

    return dict(CATALOG)


def quantize(x: "Tensor", format: str) -> "QTensor":
    """Codes and scales of x (..., columns) by the format's own scale rule.

    Raises:
        FormatError: unknown format, or its groups do not divide the last dimension.
    """
    from qat.numbers import numerics
    from qat.numbers.catalog import lookup

    return numerics.quantize(x, lookup(format))


def fake_quantize(x: "Tensor", format: str) -> "Tensor":
    """float32 values of `quantize(x, format).dequantize()`, bit for bit, without making codes."""
    from qat.numbers import numerics
    from qat.numbers.catalog import lookup

    return numerics.fake_quantize(x, lookup(format))


def load_job(path: str | Path, overrides: list[str] | None = None) -> "Job":
    """Read and check a YAML job; `overrides` are `a.b=c` strings."""
    from qat.trainers.job import load_job as load

    return load(path, overrides)


def train(job: "Job", *, resume: bool = False) -> dict[str, Any]:
    """Run a job; returns its report."""
    from qat.kernels.load import load_for_training
    from qat.trainers.run import train as run

    load_for_training()
    return run(job, resume_run=resume)


def parameter_groups(
    model: "nn.Module",
    lr: float,
    *,
    scale_lr: float = 1e-3,
    norm_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for any optimizer: weights, norms and biases (by default at `lr` too), and what quantizers learn, whose
    rate is a relative change per step. Only weights are decayed."""
    from qat.config import validate
    from qat.trainers import optim

    rates = {"lr": lr, "scale_lr": scale_lr, "norm_lr": norm_lr, "weight_decay": weight_decay}
    return optim.parameter_groups(model, validate(optim.OptimConfig, rates, "qat.parameter_groups"))


def export(
    trained: "str | Path | nn.Module",
    out: str | Path,
    target: str = "compressed-tensors",
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
    pack_tables: bool = False,
) -> Path:
    """Write a checkpoint for `target`.

    Args:
        trained: the folder of a run, whose best student is exported, or a model that `prepare` prepared.
        out: folder to create.
        target: name of the file layout.
        source: where the unquantized model lies now, if that is not known or has changed.
        overwrite: replace `out` if an export wrote it.
        pack_tables: pack quantized embeddings too, which few engines read yet, instead of storing their values in BF16.
    """
    if isinstance(trained, str | Path):
        from qat.checkpoints.export import export as write

        return write(Path(trained), Path(out), target, overwrite, moved=source, pack_tables=pack_tables)
    from qat.trainers.prepared import export_prepared

    model: Any = trained
    return export_prepared(model, Path(out), target, source=source, overwrite=overwrite, pack_tables=pack_tables)
