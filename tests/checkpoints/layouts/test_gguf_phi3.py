"""Phi-3 in GGUF files: fused layers, LongRoPE, rotation of a part of each head, a window, and a tokenizer whose tokens
swallow spaces. `tests/engines/test_llama_cpp_phi3.py` compares with llama.cpp and its converter."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from tokenizers import AddedToken
from torch import nn

from qat.checkpoints.export import export_model
from qat.checkpoints.hf import ModelConfig, load_model, load_tokenizer, resolve
from qat.checkpoints.layouts.gguf.load import load_file
from qat.checkpoints.layouts.gguf.read import GgufFile
from qat.checkpoints.layouts.gguf.spaces import name_for
from qat.checkpoints.verify_file import verify_file
from qat.cli import main
from qat.errors import UnsupportedError
from qat.modes import served
from qat.sites import weights
from tests.checkpoints.exports import ids, quantized, quiet_export
from tests.checkpoints.layouts.phi3 import PHI3S, WORDS, byte_level_files, longrope
from tests.checkpoints.sentencepieces import PHI3, sentencepiece_files
from tests.tiny import tiny_model

REST = {"match": "*", "skip": "the rest"}
PROJECTIONS = [{"match": "*_proj", "weight": "q4_0"}, REST]


def written(folder: Path, weight: str = "q4_0", **config: Any) -> tuple[nn.Module, Path]:
    source = tiny_model("phi3", folder / "source", **config)
    model = quantized(source, [{"match": "*_proj", "weight": weight}, REST], round_bf16=False, tied="share")
    return model, quiet_export(model, source, folder / "out.gguf", "gguf")


@pytest.mark.parametrize("kind", PHI3S)
def test_a_file_is_the_trained_model(kind: str, tmp_path: Path) -> None:
    model, out = written(tmp_path, **PHI3S[kind])
    file = GgufFile(out)
    assert file.record is not None and len(file.record["modules"]) == 8
    with torch.no_grad():
        trained = {path: site.value().float() for path, site in weights(model).items()}
    for path, entry in file.record["modules"].items():
        stored = file.stored(entry["tensor"])
        values = torch.from_numpy(gguf.quants.dequantize(stored.data, GGMLQuantizationType.Q4_0))
        assert stored.tensor_type is GGMLQuantizationType.Q4_0 and torch.equal(values, trained[path])
    with torch.no_grad(), served(model):
        assert torch.equal(load_file(out)(ids()).logits, model(ids()).logits)
    report = verify_file(out)
    assert report.ok, report
    skipped = {"4k": "0.0 over 64 tokens", "partial": "takes every channel of phi3 files for rotated"}
    assert skipped.get(kind, "does not read LongRoPE's factors of phi3 files") in report.checks[-1].detail


def test_a_window_is_read_back(tmp_path: Path) -> None:
    """Texts longer than it are another matter to llama.cpp, which export says."""
    source = tiny_model("phi3", tmp_path / "source", sliding_window=16)
    model = quantized(source, PROJECTIONS, round_bf16=False)
    with pytest.warns(UserWarning, match="lets phi3 see all of a text where this model sees the last 16 tokens"):
        out = export_model(model, source, tmp_path / "out.gguf", "gguf")
    file = load_file(out)
    with torch.no_grad(), served(model):
        theirs = model(ids()).logits
        assert torch.equal(file(ids()).logits, theirs)
    file.config.sliding_window = None
    with torch.no_grad():
        assert not torch.equal(file(ids()).logits, theirs)
    assert "does not read sliding_window of phi3" in verify_file(out).checks[-1].detail
    assert "0.0 over 12 tokens" in verify_file(out, tokens=12).checks[-1].detail


def test_a_share_that_no_quotient_gives_is_read_back(tmp_path: Path) -> None:
    """30 of 44 channels: int(44 * (30 / 44)) is 29."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.69}
    wide = {"hidden_size": 352, "num_attention_heads": 8, "head_dim": 44, "num_hidden_layers": 1}
    model, out = written(tmp_path, rope_parameters=rope, **wide)
    assert GgufFile(out).facts["phi3.rope.dimension_count"] == 30
    with torch.no_grad(), served(model):
        assert torch.equal(load_file(out)(ids()).logits, model(ids()).logits)


