"""Loading: every kind of model exactly, and every way a folder can be wrong refused by name."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from qat.checkpoints.hf import (
    ModelConfig,
    load_model,
    load_tokenizer,
    quiet,
    resolve,
    source_files,
)
from qat.checkpoints.shards import INDEX, SINGLE, ShardReader
from qat.cli import main
from qat.config import validate
from qat.errors import CheckpointError, ConfigError, UnsupportedError
from qat.families import stacks
from tests.tiny import KINDS, tiny_model

TEXT = "The fox said: 'x = 12.5'\n\n\tnaïve 世界 🦊  <|im_start|>user\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny_model(kind, root / kind) for kind in KINDS}


@pytest.fixture
def llama(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(models["llama"], tmp_path / "llama"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


# --- what loads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_loads_with_exact_weights(models: dict[str, Path], kind: str, dtype: torch.dtype) -> None:
    model = load_model(models[kind], dtype)
    stored = load_file(models[kind] / SINGLE)
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {b.dtype for name, b in model.named_buffers() if "inv_freq" in name} == {torch.float32}
    loaded = dict(model.named_parameters())
    for name, tensor in stored.items():
        if ".experts." not in name:  # stored one by one, loaded as stacks
            assert torch.equal(loaded[name], tensor.to(dtype)), name
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == (kind == "gemma")
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()


def test_experts_are_stacked_unchanged_and_reported(models: dict[str, Path]) -> None:
    model = load_model(models["qwen3_moe"])
    stored = load_file(models["qwen3_moe"] / SINGLE)
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        gate_up, down = (model.get_parameter(f"{experts}.{name}") for name in ("gate_up_proj", "down_proj"))
        for expert in range(4):
            gate, up, low = (
                stored[f"{experts}.{expert}.{name}_proj.weight"].float() for name in ("gate", "up", "down")
            )
            assert torch.equal(gate_up[expert], torch.cat([gate, up]))
            assert torch.equal(down[expert], low)
    assert sorted(stacks(model)) == sorted(
        f"model.layers.{layer}.mlp.experts.{name}" for layer in range(2) for name in ("down_proj", "gate_up_proj")
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qwen3_moe"])
def test_dense_models_have_no_stacks(models: dict[str, Path], kind: str) -> None:
    assert stacks(load_model(models[kind])) == []


def test_sharded_folders_load_the_same(llama: Path, tmp_path: Path) -> None:
    whole = load_model(llama)
    with quiet():
        whole.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(ShardReader(tmp_path / "shards").shards) > 3
    parts = load_model(tmp_path / "shards").state_dict()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.state_dict().items())


def test_a_model_in_the_type_of_its_file_is_that_file_until_written_to(llama: Path) -> None:
    model, before = load_model(llama, torch.bfloat16), (llama / "model.safetensors").read_bytes()
    mapped = Path("/proc/self/maps")
    if mapped.is_file():
        assert str(llama) in mapped.read_text()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert (llama / "model.safetensors").read_bytes() == before


@pytest.mark.gpu
def test_tensors_go_to_the_gpu_as_they_are_read(llama: Path) -> None:
    there, here = (load_model(llama, device=torch.device(name)) for name in ("cuda", "cpu"))
    assert all(tensor.is_cuda for tensor in there.state_dict().values())
    assert all(torch.equal(there.get_parameter(n).cpu(), p) for n, p in here.named_parameters())


def test_tied_model_loads_without_a_head_and_untied_does_not(llama: Path) -> None:
    edit_weights(llama, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"1 tensors are missing .*: lm_head.weight"):
        load_model(llama)
    edit_config(llama, tie_word_embeddings=True)
    model = load_model(llama)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_attention_is_the_one_asked_for(llama: Path) -> None:
    for name in ("sdpa", "eager"):
        assert load_model(llama, attn_implementation=name).config._attn_implementation == name
    for name in ("nonsense", "flash_attention_2"):
        with pytest.raises(UnsupportedError, match=f"attn_implementation '{name}'"):
            load_model(llama, attn_implementation=name)


def test_loading_is_silent_and_restores_what_it_silenced(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logging.enable_progress_bar()
    before = logging.get_verbosity(), True
    load_model(llama)
    edit_weights(llama, lambda tensors: tensors.update(surplus=torch.zeros(1)))
    with pytest.raises(CheckpointError):
        load_model(llama)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"1 tensors are missing .*layers.1.mlp.up_proj",
        ),
        (lambda t: t.update(surplus=torch.zeros(2)), r"1 tensors belong to no module .*surplus"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
            r"1 tensors have another shape .*model.norm",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    llama: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    edit_weights(llama, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(llama)


def test_two_different_tied_weights_are_refused(llama: Path) -> None:
    edit_config(llama, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="ties the output layer"):
        load_model(llama)


def test_numbers_that_are_not_finite_are_named_before_training(llama: Path, tmp_path: Path, capsys: Any) -> None:
    """Through the command line: nothing is calibrated or trained, and no traceback is shown."""
    job = tmp_path / "job.yaml"
    rules = [{"match": "*proj", "weight": "int8_channel"}, {"match": "*", "skip": "dense"}]
    job.write_text(yaml.safe_dump({"name": "x", "model": {"id": str(llama)}, "scheme": {"rules": rules}, "steps": 1,
                                   "runs": str(tmp_path / "runs")}))  # fmt: skip
    for name, value in (("model.layers.1.mlp.up_proj.weight", float("nan")), ("model.norm.weight", float("-inf"))):
        edit_weights(llama, lambda t, n=name, v=value: t[n].view(-1)[5:6].fill_(v))  # type: ignore[misc]  # bound now
        assert main(["train", str(job)]) == 2
        error = capsys.readouterr().err
        assert "holds NaN or infinity in" in error and name in error
        edit_weights(llama, lambda t, n=name: t[n].nan_to_num_(0.5, 0.5, 0.5))  # type: ignore[misc]  # bound now


@pytest.mark.parametrize("metadata", ["absent", None, [1]])
def test_an_index_without_metadata_loads(llama: Path, tmp_path: Path, metadata: Any) -> None:
    """transformers needs it; the weights do not."""
    whole = load_model(llama)
    with quiet():
        whole.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    index = json.loads((tmp_path / "shards" / INDEX).read_text())
    index.pop("metadata")
    (tmp_path / "shards" / INDEX).write_text(
        json.dumps(index if metadata == "absent" else index | {"metadata": metadata})
    )
    parts = load_model(tmp_path / "shards")
    assert all(torch.equal(parts.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())
    assert parts.name_or_path == str(tmp_path / "shards")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.int8])
def test_codes_without_a_quantization_config_are_refused(llama: Path, dtype: torch.dtype) -> None:
    """transformers would take them for the weights themselves."""
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(llama, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(UnsupportedError, match=f"quantized already, although config.json does not say so: {name}"):
        load_model(llama)


@pytest.mark.parametrize("text", ["", "[]", '{"max_new_tokens": -3}', '{"cache_implementation": "nope"}'])
def test_generation_configs_that_cannot_be_used_are_refused(llama: Path, text: str) -> None:
    """They would travel into the export, and stop whoever loads it."""
    (llama / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_model(llama)


def test_truncated_weights_are_refused(llama: Path) -> None:
    with (llama / SINGLE).open("r+b") as file:
        file.truncate((llama / SINGLE).stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(llama)


def test_missing_shard_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    with quiet():
        load_model(models["llama"]).save_pretrained(tmp_path, max_shard_size="200KB")
    lost = ShardReader(tmp_path).shards[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"{lost.name} is missing"):
        load_model(tmp_path)


def test_missing_parts_are_named(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        load_model(tmp_path / "nowhere")
    (llama / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=f"neither {SINGLE} nor {INDEX}"):
        load_model(llama)
    (llama / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"pickled weights only \(pytorch_model.bin\).*save_pretrained"):
        load_model(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read as JSON"):
        load_model(llama)
    (llama / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json"):
        load_model(llama)


def test_adapters_and_other_types_are_refused(llama: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"float32 or torch.bfloat16, not torch.float16"):
        load_model(llama, torch.float16)
    (llama / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="adapter"):
        load_model(llama)


# --- tokenizer and other files ----------------------------------------------------------------------------


def test_tokenizer_round_trips_and_keeps_its_template(models: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(models["llama"])
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    chat = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_missing_or_broken_tokenizer_is_refused(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(llama)
    (llama / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer; looked for tokenizer.json"):
        load_tokenizer(llama)


def test_source_files_are_everything_but_weights_and_config(llama: Path) -> None:
    expected = {p.name for p in llama.iterdir()} - {SINGLE, "config.json"}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= expected
    (llama / "additional_chat_templates").mkdir()
    kept = ["LICENSE", "modeling_x.py", "additional_chat_templates/tool.jinja"]
    dropped = [
        INDEX,
        "a.bin",
        "b.gguf",
        "c.pt",
        "d.h5",
        ".hidden",
        "params.json",
        "pytorch_model.bin.index.json",
    ]
    for name in kept + dropped:
        (llama / name).write_text("x")
    (llama / ".cache").mkdir()
    (llama / ".cache" / "file.json").write_text("x")
    assert {str(p.relative_to(llama)) for p in source_files(llama)} == expected | set(kept)


# --- names ------------------------------------------------------------------------------------------------


def test_config_refuses_what_cannot_be_a_model() -> None:
    for value, message in (("embedded:gpt", "embedded:smollm2-135m"), ("  ", "hub id")):
        with pytest.raises(ConfigError, match=message):
            validate(ModelConfig, {"id": value}, "test")
    with pytest.raises(ConfigError, match="nearest: revision"):
        validate(ModelConfig, {"id": "a/b", "revison": "main"}, "test")


def test_local_names_resolve_or_explain(llama: Path, tmp_path: Path) -> None:
    assert resolve(ModelConfig(id=str(llama))) == llama
    with pytest.raises(ConfigError, match="only hub models have one"):
        resolve(ModelConfig(id=str(llama), revision="main"))
    with pytest.raises(CheckpointError, match=r"no folder .*nowhere; if the model moved"):
        resolve(ModelConfig(id=str(tmp_path / "nowhere")))
    with pytest.raises(CheckpointError, match=r"no folder .*not a hub id"):
        resolve(ModelConfig(id="./nowhere/at/all"))
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(ModelConfig(id=str(llama / SINGLE)))
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"ggufs/model.gguf"):
        resolve(ModelConfig(id=str(tmp_path / "ggufs")))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    with pytest.raises(CheckpointError, match="merge it"):
        resolve(ModelConfig(id=str(tmp_path / "adapter")))


HUB = """
import sys
from qat.checkpoints.hf import ModelConfig, load_model, resolve
from qat.errors import CheckpointError
for name in sys.argv[1:]:
    try:
        folder = resolve(ModelConfig(id=name))
        print(folder, sum(p.numel() for p in load_model(folder).parameters()))
    except CheckpointError as error:
        print("refused:", error)
"""


def test_hub_models_come_from_the_cache_when_offline(models: dict[str, Path], tmp_path: Path) -> None:
    """The hub's own cache layout, filled by hand; a model that is not in it is refused with what to do."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, source in (("some--model", models["llama"]), ("some--pickle", None)):
        repository = tmp_path / "hub" / f"models--{name}"
        snapshot = repository / "snapshots" / commit
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        if source:
            shutil.copytree(source, snapshot)
        else:
            snapshot.mkdir(parents=True)
            (snapshot / "config.json").write_text("{}")
    asked = [sys.executable, "-c", HUB, "some/model", "some/other", "some/pickle"]
    done = subprocess.run(
        asked, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    with quiet():
        expected = AutoModelForCausalLM.from_pretrained(models["llama"]).num_parameters()
    found, other, pickle = done.stdout.splitlines()
    assert found == f"{tmp_path}/hub/models--some--model/snapshots/{commit} {expected}"
    assert other.startswith("refused: cannot get 'some/other'")
    assert "embedded:smollm2-135m" in other
    assert pickle.startswith("refused: the hub model 'some/pickle' has no safetensors")
