"""Text of tokens as they come equals the text of all of them, in every kind of vocabulary and wherever it ends."""

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from qat.checkpoints.decoding import TextStream
from tests.tiny import tiny_tokenizer

TEXT = "fox\n dog é 海 \U0001f30a, \n   indented"


def sentencepiece() -> Any:
    """As Llama's: a first token loses its space, and characters out of the vocabulary are written in bytes."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁fox",
        "▁dog",
        "▁▁",
        *"foxdogé,",
    ]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(dict.fromkeys(words))}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def wordpiece() -> Any:
    words = ["[UNK]", "fox", "##es", "do", "n't", ".", ",", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", sep_token="[SEP]")


def streamed(tokenizer: Any, ids: list[int]) -> tuple[list[str], str]:
    stream = TextStream(tokenizer)
    return [stream.push(token) for token in ids], stream.rest()


@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece])
def test_a_text_of_long_characters(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer(TEXT)["input_ids"]
    pieces, rest = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == TEXT and rest == ""
    assert len([piece for piece in pieces if piece]) > 10 and not any("\ufffd" in piece for piece in pieces)


def test_an_end_within_a_character_is_shown() -> None:
    for tokenizer, marks in ((tiny_tokenizer(), 1), (sentencepiece(), 2)):  # per byte in SentencePiece
        ids = tokenizer("a 海海")["input_ids"][:-1]
        pieces, rest = streamed(tokenizer, ids)
        assert ("".join(pieces), rest) == ("a 海", "\ufffd" * marks)


@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece, wordpiece])
def test_random_tokens(make: Any) -> None:
    tokenizer, draw = make(), random.Random(0)
    characters = [i for i in range(len(tokenizer)) if "\ufffd" not in tokenizer.decode([i])]
    for _ in range(300):
        ids = draw.choices(range(len(tokenizer)) if make is tiny_tokenizer else characters, k=12)
        pieces, rest = streamed(tokenizer, ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=True), ids
