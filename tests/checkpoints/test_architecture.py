"""What config.json says, before weights are read: kinds of models accepted or refused by name, and the whole road for
architectures that are unlike Llama."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import CONFIG_MAPPING

from qat.checkpoints.architecture import empty_model, read_config
from qat.checkpoints.hf import ModelConfig, describe, load_model
from qat.cli import main
from qat.config import load_yaml, validate
from qat.errors import CheckpointError, UnsupportedError
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama") / "llama", num_hidden_layers=1)


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "llama"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_config(model: Path, folder: Path, config: dict[str, Any]) -> str:
    """A copy of `model` with another config.json and weights that nobody may read."""
    shutil.copytree(model, folder)
    (folder / "model.safetensors").write_bytes(b"not to be read")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def job(folder: Path, source: str, skipped: tuple[str, ...] = ("lm_head", "model.embed_tokens"), **changes: Any) -> str:
    rules = [{"match": path, "skip": "kept in BF16"} for path in skipped]
    settings: dict[str, Any] = {
        "name": "run",
        "model": {"id": source},
        "scheme": {"rules": [*rules, {"match": "*", "weight": "int8_channel", "input": "int8_token"}]},
        "data": {"source": "embedded", "seq_len": 32, "max_tokens": 1024},
        "eval": {"data": {"source": "heldout", "seq_len": 32}, "tokens": 64},
        "steps": 1,
        "runs": str(folder / "runs"),
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return str(path)


# --- the whole road ---------------------------------------------------------------------------------------


# kind -> (what stays dense, overrides, the attention that transformers chooses)
ROADS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "gemma2": (("lm_head", "model.embed_tokens"), (), "eager"),
    "bloom": (("lm_head", "transformer.word_embeddings"), ("data.pack=false", "eval.data.pack=false"), "eager"),
    "gemma3": (("*vision*", "*multi_modal*", "lm_head", "model.language_model.embed_tokens"), (), "sdpa"),
}


@pytest.mark.parametrize("kind", ROADS)
def test_models_without_sdpa_or_with_towers_go_the_whole_road(kind: str, tmp_path: Path, capsys: Any) -> None:
    """With attn_implementation left to transformers; the run says which it was, and everything after uses it."""
    skipped, changes, attention = ROADS[kind]
    model = str(tiny_model(kind, tmp_path / kind))
    path, run, out = job(tmp_path, model, skipped), str(tmp_path / "runs" / "run"), str(tmp_path / "out")
    assert main(["train", path, *changes, "--dry-run", "--json"]) == 0
    assert main(["train", path, *changes, "--json"]) == 0
    assert load_yaml(tmp_path / "runs" / "run" / "job.yaml")["model"]["attn_implementation"] == attention
    assert main(["export", run, out]) == 0
    capsys.readouterr()
    assert main(["verify", out, "--json"]) == 0, capsys.readouterr().out
    scores = {}
    for folder in (run, out):
        capsys.readouterr()
        assert main(["eval", folder, "--teacher", model, "--tokens", "64", "--json"]) == 0
        scores[folder] = json.loads(capsys.readouterr().out)["rows"][-1]["kl"]
    assert scores[run] == pytest.approx(scores[out], rel=0.05) and scores[run] > 0
    assert main(["generate", out, "The fox", "--tokens", "2"]) == 0


def test_documents_that_see_each_other_are_refused_before_text_is_read(tmp_path: Path, capsys: Any) -> None:
    """Bloom's attention knows no positions; the error says which keys to set, and eval sets its own."""
    model = str(tiny_model("bloom", tmp_path / "bloom", num_hidden_layers=1))
    path = job(tmp_path, model, ("lm_head", "transformer.word_embeddings"))
    assert main(["train", path, "data.pack=false"]) == 2
    error = capsys.readouterr().err
    assert "BloomForCausalLM with eager attention" in error and "set eval.data.pack to false" in error
    assert main(["eval", model, "--tokens", "64", "--json"]) == 0


def test_attention_that_cannot_run_says_what_to_do(tmp_path: Path, llama: Path, capsys: Any) -> None:
    model = {"id": str(tiny_model("gemma2", tmp_path / "gemma2")), "attn_implementation": "sdpa"}
    assert main(["train", job(tmp_path, "", model=model)]) == 2
    error = capsys.readouterr().err
    assert "attn_implementation 'sdpa' does not work here" in error and "Leave attn_implementation out" in error
    assert "AutoModel" not in error
    assert main(["train", job(tmp_path, "", model={"id": str(llama), "attn_implementation": "nonsense"})]) == 2
    assert "attn_implementation 'nonsense' does not work here" in capsys.readouterr().err


# --- what is refused --------------------------------------------------------------------------------------


REFUSED = {
    "llava": "LlavaForConditionalGeneration.*made of several parts",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration.*made of several parts",
    "mllama": "MllamaForConditionalGeneration.*made of several parts",
    "whisper": "WhisperForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "clip": "CLIPModel.*made of several parts",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_of_models_are_refused_before_their_weights(
    kind: str, llama: Path, tmp_path: Path, capsys: Any
) -> None:
    name = REFUSED[kind].split(".")[0]
    config = CONFIG_MAPPING[kind]().to_dict() | {"architectures": [name]}
    model = with_config(llama, tmp_path / kind, config)
    for extra in ([], ["--dry-run"]):
        assert main(["train", job(tmp_path, model), *extra]) == 2
        error = capsys.readouterr().err
        assert "is not a causal language model that this transformers knows" in error and name in error
        assert ("made of several parts" in error) == ("parts" in REFUSED[kind])


