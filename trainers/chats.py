"""Chats as their template renders them, and where in that text each assistant turn stands.

Nothing about a template is assumed: a turn is found by rendering the messages before it with the generation
prompt, which is what the model will see, and the messages up to it, and comparing both with the whole chat. What
is learnt is what the model has to write after the generation prompt, as far as the whole chat contains it. A turn
of which that cannot be known for certain is refused.
"""

import contextlib
import json
import os
import re
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.errors import DataError
from qat.trainers.records import Document, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")
LONGEST_TAG = 64  # characters
_TAG = re.compile(r"<[^<>\s]*>")
_TAGS = re.compile(r"(?:\s|<[^<>]*>|\[[^\[\]]*\])*")  # what a generation prompt may add and a history lack
_SPLIT_ADVICE = (
    "give one sample per assistant turn, so that each ends with the turn to learn, or a template that marks "
    "assistant turns with {% generation %}"
)
_REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of a message, of which transformers fills in others
_ASKING = ("system", "developer", "user")  # roles whose text templates show as it is
_NAME, _KEY = "probe_name", "probe_key"  # stand in for a tool's name and an argument, to see how they are rendered


class Span(NamedTuple):
    """Characters to learn; with `whole` a token that begins inside counts even if it ends outside."""

    begin: int
    end: int
    whole: bool = True


@dataclass(frozen=True)
class Chat:
    """A document's messages in the form that the tokenizer's template takes.

    Attributes:
        where: names the document in errors.
        messages, tools: as the template is given them.
        context: messages at the beginning of which nothing is learnt.
    """

    where: str
    messages: tuple[Message, ...]
    tools: tuple[Message, ...]
    context: int
    tokenizer: "PreTrainedTokenizerBase"

    def render(
        self, messages: tuple[Message, ...] | None = None, *, prompt: bool = False, tokenize: bool = False
    ) -> Any:
        """The template's text of these messages (all by default); with `tokenize` its ids and assistant mask."""
        given = self.messages if messages is None else messages
        try:
            return self.tokenizer.apply_chat_template(
                list(given),
                tools=list(self.tools) or None,
                tokenize=tokenize,
                add_generation_prompt=prompt,
                return_dict=tokenize,
                return_assistant_tokens_mask=tokenize,
            )
        except Exception as error:  # templates raise whatever their author, or Jinja, chose
            roles = ", ".join(message["role"] for message in given) or "none"
            raise DataError(
                f"{self.where}: the chat template refuses messages with the roles {roles}: "
                f"{str(error)[:200]}; reorder or merge them as the model's template expects"
            ) from None

    @property
    def marked(self) -> bool:
        """Whether the template itself marks what the assistant writes."""
        template = self.tokenizer.get_chat_template(tools=list(self.tools) or None)
        return GENERATION_MARK.search(template) is not None

    @property
    def learnt(self) -> list[int]:
        """Indices of the messages to learn; OpenAI's data says `weight: 0` where it is not meant to be."""
        from_here = enumerate(self.messages[self.context :], self.context)
        return [i for i, m in from_here if m["role"] == "assistant" and m.get("weight") != 0]

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """Added tokens, which no other text becomes a part of."""
        return tuple(str(token) for token in self.tokenizer.added_tokens_decoder.values())

    def whole_tokens(self, text: str, cut: int) -> int:
        """`cut`, or the beginning of the added token or tag that it would cut in two."""
        begins = [text.find(mark, max(0, cut - len(mark) + 1), cut + len(mark) - 1) for mark in self.marks]
        first = max(0, cut - LONGEST_TAG)
        begins += [first + tag.start() for tag in _TAG.finditer(text[first : cut + LONGEST_TAG])
                   if first + tag.start() < cut < first + tag.end()]  # fmt: skip
        return min((begin for begin in begins if 0 <= begin < cut), default=cut)

    def closed(self, turn: str) -> str:
        """The turn without white space after its closing token: generation stops before writing that."""
        return turn.rstrip() if turn.rstrip().endswith(self.marks) else turn

    def only_tags(self, text: str) -> bool:
        """Whether a text is nothing but added tokens, tags and white space."""
        for mark in sorted(self.marks, key=len, reverse=True) if text.strip() else ():
            text = text.replace(mark, "")
        return _TAGS.fullmatch(text) is not None


