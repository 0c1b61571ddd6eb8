"""A tokenizer as llama.cpp keeps it: tokens, their kinds, merges, and the name of the rule that splits text first.

llama.cpp knows such rules by name only, so the name follows from what tokenizer.json does: a tokenizer that does
anything else is refused, since it would split text otherwise there.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from qat.checkpoints.hf import load_tokenizer, read_json
from qat.checkpoints.layouts.gguf.families import Family
from qat.checkpoints.layouts.gguf.pieces import FILE, adds_space, adds_space_once, is_sentencepiece, read_pieces, rows
from qat.errors import UnsupportedError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"qwen2": _WORDS % "", "llama-bpe": _WORDS % "{1,3}", "dbrx": _WORDS % "{1,3}", "gpt-4o": _CASED}
"""Regular expressions of words, by llama.cpp's names; of `gpt-4o` it has one that knows capitals of ASCII only."""
_MERGED_FIRST = ("llama-bpe",)  # rules under which llama.cpp takes a word that is a token before it merges
_CAPITALS = "llama.cpp splits words with marks, or capitals outside of ASCII, otherwise than this tokenizer (gpt-4o)"
_BEHIND = (
    "llama.cpp puts a space before the text behind each added token, such as <s>, where this tokenizer "
    "(prepend_scheme: first) puts one before the start of a text only"
)
_NFC = ("qwen2",)  # whose normalization llama.cpp leaves out


def splitting(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name (`tokenizer.ggml.pre`) for how a tokenizer.json splits text.

    Raises:
        UnsupportedError: llama.cpp has no such tokenizer, or none that was compared here.
    """
    model, steps = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UnsupportedError(
            f"a tokenizer of kind {model.get('type')} is not written to GGUF files; BPE is, of bytes or SentencePiece"
        )
    chain = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    early = bool(model.get("ignore_merges"))
    name = next((name for name in _named(chain) if early == (name in _MERGED_FIRST)), None)
    normalized = (tokenizer.get("normalizer") or {}).get("type")
    if name is None or not (normalized is None or (normalized == "NFC" and name in _NFC)):
        what = json.dumps({"normalizer": tokenizer.get("normalizer"), "pre_tokenizer": steps}, ensure_ascii=False)
        raise UnsupportedError(f"llama.cpp has no name for how this tokenizer splits text: {what[:400]}")
    return name


def _named(chain: list[dict[str, Any]]) -> list[str]:
    """Names of rules that split like it, whatever they do then."""
    *first, last = chain
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return []
    if not first:
        return ["gpt-2"] if last.get("use_regex", True) else []
    if len(first) > 1:
        return []
    (step,) = first
    if step.get("type") == "Digits" and step.get("individual_digits") and last.get("use_regex", True):
        return ["smollm"]
    # The words alone, or, as the expressions leave nothing between them, nothing but the words.
    words = (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))
    if step.get("type") == "Split" and words and not last.get("use_regex", True):
        return [name for name, regex in SPLITS.items() if regex == step["pattern"].get("Regex")]
    return []


def add_vocabulary(writer: GGUFWriter, source: Path, size: int, family: Family) -> None:
    """Everything about the tokenizer in `source`, padded to the `size` rows of the embedding.

    Raises:
        UnsupportedError: a tokenizer that llama.cpp cannot express.
        CheckpointError: there is none.
    """
    fast = source / "tokenizer.json"
    if not fast.is_file():
        raise UnsupportedError(f"{source} has no tokenizer.json, which GGUF's vocabulary is made of")
    whole = read_json(fast)
    tokenizer: Any = load_tokenizer(source)
    config = read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").is_file() else {}
    if writer.arch == "llama" and config.get("add_prefix_space") is not None:
        writer.add_add_space_prefix(config["add_prefix_space"])
    if is_sentencepiece(whole):
        if not family.spaced:
            config = {**config, "add_prefix_space": False}
        special = _add_pieces(writer, source, whole, config, size, family.joined)
        if writer.arch != "llama" and config.get("add_prefix_space") is False:
            writer.add_add_space_prefix(False)
    else:
        rule = splitting(whole)
        if rule == "gpt-4o":
            warnings.warn(_CAPITALS, UserWarning, stacklevel=2)
        special = _add_byte_level(writer, source, rule, _tokens(tokenizer, size))
    if "bos" not in special.add_special_token and (bos := special.special_token_ids.get("bos")) is not None:
        special.add_special_token["bos"] = tokenizer.encode("a")[:1] == [bos]
    special.add_to_gguf(writer, quiet=True)


def _add_byte_level(
    writer: GGUFWriter, source: Path, rule: str, vocabulary: tuple[list[str], list[TokenType]]
) -> SpecialVocab:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(vocabulary[0])
    writer.add_token_types(vocabulary[1])
    return SpecialVocab(source, load_merges=True)


def _add_pieces(
    writer: GGUFWriter, source: Path, whole: dict[str, Any], config: dict[str, Any], size: int, joined: bool
) -> SpecialVocab:
    """The rows of a SentencePiece tokenizer, with what tokenizer.json and tokenizer_config.json add to its pieces;
    `joined`: see `Family`."""
    pieces, said = read_pieces(source / FILE), config.get("add_prefix_space")
    if adds_space(whole) != (said is None or bool(said)):
        raise UnsupportedError(
            f"tokenizer_config.json says add_prefix_space: {said} (which llama.cpp takes for true where it is absent), "
            "but tokenizer.json does otherwise; make them agree"
        )
    if adds_space_once(whole):
        warnings.warn(_BEHIND, UserWarning, stacklevel=2)
    known = whole["model"]["vocab"]
    apart = [piece.text for number, piece in enumerate(pieces) if known.get(piece.text) != number]
    if apart:
        raise UnsupportedError(f"tokenizer.json and {FILE} differ, in {len(apart)} pieces, such as {apart[0]!r}")
    every = {token["id"]: token for token in whole.get("added_tokens", ())}
    added = {number: token for number, token in every.items() if number >= len(pieces)}
    added |= {int(number): token for number, token in config.get("added_tokens_decoder", {}).items()}
    vocabulary = rows(pieces, added | every, size, None) if joined else rows(pieces, added, size, _looks_special)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([row.text for row in vocabulary])
    writer.add_token_scores([row.score for row in vocabulary])
    writer.add_token_types([row.kind for row in vocabulary])
    return SpecialVocab(source, n_vocab=len(vocabulary))


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[TokenType]]:
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(names) >= size:
        raise UnsupportedError(f"the tokenizer has token {max(names)}, but the embedding only {size} rows")
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(size):
        token, kind = names.get(number, f"[PAD{number}]"), TokenType.UNUSED
        if number in added:
            if not added[number].normalized:
                token = tokenizer.decode(tokenizer.encode(token, add_special_tokens=False))
            special = added[number].special or _looks_special(token)
            kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
            token = token if special else token.replace("\u2581", " ")
        elif number in names:
            kind = TokenType.NORMAL
        tokens.append(token)
        kinds.append(kind)
    return tokens, kinds


def _looks_special(token: str) -> bool:
    """Some tokenizers leave out the mark of tokens that steer."""
    return token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        token.startswith(start) and token.endswith(end)
        for start, end in (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    )
