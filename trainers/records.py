"""What a record of a data set means: one table of the shapes that records have, each made into a document.

A shape is recognised by the fields that hold something, or named by `data.records`. A record that fits two
shapes is refused by name, since the two would train different things. A table (Parquet, the hub) has the same
fields in every row, at every depth, and fills in null for what a row lacks; there a null is dropped. In JSON a
null is what somebody wrote.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qat.errors import DataError, nearest

if TYPE_CHECKING:
    from qat.trainers.data import DataConfig

Record = Mapping[str, Any]
Message = dict[str, Any]

# Who speaks in a ShareGPT record, as a role of chat templates. Some data sets write these names as roles.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
CHATS = ("messages", "sharegpt")  # shapes that are nothing but a chat
# What an error calls the fields of a shape: the keys of `data` that name them, where there are such.
KEYS = {
    "text": "text_field",
    "messages": "messages_field",
    "sharegpt": "ShareGPT field",
    "prompt": "prompt_field and completion_field",
    "alpaca": "Alpaca fields",
}
PARTS = ("text", "input_text", "output_text")
ARGUMENTS = ("arguments", "parameters", "args")  # how data sets spell those of a call


@dataclass(frozen=True)
class Document:
    """One text or one chat; what has both is a chat where the tokenizer has a template, else a text.

    Attributes:
        where: names it in error messages.
        text: learnt whole.
        prompt: stands before the text and is not learnt.
        messages: of {role, content}; assistant turns are learnt, apart from the first `context` messages.
        tools: what the chat's model may call, as JSON schemas.
        shape: the kind of record it was, a key of SHAPES.
        leading: assistant turns that were left out because the chat began with them.
    """

    where: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    tools: tuple[Message, ...] = ()
    context: int = 0
    shape: str = "text"
    leading: int = 0


def document(record: Any, config: "DataConfig", where: str, *, table: bool = False) -> Document:
    """A record as a document; `table` says that nulls in it were filled in.

    Raises:
        DataError: it has no known shape, or several, or a field of it is not what the shape needs.
    """
    if not isinstance(record, Mapping):
        kind = type(record).__name__
        raise DataError(f"{where} is a {kind}; it must be an object with a field {config.text_field!r}")
    shape = _shape(record, config, where)
    result = _from_first_question(SHAPES[shape].build(_unpadded(record) if table else record, config, where))
    for name in ("prompt", "text", "messages", "tools"):
        _check_unicode(getattr(result, name), f"{where}: {name}")
    return result


# ---- which shape


@dataclass(frozen=True)
class _Shape:
    """The fields that a record of this shape has, and what makes it a document."""

    fields: Callable[["DataConfig"], tuple[str, ...]]
    build: Callable[[Record, "DataConfig", str], Document]


def _shape(record: Record, config: "DataConfig", where: str) -> str:
    """A key of SHAPES. A field that the config names decides; else a text is taken where nothing else is."""
    if config.records != "auto":
        if any(_absent(record, config.records, field) for field in SHAPES[config.records].fields(config)):
            raise _unknown(record, config, [config.records], where)
        return config.records
    allowed = [name for name in SHAPES if config.chat == "auto" or name not in CHATS]
    fits = [name for name in allowed if not any(_absent(record, name, f) for f in SHAPES[name].fields(config))]
    named = [name for name in fits if SHAPES[name].fields(config) != SHAPES[name].fields(type(config)())]
    if "text" in fits and (config.chat == "never" or (named == ["text"] and "messages" not in fits)):
        return "text"
    several = [name for name in named if name != "text"] or [name for name in fits if name != "text"]
    if len(several) > 1:
        ways = "; ".join(f"{name} ({', '.join(SHAPES[name].fields(config))})" for name in several)
        raise DataError(f"{where} can be read in {len(several)} ways: {ways}; set data.records to one of them")
    if several:
        return several[0]
    if config.text_field not in record:
        raise _unknown(record, config, allowed, where)
    return "text"


def _absent(record: Record, shape: str, field: str) -> bool:
    """Whether a field holds nothing; an empty text is something, but no chat."""
    value = record.get(field)
    return value is None or (value == "" and shape in CHATS)


def _unknown(record: Record, config: "DataConfig", shapes: list[str], where: str) -> DataError:
    """The error for a record that has none of these shapes."""
    pairs = [(name, field) for name in shapes for field in SHAPES[name].fields(config)]
    for name, field in pairs:
        if field in record and _absent(record, name, field):
            what = "null" if record[field] is None else "empty"
            return DataError(f"{where}: field {field!r} is {what}; give it a value, or remove the record")
    have = [str(name) for name in record]
    expected = [f"{KEYS[name]} {' and '.join(map(repr, SHAPES[name].fields(config)))}" for name in shapes]
    near = nearest(next((field for _, field in pairs if field not in record), ""), have)
    return DataError(
        f"{where} has no {', '.join(expected[:-1])}{' or ' if expected[1:] else ''}{expected[-1]}; its fields are "
        f"{', '.join(have)[:200] or 'none'}; nearest: {near or 'none'}; set one of these to a field that is there"
    )


def _unpadded(value: Any) -> Any:
    """The value without the keys, at any depth, that hold null."""
    if isinstance(value, Mapping):
        return {key: _unpadded(item) for key, item in value.items() if item is not None}
    return [_unpadded(item) for item in value] if isinstance(value, list | tuple) else value


def _check_unicode(value: Any, where: str) -> None:
    """Refuse text that no encoding can write: JSON's escapes can spell half of a surrogate pair."""
    if isinstance(value, str):
        try:
            value if value.isascii() else value.encode()
        except UnicodeEncodeError as error:
            code = f"\\u{ord(value[error.start]):04x}"
            problem = f"is not Unicode text: {code} at character {error.start + 1} is half of a surrogate pair"
            raise DataError(f"{where} {problem}; repair or remove the record") from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_unicode(str(key), f"{where}: a key")
            _check_unicode(item, f"{where}.{ascii(str(key))[1:-1]}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check_unicode(item, f"{where}[{number}]")


# ---- from a shape to a document


def _text(record: Record, config: "DataConfig", where: str) -> Document:
    return Document(where, _string(record, config.text_field, where))


def _chat(record: Record, config: "DataConfig", where: str) -> Document:
    messages = _messages(record[config.messages_field], config.messages_field, where)
    return Document(where, messages=messages, tools=_tools(record, config, where), shape="messages")


def _sharegpt(record: Record, config: "DataConfig", where: str) -> Document:
    messages = (*_system(record, where), *_messages(record["conversations"], "conversations", where))
    return Document(where, messages=messages, tools=_tools(record, config, where), shape="sharegpt")


def _prompt(record: Record, config: "DataConfig", where: str) -> Document:
    """Texts, or lists of messages; a text beside a list is one message of the user or the assistant."""
    fields = {"user": config.prompt_field, "assistant": config.completion_field}
    plain = all(isinstance(record[field], str) for field in fields.values())
    prompt, completion = (
        (_spoken(role, record[field]),)
        if isinstance(record[field], str)
        else _messages([value] if isinstance(value := record[field], Mapping) else value, field, where)
        for role, field in fields.items()
    )
    if not any(message["role"] == "assistant" for message in completion):
        raise DataError(f"{where}: {config.completion_field} has no message of the assistant, so nothing is learnt")
    texts = {"prompt": record[fields["user"]], "text": record[fields["assistant"]]} if plain else {}
    if config.chat == "never":
        if not plain:
            raise DataError(f"{where}: {' and '.join(fields.values())} hold messages, which need chat: auto")
        return Document(where, **texts, shape="prompt")
    tools = _tools(record, config, where)
    return Document(where, **texts, messages=prompt + completion, tools=tools, context=len(prompt), shape="prompt")


def _alpaca(record: Record, config: "DataConfig", where: str) -> Document:
    task, more, answer = (_string(record, field, where) for field in ("instruction", "input", "output"))
    system = _system(record, where)
    parts = [f"### Instruction:\n{task}", *([f"### Input:\n{more}"] if more.strip() else []), "### Response:\n"]
    prompt = "\n\n".join([*(message["content"] for message in system), *parts])
    if config.chat == "never":
        return Document(where, answer, prompt=prompt, shape="alpaca")
    question = f"{task}\n\n{more}" if more.strip() else task
    messages = (*system, _spoken("user", question), _spoken("assistant", answer))
    tools = _tools(record, config, where)
    return Document(where, answer, messages, prompt, tools=tools, context=len(messages) - 1, shape="alpaca")


def _system(record: Record, where: str) -> tuple[Message, ...]:
    """The system message that some ShareGPT and Alpaca records hold in a field of its own."""
    text = _string(record, "system", where)
    return (_spoken("system", text),) if text.strip() else ()


def _from_first_question(chat: Document) -> Document:
    """Without the assistant turns that a chat begins with, as ShareGPT dumps do that were cut into pieces: nothing says
    what they answer, or where they begin in the template's text."""
    if chat.context:
        return chat
    first = next((i for i, m in enumerate(chat.messages) if m["role"] != "assistant"), len(chat.messages))
    return replace(chat, messages=chat.messages[first:], leading=first)


def _spoken(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _string(record: Record, field: str, where: str) -> str:
    value = record.get(field)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} is a {type(value).__name__}; it must be a string")
    return value or ""


# ---- messages and tools


def _json(value: Any) -> Any:
    """What a JSON text holds; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _messages(value: Any, name: str, where: str) -> tuple[Message, ...]:
    """Checked messages with the keys role and content, their tool calls' arguments as objects."""
    messages = _json(value)
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where}: field {name!r} must be a non-empty list of messages, but is {value!r:.80}")
    return tuple(_message(message, f"{where}: {name}[{number}]") for number, message in enumerate(messages))


