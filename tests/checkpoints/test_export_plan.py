"""Odd checkpoints through the command line: nothing of the source is lost, the export loads in plain transformers with
the same logits, and what would be refused is said before the first step."""

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from qat.checkpoints.export import RECORD, check_export
from qat.checkpoints.exported import load_exported
from qat.checkpoints.hf import load_model
from qat.checkpoints.layouts import READERS, TARGETS
from qat.checkpoints.names import stored_names
from qat.checkpoints.resume import save_best, student_tensors
from qat.cli import main
from qat.errors import UnsupportedError
from qat.modes import served
from qat.scheme import Scheme
from qat.surgery import apply
from tests.checkpoints.exports import SKIP_TABLE, edit, ids, pair_rules, quantized, rewrite
from tests.tiny import tiny_model

REST = {"match": "*", "skip": "the rest"}
INT4 = [pair_rules("int4_g32", None), REST]
FP8 = [pair_rules("fp8_channel", None), REST]
NEOX = [pair_rules("int4_g32", None, "*.dense*"), pair_rules("int4_g32", None, "*.query_key_value"), REST]
EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "num_hidden_layers": 1,
}


def make_run(source: Path, rules: list[dict[str, Any]], **scheme: Any) -> Path:
    """What `qat train` leaves of a student that was trained a little."""
    settings = {"learn": "none", "init": (), **scheme}
    model = quantized(source, rules, **settings)
    run = source.parent / "run"
    run.mkdir()
    job = {"model": {"id": str(source)}, "scheme": {"rules": rules, **settings}}
    (run / "job.yaml").write_text(yaml.safe_dump(job))
    save_best(run, student_tensors(model), {"step": 1})
    return run


def exported(source: Path, rules: list[dict[str, Any]], *options: str, **scheme: Any) -> tuple[Path, dict[str, Any]]:
    """The export of a run, which `qat verify` finds good, logits of plain transformers included; and its record, whose
    notes were shown."""
    out, run = source.parent / "out", make_run(source, rules, **scheme)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert main(["export", str(run), str(out), *options]) == 0
    assert main(["verify", str(out)]) == 0
    record: dict[str, Any] = json.loads((out / RECORD).read_text())
    assert set(record["notes"]) <= {str(warning.message) for warning in shown}
    return out, record


def written(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def config(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "config.json").read_text())
    return found


def job(source: Path, rules: list[dict[str, Any]], **scheme: Any) -> str:
    """A config of one step on `source`."""
    settings = {
        "name": "run",
        "method": "qat",
        "model": {"id": str(source)},
        "scheme": {"rules": rules, **scheme},
        "data": {"source": "embedded", "seq_len": 32, "max_tokens": 2048},
        "eval": {"data": {"source": "heldout", "seq_len": 32, "max_tokens": 512}, "tokens": 64},
        "steps": 1,
        "rows": 1,
        "micro_rows": 1,
        "runs": str(source.parent / "runs"),
    }
    path = source.parent / "job.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


# --- one tensor under two names -------------------------------------------------------------------


