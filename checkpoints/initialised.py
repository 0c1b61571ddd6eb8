"""Blocks that an initialisation has finished, on disk until training begins (`qat.init.kept.Store`).

    runs/<name>/checkpoints/initialised/model.layers.3/    block.safetensors, state.json

A block's folder is whole or absent, whatever kills the process; the run that is started again takes from it what is
its own, and all of it goes when the initialisation has become the first student.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.checkpoints.folders import atomic_folder

_BLOCK, _STATE = "block.safetensors", "state.json"


class Initialised:
    """The finished blocks of one run.

    Args:
        run: its folder.
        writes: False for one of several processes that do the same.
    """

    def __init__(self, run: Path, writes: bool = True) -> None:
        self.folder, self.writes = run / "checkpoints" / "initialised", writes

    def __len__(self) -> int:
        return len(list(self.folder.glob(f"[!.]*/{_STATE}")))

    def read(self, name: str, key: str) -> tuple[dict[str, Tensor], list[dict[str, int]]] | None:
        """See `qat.init.kept.Store`."""
        file = self.folder / name / _STATE
        if not file.is_file():
            return None
        state = json.loads(file.read_text(encoding="utf-8"))
        return (load_file(file.with_name(_BLOCK)), state["sums"]) if state["key"] == key else None

    def write(self, name: str, key: str, tensors: dict[str, Tensor], sums: list[dict[str, int]]) -> None:
        """See `qat.init.kept.Store`."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with atomic_folder(self.folder / name, overwrite=True, expected_bytes=size) as partial:
            save_file(tensors, partial / _BLOCK)
            (partial / _STATE).write_text(json.dumps({"key": key, "sums": sums}), encoding="utf-8")

    def clear(self) -> None:
        """Nothing of it is needed any more."""
        if self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)
