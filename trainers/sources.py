"""Where text comes from: built-in texts, local files and folders, and the Hugging Face hub, read as a
stream.

A source gives documents in a fixed order, each a plain text or a chat, without ever holding a whole corpus
in memory, and a fingerprint of its content, which is what the token cache is keyed by. Whatever is wrong
with a source is a `DataError` that names the file, the line or the field.
"""

import hashlib
import importlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.errors import DataError, nearest

if TYPE_CHECKING:
    from qat.trainers.data import DataConfig

BUILT_IN = ("embedded", "heldout", "teacher")
RECORD_SUFFIXES = (".jsonl", ".json", ".parquet")
TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = RECORD_SUFFIXES + TEXT_SUFFIXES
HELDOUT = Path(__file__).parent / "text" / "heldout.txt"

PIECE_CHARACTERS = 1 << 18  # a longer plain text is cut at a line into several documents, so that memory stays bounded
WHOLE_FILE_BYTES = 64 << 20  # larger files are identified by size, time and both ends instead of every byte
HUB_TIMEOUT_SECONDS = 10.0

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_FIELDS = ("config_name", "revision", "split")
_RECORD_FIELDS = ("text_field", "messages_field", "chat")

Message = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """One text, or one chat as messages of {role, content}; `where` names it in error messages."""

    where: str
    text: str = ""
    messages: tuple[Message, ...] = ()


def pinned(config: "DataConfig") -> "DataConfig":
    """The configuration with a hub data set's `revision` resolved to a commit; needs the network unless it
    is one.

    Raises:
        DataError: the source does not exist, cannot be reached, or an option was set that this source
        ignores.
    """
    kind = _kind(config.source)
    used = {"hub": _HUB_FIELDS + _RECORD_FIELDS, "records": _RECORD_FIELDS, "folder": _RECORD_FIELDS}
    _refuse_ignored(config, used.get(kind, ()))
    return config.model_copy(update={"revision": _hub_commit(config)}) if kind == "hub" else config


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
            digest.update(f"{path.name}\0".encode())
            _hash_file(path, digest)
    return f"{config.source} sha256:{digest.hexdigest()}"


def documents(config: "DataConfig") -> Iterator[Document]:
    """Every document of the source, in a fixed order; empty texts are left out.

    Raises:
        DataError: at the first file, line or record that cannot be read.
    """
    kind = _kind(config.source)
    if kind == "embedded":
        found: Iterator[Document] = (Document(f"topic {name!r}", text) for name, text in _topics())
    elif kind == "heldout":
        found = _separated(HELDOUT)
    elif kind == "hub":
        found = _hub_documents(config)
    else:
        found = (document for path in _files(config.source) for document in _file_documents(path, config))
    return (document for document in found if document.messages or document.text.strip())


def _kind(source: str) -> str:
    """One of embedded, heldout, teacher, text, records, folder, hub."""
    if source in BUILT_IN:
        return source
    path = Path(source).expanduser()
    if path.is_dir():
        return "folder"
    if path.exists():
        if path.suffix.lower() not in SUFFIXES:
            allowed = ", ".join(SUFFIXES)
            raise DataError(f"{path}: unknown suffix {path.suffix!r}; allowed: {allowed}; rename or convert it")
        return "text" if path.suffix.lower() in TEXT_SUFFIXES else "records"
    if path.suffix.lower() in SUFFIXES or source.startswith(("/", ".", "~")) or source.endswith("/"):
        beside = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        hint = f"; nearest in {path.parent}: {beside}" if beside else ""
        raise DataError(f"no file or folder at {path}{hint}; give a path that exists, or a hub id owner/name")
    if not _HUB_ID.fullmatch(source):
        raise DataError(
            f"unknown source {source!r}; allowed: {', '.join(BUILT_IN)}, a local folder, a local file ending "
            f"in {', '.join(SUFFIXES)}, or a hub id owner/name; nearest: {nearest(source, BUILT_IN, 1)}"
        )
    return "hub"


def _refuse_ignored(config: "DataConfig", used: Iterable[str]) -> None:
    fields = type(config).model_fields
    for name in (*_HUB_FIELDS, *_RECORD_FIELDS):
        value = getattr(config, name)
        if name not in used and value != fields[name].default:
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
    path = HELDOUT if source == "heldout" else Path(source).expanduser()
    if path.is_file():
        return [path]
    inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
    visible = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    files = [p for p in visible if p.suffix.lower() in SUFFIXES]
    others = sorted({p.suffix or p.name for p in visible if p not in set(files)})
    if not files:
        found = f"it holds only {', '.join(others)}" if others else "it is empty"
        raise DataError(f"folder {path} has no file ending in {', '.join(SUFFIXES)}; {found}")
    if others:
        warnings.warn(f"folder {path}: files ending in {', '.join(others)} are not read", stacklevel=2)
    return files


