"""The independent readers of exported checkpoints, one per layout; a new layout is one file here and one line below."""

from pathlib import Path

from qat.checkpoints.hf import read_json
from qat.checkpoints.layouts.compressed_tensors.read import CompressedTensorsFolder
from qat.checkpoints.layouts.fp8.read import Fp8Folder
from qat.checkpoints.layouts.modelopt.read import ModeloptFolder
from qat.checkpoints.layouts.reader import ExportedFolder
from qat.errors import CheckpointError

READERS: dict[str, type[ExportedFolder]] = {
    reader.METHOD: reader for reader in (CompressedTensorsFolder, ModeloptFolder, Fp8Folder)
}


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


__all__ = ["READERS", "ExportedFolder", "open_export"]
