"""Where text comes from: built-in texts, local files and folders, and the Hugging Face hub, read as a
stream.

A source gives documents in a fixed order, each a plain text or a chat, without ever holding a whole corpus
in memory, and a fingerprint of its content, which is what the token cache is keyed by. Whatever is wrong
with a source is a `DataError` that names the file, the line or the field. What a record means is decided in
`records`, how a file is read in `files`.
"""

import hashlib
import importlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.errors import DataError, nearest
from qat.trainers import files
from qat.trainers.files import suffix as _suffix
from qat.trainers.records import Document, document

if TYPE_CHECKING:
    from qat.trainers.data import DataConfig

# Which documents of the held-out text: what decides something in a run and what is reported of it are different ones.
HELDOUT_PARTS = {
    "heldout": slice(None),
    "heldout/choosing": slice(1, None, 2),
    "heldout/reporting": slice(0, None, 2),
}
BUILT_IN = ("embedded", *HELDOUT_PARTS, "teacher")
HELDOUT = Path(__file__).parent / "text" / "heldout.txt"

WHOLE_FILE_BYTES = 64 << 20  # larger files are identified by size, time and both ends instead of every byte
END_BYTES = 1 << 18  # how much of each end
HUB_TIMEOUT_SECONDS = 10.0

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_FIELDS = ("config_name", "revision", "split")
_RECORD_FIELDS = (
    "records",
    "text_field",
    "messages_field",
    "prompt_field",
    "completion_field",
    "tools_field",
    "chat",
)


def pinned(config: "DataConfig") -> "DataConfig":
    """The configuration with a hub data set's `revision` resolved to a commit; needs the network unless it
    is one.

    Raises:
        DataError: the source does not exist, cannot be reached, or an option was set that this source
        ignores.
    """
    kind = _kind(config.source)
    by_kind = {"hub": _HUB_FIELDS + _RECORD_FIELDS, "records": _RECORD_FIELDS, "folder": _RECORD_FIELDS}
    _refuse_ignored(config, by_kind.get(kind, ()))
    return config.model_copy(update={"revision": _hub_commit(config)}) if kind == "hub" else config


def is_hub(config: "DataConfig") -> bool:
    """Whether the source is a data set of the Hugging Face hub."""
    return _kind(config.source) == "hub"


def overlapping(one: "DataConfig", other: "DataConfig") -> bool:
    """Whether two configurations read the same documents, in full or in part, as far as their names tell."""
    return any(_same(first, second) for first in one.parts for second in other.parts)


def _same(one: "DataConfig", other: "DataConfig") -> bool:
    if one.source in HELDOUT_PARTS and other.source in HELDOUT_PARTS:
        return "heldout" in (one.source, other.source) or one.source == other.source
    return one.source == other.source and one.split == other.split


def fingerprint(config: "DataConfig") -> str:
    """What identifies the content of a pinned source: its bytes, or for a hub data set `id@commit`."""
    kind = _kind(config.source)
    if kind == "hub":
        return f"{config.source}@{config.revision}"
    digest = hashlib.sha256()
    if kind == "embedded":
        for name, text in _topics():
            digest.update(f"{name}\0{text}\0".encode())
    elif kind != "teacher":
        for path in _files(config.source):
            digest.update(os.fsencode(path.name) + b"\0")
            _hash_file(path, digest)
    return f"{config.source} sha256:{digest.hexdigest()}"


def documents(config: "DataConfig") -> Iterator[Document]:
    """Every document of the source, in a fixed order; empty texts are left out.

    Raises:
        DataError: at the first file, line or record that cannot be read.
    """
    kind = _kind(config.source)
    if kind == "embedded":
        texts: Iterator[Document] = (Document(f"topic {name!r}", text) for name, text in _topics())
    elif kind in HELDOUT_PARTS:
        texts = iter(list(_separated(HELDOUT))[HELDOUT_PARTS[kind]])
    elif kind == "hub":
        texts = _hub_documents(config)
    else:
        texts = (each for path in _files(config.source) for each in _file_documents(path, config))
    return (each for each in texts if each.messages or each.leading or each.prompt or each.text.strip())


def _kind(source: str) -> str:
    """One of `BUILT_IN`, text, records, folder, hub."""
    if source in BUILT_IN:
        return source
    path = Path(source).expanduser()
    if path.is_dir():
        return "folder"
    if path.exists():
        if _suffix(path) is None:
            suffix = "".join(path.suffixes[-2:])
            raise DataError(f"{path}: unknown suffix {suffix!r}; allowed: {files.ALLOWED}; rename or convert it")
        return "text" if _suffix(path) in files.TEXT_SUFFIXES else "records"
    if path.is_symlink():
        raise DataError(f"{path} is a link to {os.readlink(path)}, which is not there; repair the link")
    if _suffix(path) is not None or source.startswith(("/", ".", "~")) or source.endswith("/"):
        beside = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        hint = f"; nearest in {path.parent}: {beside}" if beside else ""
        hint += "; patterns and variables are not expanded: give the folder" if set("*?[$") & set(source) else ""
        raise DataError(f"no file or folder at {path}{hint}; give a path that exists, or a hub id owner/name")
    if not _HUB_ID.fullmatch(source):
        raise DataError(
            f"unknown source {source!r}; allowed: {', '.join(BUILT_IN)}, a local folder, a local file ending "
            f"in {', '.join(files.SUFFIXES)}, or a hub id owner/name; nearest: {nearest(source, BUILT_IN, 1)}"
        )
    return "hub"