def test_settings_are_those_of_the_converter(tmp_path: Path) -> None:
    """Written down here as it has them of the same model."""
    _, out = written(tmp_path, **PHI3S["4 mini"])
    fields = {name: field.contents() for name, field in GGUFReader(out).fields.items() if name.startswith("phi3.")}
    assert fields.pop("phi3.rope.scaling.attn_factor") == pytest.approx(math.sqrt(1 + math.log(2) / math.log(256)))
    assert fields.pop("phi3.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert fields == {
        "phi3.context_length": 512,
        "phi3.rope.scaling.original_context_length": 256,
        "phi3.embedding_length": 128,
        "phi3.feed_forward_length": 256,
        "phi3.block_count": 2,
        "phi3.attention.head_count": 4,
        "phi3.attention.head_count_kv": 2,
        "phi3.rope.dimension_count": 24,
        "phi3.rope.freq_base": 10000.0,
        "phi3.attention.sliding_window": 0,
    }
    names = [tensor.name for tensor in GGUFReader(out).tensors]
    own = ("attn_qkv", "attn_output", "attn_norm", "ffn_down", "ffn_up", "ffn_norm")
    assert names[:2] == ["rope_factors_long.weight", "rope_factors_short.weight"]
    layers = {f"blk.{layer}.{name}.weight" for layer in range(2) for name in own}
    assert set(names[2:]) == layers | {"token_embd.weight", "output_norm.weight"}


@pytest.mark.parametrize(("own", "expected"), [({"attention_factor": 1.7}, 1.7), ({"factor": 1.0}, 1.0)])
def test_the_models_own_factor_of_attention_is_kept(own: dict[str, float], expected: float, tmp_path: Path) -> None:
    """Where the converter takes the usual one."""
    model, out = written(tmp_path, **longrope(**own), original_max_position_embeddings=256)
    assert GgufFile(out).facts["phi3.rope.scaling.attn_factor"] == pytest.approx(expected)
    with torch.no_grad(), served(model):
        assert torch.equal(load_file(out)(ids()).logits, model(ids()).logits)


def test_damaged_factors_are_found(tmp_path: Path) -> None:
    _, out = written(tmp_path, num_hidden_layers=1, **PHI3S["128k"])
    reader = GGUFReader(out, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "rope_factors_short.weight")
    np.testing.assert_array_equal(tensor.data, np.float32([1.0 + 0.07 * i for i in range(16)]))
    tensor.data[5] = 2.0
    reader.data.flush()
    (found,) = (check.detail for check in verify_file(out, logits=False).checks if not check.ok)
    assert "rope_factors_short.weight is not what the model's rotation is made of" in found


def test_what_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    def refused(match: str, weight: str = "q4_0", kind: str = "phi3", **config: Any) -> None:
        source = tiny_model(kind, tmp_path / "source", num_hidden_layers=1, **config)
        model = quantized(source, [{"match": "*_proj", "weight": weight}, REST], round_bf16=False)
        with pytest.raises(UnsupportedError, match=match):
            quiet_export(model, source, tmp_path / "out.gguf", "gguf")
        assert not (tmp_path / "out.gguf").exists()

    refused(r"head_dim 16, for which llama\.cpp's phi3 has hidden_size / num_attention_heads", head_dim=16)
    odd = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.05}
    refused("1 rotated channels of a head, which llama.cpp takes in pairs", rope_parameters=odd)
    refused("hidden_act 'gelu', for which llama.cpp has silu", hidden_act="gelu")
    refused("hidden_act 'gelu', for which llama.cpp has silu", kind="llama", hidden_act="gelu")
    refused(r"gate_up_proj: llama\.cpp's phi3 leaves out the scale above .* in its MLP; use mxfp4", weight="nvfp4")
    refused(r"mlp\.\w+_proj: llama\.cpp's qwen2 leaves out the scale above .* in its MLP", "nvfp4", kind="qwen2")


# --- tokenizer --------------------------------------------------------------------------------------


def test_added_tokens_replace_pieces(tmp_path: Path) -> None:
    """As llama.cpp's converter has it of this family only."""
    source = tiny_model("phi3", tmp_path / "phi3", num_hidden_layers=1)
    sentencepiece_files(source, added=PHI3)
    out = quiet_export(quantized(source, PROJECTIONS, round_bf16=False), source, tmp_path / "out.gguf", "gguf")
    fields = {name: field.contents() for name, field in GGUFReader(out).fields.items()}
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    control, user = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    assert (tokens[:3], scores[:3], kinds[:3]) == (["<unk>", "<s>", "</s>"], [-1000.0] * 3, [control, control, user])
    at = tokens.index("<|assistant|>")
    assert (scores[at], kinds[at]) == (-1000.0, control) and kinds[3] == gguf.TokenType.BYTE
    assert fields["general.name"] == "Phi3" and "tokenizer.ggml.add_space_prefix" not in fields


def test_a_space_that_is_not_put_before_text_is_said(tmp_path: Path) -> None:
    source = tiny_model("phi3", tmp_path / "source", num_hidden_layers=1)
    sentencepiece_files(source, prefix=False, added=PHI3)
    out = quiet_export(quantized(source, PROJECTIONS, round_bf16=False), source, tmp_path / "out.gguf", "gguf")
    assert GgufFile(out).facts["tokenizer.ggml.add_space_prefix"] is False


