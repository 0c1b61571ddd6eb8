"""GGUF files against the `gguf` package, whose dequantization and reader are llama.cpp's authors' own, against plain
transformers, and against what llama.cpp's converter writes of the same models (its keys and names, written down here;
`make test-llama-cpp` runs the converter itself)."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from torch import Tensor, nn

from qat.checkpoints.export import check_export
from qat.checkpoints.hf import load_tokenizer
from qat.checkpoints.layouts.gguf.file import RECORD_KEY
from qat.checkpoints.layouts.gguf.load import load_file
from qat.checkpoints.layouts.gguf.pieces import adds_space, read_pieces
from qat.checkpoints.layouts.gguf.read import GgufFile
from qat.checkpoints.layouts.gguf.types import FORMATS, row_bytes, unit
from qat.checkpoints.layouts.gguf.vocabulary import splitting
from qat.cli import main
from qat.errors import CheckpointError, UnsupportedError
from qat.init.scales import initial_scales
from qat.modes import served
from qat.numbers.format import Format
from qat.numbers.numerics import quantize
from qat.sites import weights
from tests.checkpoints.exports import ids, quantized, quiet_export
from tests.checkpoints.sentencepieces import model_file, sentencepiece_files
from tests.tiny import tiny_model, tiny_tokenizer

REST = {"match": "*", "skip": "the rest"}
FOUR, EIGHT = "q4_0", "q8_0"
PROJECTIONS = [{"match": "*_proj", "weight": FOUR}, REST]
KINDS = ("llama", "mistral", "qwen2", "qwen3")
LLAMA_3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
}
# What llama.cpp's convert_hf_to_gguf.py (in llama-cpp-python 0.3.36) writes of the tiny Llama, vocabulary aside.
CONVERTED = {
    "general.architecture": "llama",
    "general.type": "model",
    "general.size_label": "394K",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 128,
    "llama.feed_forward_length": 256,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 10000.0,
    "llama.attention.key_length": 32,
    "llama.attention.value_length": 32,
    "llama.vocab_size": 384,
    "llama.rope.dimension_count": 32,
    "general.quantization_version": 2,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
}


def written(kind: str, folder: Path, rules: Any = PROJECTIONS, **config: Any) -> tuple[nn.Module, Path]:
    """A tiny trained model, and its file."""
    source = tiny_model(kind, folder / "source", **config)
    model = quantized(source, rules, round_bf16=False, tied="share")
    return model, quiet_export(model, source, folder / "out.gguf", "gguf")


@pytest.mark.parametrize(("kind", "fmt"), FORMATS.items(), ids=lambda each: each.name)
def test_blocks_are_what_ggml_dequantizes(kind: GGMLQuantizationType, fmt: Format) -> None:
    columns = 3 * unit(kind)
    weight = torch.randn(12, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 12)[:, None]
    weight[3, 32:64] = 0.0
    weight[5], weight[6] = 0.0, weight[6].abs()  # a block of zeros; no minimum, or no scale of one of the signs
    for scales in (None, initial_scales(weight, fmt)):
        q = quantize(weight, fmt, scales)
        raw = row_bytes(q)
        assert raw.shape == (12, gguf.quant_shape_to_byte_shape((12, columns), kind)[1]) and raw.dtype == torch.uint8
        above = q.scales.global_scale if fmt.global_scale else None  # a tensor of its own in the file
        values = torch.from_numpy(gguf.quants.dequantize(raw.numpy(), kind))
        assert torch.equal(values if above is None else values * above, q.dequantize())


def test_a_negative_scale_is_the_mirrored_element() -> None:
    weight = torch.tensor([[8.0, *[-1.0] * 31, -8.0, *[1.0] * 31]])
    raw = row_bytes(quantize(weight, FORMATS[GGMLQuantizationType.Q4_0])).view(2, 18)
    assert raw[:, :2].contiguous().view(torch.float16).flatten().tolist() == [-1.0, 1.0]
    assert raw[0, 2].item() == 0 | 9 << 4 and raw[1, 2].item() == 0 | 9 << 4  # -8 + 8, 1 + 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_the_trained_model(kind: str, tmp_path: Path) -> None:
    model, out = written(kind, tmp_path)
    file = GgufFile(out)
    with torch.no_grad():
        trained = {f"{path}.weight": site.value().float() for path, site in weights(model).items()}
    assert file.record is not None and len(trained) == 14
    for path, entry in file.record["modules"].items():
        assert torch.equal(file.value(entry["tensor"]), trained[f"{path}.weight"])
        assert file.stored(entry["tensor"]).tensor_type is GGMLQuantizationType.Q4_0
    with torch.no_grad(), served(model):
        assert torch.equal(load_file(out)(ids()).logits, model(ids()).logits)


def test_experts_are_stacked(tmp_path: Path) -> None:
    rules = [{"match": "re:.*(_proj|experts.*)", "weight": FOUR}, REST]
    model, out = written("qwen3_moe", tmp_path, rules)
    file = GgufFile(out)
    stack = file.value("blk.1.ffn_down_exps.weight")
    assert stack.shape == (4, 128, 128) and file.record is not None
    assert file.stored("blk.0.ffn_gate_inp.weight").tensor_type is GGMLQuantizationType.F32
    entry = file.record["modules"]["model.layers.1.mlp.experts.2.down_proj"]
    assert entry["tensor"] == "blk.1.ffn_down_exps.weight" and entry["expert"] == 2
    with torch.no_grad():
        values = {site.path: site.value() for site in weights(model).values() if "experts" in site.path}
    down = next(value for path, value in values.items() if path.startswith("model.layers.1") and "down" in path)
    assert torch.equal(stack, down)


def test_settings_and_names_are_those_of_the_converter(tmp_path: Path) -> None:
    _, out = written("llama", tmp_path)
    fields = {name: field.contents() for name, field in GGUFReader(out).fields.items()}
    found = {name: fields.get(name) for name in CONVERTED}
    assert found == CONVERTED
    more = {"general.name", "general.file_type", "llama.attention.layer_norm_rms_epsilon", "tokenizer.chat_template",
            "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges", RECORD_KEY,
            "tokenizer.ggml.add_bos_token"}  # fmt: skip
    assert {name for name in fields if not name.startswith("GGUF.")} == CONVERTED.keys() | more
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    names = [tensor.name for tensor in GGUFReader(out).tensors]
    own = ("attn_k", "attn_output", "attn_q", "attn_v", "attn_norm", "ffn_down", "ffn_gate", "ffn_up", "ffn_norm")
    expected = {f"blk.{layer}.{name}.weight" for layer in range(2) for name in own}
    assert set(names) == expected | {"token_embd.weight", "output.weight", "output_norm.weight"}


def test_the_vocabulary_is_the_tokenizers(tmp_path: Path) -> None:
    _, out = written("llama", tmp_path)
    fields = GGUFReader(out).fields
    tokenizer = tiny_tokenizer()
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    assert len(tokens) == len(kinds) == 384 > len(names)
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        assert token == names.get(number, f"[PAD{number}]")
        wanted = gguf.TokenType.CONTROL if number < 3 else gguf.TokenType.NORMAL
        assert kind == (wanted if number in names else gguf.TokenType.UNUSED)


def test_llama_3_has_factors_of_its_frequencies(tmp_path: Path) -> None:
    """Against transformers, which divides the inverse frequencies by the same factors."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, out = written("llama", tmp_path, **LLAMA_3)
    factors = GgufFile(out).value("rope_freqs.weight")
    config = LlamaConfig(head_dim=32, max_position_embeddings=512, **LLAMA_3)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(plain / factors, theirs, rtol=1e-6, atol=0)
    assert factors[0] == 1 and factors[-1] == 8 and bool(((factors > 1) & (factors < 8)).any())


