"""Positions and token ids that a model lacks are found before anything trains, in a dry run and by every command."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from qat.checkpoints.positions import known_positions, table_positions
from qat.cli import main
from qat.errors import ConfigError
from qat.trainers import limits, speeds
from qat.trainers.limits import check_positions, fitting
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(speeds, "SIDE", 64)


LLAMA = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48}
TABLES: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "openai-gpt": GPT,
    "gpt_bigcode": GPT,
    "gptj": {**GPT, "rotary_dim": 8},
    "codegen": {**GPT, "n_head": 4, "n_ctx": 48, "rotary_dim": 8},
    "ctrl": {**GPT, "dff": 32},
    "gpt_neo": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 48,
                "attention_types": [[["global"], 1]]},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "ffn_dim": 32, "max_position_embeddings": 48},
    "biogpt": {**LLAMA, "max_position_embeddings": 48},
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 48},
}  # fmt: skip
WITHOUT: dict[str, tuple[dict[str, Any], int | None]] = {
    "llama": ({**LLAMA, "max_position_embeddings": 48}, 48),
    "mistral": ({**LLAMA, "max_position_embeddings": 48, "num_key_value_heads": 2, "sliding_window": 8}, 48),
    "gemma3_text": ({**LLAMA, "max_position_embeddings": 48, "head_dim": 16, "num_key_value_heads": 2}, 48),
    "xglm": ({"d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 32, "max_position_embeddings": 48}, 48),
    "falcon": ({**LLAMA, "max_position_embeddings": 48, "alibi": True}, None),
    "bloom": ({"hidden_size": 32, "n_layer": 1, "n_head": 2}, None),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 1}, None),
}


def built(kind: str, settings: dict[str, Any], device: str = "cpu") -> Any:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](vocab_size=64, **settings)).eval()


def reads(model: Any, length: int) -> bool:
    ids = torch.full((1, length), 3)
    try:
        with torch.no_grad():
            model(input_ids=ids, position_ids=torch.arange(length)[None], use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_positions_end_where_the_model_fails(kind: str) -> None:
    model = built(kind, TABLES[kind])
    assert reads(model, 48) and not reads(model, 49)
    assert table_positions(model) == table_positions(built(kind, TABLES[kind], "meta")) == 48
    assert check_positions(model, {"a": 48}) == [] and fitting(99, model, None) == 48 and fitting(9, model) == 9
    with pytest.raises(ConfigError, match=f"data.seq_len 49 exceeds the 48 positions that {type(model).__name__} has"):
        check_positions(model, {"eval.data.seq_len": 48, "data.seq_len": 49})


@pytest.mark.parametrize("kind", WITHOUT)
def test_models_without_a_table_read_on_and_are_noted_where_they_say_a_length(kind: str) -> None:
    settings, known = WITHOUT[kind]
    model = built(kind, settings)
    assert reads(model, 60) and table_positions(model) is None and known_positions(model) == known
    notes = check_positions(model, {"data.seq_len": 60})
    assert len(notes) == (known is not None) and all("data.seq_len 60 exceeds the 48 positions" in n for n in notes)


@pytest.mark.parametrize(
    ("scaling", "known"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 192),
        ({"rope_type": "dynamic", "factor": 2.0}, 96),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 24, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0}, 48),
        ({"rope_type": "default"}, 48),
    ],
)  # fmt: skip
def test_scaled_rotary_positions_reach_further(scaling: dict[str, Any], known: int) -> None:
    rope = {"rope_theta": 10000.0, **scaling}
    model = built("llama", {**LLAMA, "max_position_embeddings": 48, "rope_parameters": rope}, "meta")
    assert known_positions(model) == known


# ---- through the command line


def gpt2(folder: Path, **settings: Any) -> Path:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt2"](**{**GPT, "vocab_size": 384, **settings}))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def job(folder: Path, model: Path, data: Any = None, **changes: Any) -> str:
    settings: dict[str, Any] = {
        "name": "x", "model": {"id": str(model)}, "runs": str(folder / "runs"), "steps": 1, "calibration_rows": 2,
        "scheme": {"rules": [{"match": "model.embed_tokens", "skip": "kept"}, {"match": "lm_head", "skip": "kept"},
                             {"match": "*_proj", "weight": "int8_channel"}], "init": []},
        "data": {"source": "embedded", "seq_len": 32, **(data or {})},
        "eval": {"data": {"source": "heldout", "seq_len": 32}, "tokens": 64},
        **changes,
    }  # fmt: skip
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_learned_positions_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: list[str]
) -> None:
    model = gpt2(tmp_path / "gpt2")
    for changes, key in (
        ({"data": {"seq_len": 64}}, "data.seq_len 64"),
        ({"eval": {"data": {"source": "heldout", "seq_len": 64}}}, "eval.data.seq_len 64"),
        ({"calibration": {"source": "embedded", "seq_len": 64}}, "calibration.seq_len 64"),
    ):
        path = job(tmp_path, tiny_model("llama", tmp_path / "llama"), **changes)
        assert main(["train", path, f"teacher.id={model}", *dry]) == 2
        assert f"{key} exceeds the 48 positions that GPT2LMHeadModel has" in capsys.readouterr().err


def test_rotary_positions_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama", tmp_path / "llama", num_hidden_layers=1, max_position_embeddings=24)
    assert main(["train", job(tmp_path, model), "--dry-run", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert sum("seq_len 32 exceeds the 24 positions that LlamaForCausalLM was made for" in note for note in notes) == 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["train", job(tmp_path, model, name="y"), "--json"]) == 0
    assert sum("exceeds the 24 positions" in str(one.message) for one in caught) == 2


def test_commands_on_a_model_keep_to_its_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(gpt2(tmp_path / "gpt2"))
    assert main(["eval", model, "--tokens", "200"]) == 0
    assert main(["generate", model, "a b c", "--tokens", "60"]) == 0
    assert "48 positions" in capsys.readouterr().err


def test_token_ids_beyond_the_embedding_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama", tmp_path / "llama", num_hidden_layers=1)
    tokenizer = tiny_tokenizer()
    first = len(tokenizer)
    tokenizer.add_tokens([f"<added{n}>" for n in range(400 - first)])
    tokenizer.save_pretrained(model)
    token, number = tokenizer.convert_ids_to_tokens(399), "id 399"
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"plain words {n} " * 9}) for n in range(30)))
    good = job(tmp_path, model, {"source": str(data)})
    assert main(["train", good, "--dry-run"]) == 0  # tokens that no text uses do no harm
    data.write_text(data.read_text() + "\n" + json.dumps({"text": f"far {token} "}))
    assert main(["train", good, "--dry-run"]) == 0  # nor where a run does not come to them
    data.write_text(json.dumps({"text": f"now {token} "}) + "\n" + data.read_text())
    for more in ([], ["--dry-run"]):
        for key in ("data", "eval.data"):
            other = "embedded" if key == "eval.data" else str(data)
            evaluated = str(data) if key == "eval.data" else "heldout"
            path = job(tmp_path, model, {"source": other})
            assert main(["train", path, f"eval.data.source={evaluated}", *more]) == 2
            said = capsys.readouterr().err
            assert f"the text of {key}" in said and all(part in said for part in (token, number, "384 rows")), said
    assert not (tmp_path / "runs" / "x" / "metrics.csv").exists()
    assert main(["eval", str(model), "--text", str(data)]) == 2 and number in capsys.readouterr().err
    assert main(["generate", str(model), f"say {token}"]) == 2 and number in capsys.readouterr().err


def test_a_padding_token_beyond_the_embedding_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama", tmp_path / "llama", num_hidden_layers=1)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<added{n}>" for n in range(384 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(model)
    data = {"source": str(tmp_path / "a.jsonl")}
    Path(data["source"]).write_text("\n".join(json.dumps({"text": "plain words " * n}) for n in range(1, 40)))
    for more in ([], ["--dry-run"]):
        assert main(["train", job(tmp_path, model, {**data, "pack": False}), *more]) == 2
        assert "'<padding>' with id 384" in capsys.readouterr().err
    assert main(["train", job(tmp_path, model, data), "--dry-run"]) == 0


def test_a_dry_run_says_what_it_could_not_look_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama", tmp_path / "llama", num_hidden_layers=1)
    assert main(["train", job(tmp_path, model, {"source": "owner/name"}), "--dry-run"]) == 0
    assert "note: data was not looked at: owner/name is on the hub" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"words": "b"}')
    assert main(["train", job(tmp_path, model, {"source": str(tmp_path / "a.jsonl")}), "--dry-run"]) == 2
    assert "line 2 has no text_field" in capsys.readouterr().err
    (model / "tokenizer.json").unlink()
    assert main(["train", job(tmp_path, model), "--dry-run"]) == 0
    assert "texts were not looked at" in capsys.readouterr().out
    assert limits.SAMPLE_TOKENS < 10**6