def _refuse_ignored(config: "DataConfig", effective: Iterable[str]) -> None:
    fields = type(config).model_fields
    for name in (*_HUB_FIELDS, *_RECORD_FIELDS):
        value = getattr(config, name)
        if name not in effective and value != fields[name].default:
            raise DataError(f"{name}={value!r} has no effect on source {config.source!r}; remove it")


# ---- built-in texts


def _topics() -> list[tuple[str, str]]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return sorted(topics.items())


def _separated(path: Path) -> Iterator[Document]:
    """Documents of a small text file, separated by lines that hold only `---`."""
    whole = path.read_text(encoding="utf-8")
    for number, text in enumerate(re.split(r"^---[ \t]*$", whole, flags=re.MULTILINE)):
        yield Document(f"{path.name} document {number}", text.strip("\n"))


# ---- local files


def _files(source: str) -> list[Path]:
    """The files of a local source, sorted; hidden ones are left out, other unknown ones are warned
    about."""
    path = HELDOUT if source in HELDOUT_PARTS else Path(source).expanduser()
    if path.is_file():
        return [path]
    inside = list(_inside(path, ()))
    named = [p for p in inside if _suffix(p) is not None]
    broken = next((p for p in named if p.is_symlink() and not p.exists()), None)
    if broken is not None:
        raise DataError(f"{broken} is a link to {os.readlink(broken)}, which is not there; repair or remove it")
    paths = [p for p in named if p.is_file()]
    others = sorted({p.suffix or p.name for p in inside if p not in set(paths)})
    if not paths:
        holds = f"it holds only {', '.join(others)}" if others else "it is empty"
        raise DataError(f"folder {path} has no file ending in {files.ALLOWED}; {holds}")
    if others:
        _say_once(f"folder {path}: files ending in {', '.join(others)} are not read")
    return paths


@cache
def _say_once(note: str) -> None:
    """A folder is looked through for its fingerprint and again for its documents."""
    warnings.warn(note, stacklevel=3)


def _inside(folder: Path, around: tuple[Path, ...]) -> Iterator[Path]:
    """What is in a folder and the folders in it, links followed unless they lead back to one `around`."""
    here = folder.resolve()
    if here in around:
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read: {error.strerror}") from None
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _inside(path, (*around, here))
        else:
            yield path


def _hash_file(path: Path, digest: Any) -> None:
    try:
        status = path.stat()
        with path.open("rb") as file:
            if status.st_size <= WHOLE_FILE_BYTES:
                digest.update(file.read())
                return
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
            digest.update(file.read(END_BYTES))
            file.seek(-END_BYTES, 2)
            digest.update(file.read())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _file_documents(path: Path, config: "DataConfig") -> Iterator[Document]:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    if _suffix(path) in files.TEXT_SUFFIXES:
        yield from (Document(where, text) for where, text in files.texts(path))
        return
    for where, record in files.records(path):
        yield document(record, config, where, table=_suffix(path) in files.TABLES)


# ---- the hub


def _hub_commit(config: "DataConfig") -> str:
    if config.revision and _COMMIT.fullmatch(config.revision):
        return config.revision
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(config.source, revision=config.revision, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # the client raises its own, its transport's and the operating system's errors
        raise _unreachable(config, error) from None
    return str(info.sha)


def _hub_documents(config: "DataConfig") -> Iterator[Document]:
    from datasets import load_dataset

    try:
        stream = load_dataset(
            config.source,
            name=config.config_name,
            split=config.split,
            revision=config.revision,
            streaming=True,
        )
        records = iter(stream)
    except Exception as error:  # as above, and every reader of a file format has its own errors
        raise _unreachable(config, error) from None
    number = 0
    while True:
        try:
            record = next(records, None)
        except Exception as error:  # the connection may break at any record
            raise _unreachable(config, error) from None
        if record is None:
            return
        number += 1
        yield document(record, config, f"{config.source} record {number}", table=True)


def _unreachable(config: "DataConfig", error: Exception) -> DataError:
    return DataError(
        f"hub data set {config.source!r} (config {config.config_name!r}, split {config.split!r}, revision "
        f"{config.revision!r}) cannot be read: {type(error).__name__}: {_first_line(error)}. Check the names "
        "and the network (HF_HUB_OFFLINE must not be set), log in if it is gated, or download it and give "
        "the local folder; with a revision given as a full commit, tokens cached earlier need no network"
    )


def _first_line(error: Exception) -> str:
    lines: list[str] = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"
