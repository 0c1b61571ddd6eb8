"""Documents from every kind of source, and the message each broken source gives."""

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qat.errors import DataError
from qat.trainers import files, sources
from qat.trainers.data import DataConfig
from qat.trainers.sources import HELDOUT, documents, fingerprint, overlapping, pinned

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def read(source: str | Path, **options: Any) -> list[Any]:
    """Each document as its text or its messages."""
    config = pinned(DataConfig(source=str(source), **options))
    return [list(document.messages) or document.text for document in documents(config)]


def refusal(source: str | Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(source, **options)
    message = str(caught.value)
    assert len(message) < 700 and caught.value.__cause__ is None
    return message


def test_embedded_is_every_topic_in_order() -> None:
    topics = importlib.import_module("pydoc_data.topics").topics
    assert read("embedded") == [topics[name] for name in sorted(topics)]


def test_heldout_is_the_shipped_file() -> None:
    found = read("heldout")
    assert len(found) > 10 and not any("\n---\n" in text or text.startswith("---") for text in found)
    assert "\n---\n".join(found) == HELDOUT.read_text(encoding="utf-8").strip("\n")


def test_halves_of_the_heldout_text_share_no_document() -> None:
    whole, choosing, reporting = (read(f"heldout{half}") for half in ("", "/choosing", "/reporting"))
    assert sorted(choosing + reporting) == sorted(whole) and not set(choosing) & set(reporting)
    sizes = [sum(map(len, half)) for half in (choosing, reporting)]
    assert max(sizes) < 1.25 * min(sizes)
    assert choosing == whole[1::2]  # fixed: numbers of different runs are of the same text


def test_the_same_documents_are_known_by_their_names() -> None:
    def same(one: str, other: str) -> bool:
        return overlapping(DataConfig(source=one), DataConfig(source=other))

    assert same("heldout", "heldout/reporting") and same("heldout/choosing", "heldout/choosing")
    assert same("embedded", "embedded") and not same("embedded", "heldout")
    assert not same("heldout/choosing", "heldout/reporting")
    assert not overlapping(DataConfig(source="a/b"), DataConfig(source="a/b", split="test"))


def test_each_file_kind(tmp_path: Path) -> None:
    records = [
        {"text": "one\nüñ"},
        {"text": None},
        {"text": "  "},
        {"text": "two"},
        {"messages": MESSAGES, "text": "three"},
    ]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    (tmp_path / "b.json").write_text(json.dumps(records))
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(r) for r in records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.json", "lines.json"):
        assert read(tmp_path / name) == ["one\nüñ", "two", MESSAGES], name
        assert read(tmp_path / name, chat="never") == ["one\nüñ", "two", "three"], name
    # from_pylist takes its columns from the first record
    assert read(tmp_path / "c.parquet") == ["one\nüñ", "two", "three"]
    (tmp_path / "d.txt").write_text("a text\n---\nin one piece\n")
    assert read(tmp_path / "d.txt") == ["a text\n---\nin one piece\n"]


CALL = {"name": "f", "arguments": {"a": 1}}


def test_parquet_chats_lose_the_keys_a_table_fills_in(tmp_path: Path) -> None:
    chat = [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, MESSAGES[1]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"talk": chat}]), tmp_path / "c.parquet")
    (found,) = read(tmp_path / "c.parquet", messages_field="talk")
    assert found == [MESSAGES[0], {**chat[1], "content": ""}, MESSAGES[1]]


def test_a_map_of_parquet_is_an_object(tmp_path: Path) -> None:
    """Spark writes JSON objects with free keys so; pyarrow's own reading of them is a list of pairs."""
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    call = pyarrow.struct([("name", pyarrow.string()), ("arguments", kind)])
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string()),
                              ("tool_calls", pyarrow.list_(call))])  # fmt: skip
    calls = [{"name": "f", "arguments": [("a", "1")]}]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    column = pyarrow.array([chat], pyarrow.list_(message))
    pyarrow.parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "c.parquet")
    (found,) = read(tmp_path / "c.parquet")
    assert found[1]["tool_calls"] == [{"name": "f", "arguments": {"a": "1"}}]


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.md", ".git/x.txt", "c.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert read(tmp_path) == ["a/1.md", "b/2.txt", "c.txt"]
    (tmp_path / "d.pdf").touch()
    with pytest.warns(UserWarning, match=r"\.pdf are not read") as notes:
        read(tmp_path)
        fingerprint(DataConfig(source=str(tmp_path)))
    assert len(notes) == 1
    assert "patterns and variables are not expanded" in refusal(tmp_path / "*.txt")


def test_long_texts_are_cut_at_lines_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE_CHARACTERS", 100)
    text = "".join(f"line {i} is here\n" * (i % 3) for i in range(99)) + "x" * 250 + "\nend"
    (tmp_path / "long.txt").write_text(text)
    found = read(tmp_path / "long.txt")
    assert "".join(found) == text and len(found) > 10 and max(map(len, found)) <= 200
    assert sum(not part.endswith("\n") for part in found) <= 4  # only within the line that exceeds a piece, and the end


