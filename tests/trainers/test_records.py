"""Records of every shape that data sets have: what becomes of them, and which are refused by name."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qat.config import validate
from qat.engines.requests import _message
from qat.errors import ConfigError, DataError
from qat.trainers.data import DataConfig, load_blocks
from qat.trainers.records import SHAPES, SPEAKERS, Document, document
from qat.trainers.sources import documents, pinned
from tests.tiny import tiny_tokenizer

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


def made(record: Any, table: bool = False, **options: Any) -> Document:
    return document(record, DataConfig(source="x.jsonl", **options), "here", table=table)


def refusal(record: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        made(record, **options)
    assert "here" in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


# ---- shapes


@pytest.mark.parametrize(
    ("record", "messages", "context"),
    [
        ({"messages": [USER, ANSWER]}, (USER, ANSWER), 0),
        ({"messages": json.dumps([USER, ANSWER])}, (USER, ANSWER), 0),
        ({"conversations": SHAREGPT}, (USER, ANSWER), 0),
        ({"conversations": [USER, ANSWER]}, (USER, ANSWER), 0),
        ({"messages": SHAREGPT}, (USER, ANSWER), 0),
        ({"messages": [{**USER, "role": "human"}, {**ANSWER, "role": "gpt"}]}, (USER, ANSWER), 0),
        ({"messages": [{**USER, "role": "User"}, {**ANSWER, "role": "model"}]}, (USER, ANSWER), 0),
        ({"conversations": SHAREGPT, "system": "Be"}, ({"role": "system", "content": "Be"}, USER, ANSWER), 0),
        ({"prompt": "Hi", "completion": "Hello"}, (USER, ANSWER), 1),
        ({"prompt": [USER], "completion": [ANSWER]}, (USER, ANSWER), 1),
        ({"prompt": [USER, ANSWER, USER], "completion": "Hello"}, (USER, ANSWER, USER, ANSWER), 3),
        ({"prompt": "Hi", "completion": ANSWER}, (USER, ANSWER), 1),
        (ALPACA, ({"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}), 1),
        ({**ALPACA, "input": ""}, ({"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}), 1),
        ({"text": "as text", **ALPACA}, ({"role": "user", "content": "Add.\n\n1 2"},
                                         {"role": "assistant", "content": "3"}), 1),
    ],
)  # fmt: skip
def test_each_shape_is_recognised_by_its_fields(record: Any, messages: Any, context: int) -> None:
    found = made(record)
    assert (found.messages, found.context) == (messages, context)
    assert made({**record, "id": 7, "source": None}, table=True).messages == messages


def test_every_speaker_of_sharegpt_has_a_role() -> None:
    turns = [{"from": name, "value": '{"name": "f", "arguments": "{}"}'} for name in SPEAKERS]
    found = made({"conversations": turns}).messages
    assert [message["role"] for message in found] == list(SPEAKERS.values())
    called = found[list(SPEAKERS).index("function_call")]
    assert called == {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    told = refusal({"conversations": [{"from": "narrator", "value": ""}]})
    assert "unknown speaker 'narrator'; allowed: human" in told


def test_the_config_can_name_fields_and_shapes() -> None:
    both = {"messages": [USER, ANSWER], "prompt": "p", "completion": "c", "question": "Hi", "answer": "Hello"}
    said = refusal(both)
    assert "messages (messages); prompt (prompt, completion)" in said and "set data.records" in said
    assert made(both, records="prompt").text == "c" and made(both, records="messages").shape == "messages"
    asked = {"question": "Hi", "answer": "Hello", "text": "x"}
    assert made(asked, prompt_field="question", completion_field="answer").messages == (USER, ANSWER)
    assert made({**ALPACA, "body": "b"}, text_field="body").text == "b"
    assert made({**ALPACA, "talk": [USER, ANSWER]}, messages_field="talk").messages == (USER, ANSWER)
    assert made({"text": "t", "messages": [USER]}, chat="never") == Document("here", "t")
    assert made({"prompt": "p", "completion": "c"}, chat="never") == Document("here", "c", prompt="p", shape="prompt")
    assert made(ALPACA, chat="never").prompt == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert "has no messages_field 'messages'" in refusal({"text": "t"}, records="messages")
    with pytest.raises(ConfigError, match="remove one of the two"):
        validate(DataConfig, {"records": "sharegpt", "chat": "never"}, "data")
    with pytest.raises(ConfigError, match="'auto', 'text', 'messages', 'sharegpt', 'prompt' or 'alpaca'"):
        validate(DataConfig, {"records": "shared"}, "data")
    assert set(SHAPES) == {"text", "messages", "sharegpt", "prompt", "alpaca"}


def test_what_is_wrong_with_a_record_is_named() -> None:
    assert "field 'messages' is null" in refusal({"messages": None})
    assert "field 'output' is null" in refusal({**ALPACA, "output": None})
    assert "field 'completion' is null" in refusal({"prompt": "p", "completion": None, "id": 1})
    assert "field 'messages' is empty" in refusal({"messages": ""})
    assert "nearest: prompts" in refusal({"prompts": "p", "completion": "c"}, records="prompt")
    assert "field 'output' is a int" in refusal({**ALPACA, "output": 3})
    assert "must be a non-empty list of messages, but is 5" in refusal({"prompt": 5, "completion": "c"})
    assert "no message of the assistant" in refusal({"prompt": [USER], "completion": [USER]})
    assert "need chat: auto" in refusal({"prompt": [USER], "completion": [ANSWER]}, chat="never")
    message = refusal({"id": 1})
    known = ("text_field", "messages_field", "completion_field", "conversations", "output")
    assert all(name in message for name in known)


def test_content_may_come_in_parts_of_text_which_are_lines_as_in_serving() -> None:
    parts = [{"type": "text", "text": "Hel", "image_url": None}, {"text": "l"}, "o"]
    read = made({"messages": [{"role": "user", "content": parts}, ANSWER]}).messages[0]["content"]
    assert read == "Hel\nl\no"
    served = _message({"role": "user", "content": [{"type": "text", "text": text} for text in ("Hel", "l", "o")]})
    assert served["content"] == read  # vLLM joins the same way for templates that take a text
    for part in ({"type": "image_url", "image_url": {"url": "u"}}, 5, {"temperature": 21}):
        said = refusal({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]})
        assert f"messages[0].content[1] is no part of type 'text' with a text, but {part!r:.80}; only text" in said


# ---- tools


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "day": None}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "default": None}}}]


def test_arguments_and_tools_are_taken_as_objects_or_as_text() -> None:
    texts: Any = {**CALL, "function": {"name": "weather", "arguments": json.dumps(CALL["function"]["arguments"])}}
    for call in (CALL, texts):
        for tools in (TOOLS, json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS]):
            answer = {"role": "assistant", "content": None, "tool_calls": [call]}
            found = made({"messages": [USER, answer], "tools": tools})
            assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
            assert found.tools == tuple(TOOLS)
    assert made({"messages": [USER, ANSWER], "tools": "null"}).tools == ()
    for spelt in ({"parameters": {"city": "Rome"}}, {"args": '{"city": "Rome"}'}, {"arguments": {"city": "Rome"}}):
        answer = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", **spelt}]}
        (call,) = made({"messages": [USER, answer]}).messages[1]["tool_calls"]
        assert call == {"name": "weather", "arguments": {"city": "Rome"}}
    answer = {"role": "assistant", "content": "", "tool_calls": [{"name": "now"}]}
    assert made({"messages": [USER, answer]}).messages[1]["tool_calls"] == [{"name": "now", "arguments": {}}]
    answer = {**ANSWER, "function_call": {"name": "f", "arguments": ""}}
    old = made({"messages": [USER, answer], "functions": [{"name": "f"}]})
    assert old.messages[1]["tool_calls"] == [{"name": "f", "arguments": {}}] and old.tools == ({"name": "f"},)
    none = made({"messages": [USER, {**ANSWER, "tool_calls": []}], "tools": "no"}, tools_field=None)
    assert none.messages[1] == ANSWER


def test_wrong_tools_are_named() -> None:
    for tools in ("weather", {"name": "f"}):
        assert "'tools' must be a list of tools" in refusal({"messages": [USER, ANSWER], "tools": tools})
    said = refusal({"messages": [USER, ANSWER], "tools": [{"type": "x"}]})
    assert "tools[0] must be a JSON schema with a name" in said
    for calls, says in (
        ("f()", ".tool_calls must be a list of calls"),
        ([{"id": "1"}], ".tool_calls[0] must be an object with a name"),
        ([{"name": "f", "arguments": "city=Rome"}], ".tool_calls[0]: arguments must be a JSON object"),
        ([{"name": "f", "arguments": [1]}], ".tool_calls[0]: arguments must be a JSON object"),
    ):
        assert f"messages[1]{says}" in refusal({"messages": [USER, {"role": "assistant", "tool_calls": calls}]})


def test_a_tables_padding_is_dropped_at_every_depth_and_json_nulls_stay(tmp_path: Path) -> None:
    def call(name: str, **arguments: Any) -> dict[str, Any]:
        called = {"function": {"name": name, "arguments": arguments}}
        return {"role": "assistant", "content": None, "tool_calls": [called]}

    def tool(name: str, **fields: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "parameters": {"properties": fields}}}

    rows = [
        {"messages": [USER, call("a", city="Rome")], "tools": [tool("a", city={"type": "string"})]},
        {"messages": [USER, call("b", deep={"x": 1}, list=[{"p": 1}, {"q": 2}])], "tools": [tool("b", n={"min": 0})]},
        {"messages": [USER, ANSWER]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    padded = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert padded[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["deep"] is None  # the trap is set
    found = list(documents(pinned(DataConfig(source=str(tmp_path / "a.parquet")))))
    for each, row in zip(found, rows, strict=True):
        calls = row["messages"][1].get("tool_calls")
        assert each.messages[1].get("tool_calls") == calls and each.tools == tuple(row.get("tools", ()))
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"messages": [USER, call("a", city=None, deep={"x": None})], "tools": TOOLS}))
    (line,) = documents(pinned(DataConfig(source=str(lines))))
    assert line.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": None, "deep": {"x": None}}
    assert line.tools == tuple(TOOLS)


# ---- to rows


def test_what_was_detected_is_said_and_only_completions_are_learnt(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    asked = {"prompt": "Say hi.", "completion": "Hi there."}
    records: list[Any] = [asked, ALPACA, {"conversations": SHAREGPT}, {"text": "x"}]
    path.write_text("\n".join(map(json.dumps, records)))
    tokenizer = tiny_tokenizer()
    for template in (tokenizer.chat_template, None):
        tokenizer.chat_template = template
        if template is None:
            path.write_text("\n".join(json.dumps(record) for record in records if "conversations" not in record))
        config = DataConfig(source=str(path), seq_len=128, pack=False)
        blocks = load_blocks(config, tokenizer, cache_dir=tmp_path)
        learnt = [tokenizer.decode(row[row != -100]) for row in blocks.rows(range(len(blocks)))["targets"]]
        assert learnt[:2] == ["Hi there.<|im_end|>", "3<|im_end|>"]
        kind = "as chats" if template else "as plain text"
        assert blocks.shapes[f"alpaca {kind}"] == blocks.shapes[f"prompt {kind}"] == blocks.shapes["text"] == 1
        assert f"1 alpaca {kind}, 1 prompt {kind}" in blocks.summary