def chat(document: Document, tokenizer: "PreTrainedTokenizerBase") -> Chat:
    """The document for this tokenizer's template, tools and tool calls in transformers' form.

    Raises:
        DataError: the tokenizer has no template, or its template leaves out tool calls.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{document.where} is a chat, but the tokenizer has no chat template; use the tokenizer of an "
            "instruct model, or set chat: never and name a text_field"
        )
    tools = tuple(_wrapped(tool) for tool in document.tools)
    rendered = Chat(document.where, document.messages, tools, document.context, tokenizer)
    try:
        tokenizer.get_chat_template(tools=list(tools) or None)
    except ValueError as error:
        raise DataError(f"{document.where}: {str(error)[:300]}; name one of them `default`") from None
    if any(message.get("tool_calls") for message in document.messages):
        rendered = _with_calls(rendered)
    if tools:
        text = rendered.render()
        missing = [str(tool["function"]["name"]) for tool in tools if str(tool["function"]["name"]) not in text]
        if missing:
            warnings.warn("the chat template does not show tools to the model, so it learns to call tools that it "
                          "does not see; data.tools_field=null leaves them out on purpose", stacklevel=2)  # fmt: skip
    return rendered


# ---- tool calls


def _wrapped(call: Message) -> Message:
    """A tool or a call as chat APIs and transformers write it: under the key function."""
    return call if "function" in call else {"type": "function", "function": call}


def _with_calls(given: Chat) -> Chat:
    """The chat with its calls in the first form that the template shows as they are.

    transformers' form comes first: arguments are objects, and a message with calls and no text has no content. Some
    templates need the text of the arguments instead, or an empty content.
    """
    refusals, problems = [], []
    for arguments, content in product((dict, str), (None, "")):
        formed = replace(given, messages=tuple(_formed(m, arguments, content) for m in given.messages))
        try:
            problem = _hidden(formed)
        except DataError as error:
            refusals.append(error)
            continue
        if not problem:
            return formed
        problems.append(problem)
    if not problems:
        raise refusals[-1]  # not one about the content that was not there
    raise DataError(
        f"{given.where}: the chat template {problems[0]}, so they cannot be learnt; use the tokenizer of a model that "
        "calls tools, or remove the calls"
    )


def _formed(message: Message, arguments: type, content: str | None) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    formed = []
    for call in map(_wrapped, calls):
        inner = dict(call["function"])
        if arguments is str and "arguments" in inner:
            inner["arguments"] = json.dumps(inner["arguments"], ensure_ascii=False)
        formed.append({**call, "function": inner})
    others = {key: value for key, value in message.items() if key != "content" or value}
    return {**({"content": content} if content is not None else {}), **others, "tool_calls": formed}


def _hidden(given: Chat) -> str:
    """What the template does not show of tool calls, found with names and arguments that occur nowhere else."""
    names = keys = 0
    messages = []
    for message in given.messages:
        calls = []
        for call in message.get("tool_calls") or ():
            inner = {**call["function"], "name": _NAME}
            names += 1
            if inner.get("arguments") not in (None, {}, "{}"):
                keys += 1
                probe = {_KEY: "value"}
                inner["arguments"] = json.dumps(probe) if isinstance(inner["arguments"], str) else probe
            calls.append({**call, "function": inner})
        messages.append({**message, "tool_calls": calls} if calls else message)
    text = given.render(tuple(messages))
    if text.count(_NAME) < names:
        return "does not show tool calls"
    if text.count(_KEY) < keys:
        return "does not show the arguments of tool calls"
    if text.count(f'"{_KEY}"') < keys or f'\\"{_KEY}' in text:
        return "does not show the arguments of tool calls as JSON"
    return ""


# ---- assistant turns


def turns(given: Chat) -> tuple[str, list[Span]]:
    """The rendered chat, and where in it each assistant turn stands.

    Raises:
        DataError: one of them cannot be found for certain.
    """
    full: str = given.render()
    spans = [_turn(given, index, full) for index in given.learnt]
    # A tag that begins the content may be the generation prompt's, and so stand before the turn.
    shown = [full[max(0, span.begin - LONGEST_TAG) : span.end] for span in spans]
    if any(_lost(given.messages[index], turn) for index, turn in zip(given.learnt, shown, strict=True)):
        warnings.warn("the chat template leaves out a part of what assistants wrote in this data (reasoning, as a "
                      "rule); what it leaves out is not learnt", stacklevel=2)  # fmt: skip
    for role in sorted({m["role"] for m in given.messages if m["role"] in _ASKING and _lost(m, full)}):
        warnings.warn(f"the chat template does not show messages of the role {role} in this data, so the model learns "
                      "its answers without them; write them into a message that it shows", stacklevel=2)  # fmt: skip
    return full, spans


def _lost(message: Message, rendered: str) -> bool:
    """Whether a rendering lacks what a message holds, white space apart."""
    texts = [message.get("content"), next((message[key] for key in _REASONING if message.get(key)), None)]
    squeezed = "".join(rendered.split())
    return any("".join(text.split()) not in squeezed for text in texts if isinstance(text, str))


def _turn(given: Chat, index: int, full: str) -> Span:
    """Where the turn of message `index` stands.

    It begins where the generation prompt ends, or, where that adds a tag which the history lacks, where both part.
    It ends where the messages up to it end. A template may render the turn differently when it is the last: Qwen3
    puts a thought before it, gpt-oss closes it with another token. Then all that the assistant wrote and what closes
    it must follow there, or both renderings may differ in closing tokens only, which are not learnt.
    """
    before = given.render(given.messages[:index], prompt=True)
    through = given.render(given.messages[: index + 1])
    begin = len(before)
    if not full.startswith(before) or not through.startswith(before):
        begin = _parting(given, index, before, full, through)
    if full.startswith(through):
        return Span(begin, begin + len(given.closed(through[begin:])))
    turn = _common_ending(given.messages[index], through[begin:], full[begin:])
    if turn:
        return Span(begin, begin + len(given.closed(turn)))
    shared = _shared(through, full)
    end = min(given.whole_tokens(through, shared), given.whole_tokens(full, shared))
    if end > begin and _shows(given.messages[index], full[begin:end]) and given.only_tags(through[end:]):
        return Span(begin, begin + len(given.closed(full[begin:end])), whole=False)
    raise DataError(
        f"{given.where}: the chat template rewrites message {index} once more messages follow (it "
        f"may drop reasoning), so this assistant turn cannot be found; {_SPLIT_ADVICE}"
    )


def _common_ending(message: Message, last: str, here: str) -> str:
    """The end of a turn, as it is rendered `last`, that `here` begins with, if it is all that the assistant wrote."""
    start = last.find(here[:1])
    while start >= 0:
        if here.startswith(last[start:]):
            return last[start:] if _shows(message, last[start:]) else ""
        start = last.find(here[:1], start + 1)
    return ""


def _shows(message: Message, text: str) -> bool:
    """Whether a rendering holds a message's content and the names of the tools that it calls."""
    names = [str(call["function"]["name"]) for call in message.get("tool_calls") or ()]
    return all(part in text for part in (message.get("content", "").strip(), *names))


