"""Safetensors folders: written tensor by tensor, complete or absent, and read back with every shard checked.

`ShardWriter` keeps one tensor in memory, whatever the size of the model: tensors are spooled to a file in
arrival order and copied behind their header when a shard closes, because safetensors wants the header first
and the widest items first (so that each tensor is aligned). `ShardReader` compares what the index and the
headers promise with the files.
"""

import contextlib
import json
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from safetensors import safe_open

from qat.checkpoints.folders import atomic_folder
from qat.errors import CheckpointError, UnsupportedError, nearest
from qat.text import some

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
STEMS = (SINGLE.partition(".")[0], "quant_model_weights")  # what files of weights are called; the second on Ascend
DEFAULT_SHARD_BYTES = 5_000_000_000
_COPY_BYTES = 16 << 20
_SPOOL = ".spool"

# Names the safetensors format gives to torch types.
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor; `start` and `stop` are bytes after the header."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch type, or UnsupportedError where torch (or this package) has none for it."""
        if self.code not in _DTYPES:
            raise UnsupportedError(f"safetensors type {self.code!r} is not supported; known: {', '.join(_DTYPES)}")
        return _DTYPES[self.code]


# --- writing --------------------------------------------------------------------------------


class ShardWriter:
    """Write a folder of safetensors tensor by tensor; see the module for what is guaranteed.

    Use it as a context manager. Inside the block, `add` tensors and put any other file of the checkpoint
    into `folder`; when the block ends, `model.safetensors` (or the numbered shards and their index) is
    finished and the folder takes its final name. The peak need of disk is the checkpoint plus one shard.

    Args:
        out: destination folder.
        max_shard_bytes: a shard closes before it would exceed this; a larger tensor gets its own shard.
        overwrite: replace a non-empty destination.
        expected_bytes: size of the checkpoint, if known, to refuse at once when the disk is too small.
        stem: what the files are called, one of `STEMS`.
    """

    folder: Path

    def __init__(
        self,
        out: Path,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        *,
        overwrite: bool = False,
        expected_bytes: int | None = None,
        stem: str = STEMS[0],
    ) -> None:
        if max_shard_bytes <= 0:
            raise CheckpointError(f"max_shard_bytes must be positive, not {max_shard_bytes}")
        peak = None if expected_bytes is None else expected_bytes + min(expected_bytes, max_shard_bytes)
        self._building: AbstractContextManager[Path] = atomic_folder(out, overwrite=overwrite, expected_bytes=peak)
        self._max, self._stem = max_shard_bytes, stem
        self._spool: IO[bytes] | None = None
        self._open: dict[str, TensorInfo] = {}  # tensors of the open shard, with offsets in the spool
        self._shards: list[list[str]] = []  # tensor names of each closed shard
        self.names: set[str] = set()
        self.total_bytes = 0

    def __enter__(self) -> Self:
        self.folder = self._building.__enter__()
        self._spool = (self.folder / _SPOOL).open("w+b")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            if value is None:
                self._finish()
        except BaseException as error:
            kind, value, trace = type(error), error, error.__traceback__
            self._building.__exit__(kind, value, trace)
            raise
        finally:
            if self._spool is not None:
                with contextlib.suppress(OSError):  # on a full disk its buffer cannot be flushed
                    self._spool.close()
                self._spool = None
        return self._building.__exit__(kind, value, trace)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor. It is copied at once: the caller may change or free it afterwards.

        Raises:
            CheckpointError: the name was added before, or the tensor holds no plain data (meta, sparse).
            UnsupportedError: safetensors has no such type.
        """
        self._check(name, tensor)
        data = tensor.detach().to("cpu").contiguous()
        assert self._spool is not None
        if self._open and self._spool.tell() + data.nbytes > self._max:
            self._close_shard()
        start = self._spool.tell()
        self._spool.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self._open[name] = TensorInfo(_CODES[data.dtype], tuple(data.shape), start, start + data.nbytes)
        self.names.add(name)
        self.total_bytes += data.nbytes

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        if self._spool is None:
            raise CheckpointError("ShardWriter.add works only inside its `with` block")
        if not name or name == "__metadata__":
            raise CheckpointError(f"{name!r} cannot name a tensor")
        if name in self.names:
            raise CheckpointError(f"tensor {name!r} was added twice")
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "meta" if tensor.is_meta else str(tensor.layout)
            raise CheckpointError(f"tensor {name!r} is {kind} and has no plain data to write")
        if tensor.dtype not in _CODES:
            known = ", ".join(str(dtype) for dtype in _CODES)
            raise UnsupportedError(f"tensor {name!r} is {tensor.dtype}, which cannot be stored; known: {known}")

    def _close_shard(self) -> None:
        """Write the spooled tensors as one safetensors file: header, then data, widest items first."""
        spool = self._spool
        assert spool is not None
        order = sorted(self._open, key=lambda name: (-self._open[name].dtype.itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in order:
            info = self._open[name]
            end = offset + info.stop - info.start
            header[name] = {"dtype": info.code, "shape": list(info.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._shards.append(order)
        with (self.folder / _unfinished(len(self._shards))).open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name in order:
                _copy(spool, self._open[name].start, self._open[name].stop, file)
        spool.seek(0)
        spool.truncate()
        self._open = {}

    def _finish(self) -> None:
        if self._open:
            self._close_shard()
        if not self._shards:
            raise CheckpointError("no tensor was added: an empty checkpoint is not written")
        assert self._spool is not None
        self._spool.close()
        (self.folder / _SPOOL).unlink()
        count = len(self._shards)
        single, index_name = _names(self._stem)
        parts = [f"{self._stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        names = parts if count > 1 else [single]
        for number, name in enumerate(names, start=1):
            os.replace(self.folder / _unfinished(number), self.folder / name)
        if count > 1:
            where = {tensor: names[i] for i, tensors in enumerate(self._shards) for tensor in tensors}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(where.items()))}
            (self.folder / index_name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _names(stem: str) -> tuple[str, str]:  # of the only file, and of the index of several
    return f"{stem}.safetensors", f"{stem}.safetensors.index.json"


def _unfinished(number: int) -> str:
    return f".shard-{number:05}"


def _copy(source: IO[bytes], start: int, stop: int, target: IO[bytes]) -> None:
    source.seek(start)
    while start < stop:
        chunk = source.read(min(_COPY_BYTES, stop - start))
        if not chunk:
            raise CheckpointError("the spool ended early: another process changed the folder being written")
        target.write(chunk)
        start += len(chunk)


# --- reading --------------------------------------------------------------------------------


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file, after checking that its size is what its header promises.

    Raises:
        CheckpointError: missing, truncated, too long, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 8 + length <= size else b""
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, not a safetensors file") from None
    if not text:
        raise CheckpointError(f"{path} is truncated: {size} bytes do not hold its header")
    try:
        header = json.loads(text, object_pairs_hook=_distinct)
        metadata = header.pop("__metadata__", {})
        tensors = {name: _tensor_info(**entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is not a safetensors file: its header cannot be read") from None
    promised = 8 + length + max((info.stop for info in tensors.values()), default=0)
    if promised != size:
        kind = "truncated" if size < promised else "too long"
        raise CheckpointError(f"{path} is {kind}: its header promises {promised} bytes, the file has {size}")
    return tensors, metadata


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name stands twice: readers would differ in which one they take."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands twice")
    return table


def _tensor_info(dtype: str, shape: list[int], data_offsets: list[int]) -> TensorInfo:
    start, stop = data_offsets
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError("not a name and whole numbers")
    return TensorInfo(dtype, tuple(shape), start, stop)


class ShardReader:
    """Read tensors of a folder by name, one at a time, over one `model.safetensors` or an index of shards.

    Opening reads names only. Each shard's size is checked against its header before the first read from it;
    `verify_complete` checks all of them.

    Raises:
        CheckpointError: no safetensors, an unreadable index, or both a single file and shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where = _locate(folder)
        self._headers: dict[str, tuple[dict[str, TensorInfo], dict[str, str]]] = {}
        self._handles: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget open files; tensors already read stay valid."""
        self._handles.clear()

    def names(self) -> list[str]:
        """Every tensor, sorted."""
        return sorted(self._where)

    @property
    def shards(self) -> list[Path]:
        """Every shard the folder needs, whether it is there or not."""
        return [self.folder / name for name in sorted(set(self._where.values()))]

    @property
    def metadata(self) -> dict[str, str]:
        """The safetensors metadata of all shards together, such as {"format": "pt"}."""
        return {key: value for shard in self.shards for key, value in self._header(shard.name)[1].items()}

    def info(self, name: str) -> TensorInfo:
        """Type and shape of a tensor, without reading it."""
        shard = self._shard_of(name)
        tensors = self._header(shard)[0]
        if name not in tensors:
            raise CheckpointError(f"{self.folder / shard} lacks {name!r}, which {INDEX} says it holds")
        return tensors[name]

    def get(self, name: str) -> torch.Tensor:
        """One tensor, on CPU, in the type it is stored in."""
        self.info(name)
        shard = self._shard_of(name)
        if shard not in self._handles:
            self._handles[shard] = safe_open(self.folder / shard, framework="pt", device="cpu")
        tensor: torch.Tensor = self._handles[shard].get_tensor(name)
        return tensor

    def empty(self, name: str) -> torch.Tensor:
        """A tensor of that type and shape on the meta device."""
        info = self.info(name)
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    def verify_complete(self) -> None:
        """Check that every shard is there and whole, and holds every tensor listed for it.

        Raises:
            CheckpointError: names everything that is wrong, not just the first.
        """
        problems: list[str] = []
        for shard in self.shards:
            try:
                present = self._header(shard.name)[0]
            except CheckpointError as error:
                problems.append(str(error))
                continue
            listed = (name for name, where in self._where.items() if where == shard.name)
            absent = sorted(name for name in listed if name not in present)
            if absent:
                problems.append(f"{shard} lacks {len(absent)} tensors listed in {INDEX}: {some(absent)}")
            # Loaders that read whole files would take these, possibly instead of those that the index means.
            surplus = sorted(name for name in present if self._where.get(name) != shard.name)
            if surplus:
                problems.append(
                    f"{shard} holds {len(surplus)} tensors that {INDEX} does not list there: {some(surplus)}"
                )
        if problems:
            listing = "\n  ".join(problems)
            raise CheckpointError(f"{self.folder} is incomplete or damaged; copy or download it again:\n  {listing}")

    def _shard_of(self, name: str) -> str:
        if name not in self._where:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}; nearest: {nearest(name, self._where)}")
        return self._where[name]

    def _header(self, shard: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        if shard not in self._headers:
            self._headers[shard] = read_header(self.folder / shard)
        return self._headers[shard]


def _locate(folder: Path) -> dict[str, str]:
    """Tensor name to shard file name."""
    stems = [stem for stem in STEMS if any((folder / name).is_file() for name in _names(stem))]
    if not stems:
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")
    if len(stems) > 1:  # engines that read every *.safetensors would take both
        raise CheckpointError(f"{folder} has weights called {' and '.join(stems)}; remove those that are stale")
    single_name, index_name = _names(stems[0])
    single, index = folder / single_name, folder / index_name
    if not index.is_file():
        return dict.fromkeys(read_header(single)[0], single_name)
    try:
        where = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_distinct)["weight_map"]
        outside = [shard for shard in set(where.values()) if Path(shard).name != shard]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is not an index of safetensors: no readable `weight_map`") from None
    if not where:
        raise CheckpointError(f"{index} lists no tensor")
    if outside:
        raise CheckpointError(f"{index} points outside its folder: {some(outside)}")
    if single.is_file() and single_name not in where.values():
        # transformers would read the single file, vLLM the shards: refuse to choose.
        raise CheckpointError(
            f"{folder} has both {single_name} and shards in {index_name}; remove the one that is stale"
        )
    return dict(where)