def test_a_head_stored_beside_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    source = tiny_model("qwen3", tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=True)
    rewrite(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    out, record = exported(source, INT4)
    tensors = written(out)
    assert "model.embed_tokens.weight" in tensors and "lm_head.weight" not in tensors
    assert config(out)["tie_word_embeddings"] is True
    assert record["left_out"] == {"lm_head.weight": "the same tensor as model.embed_tokens.weight"}
    assert "lm_head.weight is left out: the same tensor as model.embed_tokens.weight" in record["notes"]


def test_a_tied_model_whose_file_has_the_head_only(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=True)
    rewrite(source, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    out, record = exported(source, INT4)
    assert "model.embed_tokens.weight" in written(out) and "lm_head.weight" not in written(out)
    assert config(out)["tie_word_embeddings"] is True and list(record["left_out"]) == ["lm_head.weight"]


def test_a_head_stored_twice_can_be_untied(tmp_path: Path) -> None:
    source = tiny_model("qwen3", tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=True)
    rewrite(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    out, record = exported(source, [*SKIP_TABLE, pair_rules("int8_channel", None, "*")], tied="untie")
    assert {"model.embed_tokens.weight", "lm_head.weight_packed"} <= written(out).keys()
    assert config(out)["tie_word_embeddings"] is False and record["left_out"] == {}


def test_two_different_tensors_in_one_place_are_refused_in_seconds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tiny_model("llama", tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=True)
    rewrite(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    began = time.process_time()
    assert main(["train", job(source, INT4)]) == 2
    assert time.process_time() - began < 5
    assert "lm_head.weight and model.embed_tokens.weight, which are one tensor" in capfd.readouterr().err


def test_a_second_name_with_the_same_numbers_is_left_out_by_name(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    rewrite(source, lambda t: t.update({"norm.weight": t["model.norm.weight"].clone()}))
    out, record = exported(source, INT4)
    assert record["left_out"] == {"norm.weight": "a second name of model.norm.weight"}
    assert "norm.weight" not in written(out)


# --- names that differ between file and module ----------------------------------------------------


def test_a_head_with_two_names_is_ignored_under_both(tmp_path: Path) -> None:
    source = tiny_model("gpt_neox", tmp_path / "model", num_hidden_layers=1)
    assert "embed_out.weight" in load_file(source / "model.safetensors")  # and `lm_head` in the model
    out, _ = exported(source, NEOX)
    ignored = config(out)["quantization_config"]["ignore"]
    assert ignored == ["embed_out", "lm_head"]
    for name in ignored:
        edit(out, lambda c, name=name: c["quantization_config"].update(ignore=[name]))
        assert main(["verify", str(out), "--no-logits"]) == 1, f"without the other name, {name} alone"


@pytest.mark.parametrize("target", sorted(name for name in READERS if not TARGETS[name].STACKS_OF))
def test_a_quantized_head_with_two_names_is_found_under_both(target: str, tmp_path: Path) -> None:
    source = tiny_model("gpt_neox", tmp_path / "model", num_hidden_layers=1)
    others = {"fp8": ("fp8_b128", "fp8_g128"), "ascend": ("int8_channel", "int8_token")}
    pair = others.get(target, ("fp8_channel", "fp8_token"))
    rules = [pair_rules(*pair, "*.dense*"), *([] if target == "fp8" else [pair_rules(*pair, "lm_head")]), REST]
    out, record = exported(source, rules, "--target", target)
    assert ("embed_out" in record["modules"]) == (target != "fp8")
    if target == "compressed-tensors":
        targets = config(out)["quantization_config"]["config_groups"]["group_0"]["targets"]
        assert {"re:.*embed_out$", "re:.*lm_head$"} <= set(targets)


def test_files_without_the_base_models_prefix(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=True)
    rewrite(source, lambda t: [t.update({name.removeprefix("model."): t.pop(name)}) for name in list(t)])
    out, _ = exported(source, [*SKIP_TABLE, pair_rules("int4_g32", None, "*")], tied="untie")
    assert {"embed_tokens.weight", "layers.0.mlp.up_proj.weight_packed", "lm_head.weight_packed"} <= written(out).keys()


def test_names_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe", tmp_path / "model", num_hidden_layers=1, num_experts=12)
    tensors = load_file(source / "model.safetensors")
    model = load_model(source)
    names = stored_names(model, tensors)
    assert names.tensors.keys() == tensors.keys() and not names.unread
    assert all(torch.equal(names.tensors[name], tensor.float()) for name, tensor in tensors.items())
    assert names.parts == {name for name in tensors if ".experts." in name}
    assert names.modules["model.layers.0.self_attn.q_proj"] == "model.layers.0.self_attn.q_proj"


def test_layers_that_no_file_can_hold_are_refused_before_the_first_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """HRM stores query, key and value as one tensor, so a packed query has no name."""
    source = tiny_model("hrm_text", tmp_path / "model", num_hidden_layers=1)
    for options in ([], ["--dry-run"]):
        assert main(["train", job(source, INT4), *options]) == 2
        assert "self_attn.q_proj" in (said := capfd.readouterr().err) and "stores these weights merged" in said
    assert not (tmp_path / "runs" / "run" / "checkpoints").exists()


# --- tensors that the model does not load ---------------------------------------------------------


def test_towers_and_prediction_heads_are_copied_and_named(tmp_path: Path) -> None:
    source = tiny_model("qwen3_5_text", tmp_path / "model", num_hidden_layers=1, layer_types=["full_attention"])
    extra = {
        "mtp.fc.weight": torch.randn(8, 16).to(torch.bfloat16),
        "mtp.norm.weight": torch.randn(8),
        "model.visual.blocks.0.attn.qkv.weight": torch.randn(8, 16),
    }
    rewrite(source, lambda t: t.update(extra))
    out, record = exported(source, INT4)
    tensors = written(out)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in extra.items())
    assert set(record["copied"]) == extra.keys()
    ignored = config(out)["quantization_config"]["ignore"]
    assert {"mtp.fc", "model.visual.blocks.0.attn.qkv"} <= set(ignored) and "mtp.norm" not in ignored
    assert any("3 tensors that Qwen3_5ForCausalLM does not load are copied unread" in note for note in record["notes"])


def test_layers_beyond_those_of_the_config_are_refused_by_the_dry_run_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    rewrite(source, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.randn(8, 4)}))
    for options in ([], ["--dry-run"]):
        assert main(["train", job(source, INT4), *options]) == 2
        assert "1 tensors belong to no module (they would be ignored): model.layers.1.mlp" in capfd.readouterr().err


def test_every_tensor_of_the_source_has_a_fate(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=True)
    rewrite(
        source,
        lambda t: t.update(
            {"lm_head.weight": t["model.embed_tokens.weight"].clone()},
            **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(16)},
        ),
    )
    _, record = exported(source, INT4)
    packed = {f"{path}.weight" for path in record["modules"]}
    fates = [packed, record["tensors"].keys() - set(record["copied"]), set(record["copied"]), set(record["left_out"])]
    names = [name for fate in fates for name in fate]
    assert sorted(names) == sorted(load_file(source / "model.safetensors"))


# --- float32 --------------------------------------------------------------------------------------


def test_router_biases_stay_in_float32(tmp_path: Path) -> None:
    source = tiny_model("glm4_moe", tmp_path / "model", **EXPERTS)
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    biases = 1 + torch.arange(8) / 4096  # eight numbers, two in BF16
    rewrite(source, lambda t: t.update({name: biases}))
    out, _ = exported(source, FP8)
    assert written(out)[name].dtype == torch.float32 and torch.equal(written(out)[name], biases)
    rewrite(out, lambda t: t.update({name: t[name].to(torch.bfloat16)}))
    assert main(["verify", str(out), "--no-logits"]) == 1


@pytest.mark.parametrize(("dtype", "word"), [(torch.float16, "FP16"), (torch.float32, "float32")])
def test_what_is_narrowed_is_counted(dtype: torch.dtype, word: str, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    rewrite(source, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    _, record = exported(source, INT4)
    count = 2 * 384 * 128 + 3 * 128
    note = f"5 tensors ({count} numbers) that are not quantized are {word} in the source and become BF16"
    assert any(said.startswith(note) for said in record["notes"])


# --- what is said before the first step -----------------------------------------------------------


def test_formats_that_no_target_holds_are_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    assert main(["train", job(source, [pair_rules("nf4_g64", None), REST])]) == 0
    said = capfd.readouterr().err
    assert "this can be trained and evaluated, but not exported: no export target holds nf4_g64\n" in said


def test_what_only_another_target_holds_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    model = apply(load_model(source), Scheme(rules=[pair_rules("fp8_channel", "fp8_token"), REST]))

    def refuse(*_: object) -> None:
        raise UnsupportedError("not today")

    monkeypatch.setattr(TARGETS["compressed-tensors"], "check", refuse)
    assert check_export(model, source) == ["not today. Export this run with --target modelopt"]
    monkeypatch.setattr(TARGETS["modelopt"], "check", refuse)
    with pytest.raises(UnsupportedError, match="no export target can hold this model"):
        check_export(model, source)


def test_the_dry_run_says_what_the_export_will(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    assert main(["train", job(source, [pair_rules("int4_g64_asym", None), REST]), "--dry-run", "--json"]) == 0
    notes = json.loads(capfd.readouterr().out)["notes"]
    assert any(note.startswith("export: int4_g64_asym: plain transformers") for note in notes)


def test_inputs_of_the_served_model_are_those_of_the_export(tmp_path: Path) -> None:
    """Evaluation rounds what export rounds, and keeps what it keeps."""
    source = tiny_model("glm4_moe", tmp_path / "model", **EXPERTS)
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    rewrite(source, lambda t: t.update({name: 1 + torch.arange(8) / 4096}))
    model = quantized(source, FP8)
    run = make_run(source, FP8)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    with torch.no_grad(), served(model):
        assert torch.equal(load_exported(tmp_path / "out")(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("written", [[0.0, float("inf")], [0.0, {"__float__": "Infinity"}]], ids=["bare", "tagged"])
def test_infinity_in_a_config_stays_and_packed_layers_of_parents_that_initialise_them_load_here(
    tmp_path: Path, written: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Mamba-2: transformers writes one form, older checkpoints hold the other; its mixer initialises out_proj, so that
    plain transformers cannot load it packed: this is said, and neither we nor vLLM are concerned."""
    sizes = {"num_heads": 8, "head_dim": 32, "state_size": 16, "n_groups": 1, "num_hidden_layers": 1}
    source = tiny_model("mamba2", tmp_path / "model", tie_word_embeddings=True, **sizes)
    edit(source, lambda found: found.update(time_step_limit=written))
    out, record = exported(source, [pair_rules("int8_channel", None, "*_proj"), REST])
    assert config(out)["time_step_limit"] == written
    assert "skipped: transformers cannot load packed layers of Mamba2Mixer" in capsys.readouterr().out
    assert any("cannot load packed layers of Mamba2Mixer" in note for note in record["notes"])
    assert main(["generate", str(out), "The fox", "--tokens", "2"]) == 0
