"""Documents as token ids, with one flag per token that says whether a model should learn to produce it.

A text is learnt whole. Of a chat every assistant turn is learnt, and nothing else; where a turn begins and
ends comes from the tokenizer's own template, and a template for which that cannot be known for certain is
refused.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qat.errors import DataError
from qat.trainers.sources import Document, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 1 << 18  # texts handed to the tokenizer at once; it works on them in parallel

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")
_SPLIT_ADVICE = (
    "give one sample per assistant turn, so that each ends with the turn to learn, or a template that marks "
    "assistant turns with {% generation %}"
)


class Tokens(NamedTuple):
    """Token ids of one document, int32 of shape (n,), and which of them are to be learnt, bool of shape
    (n,)."""

    ids: npt.NDArray[np.int32]
    learn: npt.NDArray[np.bool_]


def encode(documents: Iterator[Document], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Tokens]:
    """Tokenise documents in order. A chat without an assistant turn comes out with nothing to learn.

    A text ends with the EOS token if the tokenizer has one; a chat is exactly what its template renders.

    Raises:
        DataError: a chat cannot be rendered, or its assistant turns cannot be found.
    """
    waiting: list[Document] = []
    size = 0
    for document in documents:
        if document.messages:
            yield from _encode_texts(waiting, tokenizer)
            waiting, size = [], 0
            yield _encode_chat(document, tokenizer)
        else:
            waiting.append(document)
            size += len(document.text)
            if size >= BATCH_CHARACTERS:
                yield from _encode_texts(waiting, tokenizer)
                waiting, size = [], 0
    yield from _encode_texts(waiting, tokenizer)


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 over everything that decides which ids a text or a chat becomes."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # These two are set by whoever called the tokenizer last and do not matter here.
        rules.pop("truncation", None), rules.pop("padding", None)
    else:
        rules = tokenizer.get_vocab()
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    state = [type(tokenizer).__name__, rules, special, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _encode_texts(documents: list[Document], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Tokens]:
    if not documents:
        return
    texts = [document.text for document in documents]
    rows = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    for row in rows:
        ids = row if end is None or (row and row[-1] == end) else [*row, end]
        yield Tokens(np.asarray(ids, np.int32), np.ones(len(ids), np.bool_))


def _encode_chat(document: Document, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    if not tokenizer.chat_template:
        raise DataError(
            f"{document.where} is a chat, but the tokenizer has no chat template; use the tokenizer of an "
            "instruct model, or set chat: never and name a text_field"
        )
    if _GENERATION_MARK.search(tokenizer.get_chat_template()):
        return _encode_marked(document, tokenizer)
    text, turns = _assistant_turns(document, tokenizer)
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise DataError(f"{document.where}: {kind} cannot map tokens to characters; use a fast tokenizer")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(encoded["input_ids"], np.int32)
    starts = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)[:, 0]
    learn = np.zeros(len(ids), np.bool_)
    for begin, end in turns:
        learn |= (starts >= begin) & (starts < end)
    return Tokens(ids, learn)


def _encode_marked(document: Document, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    encoded = _render(document, document.messages, tokenizer, tokenize=True)
    ids, learn = np.asarray(encoded["input_ids"], np.int32), np.asarray(encoded["assistant_masks"], np.bool_)
    if _speaks(document.messages) and not learn.any():
        raise DataError(f"{document.where}: the template's generation marks cover no token; repair the template")
    return Tokens(ids, learn)


def _speaks(messages: tuple[Message, ...]) -> bool:
    return any(message["role"] == "assistant" for message in messages)


def _assistant_turns(document: Document, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, list[tuple[int, int]]]:
    """The rendered chat and the character span of every assistant turn in it, end-of-turn mark included.

    A turn begins where the messages before it, rendered with the generation prompt, end; both renderings
    must agree up to there. It ends where the messages up to and including it end, if that too is a prefix.
    Templates that drop the reasoning of earlier turns (Qwen3) render a turn differently when it is the
    last; such a turn is accepted if its content, followed by what closes it when last, stands right at its
    beginning.
    """
    messages = document.messages
    full = _render(document, messages, tokenizer)
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise DataError(
                f"{document.where}: the chat begins with the assistant, so nothing says where its turn begins"
                "; put a user or system message first, or remove that turn"
            )
        before = _render(document, messages[:index], tokenizer, prompt=True)
        through = _render(document, messages[: index + 1], tokenizer)
        begin = len(before)
        if not full.startswith(before) or not through.startswith(before):
            raise DataError(
                f"{document.where}: the chat template renders what precedes message {index} differently once "
                f"more messages follow, so its assistant turns cannot be found; {_SPLIT_ADVICE}"
            )
        if full.startswith(through):
            turns.append((begin, begin + len(_closed(through[begin:], tokenizer))))
            continue
        content = message["content"].strip()
        turn = content + through[begin:].rpartition(content)[2] if content else ""
        if not turn or not full.startswith(turn, begin):
            raise DataError(
                f"{document.where}: the chat template rewrites message {index} once more messages follow (it "
                f"may drop reasoning), so this assistant turn cannot be found; {_SPLIT_ADVICE}"
            )
        turns.append((begin, begin + len(_closed(turn, tokenizer))))
    return full, turns


def _closed(turn: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The turn without white space after its closing special token: generation stops before writing that."""
    marks = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
    return turn.rstrip() if turn.rstrip().endswith(marks) else turn


def _render(
    document: Document,
    messages: tuple[Message, ...],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    prompt: bool = False,
    tokenize: bool = False,
) -> Any:
    """The template's text, or with `tokenize` its ids and assistant mask."""
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tokenize=tokenize,
            add_generation_prompt=prompt,
            return_dict=tokenize,
            return_assistant_tokens_mask=tokenize,
        )
    except Exception as error:  # templates raise whatever their author, or Jinja, chose
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise DataError(
            f"{document.where}: the chat template refuses messages with the roles {roles}: "
            f"{str(error)[:200]}; reorder or merge them as the model's template expects"
        ) from None
