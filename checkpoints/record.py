"""qat.json, the record that an export keeps beside its weights: its name, its version, and who may rely on it."""

from pathlib import Path
from typing import Any

from qat.checkpoints.hf import read_json
from qat.errors import CheckpointError

RECORD = "qat.json"
RECORD_VERSION = 1


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of an exported checkpoint, None where there is none (another tool's).

    Raises:
        CheckpointError: it cannot be read, or is of another version.
    """
    if not (folder / RECORD).is_file():
        return None
    record = read_json(folder / RECORD)
    if record.get("record_version") != RECORD_VERSION:
        raise CheckpointError(
            f"{folder / RECORD}: record_version {record.get('record_version')}; this release reads {RECORD_VERSION}"
        )
    return record


def is_export(folder: Path) -> bool:
    """Whether an export wrote the folder: it holds a config.json and a record with everything a record has."""
    try:
        record = read_record(folder)
    except CheckpointError:
        return False
    parts = (record or {}).get("modules"), (record or {}).get("tensors"), (record or {}).get("files")
    return (folder / "config.json").is_file() and all(isinstance(part, dict) for part in parts)
