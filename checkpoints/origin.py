"""Where the model of a run lies now, and whether it is still the one the run was made from.

A run records its model by absolute path with a fingerprint. Folders move: the path may be given anew, but a model that
changed is refused by name, because names, untrained tensors and the tokenizer of an export come from it.
"""

import hashlib
import json
from pathlib import Path

from qat.checkpoints.gguf import MARKER
from qat.checkpoints.hf import ModelConfig, read_json, resolve
from qat.checkpoints.shards import ShardReader
from qat.errors import CheckpointError

_VOLATILE = ("transformers_version", "_name_or_path")  # keys of config.json that say nothing about the model
_PIECES, _PIECE_BYTES = 16, 1 << 16


def fingerprint(folder: Path) -> str:
    """What identifies a model without reading all of it: its config, and of every shard size, header and 16 pieces.

    Training changes every piece; a copy, a link or another path changes none.
    """
    digest = hashlib.sha256()
    if not (folder / MARKER).is_file():  # the config of a converted file is the converter's, whose versions differ
        config = {key: value for key, value in read_json(folder / "config.json").items() if key not in _VOLATILE}
        digest.update(json.dumps(config, sort_keys=True).encode())
    for shard in _shards(folder):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}".encode())
        with shard.open("rb") as file:
            for piece in range(_PIECES):
                file.seek(piece * max(size - _PIECE_BYTES, 0) // (_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
    return f"sha256:{digest.hexdigest()}"


def _shards(folder: Path) -> list[Path]:
    """What is there; what is missing or unreadable is explained where the model is loaded."""
    try:
        return [shard for shard in ShardReader(folder).shards if shard.is_file()]
    except CheckpointError:
        return []


def is_path(config: ModelConfig) -> bool:
    """Whether the id names a place on this machine rather than something that others can resolve."""
    path = Path(config.id).expanduser()
    return not config.id.startswith("embedded:") and (path.is_absolute() or path.exists() or path.suffix == ".gguf")


def anchored(config: ModelConfig) -> ModelConfig:
    """The same, a local path made absolute (links are kept: they may be meant to move)."""
    if not is_path(config):
        return config
    return config.model_copy(update={"id": str(Path(config.id).expanduser().absolute())})


def check_there(config: ModelConfig, hint: str = "") -> None:
    """Refuse a path of this machine that leads nowhere, before anything takes it for something else.

    Raises:
        CheckpointError: names the path and says `hint`.
    """
    if is_path(config) and not Path(config.id).expanduser().exists():
        gone = (
            f"the model {config.id} is no longer there" if config.fingerprint else f"there is no model at {config.id}"
        )
        raise CheckpointError(gone + (f"; {hint}" if hint else ""))


def locate(config: ModelConfig, moved: Path | str | None = None, hint: str = "") -> Path:
    """The folder of a recorded model, after checking that it is still the same.

    Args:
        config: as recorded; without a fingerprint nothing is compared.
        moved: where it is now, if its path changed.
        hint: what to do when it is not there, "say where it is with --model PATH".

    Raises:
        CheckpointError: it is not there, or is another one.
    """
    if moved is not None:
        if not Path(moved).expanduser().exists():
            raise CheckpointError(f"there is no model at {moved}" + (f"; {hint}" if hint else ""))
        config = config.model_copy(update={"id": str(moved), "revision": None})
    else:
        check_there(config, hint)
    folder = resolve(config)
    if config.fingerprint is not None and fingerprint(folder) != config.fingerprint:
        raise CheckpointError(
            f"{config.id} is not the model that was used before: its config.json or its weights have changed"
            + (f"; {hint}" if hint else "")
        )
    return folder
