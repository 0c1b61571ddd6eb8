"""Phi-3's GGUF files inside llama.cpp and beside its converter's, as `test_llama_cpp.py` does with other families."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from qat.checkpoints.hf import load_tokenizer
from qat.checkpoints.layouts.gguf.read import GgufFile
from qat.engines.llama_cpp import note_of_context
from tests.checkpoints.layouts.phi3 import CAPITAL, PHI3S, WORDS, byte_level_files
from tests.checkpoints.sentencepieces import PHI3, sentencepiece_files
from tests.engines.test_llama_cpp import (
    PYTHON,
    REST,
    assert_converted,
    command,
    export,
    in_float32,
    llama_cpp,
    needs_converter,
    needs_engine,
    ours,
    untrained,
)
from tests.tiny import tiny_model

RULES = [{"match": "*_proj", "weight": "q4_0"}, REST]
TEXTS = [
    "The quick brown fox, 345 (jumps)",
    "<|user|>\n  Over the dog<|end|>\n<|assistant|>\n jumps</s>  the<|endoftext|>\n fox",
    " <|user|> a <|user|>b",
]


def tokens(file: Path, texts: list[str], add_bos: bool = True) -> list[list[int]]:
    """llama.cpp's."""
    program = (
        "import json, sys; from llama_cpp import Llama; m = Llama(sys.argv[1], vocab_only=True, verbose=False); "
        f"print(json.dumps([m.tokenize(t.encode(), {add_bos}, special=True) for t in json.loads(sys.argv[2])]))"
    )
    words = [PYTHON, "-c", program, str(file), json.dumps(texts)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found: list[list[int]] = json.loads(done.stdout)
    return found


@needs_engine
@pytest.mark.parametrize("kind", PHI3S)
def test_dequantized_weights_give_our_logits(kind: str, tmp_path: Path) -> None:
    """Fused layers, rotation, its factors: everything but the rounding of inputs."""
    file = export(tmp_path, "phi3", "q4_0", tables=False, **PHI3S[kind])
    (theirs,) = llama_cpp(tmp_path, [in_float32(file, tmp_path / "f32.gguf")])
    own = ours(file, False)
    assert torch.equal(own.argmax(-1), theirs.argmax(-1))
    torch.testing.assert_close(own, theirs, rtol=0, atol=2e-4)


def test_factors_of_long_texts_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"general.architecture": "phi3", "phi3.context_length": 512}
    longrope = {"phi3.rope.scaling.original_context_length": 256, "phi3.rope.scaling.attn_factor": 1.06}
    note_of_context({**facts, "phi3.rope.scaling.original_context_length": 256}, None)
    note_of_context(facts | longrope, 256)
    assert capsys.readouterr().err == ""
    for positions in (257, None):
        note_of_context(facts | longrope, positions)
        assert "rotates every text as one of more than 256 tokens" in capsys.readouterr().err


@needs_engine
def test_only_texts_within_the_window_are_read_alike(tmp_path: Path) -> None:
    """What export warns of: of later tokens llama.cpp sees more."""
    file = export(tmp_path, "phi3", "q4_0", tables=False, sliding_window=16)
    (theirs,) = llama_cpp(tmp_path, [in_float32(file, tmp_path / "f32.gguf")])
    apart = (ours(file, False) - theirs).abs().amax(-1)[0]
    assert float(apart[:16].max()) < 2e-4 and float(apart[16:].min()) > 1e-2


@needs_converter
@pytest.mark.parametrize("pieces", [False, True], ids=["bytes", "pieces"])
@pytest.mark.parametrize("kind", PHI3S)
def test_keys_and_unquantized_tensors_are_the_converters(kind: str, pieces: bool, tmp_path: Path) -> None:
    folder = tmp_path / ("phi3" if pieces else "mini")
    source = tiny_model("phi3", folder, **PHI3S[kind])
    if pieces:
        sentencepiece_files(source, added=PHI3)
    else:  # the class by which the converter knows Phi-4's tokenizer
        path = source / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    assert_converted(untrained(source, RULES), source, pieces)


@needs_engine
@pytest.mark.parametrize("folder", ["Phi-3-mini", "phi3", "mine"])
def test_tokens_swallow_spaces_as_in_transformers(folder: str, tmp_path: Path) -> None:
    """Which llama.cpp does by the model's name only."""
    source = tiny_model("phi3", tmp_path / folder, num_hidden_layers=1)
    tokenizer = sentencepiece_files(source, added=PHI3)
    file = untrained(source, RULES)
    assert tokens(file, TEXTS) == [tokenizer(text)["input_ids"] for text in TEXTS]


@needs_engine
def test_a_space_stands_behind_each_added_token(tmp_path: Path) -> None:
    """What export warns of where a tokenizer puts one before the start of a text only."""
    source = tiny_model("phi3", tmp_path / "phi3", num_hidden_layers=1)
    sentencepiece_files(source, added=PHI3)
    path = source / "tokenizer.json"
    meta = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": None, "pre_tokenizer": meta}))
    file, tokenizer = untrained(source, RULES), load_tokenizer(source)
    start, behind = tokens(file, ["The dog", "<|user|>The dog"])
    assert start == tokenizer("The dog")["input_ids"] and behind != tokenizer("<|user|>The dog")["input_ids"]


@needs_engine
@pytest.mark.parametrize("rule", ["dbrx", "gpt-4o"])
def test_words_are_split_as_in_transformers(rule: str, tmp_path: Path) -> None:
    source = tiny_model("phi3", tmp_path / "mini", num_hidden_layers=1)
    byte_level_files(source, rule)
    file, tokenizer = untrained(source, RULES), load_tokenizer(source)
    assert GgufFile(file).facts["tokenizer.ggml.pre"] == rule
    assert tokens(file, WORDS, add_bos=False) == [tokenizer(text)["input_ids"] for text in WORDS]
    capital = tokens(file, [CAPITAL], add_bos=False) == [tokenizer(CAPITAL)["input_ids"]]
    assert capital == (rule == "dbrx")  # of the other one export warns


@needs_engine
def test_both_write_the_same_text(tmp_path: Path) -> None:
    """`qat generate` by llama.cpp, and by our own reader."""
    source = tiny_model("phi3", tmp_path / "phi3", **PHI3S["4 mini"])
    sentencepiece_files(source, added=PHI3)
    file = untrained(source, RULES)
    texts = []
    for engine, each in (("llama.cpp", in_float32(file, tmp_path / "f32.gguf")), ("qat", file)):
        into, where = command("generate", each, "The quick", "--tokens", 6, "--engine", engine)
        done = subprocess.run(
            into, env={**where, "QAT_CACHE": str(tmp_path)}, capture_output=True, text=True, check=True
        )
        texts.append(done.stdout)
    assert texts[0] == texts[1] and texts[0].startswith("The quick")
