"""Layers whose weight a model uses without calling them are refused, by the dry run too; all others are not."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from qat.checkpoints.hf import load_model
from qat.cli import main
from qat.errors import UnsupportedError
from qat.scheme import Scheme
from qat.surgery import report
from qat.trainers import speeds
from qat.trainers.called import check_called
from tests.tiny import tiny_model
from tests.trainers import jobs

MAMBA: dict[str, Any] = {"state_size": 16, "num_hidden_layers": 1, "tie_word_embeddings": True}
REST = {"match": "*", "skip": "the rest"}


def write(folder: Path, model: Path, *rules: dict[str, str]) -> Path:
    path = jobs.write(folder, model, scheme={"rules": [*rules, REST]}, steps=2, checkpoint_every=0)
    job = yaml.safe_load(path.read_text())
    job["data"]["pack"] = job["eval"]["data"]["pack"] = False
    path.write_text(yaml.safe_dump(job))
    return path


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_weight_that_a_model_multiplies_with_itself_is_refused(
    tmp_path: Path, capsys: Any, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speeds, "MEASURE_SECONDS", 0.0)
    model = tiny_model("mamba", tmp_path / "model", **MAMBA)
    job = write(tmp_path, model, {"match": "*_proj", "weight": "int8_channel"})
    assert main(["train", str(job), *options]) == 2
    error = capsys.readouterr().err
    assert "MambaMixer uses the weight of backbone.layers.0.mixer.dt_proj without calling the layer" in error
    assert "skip" in error


def test_its_other_layers_are_trained_and_served(tmp_path: Path, capsys: Any) -> None:
    model = tiny_model("mamba", tmp_path / "model", **MAMBA)
    job = write(tmp_path, model, {"match": "*dt_proj", "skip": "read"}, {"match": "*_proj", "weight": "int8_channel"})
    run, out = tmp_path / "runs" / "tiny", tmp_path / "out"
    assert main(["train", str(job)]) == 0
    assert main(["export", str(run), str(out)]) == 0
    assert main(["verify", str(out)]) == 0
    assert main(["generate", str(out), "The fox", "--tokens", "2"]) == 0


@pytest.mark.parametrize("tied", [True, False])
def test_types_and_shapes_of_weights_and_tied_ones_are_no_use(tied: bool, tmp_path: Path) -> None:
    model: Any = load_model(tiny_model("llama", tmp_path, num_hidden_layers=1, tie_word_embeddings=tied))
    coverage = report(model, Scheme(rules=[{"match": "*", "weight": "int8_channel"}], tied="share"))
    mlp = model.model.layers[0].mlp

    def fitted(_: Any, args: Any) -> Any:
        return (args[0].to(mlp.down_proj.weight.dtype)[..., : mlp.up_proj.weight.shape[1]],)

    mlp.register_forward_pre_hook(fitted)
    check_called(model, coverage)
    mlp.register_forward_pre_hook(lambda _, args: (args[0] @ mlp.down_proj.weight @ mlp.up_proj.weight,))
    with pytest.raises(UnsupportedError, match=r"LlamaMLP uses the weight of .*mlp.down_proj and 1 more without"):
        check_called(model, coverage)


def test_a_model_that_cannot_read_is_said_so_by_name(tmp_path: Path, capsys: Any) -> None:
    sizes = {"kv_lora_rank": 32, "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
    model = tiny_model("deepseek_v3", tmp_path / "model", n_routed_experts=4, n_group=1, topk_group=1,
                       num_experts_per_tok=2, moe_intermediate_size=64, first_k_dense_replace=1, num_hidden_layers=1,
                       **sizes)  # fmt: skip  # head_dim 32 is not qk_rope_head_dim
    assert main(["train", str(write(tmp_path, model, {"match": "*down_proj", "weight": "int8_channel"}))]) == 2
    assert "DeepseekV3ForCausalLM cannot read 4 tokens: The size of tensor" in capsys.readouterr().err
