"""What a teacher said of rows of tokens, on disk: written once by `qat teacher`, read by every run on the same text.

A folder holds

    teacher.json                 whose probabilities these are (`identity`), and of which texts
    rows-<hash>.safetensors      columns of some rows: keys, starts, and per learned token ids (int32), log_p (float16)
                                 and, by kind, tail or step (float32); memory-mapped when read
    heldout-<hash>.safetensors   the teacher's final hidden states of a text that is evaluated on
    head.safetensors             its output layer, with which they become its logits

A row is found by the hash of all that it is (ids, targets, document numbers), so the order of the data plays no part,
and a longer text adds what is new. Files appear whole or not at all; a killed process loses at most a minute's work.
"""

import hashlib
import json
import os
import secrets
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from pydantic import Field, field_validator, model_validator
from safetensors import safe_open
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from qat.config import Strict, write_text_atomic
from qat.errors import CheckpointError, DataError
from qat.trainers.forward import Head
from qat.trainers.packing import Row
from qat.trainers.remote import Remote
from qat.training.known import Known

VERSION = 1
HEADER, HEAD = "teacher.json", "head.safetensors"
KEY_BYTES = 16
SHARD_BYTES, SHARD_SECONDS = 1 << 27, 60.0  # a shard is written when it has so many, or so much work would be lost
_STORED = {"ids": torch.int32, "log_p": torch.float16, "tail": torch.float32, "step": torch.float32}
_TYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "F16": np.float16, "F32": np.float32}

Array = npt.NDArray[Any]


class TeacherCache(Strict):
    """Train on what a teacher said earlier, without the teacher (`qat teacher CONFIG` asks it).

    Attributes:
        kind: `hybrid` keeps the likeliest tokens and some of the others, drawn: the loss is unbiased. `topk` keeps the
            likeliest and the mass of the rest: a lower bound of the loss. `sample` keeps tokens drawn from the
            teacher's whole distribution: unbiased, and noisier than `hybrid`.
        k: tokens kept at each position, 6 bytes each.
        seed: of the drawing.
        folder: where; by default a folder of qat's cache that is named after teacher and settings.
        remote: a server that is asked instead of weights on this machine; it says `topk`.
    """

    kind: Literal["hybrid", "topk", "sample"] = "hybrid"
    k: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    folder: Path | None = None
    remote: Remote | None = None

    @model_validator(mode="before")
    @classmethod
    def _what_servers_say(cls, given: Any) -> Any:
        return {"kind": "topk", **given} if isinstance(given, dict) and given.get("remote") is not None else given

    @model_validator(mode="after")
    def _sayable(self) -> "TeacherCache":
        if self.remote is not None and self.kind != "topk":
            raise ValueError(f"kind {self.kind} draws from all of the teacher's tokens, of which a server says the "
                             "likeliest; use kind: topk, or leave remote out")  # fmt: skip
        return self

    @field_validator("folder")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value and value.expanduser().absolute()

    @property
    def bytes_per_token(self) -> int:
        """Of a learned position; what a row takes beside that (its key) is 24 bytes."""
        return 6 * self.k + 4 * (self.kind != "sample")


def row_key(row: Row) -> bytes:
    """What a row (3, seq_len) is found by."""
    return hashlib.sha256(np.ascontiguousarray(row, "<i4").tobytes()).digest()[:KEY_BYTES]


# --- files ----------------------------------------------------------------------------------------


