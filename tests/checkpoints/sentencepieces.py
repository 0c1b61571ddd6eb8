"""A small tokenizer of SentencePiece's kind (BPE with bytes for what it does not know), as Llama 2 and Mistral 7B have
one: tokenizer.model, written here field by field, beside the tokenizer.json that follows from it."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import _TEXT

SPACE = "\u2581"


PHI3 = [
    AddedToken("</s>", rstrip=True, normalized=False, special=False),
    AddedToken("<|endoftext|>", normalized=False, special=True),
    *(AddedToken(f"<|{name}|>", rstrip=True, normalized=False, special=True) for name in ("assistant", "end", "user")),
]
"""What Phi-3's tokenizer adds to Llama 2's pieces, some of it: all but the first of those tokens swallow spaces."""


def sentencepiece_files(folder: Path, prefix: bool = True, added: Sequence[AddedToken] = ()) -> PreTrainedTokenizerFast:
    """Put them into a model's folder, in place of its own tokenizer; `added` tokens may change pieces."""
    pieces = _pieces()
    (folder / "tokenizer.model").write_bytes(model_file(pieces))
    ranks = {text: number for number, (text, _, kind) in enumerate(pieces) if kind == 1}
    merges = [
        (text[:at], text[at:])
        for text in sorted(ranks, key=ranks.__getitem__)
        for at in range(1, len(text))
        if text[:at] in ranks and text[at:] in ranks
    ]
    vocabulary = {text: number for number, (text, _, _) in enumerate(pieces)}
    whole = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    whole.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    whole.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    whole.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>", "</s>")])
    whole.add_tokens([token for token in added if not token.special])
    whole.add_special_tokens([token for token in added if token.special])
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_prefix_space=prefix
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("tokenizer_class", None)
    path.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return tokenizer


def _pieces() -> list[tuple[str, float, int]]:
    """Text, score and kind of each: unknown, control, bytes, then what is joined in order, then single characters."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trained.train_from_iterator(_TEXT, trainers.BpeTrainer(vocab_size=110, show_progress=False))
    texts = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    joined, single = [t for t in texts if len(t) > 1], [t for t in texts if len(t) == 1]
    ordered = [(text, -float(number), 1) for number, text in enumerate(joined + single)]
    return [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        *((f"<0x{b:02X}>", 0.0, 6) for b in range(256)),
        *ordered,
    ]


def model_file(pieces: list[tuple[str, float, int]], method: int = 2) -> bytes:
    """A ModelProto of sentencepiece_model.proto: pieces (1), then a trainer_spec (2) with
    byte_fallback (35) and its model_type (3)."""
    whole = b""
    for text, score, kind in pieces:
        inner = (
            _field(1, text.encode())
            + b"\x15"
            + struct.pack("<f", score)
            + (b"\x18" + bytes([kind]) if kind > 1 else b"")
        )
        whole += _field(1, inner)
    return whole + _field(2, b"\x98\x02\x01\x18" + bytes([method]))


def _field(number: int, value: bytes) -> bytes:
    size, length = len(value), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + value
