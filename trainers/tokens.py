"""Documents as token ids, with one flag per token that says whether a model should learn to produce it.

A text is learnt whole. Of a chat every assistant turn is learnt, and nothing else; where a turn begins and
ends comes from the tokenizer's own template, and a template for which that cannot be known for certain is
refused (see `chats`). Of a prompt with its completion only the completion is learnt.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from qat.errors import DataError
from qat.trainers import chats
from qat.trainers.records import CHATS, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 1 << 18  # texts handed to the tokenizer at once; it works on them in parallel

Ids = npt.NDArray[np.int32]
Learn = npt.NDArray[np.bool_]


class Tokens(NamedTuple):
    """Token ids of one document, int32 of shape (n,), which of them are to be learnt, bool of shape (n,), the
    kind of record it was, and how many assistant turns at its beginning were left out."""

    ids: Ids
    learn: Learn
    shape: str = "text"
    leading: int = 0


def encode(documents: Iterator[Document], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Tokens]:
    """Tokenise documents in order. A chat without an assistant turn comes out with nothing to learn.

    A text ends with the EOS token if the tokenizer has one; a chat is exactly what its template renders.

    Raises:
        DataError: a chat cannot be rendered, or its assistant turns cannot be found.
    """
    waiting: list[Document] = []
    size = 0
    for document in documents:
        # What can be either is a chat where there is a template.
        chat = document.shape in CHATS or (
            document.messages and (tokenizer.chat_template or not (document.prompt or document.text))
        )
        if chat or document.prompt:
            yield from _encode_texts(waiting, tokenizer)
            waiting, size = [], 0
            yield _encode_chat(document, tokenizer) if chat else _encode_completion(document, tokenizer)
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
    shape, leading = _shown(document, chat=True), document.leading
    if not document.messages:
        return Tokens(np.empty(0, np.int32), np.empty(0, np.bool_), shape, leading)
    chat = chats.chat(document, tokenizer)
    if chat.marked:
        return Tokens(*_marked(chat), shape, leading)
    text, spans = chats.turns(chat)
    ids, offsets = _offsets(text, tokenizer, document.where, special=False)
    return Tokens(ids, _inside(offsets, spans), shape, leading)


def _encode_completion(document: Document, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """A prompt and its text as one text, of which what follows the prompt is learnt, the EOS token included."""
    text = document.prompt + document.text
    ids, offsets = _offsets(text, tokenizer, document.where, special=True)
    learn = _inside(offsets, [chats.Span(len(document.prompt), len(text))])
    end = tokenizer.eos_token_id
    if end is not None and (not len(ids) or ids[-1] != end):
        ids, learn = np.append(ids, np.int32(end)), np.append(learn, True)
    elif end is not None:
        learn[-1] = True
    return Tokens(ids, learn, _shown(document, chat=False))


def _marked(chat: chats.Chat) -> tuple[Ids, Learn]:
    """Ids and what the template's own marks say is the assistant's, apart from the context."""
    encoded = chat.render(tokenize=True)
    ids, learn = np.asarray(encoded["input_ids"], np.int32), np.asarray(encoded["assistant_masks"], np.bool_)
    if any(message["role"] == "assistant" for message in chat.messages[: chat.context]):
        before = chat.render(chat.messages[: chat.context], tokenize=True)["assistant_masks"]
        learn[np.flatnonzero(learn)[: sum(before)]] = False
    if any(m["role"] == "assistant" and m.get("weight") == 0 for m in chat.messages[chat.context :]):
        raise DataError(
            f"{chat.where}: turns of weight 0 cannot be separated where the template itself marks what is learnt; "
            "end the chat before them, or put them into the prompt"
        )
    if chat.learnt and not learn.any():
        raise DataError(f"{chat.where}: the template's generation marks cover no token; repair the template")
    return ids, learn


def _offsets(
    text: str, tokenizer: "PreTrainedTokenizerBase", where: str, *, special: bool
) -> tuple[Ids, npt.NDArray[np.int64]]:
    """Ids of a text, and the characters that each stands for: int64 of shape (n, 2)."""
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise DataError(f"{where}: {kind} cannot map tokens to characters; use a fast tokenizer")
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return np.asarray(encoded["input_ids"], np.int32), offsets


def _inside(offsets: npt.NDArray[np.int64], spans: list[chats.Span]) -> Learn:
    """Which tokens begin inside one of the spans; some tokenizers leave white space with an empty offset at its end,
    and so a token without characters is inside only after the first place."""
    starts, ends = offsets.T
    learn = np.zeros(len(starts), np.bool_)
    for span in spans:
        begins = (starts > span.begin) | ((starts == span.begin) & (ends > starts))
        learn |= begins & ((starts < span.end) if span.whole else (ends <= span.end))
    return learn


def _shown(document: Document, *, chat: bool) -> str:
    """The kind of record, and what was made of one that can be a chat or a text."""
    if not document.prompt and not document.text:
        return document.shape
    return f"{document.shape} as chats" if chat else f"{document.shape} as plain text"
