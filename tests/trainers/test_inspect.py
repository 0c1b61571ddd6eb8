"""`qat eval` and `qat generate` on what people type: devices, amounts, prompts, and files with mistakes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.cli import main
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=1)


@pytest.fixture
def model(shared: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(shared, tmp_path / "llama"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("tokens", ["0", "-5"])
def test_amounts_that_make_no_sense_are_refused(model: Path, capsys: Any, tokens: str) -> None:
    assert main(["eval", str(model), "--tokens", tokens]) == 2
    assert f"--tokens {tokens} must be positive" in capsys.readouterr().err
    assert main(["generate", str(model), "x", "--tokens", tokens]) == 2
    assert f"--tokens {tokens} must be positive" in capsys.readouterr().err


def test_more_tokens_than_there_are_is_all_of_them(model: Path, tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    found = []
    for tokens in ("1", "100000", str(10**15)):
        assert main(["eval", str(model), "--text", str(text), "--tokens", tokens, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["rows"][0]["tokens"])
    assert 0 < found[0] < found[1] == found[2]


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta"])
def test_devices_that_are_not_here_are_refused(model: Path, capsys: Any, device: str) -> None:
    for command in (["eval", str(model)], ["generate", str(model), "x"]):
        assert main([*command, "--tokens", "2", "--device", device]) == 2
        assert f"--device {device} cannot be used" in capsys.readouterr().err


def test_cpu_can_be_asked_for(model: Path, capsys: Any) -> None:
    assert main(["generate", str(model), "The fox", "--tokens", "2", "--device", "cpu"]) == 0
    assert main(["eval", str(model), "--tokens", "32", "--device", "cpu", "--json"]) == 0


@pytest.mark.gpu
def test_a_gpu_gives_the_scores_of_the_cpu(model: Path, capsys: Any) -> None:
    found = []
    for device in ("cpu", "cuda", "auto"):
        assert main(["eval", str(model), "--tokens", "512", "--device", device, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["rows"][0]["nll"])
    assert found[1] == found[2] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("prompt", [" ", "\n\n", "<|im_end|>", "naïve 世界 🦊", "\u200b", "a" * 200, "-1"])
def test_prompts_of_any_kind_are_continued(model: Path, capfd: Any, prompt: str) -> None:
    command = ["generate", str(model), "--tokens", "2", "--", prompt]
    assert main(command) == 0
    assert "tokens/s" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "message"), [("", "is empty"), ("a\udcff", "not Unicode"), ("fox " * 600, "only 512")]
)
def test_prompts_that_cannot_be_read_are_refused(model: Path, capsys: Any, prompt: str, message: str) -> None:
    assert main(["generate", str(model), prompt, "--tokens", "2"]) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_without_tokens_is_refused(model: Path, capsys: Any) -> None:
    edit(model / "tokenizer.json", normalizer={"type": "Replace", "pattern": {"String": "x"}, "content": ""})
    assert main(["generate", str(model), "xxx", "--tokens", "2"]) == 2
    assert "holds no token" in capsys.readouterr().err


def test_tokens_that_the_embedding_lacks_are_named(model: Path, capsys: Any) -> None:
    path = model / "tokenizer.json"
    plain = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    added = [{"id": 376 + i, "content": f"<tool{i}>", **plain} for i in range(10)]
    edit(path, added_tokens=[*json.loads(path.read_text())["added_tokens"], *added])
    assert main(["generate", str(model), "a <tool9>", "--tokens", "2"]) == 2
    assert "the prompt holds token '<tool9>' with id 385" in capsys.readouterr().err


def test_no_more_is_written_than_the_model_has_positions(model: Path, capfd: Any) -> None:
    for name in ("config.json", "generation_config.json"):
        edit(model / name, eos_token_id=None)
    edit(model / "config.json", max_position_embeddings=16)
    edit(model / "tokenizer_config.json", eos_token=None)
    assert main(["generate", str(model), "The fox", "--tokens", "1000"]) == 0
    error = capfd.readouterr().err
    assert "knows 16 positions" in error and "14 tokens in" in error


def test_scaled_positions_can_all_be_written(model: Path, capfd: Any) -> None:
    edit(model / "generation_config.json", eos_token_id=None)
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    edit(model / "config.json", eos_token_id=None, max_position_embeddings=16, rope_parameters=rope)
    edit(model / "tokenizer_config.json", eos_token=None)
    assert main(["generate", str(model), "The fox", "--tokens", "1000"]) == 0
    error = capfd.readouterr().err
    assert "knows 64 positions" in error and "62 tokens in" in error


@pytest.mark.parametrize(
    "wrong",
    [
        {"eos_token_id": "x"},
        {"num_beams": 4, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"do_sample": True, "temperature": -1.0, "top_p": 7, "top_k": "many"},
        {"max_length": 3, "min_length": 500},
        {"pad_token_id": None, "eos_token_id": None, "bos_token_id": None},
    ],
)
@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_settings_of_a_checkpoint_do_not_stop_generation(
    model: Path, capfd: Any, wrong: dict[str, Any], temperature: str
) -> None:
    edit(model / "generation_config.json", **wrong)
    assert main(["generate", str(model), "The fox", "--tokens", "3", "--temperature", temperature]) == 0
    assert "3 tokens in" in capfd.readouterr().err or "eos_token_id" not in wrong


def test_a_tokenizer_without_an_end_and_with_types_is_enough(model: Path, capfd: Any) -> None:
    edit(model / "tokenizer_config.json", eos_token=None, pad_token=None, bos_token=None,
         model_input_names=["input_ids", "token_type_ids", "attention_mask"])  # fmt: skip
    for name in ("generation_config.json", "config.json"):
        edit(model / name, eos_token_id=None, pad_token_id=None, bos_token_id=None)
    assert main(["generate", str(model), "The fox", "--tokens", "3"]) == 0
    assert "3 tokens in" in capfd.readouterr().err


def test_a_template_that_fails_is_an_error_by_name(model: Path, capsys: Any) -> None:
    (model / "chat_template.jinja").write_text("{{ raise_exception('no system, no service') }}")
    assert main(["generate", str(model), "hello", "--chat", "--tokens", "2"]) == 2
    assert "chat template cannot wrap the prompt: no system, no service" in capsys.readouterr().err


def test_sampling_follows_its_seed(model: Path, capfd: Any) -> None:
    found = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(model), "The", "--tokens", "12", "--temperature", "2", "--seed", seed]) == 0
        found.append(capfd.readouterr().out)
    assert found[0] == found[1] != found[2]
    assert torch.initial_seed() == 2