def _write(path: Path, data: bytes) -> None:
    """The file is whole on disk before it has its name."""
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _mapped(path: Path) -> dict[str, Array]:
    """The arrays of a safetensors file, without reading them.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            described = json.loads(file.read(length))
        described.pop("__metadata__", None)
        begin = 8 + length
        ends = [begin + entry["data_offsets"][1] for entry in described.values()]
        if path.stat().st_size != max(ends):
            raise ValueError(f"{path.stat().st_size} bytes, not {max(ends)}")
        return {
            name: np.memmap(path, _TYPES[entry["dtype"]], "r", begin + entry["data_offsets"][0], tuple(entry["shape"]))
            for name, entry in described.items()
        }
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise DataError(f"{path} is damaged ({error}); remove it, and `qat teacher` makes its rows again") from error


# --- the store ------------------------------------------------------------------------------------


@dataclass
class Store:
    """A folder of the cache.

    Attributes:
        folder: where; it need not exist.
        header: of teacher.json; empty where there is none.
        shards: the columns of each file.
        places: of each row by its key: its shard, and its number there.
    """

    folder: Path
    header: dict[str, Any] = field(default_factory=dict)
    shards: list[dict[str, Array]] = field(default_factory=list)
    places: dict[bytes, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Store":
        """What lies in `folder`.

        Raises:
            DataError: a file of it is damaged.
        """
        store = cls(folder)
        if (folder / HEADER).is_file():
            try:
                store.header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
                if not isinstance(store.header, dict):
                    raise ValueError("not a mapping")
            except ValueError as error:
                raise DataError(f"{folder / HEADER} is damaged ({error}); remove {folder}") from error
        for path in sorted(folder.glob("rows-*.safetensors")):
            store._take(path)
        return store

    def _take(self, path: Path) -> None:
        columns = _mapped(path)
        for number, key in enumerate(np.asarray(columns["keys"])):
            self.places.setdefault(key.tobytes(), (len(self.shards), number))
        self.shards.append(columns)

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.folder.glob("*") if path.is_file())

    @property
    def writer(self) -> str:
        """The digest of the weights that wrote the texts of `source: teacher`, for `load_blocks`; empty without any."""
        return str(self.header.get("weights", ""))

    @property
    def vocabulary(self) -> int:
        """Columns that probabilities are over."""
        return int(self.header["vocabulary"])

    def columns(self, keys: list[bytes]) -> Known:
        """Of the learned tokens of these rows, one after the other, as they are stored."""
        found: dict[str, list[Array]] = {name: [] for name in Known._fields}
        for key in keys:
            shard, number = self.places[key]
            columns = self.shards[shard]
            begin, end = columns["starts"][number : number + 2]
            for name, arrays in found.items():
                if name in columns:
                    arrays.append(columns[name][begin:end])
        ids, log_p, tail, step = (torch.from_numpy(np.concatenate(a)) if a else None for a in found.values())
        assert ids is not None and log_p is not None
        return Known(ids, log_p, tail, step)

    @contextmanager
    def writing(self) -> Iterator["Writer"]:
        """Add rows; those that are complete when the block is left early, by Ctrl-C too, are kept.

        Raises:
            CheckpointError: another process is filling the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.folder / ".lock").acquire(timeout=0)
        except Timeout:
            raise CheckpointError(f"another process is filling {self.folder}; wait for it or stop it") from None
        with lock:
            for stale in self.folder.glob(".*.partial-*"):
                stale.unlink()
            writer = Writer(self)
            try:
                yield writer
            except BaseException:
                with suppress(OSError):
                    writer.flush()
                raise
            writer.flush()

    def keep_header(self) -> None:
        """Write teacher.json."""
        write_text_atomic(self.folder / HEADER, json.dumps(self.header, indent=1))

    # --- what is evaluated on

    def _heldout(self, digest: str) -> Path:
        return self.folder / f"heldout-{digest[:16]}.safetensors"

    def has_heldout(self, digest: str) -> bool:
        """Whether the text with this digest of its rows is there."""
        return self._heldout(digest).is_file() and (self.folder / HEAD).is_file()

    def keep_heldout(self, digest: str, hidden: Tensor, head: Head) -> None:
        """Keep final hidden states (rows x seq_len, hidden) and the output layer.

        Raises:
            DataError: the output layer is no matrix.
        """
        if type(head.linear) is not nn.Linear:
            raise DataError(f"the teacher's output layer is a {type(head.linear).__name__}, which cannot be cached; "
                            "leave teacher_cache out")  # fmt: skip
        tensors = {name: _narrowed(tensor.detach().cpu()) for name, tensor in head.linear.named_parameters()}
        steps = {"steps": json.dumps(head.steps), "dtype": str(head.linear.weight.dtype).removeprefix("torch.")}
        _write(self.folder / HEAD, save_tensors(tensors, steps))
        _write(self._heldout(digest), save_tensors({"hidden": hidden.contiguous()}))

    def heldout(self, digest: str, device: torch.device) -> tuple[Head, Tensor]:
        """The output layer, on the device, and the hidden states, on the CPU."""
        with safe_open(self._heldout(digest), "pt") as file:
            hidden: Tensor = file.get_tensor("hidden")
        with safe_open(self.folder / HEAD, "pt", device=str(device)) as file:
            said = file.metadata()
            dtype = getattr(torch, said["dtype"])
            tensors = {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118 # no mapping
        rows, width = tensors["weight"].shape
        linear = nn.Linear(width, rows, bias="bias" in tensors, device="meta")
        for name, tensor in tensors.items():
            setattr(linear, name, nn.Parameter(tensor, requires_grad=False))
        return Head(linear, tuple((str(step), float(by)) for step, by in json.loads(said["steps"]))), hidden


def _narrowed(tensor: Tensor) -> Tensor:
    """As BF16 where that loses nothing, as in models that were stored so."""
    narrow = tensor.to(torch.bfloat16)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor.contiguous()


class Writer:
    """Collects rows and writes them in files."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._keys: list[bytes] = []
        self._rows: list[dict[str, Array]] = []
        self._bytes, self._since = 0, time.monotonic()

    def add(self, key: bytes, known: Known) -> None:
        """One row: the columns of its learned tokens."""
        row: dict[str, Array] = {
            name: column.to(_STORED[name]).cpu().numpy()
            for name, column in known._asdict().items()
            if column is not None
        }
        self._keys.append(key)
        self._rows.append(row)
        self._bytes += sum(array.nbytes for array in row.values())
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was collected."""
        if self._keys:
            keys = b"".join(self._keys)
            arrays = {name: np.concatenate([row[name] for row in self._rows]) for name in self._rows[0]}
            arrays["keys"] = np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)
            arrays["starts"] = np.cumsum([0, *(len(row["ids"]) for row in self._rows)], dtype=np.int64)
            path = self.store.folder / f"rows-{hashlib.sha256(keys).hexdigest()[:16]}.safetensors"
            _write(path, save_arrays(arrays))
            self.store._take(path)
        self._keys, self._rows, self._bytes, self._since = [], [], 0, time.monotonic()