def test_the_fingerprint_follows_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    config = DataConfig(source=str(path))

    def of(text: str) -> str:
        path.write_text(text)
        return fingerprint(config)

    assert of("abc") == of("abc") != of("abd")
    monkeypatch.setattr(sources, "WHOLE_FILE_BYTES", 10)
    monkeypatch.setattr(sources, "END_BYTES", 10)
    large = "x" * 100
    found = {of(large), of(large + "x"), of("y" + large[1:]), of(large[1:] + "y")}
    os.utime(path, ns=(1, 1))
    assert len(found | {fingerprint(config)}) == 5


def test_broken_sources_say_what_to_do(tmp_path: Path) -> None:
    def file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    good = file("here.jsonl", '{"text": "a"}')
    assert "nearest" in refusal(tmp_path / "hear.jsonl") and good.name in refusal(tmp_path / "hear.jsonl")
    assert "is empty" in refusal(file("empty.txt", ""))
    assert "NUL" in refusal(file("nul.txt", b"text\0text"))
    assert "UTF-8" in refusal(file("latin.txt", "naïve".encode("latin-1")))
    assert "UTF-8" in refusal(file("latin.jsonl", '{"text": "naïve"}'.encode("latin-1")))
    assert "unknown suffix '.xls'" in refusal(file("a.xls", "a,b")) and ".parquet" in refusal(tmp_path / "a.xls")
    assert "line 3 is not JSON" in refusal(file("bad.jsonl", '{"text": "a"}\n\n{"text": }\n'))
    assert "line 2 is not JSON" in refusal(file("bad.json", '[{"text": "a"},\n}]'))
    assert "list" in refusal(file("rows.jsonl", "[1, 2]"))
    message = refusal(file("fields.jsonl", '{"contents": "a", "id": 1}'), text_field="content")
    assert "line 1" in message and "contents, id" in message and "nearest: contents" in message
    assert "messages_field" not in refusal(file("id.jsonl", '{"id": 1}'), chat="never").split(";")[0]
    assert "int" in refusal(file("number.jsonl", '{"text": 5}'))
    assert "role and content" in refusal(file("gpt.jsonl", '{"messages": [{"speaker": "human", "value": "x"}]}'))
    assert "non-empty list" in refusal(file("chat.jsonl", '{"messages": "hello"}'))
    assert "content is a list" in refusal(file("image.jsonl", '{"messages": [{"role": "user", "content": []}]}'))
    assert "Parquet" in refusal(file("bad.parquet", "PAR1 not really"))
    assert "holds only .xls" in refusal(_folder(tmp_path / "f", "a.xls"))
    assert "it is empty" in refusal(_folder(tmp_path / "g"))
    assert "nearest: embedded" in refusal("embeded")
    assert "no effect" in refusal("embedded", split="test") and "no effect" in refusal(good, config_name="en")
    assert "no effect" in refusal(file("t.txt", "x"), text_field="content")


def test_linked_folders_and_files_are_read(tmp_path: Path) -> None:
    elsewhere = _folder(tmp_path / "elsewhere", "1.txt", "2.txt")
    data = _folder(tmp_path / "data")
    (data / "a").symlink_to(elsewhere)
    (data / "b.txt").symlink_to(elsewhere / "2.txt")
    (elsewhere / "back").symlink_to(data)  # a link to what is around it is not followed again
    assert read(data) == ["x", "x", "x"]
    (tmp_path / "link").symlink_to(data)
    assert read(tmp_path / "link") == ["x", "x", "x"]
    (data / "c.txt").symlink_to(tmp_path / "gone.txt")
    assert "c.txt is a link to" in refusal(data) and "not there" in refusal(data / "c.txt")


def _folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text("x")
    return path


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = refusal("some-owner/some-data", config_name="en")
    assert "some-owner/some-data" in message and "'en'" in message and "network" in message
    commit = "0" * 40
    config = pinned(DataConfig(source="some-owner/some-data", revision=commit))
    assert fingerprint(config) == f"some-owner/some-data@{commit}"
    assert "cannot be read" in refusal("some-owner/some-data", revision=commit)


def test_hub_records_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is out of reach in tests; everything on this side of `load_dataset` is real."""
    asked: dict[str, Any] = {}

    def stream() -> Iterator[dict[str, Any]]:
        padded = [{**message, "tool_calls": None} for message in MESSAGES]  # as a table fills rows in
        yield from ({"text": "one", "messages": None}, {"text": "two", "messages": padded, "tools": None})
        raise ConnectionError("the line went dead\nand more")

    def load_dataset(*args: Any, **options: Any) -> Iterator[dict[str, Any]]:
        asked.update(options, source=args)
        return stream()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    commit = "a" * 40
    config = pinned(DataConfig(source="some-owner/some-data", revision=commit, split="test"))
    found = documents(config)
    assert [next(found).text, next(found).messages] == ["one", tuple(MESSAGES)]
    with pytest.raises(DataError, match="ConnectionError: the line went dead"):
        next(found)
    assert asked == {
        "source": ("some-owner/some-data",),
        "name": None,
        "split": "test",
        "revision": commit,
        "streaming": True,
    }
