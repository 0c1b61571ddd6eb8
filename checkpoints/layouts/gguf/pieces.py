"""A SentencePiece tokenizer as llama.cpp keeps it: pieces with their scores and kinds, out of tokenizer.model. Its
scores say which neighbours are joined first, and stand nowhere else; llama.cpp joins as the BPE of SentencePiece does.
"""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gguf import TokenType

from qat.errors import CheckpointError, UnsupportedError

FILE = "tokenizer.model"
SPACE = "\u2581"  # what SentencePiece writes for one
_BPE = 2  # model_type of a trainer_spec
_LAST, _ABSENT = -1000.0, -10000.0  # scores of added tokens, and of rows without a token


class Piece(NamedTuple):
    """One row of the vocabulary."""

    text: str
    score: float
    kind: TokenType


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind."""
    model = tokenizer["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def adds_space(tokenizer: dict[str, Any]) -> bool:
    """Whether text gets a space in front.

    Raises:
        UnsupportedError: text is normalized or split in other ways than llama.cpp's.
    """
    prefix, spaces = False, False
    for part in _steps(tokenizer):
        match part:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                spaces = True
            case {"type": "Metaspace", "replacement": "\u2581"}:
                prefix, spaces = prefix or part.get("prepend_scheme", "always") != "never", True
            case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}:
                pass  # there is none left
            case _:
                raise UnsupportedError(f"llama.cpp has nothing for a step of this tokenizer: {part}")
    if not spaces:
        raise UnsupportedError(f"llama.cpp writes spaces as {SPACE}, which this tokenizer does not")
    return prefix


def adds_space_once(tokenizer: dict[str, Any]) -> bool:
    """Whether that space stands at the start of a text only, where llama.cpp puts one behind each added token, too."""
    return any(part.get("prepend_scheme") == "first" for part in _steps(tokenizer))


def _steps(tokenizer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is done to text before pieces are joined, in order."""
    for step in (tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")):
        if step:
            yield from step.get("normalizers") or step.get("pretokenizers") or [step]


def read_pieces(file: Path) -> list[Piece]:
    """Every piece of a tokenizer.model.

    Raises:
        UnsupportedError: there is none, or it joins otherwise.
        CheckpointError: it is damaged.
    """
    if not file.is_file():
        raise UnsupportedError(
            f"{file.parent} has no {FILE}, which holds the scores that llama.cpp joins the pieces of a SentencePiece "
            "tokenizer by; put it beside tokenizer.json"
        )
    pieces, method = [], 1
    try:
        for field, value in _fields(file.read_bytes()):
            if field == 1:
                inner = dict(_fields(value))
                (score,) = struct.unpack("<f", inner.get(2, b"\0\0\0\0"))
                pieces.append(Piece(inner[1].decode(), score, TokenType(inner.get(3, 1))))
            elif field == 2:
                method = dict(_fields(value)).get(3, 1)
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}") from error
    if method != _BPE or not pieces:
        raise UnsupportedError(f"{file} is no BPE of SentencePiece, whose way to join pieces llama.cpp has")
    return pieces


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a message's fields (protocol buffers): whole numbers, or bytes."""
    at = 0
    while at < len(message):
        key, at = _number(message, at)
        if key & 7 == 0:
            value, at = _number(message, at)
            yield key >> 3, value
            continue
        size, at = (8, at) if key & 7 == 1 else (4, at) if key & 7 == 5 else _number(message, at)
        if key & 7 not in (1, 2, 5) or at + size > len(message):
            raise ValueError(f"field {key} at byte {at}")
        yield key >> 3, message[at : at + size]
        at += size


def _number(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | byte % 128 << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def rows(
    pieces: list[Piece], added: dict[int, dict[str, Any]], size: int, looks_special: Callable[[str], bool] | None
) -> list[Piece]:
    """The vocabulary of so many rows, `added` tokens (by number, as tokenizer_config.json has them) over the pieces.
    `looks_special` says which of them steer beside those that say so; without it, they stand as they are written."""
    if len(pieces) > size:
        raise UnsupportedError(f"the tokenizer has {len(pieces)} pieces, but the embedding only {size} rows")
    absent = [Piece(f"[PAD{number}]", _ABSENT, TokenType.UNUSED) for number in range(len(pieces), size)]
    found = [*pieces, *absent]
    for number, token in added.items():
        if number >= size:
            raise UnsupportedError(f"the tokenizer has token {number}, but the embedding only {size} rows")
        special = token.get("special") or (looks_special is not None and looks_special(token["content"]))
        as_is = special or looks_special is None
        text = token["content"] if as_is else token["content"].replace(SPACE, " ")
        found[number] = Piece(text, _LAST, TokenType.CONTROL if special else TokenType.USER_DEFINED)
    return found