def _parting(given: Chat, index: int, before: str, full: str, through: str) -> int:
    """Where the history parts from the generation prompt that ends `before`.

    The content itself may begin as the prompt goes on (`<div>` and `<think>`), so it is replaced by two contents
    that begin differently: only one of them can go on as the prompt does. Beyond the parting the prompt may hold
    tags that the history lacks, or anything where the content stands right there.
    """
    plain: str = given.render(given.messages[:index])
    others: list[str] = []
    for content in ("A", "B"):
        probe = {**given.messages[index], "content": content}
        with contextlib.suppress(DataError):  # a template may refuse content beside tool calls
            others.append(given.render((*given.messages[:index], probe, *given.messages[index + 1 :])))
    begin = min(_shared(before, text) for text in (full, through, *others))
    begin = min(given.whole_tokens(full, begin), given.whole_tokens(before, begin))
    content_begin = _shared(*others) if len(set(others)) == 2 else -1
    prompt_begin = given.whole_tokens(before, _shared(plain, before))
    if begin < prompt_begin or not (begin == content_begin or given.only_tags(before[begin:])):
        moved = [m["role"] for m in given.messages[:index] if _lost(m, full) and not _lost(m, before)]
        if moved:
            raise DataError(
                f"{given.where}: the chat template shows the message of the role {moved[0]} only while it is the "
                "model's turn, and not in the chat that is learnt; write its text into the first message of the user"
            )
        raise DataError(
            f"{given.where}: the chat template renders what precedes message {index} differently once "
            f"more messages follow, so its assistant turns cannot be found; {_SPLIT_ADVICE}"
        )
    return begin


def _shared(first: str, second: str) -> int:
    """Length of the common beginning of two texts."""
    return len(os.path.commonprefix([first, second]))  # noqa: RUF071  # characters are to be compared