def shared(folder: Path, input: str | None = None) -> tuple[nn.Module, Path]:
    both = {"match": "re:lm_head|.*embed_tokens", "weight": EIGHT}
    head = [{"match": "lm_head", "weight": EIGHT, "input": input}] if input else []
    return written("llama", folder, [PROJECTIONS[0], *head, both], tie_word_embeddings=True)


def test_a_table_and_its_head_are_one_tensor(tmp_path: Path) -> None:
    model, out = shared(tmp_path)
    file = GgufFile(out)
    assert "output.weight" not in file.tensors
    assert file.stored("token_embd.weight").tensor_type is GGMLQuantizationType.Q8_0
    with torch.no_grad(), served(model):
        assert torch.equal(load_file(out)(ids()).logits, model(ids()).logits)


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    llama = tiny_model("llama", tmp_path / "llama", num_hidden_layers=1)
    rounded = quantized(llama, PROJECTIONS)
    with pytest.raises(UnsupportedError, match=r"q_proj: q4_0 was trained rounded to BF16, .*\.round_bf16: false"):
        quiet_export(rounded, llama, tmp_path / "a.gguf", "gguf")
    int4 = quantized(llama, [{"match": "*_proj", "weight": "int4_g64"}, REST], round_bf16=False)
    with pytest.raises(UnsupportedError, match=r"gguf cannot hold int4_g64 weights .*nearest it can: .*q4_0"):
        quiet_export(int4, llama, tmp_path / "a.gguf", "gguf")
    q4 = quantized(llama, PROJECTIONS, round_bf16=False)
    with pytest.raises(UnsupportedError, match=r"compressed-tensors cannot hold q4_0 weights \(gguf can\)"):
        quiet_export(q4, llama, tmp_path / "folder")
    with pytest.raises(CheckpointError, match=r"this target writes one file; give it a name that ends in \.gguf"):
        quiet_export(q4, llama, tmp_path / "folder", "gguf")
    (note,) = check_export(q4, llama)
    assert note.endswith("Export this run with --target gguf")
    olmo = tiny_model("olmo2", tmp_path / "olmo", num_hidden_layers=1)
    other = quantized(olmo, PROJECTIONS, round_bf16=False)
    with pytest.raises(UnsupportedError, match="GGUF files of 'olmo2' are not written: no tested mapping; there"):
        quiet_export(other, olmo, tmp_path / "a.gguf", "gguf")
    gemma = tiny_model("gemma", tmp_path / "gemma", num_hidden_layers=2)
    with pytest.raises(UnsupportedError, match=r"the model has other layer_types than llama\.cpp's"):
        quiet_export(quantized(gemma, PROJECTIONS, round_bf16=False), gemma, tmp_path / "a.gguf", "gguf")
    windowed = tiny_model("mistral", tmp_path / "mistral", num_hidden_layers=1, sliding_window=64)
    with pytest.raises(UnsupportedError, match=r"the model has sliding_window 64, which llama\.cpp's llama"):
        quiet_export(quantized(windowed, PROJECTIONS, round_bf16=False), windowed, tmp_path / "a.gguf", "gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "olmo", "gemma", "mistral"}


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    model, out = written("llama", tmp_path, num_hidden_layers=1)
    before = out.read_bytes()
    with pytest.raises(CheckpointError, match=r"out\.gguf exists; give another name or ask to overwrite it"):
        quiet_export(model, tmp_path / "source", out, "gguf")
    norm = model.get_submodule("model.norm")
    with torch.no_grad():
        norm.weight[3] = torch.nan  # type: ignore[index, operator]  # a parameter
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN or infinity; nothing was written"):
        quiet_export(model, tmp_path / "source", out, "gguf", overwrite=True)
    assert out.read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {"source", "out.gguf"}
    with torch.no_grad():
        norm.weight[3] = 0.5  # type: ignore[index, operator]  # a parameter
    quiet_export(model, tmp_path / "source", out, "gguf", overwrite=True)
    assert GgufFile(out).value("output_norm.weight")[3] == 0.5
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(b"GGUF of somebody else")
    with pytest.raises(CheckpointError, match="was not written by an export"):
        quiet_export(model, tmp_path / "source", foreign, "gguf", overwrite=True)


def test_ways_to_split_text_are_known_or_refused() -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    model = {"type": "BPE", "ignore_merges": False}
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    split: dict[str, Any] = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    threes = {**split, "pattern": {"Regex": words.replace(r"\p{N}|", r"\p{N}{1,3}|")}}
    digits = {"type": "Digits", "individual_digits": True}

    def tokenizer(*steps: dict[str, Any], **changes: Any) -> dict[str, Any]:
        chain = {"type": "Sequence", "pretokenizers": list(steps)}
        return {"model": model, "pre_tokenizer": chain, "normalizer": None, **changes}

    assert splitting(tokenizer(split, byte_level, normalizer={"type": "NFC"})) == "qwen2"
    assert splitting(tokenizer(threes, byte_level, model={**model, "ignore_merges": True})) == "llama-bpe"
    assert splitting(tokenizer(threes, byte_level)) == "dbrx"  # merges first, unlike Llama 3
    removed = {**threes, "behavior": "Removed", "invert": True}  # what is no word, and there is nothing else
    assert splitting(tokenizer(removed, byte_level)) == "dbrx"
    assert splitting(tokenizer(digits, {**byte_level, "use_regex": True})) == "smollm"
    assert splitting({**tokenizer(), "pre_tokenizer": {**byte_level, "use_regex": True}}) == "gpt-2"
    for wrong in (
        tokenizer(split, byte_level, normalizer={"type": "NFKC"}),
        tokenizer(split, split, byte_level),
        tokenizer({**split, "invert": True}, byte_level),
        tokenizer({**split, "behavior": "Removed"}, byte_level),
        tokenizer(split, byte_level, model={**model, "ignore_merges": True}),
        tokenizer(digits, byte_level),
        tokenizer(byte_level),
    ):
        with pytest.raises(UnsupportedError, match=r"llama\.cpp has no name for how this tokenizer splits"):
            splitting(wrong)
    with pytest.raises(UnsupportedError, match="kind Unigram is not written"):
        splitting(tokenizer(split, byte_level, model={"type": "Unigram"}))


def test_pieces_of_sentencepiece_keep_scores_and_kinds(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", num_hidden_layers=1)
    sentencepiece_files(source)
    out = quiet_export(quantized(source, PROJECTIONS, round_bf16=False), source, tmp_path / "out.gguf", "gguf")
    fields = {name: field.contents() for name, field in GGUFReader(out).fields.items()}
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("llama", "default")
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    vocabulary = load_tokenizer(source).get_vocab()
    assert all(tokens[number] == text for text, number in vocabulary.items()) and len(tokens) == 384
    first = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE]
    assert kinds[:4] == first and scores[259:262] == [0.0, -1.0, -2.0] and kinds[259] == gguf.TokenType.NORMAL
    assert (tokens[-1], scores[-1], kinds[-1]) == ("[PAD383]", -10000.0, gguf.TokenType.UNUSED)
    assert fields["tokenizer.ggml.add_bos_token"] is True and "tokenizer.ggml.merges" not in fields


def test_pieces_that_llama_cpp_would_join_otherwise_are_refused(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", num_hidden_layers=1)
    sentencepiece_files(source)
    model = quantized(source, PROJECTIONS, round_bf16=False)
    pieces, config = source / "tokenizer.model", source / "tokenizer_config.json"
    whole = pieces.read_bytes()
    said = config.read_text()

    def refused(error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            quiet_export(model, source, tmp_path / "out.gguf", "gguf")
        assert {path.name for path in tmp_path.iterdir()} == {"source"}

    config.write_text(said.replace('"add_prefix_space": true', '"add_prefix_space": false'))
    refused(UnsupportedError, "says add_prefix_space: False .* but tokenizer.json does otherwise")
    config.write_text(said)
    pieces.write_bytes(whole[:-2] + b"\x18\x01")  # a unigram model
    refused(UnsupportedError, r"tokenizer\.model is no BPE of SentencePiece")
    pieces.write_bytes(whole.replace(b"fox", b"fix"))
    refused(UnsupportedError, r"tokenizer\.json and tokenizer\.model differ, in \d+ pieces, such as '.*fix")
    pieces.write_bytes(whole[:-20])
    refused(CheckpointError, r"tokenizer\.model is damaged")
    pieces.unlink()
    refused(UnsupportedError, r"has no tokenizer\.model, which holds the scores .* put it beside tokenizer\.json")


def test_long_pieces_are_read(tmp_path: Path) -> None:
    """Whose lengths take two bytes."""
    pieces = [("\u2581" + "ab" * 150, -1.5, 1), ("<pad>", 0.0, 3)]
    (tmp_path / "tokenizer.model").write_bytes(model_file(pieces))
    assert [(piece.text, piece.score, int(piece.kind)) for piece in read_pieces(tmp_path / "tokenizer.model")] == pieces


def test_spaces_are_written_as_llama_cpp_writes_them() -> None:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    both = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
    meta = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    assert adds_space({"normalizer": both, "pre_tokenizer": None}) and not adds_space({"normalizer": replace})
    assert adds_space({"pre_tokenizer": meta}) and not adds_space(
        {"pre_tokenizer": {**meta, "prepend_scheme": "never"}}
    )
    with pytest.raises(UnsupportedError, match=r"nothing for a step of this tokenizer: \{'type': 'NFKC'\}"):
        adds_space({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, replace]}})
    with pytest.raises(UnsupportedError, match="which this tokenizer does not"):
        adds_space({"normalizer": None, "pre_tokenizer": None})


def test_rows_change_places_as_llama_cpp_rotates(tmp_path: Path) -> None:
    """Row 2 i of a head in the file is its row i, row 2 i + 1 its row i + half: neighbours are rotated together."""
    model, out = written("llama", tmp_path, num_hidden_layers=1)
    raw = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    for name, heads in (("q", 4), ("k", 2)):
        stored: Tensor = torch.from_numpy(
            gguf.quants.dequantize(raw[f"blk.0.attn_{name}.weight"].data, GGMLQuantizationType.Q4_0)
        )
        with torch.no_grad():
            trained = weights(model)[f"model.layers.0.self_attn.{name}_proj"].value()
        for head in range(heads):
            own, ours = stored[32 * head : 32 * head + 32], trained[32 * head : 32 * head + 32]
            assert torch.equal(own[0::2], ours[:16]) and torch.equal(own[1::2], ours[16:])


def test_a_file_is_read_where_llama_cpp_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    _, out = shared(tmp_path)
    assert main(["generate", str(out), "The quick brown", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("The quick brown")


def test_inputs_are_trained_by_llama_cpps_rule(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", num_hidden_layers=1)
    rules = [{"match": "*_proj", "weight": FOUR, "input": EIGHT}, REST]
    other = quantized(source, rules, round_bf16=False)
    with pytest.raises(UnsupportedError, match=r"activation_rule: vllm, .*; set scheme\.activation_rule: lla"):
        quiet_export(other, source, tmp_path / "out.gguf", "gguf")
    model = quantized(source, rules, round_bf16=False, activation_rule="llama_cpp")
    out = quiet_export(model, source, tmp_path / "out.gguf", "gguf")
    with torch.no_grad(), served(model):
        trained = model(ids()).logits
    file = load_file(out, inputs=True)
    file.get_submodule("lm_head")._forward_pre_hooks.clear()  # its BF16 inputs, which the scheme left alone
    with torch.no_grad():
        assert torch.equal(file(ids()).logits, trained)
        assert not torch.equal(load_file(out)(ids()).logits, trained)