def test_a_space_at_the_start_only_is_named(tmp_path: Path) -> None:
    """Of any family's pieces: llama.cpp puts one behind each added token, as Phi-3's tokenizer does."""
    source = tiny_model("llama", tmp_path / "source", num_hidden_layers=1)
    sentencepiece_files(source)
    path, model = source / "tokenizer.json", quantized(source, PROJECTIONS, round_bf16=False)
    for scheme in ("always", "first"):
        meta = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": None, "pre_tokenizer": meta}))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            export_model(model, source, tmp_path / f"{scheme}.gguf", "gguf")
        assert any("behind each added token" in str(each.message) for each in said) == (scheme == "first")


@pytest.mark.parametrize(
    ("name", "added", "expected"),
    [
        ("Phi 3 Mini 4k", PHI3, "Phi-3 Mini 4k"),  # as the converter calls Phi-3-mini-4k
        ("Phi3 Q4_0", PHI3, "Phi3 Q4_0"),
        ("Mine", PHI3, "Mine (Phi-3)"),
        ("Phi-3 Mini", [], "Phi 3 Mini"),  # without those tokens llama.cpp does not load it
        ("Mine", [], "Mine"),
    ],
)
def test_a_name_says_which_tokens_swallow_spaces(
    name: str, added: list[AddedToken], expected: str, tmp_path: Path
) -> None:
    sentencepiece_files(tmp_path, added=added)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert name_for(name, tmp_path) == expected


def test_tokens_that_no_name_is_right_for_are_named(tmp_path: Path) -> None:
    sentencepiece_files(tmp_path, added=[*PHI3, AddedToken("<|left|>", lstrip=True, rstrip=True, special=True)])
    with pytest.warns(UserWarning, match=r"spaces beside <\|left\|> are read otherwise by llama\.cpp"):
        assert name_for("Phi-3", tmp_path) == "Phi-3"
    path = tmp_path / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] != "<|endoftext|>"]
    path.write_text(json.dumps(whole))
    with pytest.warns(UserWarning, match=r"spaces beside </s>, .* are read otherwise"):
        assert name_for("Phi-3", tmp_path) == "Phi 3"
    assert name_for("Mine", tmp_path / "absent") == "Mine"


def test_a_file_is_read_as_a_model_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `model.id` of a run, or for its tokenizer: with the rotation, and with tokens that swallow spaces."""
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    source = tiny_model("phi3", tmp_path / "phi3", num_hidden_layers=1, **PHI3S["4 mini"])
    tokenizer = sentencepiece_files(source, added=PHI3)
    model = quantized(source, PROJECTIONS, round_bf16=False)
    out = quiet_export(model, source, tmp_path / "out.gguf", "gguf")
    folder = resolve(ModelConfig(id=str(out)))
    read, text = load_tokenizer(folder), "<|user|>\n The dog<|end|>\n<|assistant|>\n jumps</s> <|endoftext|>\n over"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    converted, own = load_model(folder).float().eval(), load_file(out)
    for target, origin in zip(converted.parameters(), own.parameters(), strict=True):
        assert torch.equal(target, origin.bfloat16().float())
        target.data = origin.data
    with torch.no_grad():
        assert torch.equal(converted(ids()).logits, own(ids()).logits)


@pytest.mark.parametrize("rule", ["dbrx", "gpt-4o"])
def test_words_are_split_alike_after_reading(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rules that transformers' own reader takes for GPT-2's."""
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    source = tiny_model("phi3", tmp_path / "mini", num_hidden_layers=1)
    byte_level_files(source, rule)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = quantized(source, PROJECTIONS, round_bf16=False)
        out = export_model(model, source, tmp_path / "out.gguf", "gguf")
    assert any("capitals outside of ASCII" in str(each.message) for each in said) == (rule == "gpt-4o")
    assert GGUFReader(out).fields["tokenizer.ggml.pre"].contents() == rule
    own, read = load_tokenizer(source), load_tokenizer(resolve(ModelConfig(id=str(out))))
    found = [read(text)["input_ids"] for text in WORDS]
    assert found == [own(text)["input_ids"] for text in WORDS]
    byte_level_files(source, "dbrx" if rule == "gpt-4o" else "gpt-4o")
    other = load_tokenizer(source)
    assert found != [other(text)["input_ids"] for text in WORDS]


def test_it_writes_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    _, out = written(tmp_path, num_hidden_layers=1, **PHI3S["4 mini"])
    assert main(["generate", str(out), "The quick brown", "--tokens", "4", "--engine", "qat"]) == 0
    assert capsys.readouterr().out.startswith("The quick brown")
