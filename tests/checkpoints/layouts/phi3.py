"""Tiny models of Phi-3's kind, by what is special about each: a window (as Phi-3-mini-4k has one), frequencies for long
texts (128k), a part of each head that is rotated (Phi-4-mini)."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qat.checkpoints.layouts.gguf.vocabulary import SPLITS


def longrope(rotated: int = 32, **more: Any) -> dict[str, Any]:
    """Settings of LongRoPE for so many rotated channels of a head of 32."""
    kinds = {"long_factor": 0.31, "short_factor": 0.07}
    factors = {kind: [1.0 + step * i for i in range(rotated // 2)] for kind, step in kinds.items()}
    part = {"partial_rotary_factor": rotated / 32} if rotated != 32 else {}
    return {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **factors, **part, **more}}


PHI3S: dict[str, dict[str, Any]] = {
    "4k": {"sliding_window": 500, "original_max_position_embeddings": 512},
    "128k": {**longrope(), "original_max_position_embeddings": 32, "sliding_window": 4096},
    "128k, short text": {**longrope(), "original_max_position_embeddings": 256},
    "partial": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75}},
    "4 mini": {**longrope(24), "original_max_position_embeddings": 256, "tie_word_embeddings": True},
}
"""By name, what tiny_model("phi3") is given."""

WORDS = [
    "HelloWorld's 12345 don't STOP\n\n  x",
    "camelCaseWords /and\n/paths, IT'S 1a2\t\r\n (ok)  ",
    "Hello World helloWORLD",
]
"""Texts that Phi-4's rules (dbrx) and those of Phi-4-mini (gpt-4o) split in two ways."""


CAPITAL = "\u00e9\u00c9cole"
"""A word that llama.cpp splits otherwise by gpt-4o's rule."""


def byte_level_files(folder: Path, rule: str) -> None:
    """A tokenizer of bytes that joins all over `WORDS`, but for what a rule splits, in place of a model's own."""
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, initial_alphabet=letters, show_progress=False, min_frequency=1
    )
    whole.train_from_iterator([*WORDS, CAPITAL], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    ).save_pretrained(folder)
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": SPLITS[rule]}, "behavior": "Removed", "invert": True}
    saved["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, saved["pre_tokenizer"]]}
    saved["model"]["ignore_merges"] = rule == "llama-bpe"
    path.write_text(json.dumps(saved))
