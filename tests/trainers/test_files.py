"""Local files of every kind: compressed, comma-separated, and what is said about bytes that are not text."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qat.cli import main
from qat.errors import DataError
from qat.trainers.data import DataConfig
from qat.trainers.sources import documents, pinned
from tests.tiny import tiny_model

LINES = "".join(json.dumps({"text": f"text {n} üñ"}, ensure_ascii=False) + "\r\n" for n in range(3))
TEXTS = [f"text {n} üñ" for n in range(3)]


def read(path: Path, **options: Any) -> list[str]:
    return [each.text for each in documents(pinned(DataConfig(source=str(path), **options)))]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.__cause__ is None and str(path) in str(caught.value)
    return str(caught.value)


def zstandard(data: bytes) -> bytes:
    packed: bytes = pyarrow.compress(data, codec="zstd", asbytes=True)
    return packed


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
}


@pytest.mark.parametrize("ending", PACKERS)
def test_compressed_files_are_read_like_others(tmp_path: Path, ending: str) -> None:
    pack, half = PACKERS[ending], LINES.index("\n") + 1
    for kind in ("jsonl", "json"):
        path = tmp_path / f"{kind}.v1.{kind}{ending}"
        # Two streams in one file, as tools that append make them.
        path.write_bytes(pack(("\ufeff" + LINES[:half]).encode()) + pack(LINES[half:].encode()))
        assert read(path) == TEXTS, path
    (tmp_path / f"a.txt{ending}").write_bytes(pack(b"one\r\ntwo"))
    assert read(tmp_path / f"a.txt{ending}") == ["one\ntwo"]
    (tmp_path / f"a.csv{ending.upper()}").write_bytes(pack(b"text,n\na,1\n"))
    assert read(tmp_path / f"a.csv{ending.upper()}") == ["a"]


@pytest.mark.parametrize("ending", [ending for ending in PACKERS if ending])
def test_broken_archives_are_named(tmp_path: Path, ending: str) -> None:
    whole = PACKERS[ending](LINES.encode() * 999)
    for name, data in (("short", whole[: len(whole) // 2]), ("other", b"plain text, as it is")):
        path = tmp_path / f"{name}.jsonl{ending}"
        path.write_bytes(data)
        assert "cannot be read" in refusal(path)
    (tmp_path / f"a.parquet{ending}").write_bytes(whole)
    assert f"unknown suffix '.parquet{ending}'" in refusal(tmp_path / f"a.parquet{ending}")


def test_csv_and_tsv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "x" * 200_000  # more than Python's own limit on a cell
    path.write_bytes(f'\ufefftext, id\r\n"one, ""two""\r\nthree",1\r\n\r\n,2\r\n{long},3\r\n'.encode())
    assert read(path) == ['one, "two"\nthree', long]
    assert read(path, text_field="id") == ["1", "2", "3"]
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"a, b"\n')
    assert read(tmp_path / "a.tsv") == ["a, b"]
    for content, says in (
        ("text,id\na,1\nb\n", "line 3 ends a row of 1 cells, but the first line names 2"),
        ("text,text\na,b\n", "line 1 names the column 'text' twice"),
        ('text,id\n"a,1\n', "not CSV"),
        ("a;b\n1;2\n", "has no text_field 'text'"),
    ):
        path.write_text(content)
        assert says in refusal(path)


def test_what_is_not_unicode_is_named_by_line(tmp_path: Path) -> None:
    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    for name in ("a.jsonl", "a.json", "a.txt", "a.csv"):
        assert "line 2 is binary or not UTF-8 (byte 0xff)" in refusal(file(name, b'{"text": "caf\xc3\xa9"}\n\xff\n'))
    assert "line 3" in refusal(file("nul.txt", b"a\nb\n\0"))
    packed = file("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": "\xe9"}\n'))
    assert "line 2" in refusal(packed) and "0xe9" in refusal(packed)
    surrogate = file("s.jsonl", b'{"text": "whole \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    assert "line 2: text is not Unicode text: \\ud83d at character 6" in refusal(surrogate)
    chat = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\udc00"}]}
    assert "messages[1].content is not" in refusal(file("c.json", json.dumps([chat]).encode()))
    assert "too deeply" in refusal(file("deep.jsonl", b"[" * 100_000))
    assert "4300" in refusal(file("digits.jsonl", b'{"text": ' + b"9" * 5000 + b"}"))


def test_bytes_in_parquet_that_are_not_utf8_are_named_by_row(tmp_path: Path) -> None:
    values = [b"good"] * 299 + [b"bad \xff"]
    column = pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"id": list(range(300)), "text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "record 300: field 'text' is not UTF-8" in refusal(tmp_path / "a.parquet")


def test_arguments_that_are_not_unicode_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_model("llama", tmp_path / "model", num_hidden_layers=1))
    for arguments in (["generate", model, "\udcff"], ["eval", model, "--text", "\udcff.txt"]):
        assert main(arguments) == 2
        assert "\\udcff" in (said := capsys.readouterr().err) and "is not Unicode text" in said
    assert main(["eval", model, "--text", ""]) == 2
    assert "source" in capsys.readouterr().err
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"a\n\xff")
    assert main(["eval", model, "--text", str(bad)]) == 2
    assert f"{bad} line 2" in capsys.readouterr().err
