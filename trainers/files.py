"""Local files of training data: how each kind is opened, and its records or texts, with where they stand.

Text is read as a stream, compressed or not. Bytes that are not UTF-8 are let in as lone surrogates, which real
text never holds, so that the error can name their line.
"""

import bz2
import csv
import gzip
import importlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from qat.errors import DataError

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SUFFIXES = RECORD_SUFFIXES + TEXT_SUFFIXES
TABLES = (".parquet",)  # formats in which every row has the same fields, at every depth

PIECE_CHARACTERS = 1 << 18  # a longer plain text is cut at a line into several documents, so that memory stays bounded
CELL_CHARACTERS = 2**31 - 1  # Python's own limit on a cell of CSV is too short for a text

Where = tuple[str, Any]


def _zstandard(path: Path) -> Any:
    pyarrow: Any = importlib.import_module("pyarrow")
    return pyarrow.input_stream(str(path), compression="zstd")


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}
ALLOWED = f"{', '.join(SUFFIXES)}; all but .parquet also compressed: {', '.join(COMPRESSED)}"


def suffix(path: Path) -> str | None:
    """Which of SUFFIXES a file ends in, before what says that it is compressed; None for another one."""
    suffixes = [part.lower() for part in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        return suffixes[-2] if suffixes[-2:-1] and suffixes[-2] in SUFFIXES and suffixes[-2] not in TABLES else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """A plain text file, in pieces where it is long: cut after a line about every PIECE_CHARACTERS."""
    rest, number = "", 0
    for piece in _pieces(path, "piece"):
        head, newline, tail = piece.rpartition("\n")
        if len(piece) < PIECE_CHARACTERS:
            rest += piece
        else:
            yield f"{path} part {number}", rest + head + newline
            rest, number = tail, number + 1
    yield f"{path} part {number}" if number else str(path), rest


def records(path: Path) -> Iterator[Where]:
    """The records of a file, each with what names it in errors.

    Raises:
        DataError: at the first line or record that cannot be read.
    """
    yield from READERS[suffix(path) or ""](path)


def _pieces(path: Path, read: str) -> Iterator[str]:
    """The lines (`read="line"`) or large pieces of a UTF-8 file; line ends are made `\\n`.

    Raises:
        DataError: it cannot be read or unpacked, holds NUL bytes, or is not UTF-8.
    """
    line = 1
    try:
        with _opened(path) as file:
            for piece in file if read == "line" else iter(lambda: file.read(PIECE_CHARACTERS), ""):
                _check_text(piece, path, line)
                line += piece.count("\n")
                yield piece
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read near line {line}: {str(error)[:200]}") from None


def _opened(path: Path) -> TextIO:
    unpack = COMPRESSED.get(path.suffix.lower(), lambda path: path.open("rb"))
    return io.TextIOWrapper(io.BufferedReader(unpack(path)), encoding="utf-8-sig", errors="surrogateescape")


def _check_text(piece: str, path: Path, line: int) -> None:
    """Refuse a piece, which begins in this line, that holds NUL or bytes that are no UTF-8."""
    if "\0" in piece:
        at = line + piece.count("\n", 0, piece.index("\0"))
        raise DataError(f"{path} line {at} is binary (it holds NUL bytes); allowed: UTF-8 text; convert it")
    try:
        piece if piece.isascii() else piece.encode()
    except UnicodeEncodeError as error:
        at, byte = line + piece.count("\n", 0, error.start), ord(piece[error.start]) & 0xFF
        raise DataError(f"{path} line {at} is binary or not UTF-8 (byte 0x{byte:02x}); convert it to UTF-8") from None


# ---- records


def _jsonl(path: Path) -> Iterator[Where]:
    for number, line in enumerate(_pieces(path, "line"), start=1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON ({_problem(error)}); it must be one object") from None


def _json(path: Path) -> Iterator[Where]:
    """A .json file is one array of objects, read whole since JSON cannot be streamed, or is JSON lines
    after all."""
    text = "".join(_pieces(path, "piece"))
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _jsonl(path)
            return
        at = f"{path} line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        raise DataError(f"{at} is not JSON ({_problem(error)}); repair it") from None
    for number, record in enumerate(data if isinstance(data, list) else [data], start=1):
        yield f"{path} record {number}", record


def _problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


def _csv(path: Path, delimiter: str = ",") -> Iterator[Where]:
    """Rows as objects by the names in the first line; a cell is a text, and may hold line ends."""
    csv.field_size_limit(CELL_CHARACTERS)
    rows = csv.reader(_pieces(path, "line"), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for row in rows:
            where = f"{path} line {rows.line_num}"
            if not row:
                continue
            if not header:
                header = _header(row, where)
            elif len(row) != len(header):
                raise DataError(f"{where} ends a row of {len(row)} cells, but the first line names {len(header)}")
            else:
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path} line {rows.line_num} is not CSV ({error}); repair it") from None


def _header(names: list[str], where: str) -> list[str]:
    fields = [name.strip() for name in names]
    twice = sorted({name for name in fields if fields.count(name) > 1})
    if twice:
        raise DataError(f"{where} names the column {twice[0]!r} twice; the first line must name every column once")
    return fields


def _tsv(path: Path) -> Iterator[Where]:
    yield from _csv(path, "\t")


def _parquet(path: Path) -> Iterator[Where]:
    pyarrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in _rows(batch, path, number):
                    number += 1
                    yield f"{path} record {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise DataError(f"{path} is not a readable Parquet file: {lines[0][:200]}") from None


def _rows(batch: Any, path: Path, before: int) -> list[Any]:
    """The rows of a batch as Python objects.

    Raises:
        DataError: a column of text holds bytes that are no UTF-8, which Parquet does not check.
    """
    try:
        rows: list[Any] = batch.to_pylist(maps_as_pydicts="strict")
        return rows
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            row = batch.slice(index, 1)
            for name, column in zip(batch.schema.names, row.columns, strict=True):
                try:
                    column.to_pylist()
                except UnicodeDecodeError as error:
                    what = f"field {name!r} is not UTF-8 ({error.reason})"
                    raise DataError(f"{path} record {before + index + 1}: {what}; repair it") from None
        raise


READERS: dict[str, Callable[[Path], Iterator[Where]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