def test_a_class_that_would_drop_parts_is_refused(llama: Path, tmp_path: Path, capsys: Any) -> None:
    """AutoModelForCausalLM gives the text model of some composite configs, and loses the rest without a word."""
    config = CONFIG_MAPPING["llama4"]().to_dict() | {"architectures": ["Llama4ForCausalLM"]}
    model = with_config(llama, tmp_path / "llama4", config)
    assert main(["train", job(tmp_path, model)]) == 2
    assert "would load only Llama4ForCausalLM and drop the rest (vision_config)" in capsys.readouterr().err


def test_encoder_decoders_named_as_decoders_are_refused(llama: Path, tmp_path: Path, capsys: Any) -> None:
    config = CONFIG_MAPPING["bart"]().to_dict() | {"architectures": ["BartForCausalLM"]}
    assert main(["train", job(tmp_path, with_config(llama, tmp_path / "bart", config))]) == 2
    assert "is an encoder-decoder model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "128"}, "hidden_size"),
        ({"num_attention_heads": 0}, "transformers cannot"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"hidden_act": "nope"}, "nope"),
        ({"head_dim": 0}, "transformers cannot"),
        ({"pad_token_id": 4000}, "transformers cannot"),
        ({"architectures": "LlamaForCausalLM"}, "must be a list"),
        ({"architectures": [3]}, "not a causal language model"),
        ({"model_type": "nope"}, "model type"),
        ({"model_type": ["llama"]}, "transformers cannot"),
        ({"text_config": {"vocab_size": 3}}, "transformers cannot"),
    ],
)
def test_wrong_values_in_config_json_are_errors_by_name(
    llama: Path, tmp_path: Path, capsys: Any, change: dict[str, Any], message: str
) -> None:
    config = json.loads((llama / "config.json").read_text()) | change
    model = with_config(llama, tmp_path / "wrong", config)
    for extra in ([], ["--dry-run"]):
        assert main(["train", job(tmp_path, model), *extra]) == 2
        assert message in capsys.readouterr().err


def test_describing_a_model_reads_no_weights(llama: Path, tmp_path: Path) -> None:
    model = with_config(llama, tmp_path / "described", json.loads((llama / "config.json").read_text()))
    folder, found = describe(ModelConfig(id=model))
    empty = empty_model(found, model)
    assert folder == Path(model) and empty.device.type == "meta" and empty.config._attn_implementation == "sdpa"
    (Path(model) / "config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="model_type None"):
        describe(ModelConfig(id=model))
    with pytest.raises(CheckpointError, match="transformers cannot read"):
        read_config(Path(model))


# --- quantized already, and models with code of their own ---------------------------------------------------


@pytest.mark.parametrize("place", ["top", "nested", "old"])
def test_quantized_checkpoints_are_refused(copy: Path, place: str) -> None:
    method = {"quant_method": "compressed-tensors"}
    changes: dict[str, dict[str, Any]] = {
        "top": {"quantization_config": method},
        "nested": {"text_config": {"quantization_config": method}},
        "old": {"compression_config": method},
    }
    edit_config(copy, **changes[place])
    with pytest.raises(UnsupportedError, match=r"quantized already \(compressed-tensors\)"):
        load_model(copy)


def test_other_architectures_are_refused(copy: Path) -> None:
    edit_config(copy, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(UnsupportedError, match=r"not a causal language model.*nearest: .*Llama"):
        load_model(copy)
    edit_config(
        copy,
        architectures=["NewForCausalLM"],
        model_type="new",
        auto_map={"AutoModelForCausalLM": "new.New"},
    )
    with pytest.raises(UnsupportedError, match="trust_remote_code"):
        load_model(copy)
    edit_config(copy, architectures=None, model_type="llama")
    with pytest.raises(CheckpointError, match="cannot load"):  # transformers trips over the null
        edit_config(copy, auto_map=None)
        load_model(copy)
    edit_config(copy, auto_map={})
    assert type(load_model(copy)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("trust", ["false", "true"])
def test_remote_code_runs_only_when_the_config_trusts_it(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: str
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    (copy / f"code_{trust}.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class MyConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    auto_map = {"AutoConfig": f"code_{trust}.MyConfig", "AutoModelForCausalLM": f"code_{trust}.MyModel"}
    edit_config(copy, architectures=["MyModel"], model_type="mine", auto_map=auto_map)
    given = yaml.safe_load(f"{{id: {copy}, trust_remote_code: {trust}}}")
    config = validate(ModelConfig, given, "test")
    if config.trust_remote_code:
        model = load_model(copy, trust_remote_code=config.trust_remote_code)
        assert type(model).__name__ == "MyModel"
    else:
        with pytest.raises(UnsupportedError, match="trust_remote_code"):
            load_model(copy, trust_remote_code=config.trust_remote_code)
    assert (tmp_path / "ran").exists() == config.trust_remote_code