def _message(message: Any, at: str) -> Message:
    """A null key of a message is no key, in every format: chat APIs write them so."""
    fields = {key: item for key, item in message.items() if item is not None} if isinstance(message, Mapping) else {}
    if "role" not in fields and isinstance(fields.get("from"), str):
        fields = _from_sharegpt(fields, at)
    elif isinstance(fields.get("role"), str) and fields["role"] != SPEAKERS.get(fields["role"].lower(), fields["role"]):
        fields = _from_sharegpt({**fields, "from": fields.pop("role"), "value": fields.pop("content", "")}, at)
    if not isinstance(fields.get("role"), str):
        shown = ", ".join(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise DataError(f"{at} needs the keys role and content, but has {shown or 'none'}")
    fields["content"] = _content(fields.get("content", ""), at)
    if "function_call" in fields and not fields.get("tool_calls"):
        fields["tool_calls"] = [fields.pop("function_call")]
    calls = _json(fields.pop("tool_calls", None)) or []
    if not isinstance(calls, list | tuple):
        raise DataError(f"{at}.tool_calls must be a list of calls, but is {calls!r:.80}")
    if calls:
        fields["tool_calls"] = [_call(call, f"{at}.tool_calls[{number}]") for number, call in enumerate(calls)]
    return fields


def _from_sharegpt(message: Message, at: str) -> Message:
    speaker, value = message["from"], message.get("value", "")
    role = SPEAKERS.get(speaker.lower())
    if role is None:
        raise DataError(f"{at}: unknown speaker {speaker!r}; allowed: {', '.join(SPEAKERS)}")
    others = {key: item for key, item in message.items() if key not in ("from", "value")}
    if speaker.lower() != "function_call":
        return {**others, "role": role, "content": value}
    calls = _json(value)
    return {**others, "role": role, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _content(content: Any, at: str) -> str:
    """A text, or parts of type text, each on a line of its own, as vLLM and `qat serve` put them before a model."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not content:
        raise DataError(f"{at}.content is a {type(content).__name__}; it must be a string or a list of text parts")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in (*PARTS, "str") or not isinstance(text, str):
            raise DataError(f"{at}.content[{number}] is no part of type 'text' with a text, but {part!r:.80}; "
                            "only text can be trained on")  # fmt: skip
        texts.append(text)
    return "\n".join(texts)


def _call(call: Any, at: str) -> Message:
    """A tool call, flat or under the key function; its arguments are made an object where they are a text."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise DataError(f"{at} must be an object with a name and arguments, but is {call!r:.80}")
    spelt = next((key for key in ARGUMENTS if key in inner), ARGUMENTS[0])
    inner = {"arguments" if key == spelt else key: value for key, value in inner.items()}
    arguments = _json(inner.get("arguments") or "{}")
    if not isinstance(arguments, Mapping):
        text = f"{inner['arguments']!r:.80}"
        raise DataError(f"{at}: {spelt} must be a JSON object, or the text of one, but are {text}")
    inner["arguments"] = dict(arguments)
    return {**call, "function": inner} if "function" in call else inner


def _tools(record: Record, config: "DataConfig", where: str) -> tuple[Message, ...]:
    """The tools of a chat: a list, or the text of one, of JSON schemas or their texts."""
    if config.tools_field is None:
        return ()
    field = config.tools_field
    if field == "tools" and not record.get(field) and record.get("functions"):
        field = "functions"  # the older name, which is not wrapped either
    entries = _json(record.get(field)) or []
    if not isinstance(entries, list | tuple):
        raise DataError(f"{where}: field {field!r} must be a list of tools, but is {entries!r:.80}")
    tools = [_json(tool) for tool in entries]
    for number, tool in enumerate(tools):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise DataError(f"{where}: {field}[{number}] must be a JSON schema with a name, but is {tool!r:.80}")
    return tuple(dict(tool) for tool in tools)


SHAPES: dict[str, _Shape] = {
    "text": _Shape(lambda config: (config.text_field,), _text),
    "messages": _Shape(lambda config: (config.messages_field,), _chat),
    "sharegpt": _Shape(lambda config: ("conversations",), _sharegpt),
    "prompt": _Shape(lambda config: (config.prompt_field, config.completion_field), _prompt),
    "alpaca": _Shape(lambda config: ("instruction", "output"), _alpaca),
}