def _hash_file(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            digest.update(file.read())
            return
        digest.update(f"{size} {path.stat().st_mtime_ns}".encode())
        digest.update(file.read(PIECE_CHARACTERS))
        file.seek(-PIECE_CHARACTERS, 2)
        digest.update(file.read())


def _file_documents(path: Path, config: "DataConfig") -> Iterator[Document]:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        yield from _text_documents(path)
        return
    records = {".jsonl": _jsonl_records, ".json": _json_records, ".parquet": _parquet_records}[suffix]
    for where, record in records(path):
        yield _document(record, config, where)


def _pieces(path: Path, read: str) -> Iterator[str]:
    """The lines (`read="line"`) or large pieces of a UTF-8 file.

    Raises:
        DataError: the file holds NUL bytes or is not UTF-8.
    """
    with path.open(encoding="utf-8-sig") as file:
        try:
            for piece in file if read == "line" else iter(lambda: file.read(PIECE_CHARACTERS), ""):
                if "\0" in piece:
                    raise DataError(f"{path} is binary (it holds NUL bytes); allowed: UTF-8 text; convert it")
                yield piece
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is binary or not UTF-8 ({error.reason}); convert it to UTF-8") from None


def _text_documents(path: Path) -> Iterator[Document]:
    """A plain text file is one document; a very long one is cut after a line about every
    PIECE_CHARACTERS."""
    rest, number = "", 0
    for piece in _pieces(path, "piece"):
        head, newline, tail = piece.rpartition("\n")
        if len(piece) < PIECE_CHARACTERS:
            rest += piece
        else:
            yield Document(f"{path} part {number}", rest + head + newline)
            rest, number = tail, number + 1
    yield Document(f"{path} part {number}" if number else str(path), rest)


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_pieces(path, "line"), start=1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                problem = f"{error.msg} at column {error.colno}"
                raise DataError(f"{where} is not JSON ({problem}); it must be one object") from None


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """A .json file is one array of objects, read whole since JSON cannot be streamed, or is JSON lines
    after all."""
    text = "".join(_pieces(path, "piece"))
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl_records(path)
            return
        raise DataError(f"{path} line {error.lineno} is not JSON ({error.msg}); repair it") from None
    for number, record in enumerate(data if isinstance(data, list) else [data], start=1):
        yield f"{path} record {number}", record


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    pyarrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} record {number}", record
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {_first_line(error)}") from None


# ---- records


def _document(record: Any, config: "DataConfig", where: str) -> Document:
    """A record as a document: its messages if it has them and chats are allowed, else its text."""
    if not isinstance(record, Mapping):
        given = type(record).__name__
        raise DataError(f"{where} is a {given}; it must be an object with a field {config.text_field!r}")
    if config.chat == "auto" and record.get(config.messages_field) is not None:
        return Document(where, messages=_messages(record[config.messages_field], config, where))
    if config.text_field not in record:
        wanted = f"text_field {config.text_field!r}"
        if config.chat == "auto":
            wanted += f" or messages_field {config.messages_field!r}"
        fields = [str(name) for name in record]
        raise DataError(
            f"{where} has no {wanted}; its fields are {', '.join(fields) or 'none'}; "
            f"nearest: {nearest(config.text_field, fields) or 'none'}; set text_field or messages_field"
        )
    text = record[config.text_field]
    if text is not None and not isinstance(text, str):
        given = type(text).__name__
        raise DataError(f"{where}: field {config.text_field!r} is a {given}; it must be a string")
    return Document(where, text or "")


def _messages(value: Any, config: "DataConfig", where: str) -> tuple[Message, ...]:
    """Checked messages; keys without a value are dropped: a table fills in None for what a row lacks."""
    name = config.messages_field
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{where}: field {name!r} must be a non-empty list of messages, but is {value!r:.80}")
    found = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            shown = ", ".join(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
            raise DataError(f"{where}: {name}[{number}] needs the keys role and content, but has {shown}")
        kept = {key: item for key, item in message.items() if item is not None}
        content = kept.setdefault("content", "")
        if not isinstance(content, str):
            given = type(content).__name__
            raise DataError(f"{where}: {name}[{number}].content is a {given}; it must be a string")
        found.append(kept)
    return tuple(found)


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
        yield _document(record, config, f"{config.source} record {number}")


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
