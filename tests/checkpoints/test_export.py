"""Exports against independent readers: our own numpy unpacker and plain transformers.

Every (weight, input) pair that the target offers is exported and must reload as the trained model, bit for bit.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qat.checkpoints.export import RECORD, export, export_model
from qat.checkpoints.exported import load_exported
from qat.checkpoints.hf import load_model
from qat.checkpoints.layouts import TARGETS, open_export
from qat.checkpoints.layouts.compressed_tensors import write as target
from qat.checkpoints.layouts.reader import digest
from qat.checkpoints.layouts.support import pairs
from qat.checkpoints.resume import save_best, student_tensors
from qat.checkpoints.shards import SINGLE, ShardReader, ShardWriter
from qat.checkpoints.verify import verify
from qat.errors import CheckpointError, ConfigError, UnsupportedError
from qat.modes import served
from qat.numbers.catalog import lookup
from qat.sites import weights
from qat.training.activations import static_part
from tests.checkpoints.exports import (
    AFFINE,
    SKIP_HEAD,
    SKIP_TABLE,
    SYMMETRIC,
    TARGET,
    UNIFORM,
    Pair,
    export_pair,
    forward_weights,
    ids,
    mixed_rules,
    pair_rules,
    quantized,
    quiet_export,
)
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("small") / "model", num_hidden_layers=1)


def assert_proven(folder: Path, skipped: bool = False) -> None:
    report = verify(folder)
    assert report.ok, [check for check in report.checks if not check.ok]
    last = report.checks[-1].detail
    assert ("skipped" in last) if skipped else ("difference 0.0" in last)


# --- the model that was trained is the model that is loaded ------------------------------------------


@pytest.mark.parametrize("pair", UNIFORM, ids=str)
def test_a_uniform_export_is_the_trained_model(pair: Pair, small: Path, tmp_path: Path) -> None:
    model = export_pair(small, tmp_path / "out", pair)
    assert_proven(tmp_path / "out")
    exported = open_export(tmp_path / "out")
    weights = forward_weights(model)
    assert weights.keys() == exported.modules.keys()
    for path, weight in weights.items():
        assert torch.equal(exported.dense(path), weight)
    assert [g["targets"] for g in exported.quantization["config_groups"].values()] == [["Linear"]]


CHUNKS = [SYMMETRIC[i : i + 8] for i in range(0, len(SYMMETRIC), 8)]


@pytest.mark.parametrize("chunk", CHUNKS, ids=lambda chunk: "+".join("/".join(map(str, pair)) for pair in chunk))
def test_every_pair_is_exact_beside_others(chunk: list[Pair], llama: Path, tmp_path: Path) -> None:
    model = quantized(llama, [*mixed_rules(chunk), {"match": "*", "skip": "the rest"}])
    quiet_export(model, llama, tmp_path / "out")
    assert_proven(tmp_path / "out")
    config = open_export(tmp_path / "out").quantization
    how = [target.layout(lookup(w), lookup(a) if a else None) for w, a in chunk]
    assert len(config["config_groups"]) == len({repr(layout) for layout in how})
    formats = {layout.format for layout in how}
    assert config["format"] == (formats.pop() if len(formats) == 1 else "mixed-precision")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma"])
@pytest.mark.parametrize("pair", [("int4_g32", None), ("nvfp4", "nvfp4")], ids=str)
def test_architectures(kind: str, pair: Pair, tmp_path: Path) -> None:
    source = tiny_model(kind, tmp_path / "source", num_hidden_layers=2)
    export_pair(source, tmp_path / "out", pair)
    assert_proven(tmp_path / "out")


def test_asymmetric_layers_beside_others(llama: Path, tmp_path: Path) -> None:
    """Plain transformers would decode all by one group, so the library decompresses them."""
    rules = mixed_rules([("int4_g32_asym", None), ("int8_channel", "int8_token"), ("nvfp4", None)])
    quiet_export(quantized(llama, [*rules, {"match": "*", "skip": "the rest"}]), llama, tmp_path / "out")
    assert_proven(tmp_path / "out")


LEARNED: list[Pair] = [("int4_g64", None), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("fp8_b128", None)]


@pytest.mark.parametrize("learn", ["lsq", "dual_lsq", "focus"])
@pytest.mark.parametrize("pair", LEARNED, ids=str)
def test_learned_scales_are_what_is_stored(learn: str, pair: Pair, small: Path, tmp_path: Path) -> None:
    if learn == "focus" and pair[0] == "fp8_b128":
        pytest.skip("has no parts of eight")
    model = export_pair(small, tmp_path / "out", pair, learn=learn)
    learned = [p for name, p in model.named_parameters() if "log_" in name]
    assert learned and all(bool((p != 0).all()) for p in learned)
    assert_proven(tmp_path / "out")


def test_learned_ranges_are_what_is_stored(llama: Path, tmp_path: Path) -> None:
    """A static input scale follows the learned range, in the file and in what loads it."""
    model = export_pair(llama, tmp_path / "out", ("fp8_tensor", "fp8_tensor"), learn_inputs=True)
    site = next(iter(weights(model).values()))
    assert site.input is not None and site.input.log_range is not None and float(site.input.log_range) != 0
    assert_proven(tmp_path / "out")
    stored = load_file(tmp_path / "out" / SINGLE)[f"{site.path}.input_scale"]
    expected = static_part(site.input.format, site.input.amax * site.input.log_range.exp())
    assert expected is not None and torch.equal(stored.float().reshape(1), expected)
    assert not torch.equal(expected, static_part(site.input.format, site.input.amax))
    with torch.no_grad(), served(model):
        wanted = model(ids()).logits
    with torch.no_grad():
        assert torch.equal(load_exported(tmp_path / "out")(ids()).logits, wanted)


@pytest.mark.parametrize("pair", [("int4_g64", None), ("nvfp4", "nvfp4"), ("int8_channel", "int8_token")], ids=str)
def test_our_loader_computes_what_the_student_computed(pair: Pair, llama: Path, tmp_path: Path) -> None:
    model = export_pair(llama, tmp_path / "out", pair)
    with torch.no_grad(), served(model):
        expected = model(ids()).logits
    loaded = load_exported(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, expected)
        if pair[1] == "int8_token":  # the two rules differ here, so this comparison can fail
            other = load_exported(tmp_path / "out", "compressed_tensors")
            assert not torch.equal(other(ids()).logits, expected)
    assert loaded.generation_config.eos_token_id == 2 and not loaded.training


def test_inputs_can_be_left_alone(llama: Path, tmp_path: Path) -> None:
    export_pair(llama, tmp_path / "out", ("nvfp4", "nvfp4"))
    with torch.no_grad():
        with_inputs, without = (load_exported(tmp_path / "out", quantize_inputs=q)(ids()).logits for q in (True, False))
    assert not torch.equal(with_inputs, without)


# --- tensors around the quantized ones --------------------------------------------------------------


def test_only_quantized_tensors_change_names(llama: Path, tmp_path: Path) -> None:
    model = quantized(llama, [pair_rules("nvfp4", "nvfp4", "*.mlp.*"), {"match": "*", "skip": "attention stays"}])
    quiet_export(model, llama, tmp_path / "out")
    names = set(ShardReader(tmp_path / "out").names())
    suffixes = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    for name in ShardReader(llama).names():
        path = name.removesuffix(".weight")
        expected = {f"{path}.{suffix}" for suffix in suffixes} if ".mlp." in name else {name}
        assert expected <= names
        names -= expected
    assert names == set()
    ignored = open_export(tmp_path / "out").quantization["ignore"]
    leaves = [f"model.layers.{n}.self_attn.{leaf}_proj" for n in (0, 1) for leaf in "qkvo"]
    assert sorted(ignored) == sorted(["lm_head", *leaves])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name in stored:
            assert torch.equal(stored[name], parameter.to(torch.bfloat16))
    assert_proven(tmp_path / "out")


def test_tied_embeddings_stay_tied_and_single(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", num_hidden_layers=1, tie_word_embeddings=True)
    export_pair(source, tmp_path / "out", ("int4_g64", None))
    folder = open_export(tmp_path / "out")
    assert "lm_head.weight" not in folder.names and folder.config["tie_word_embeddings"] is True
    assert folder.quantization["ignore"] == ["lm_head"]
    assert_proven(tmp_path / "out")


@pytest.mark.parametrize("pair", [("int8_channel", "int8_token"), ("int4_g64", None), ("nvfp4", "nvfp4")], ids=str)
def test_a_quantized_head_is_untied_and_targeted_by_name(pair: Pair, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", num_hidden_layers=1, tie_word_embeddings=True)
    model = quantized(source, [*SKIP_TABLE, pair_rules(*pair, match="*")], tied="untie")
    quiet_export(model, source, tmp_path / "out")
    folder = open_export(tmp_path / "out")
    assert "lm_head" in folder.modules and folder.config["tie_word_embeddings"] is False
    (group,) = folder.quantization["config_groups"].values()
    assert "re:.*lm_head$" in group["targets"] and "Linear" not in group["targets"]
    assert_proven(tmp_path / "out")


def test_an_untied_head_that_stays_dense_is_written(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", num_hidden_layers=1, tie_word_embeddings=True)
    table = {"match": "*embed_tokens", "weight": "int4_g64"}
    model = quantized(source, [*SKIP_HEAD, table, pair_rules("int4_g64", None)], tied="untie")
    with pytest.warns(UserWarning, match=r"model\.embed_tokens is quantized to int4_g64 .* dense BF16"):
        export_model(model, source, tmp_path / "out")
    folder = open_export(tmp_path / "out")
    assert "lm_head.weight" in folder.names and folder.config["tie_word_embeddings"] is False
    quantizer = model.get_input_embeddings().weight_quantizer
    table_on_grid = quantizer(model.get_input_embeddings().weight).to(torch.bfloat16)
    assert torch.equal(folder.reader.get("model.embed_tokens.weight"), table_on_grid)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["embeddings_on_grid"] == {"model.embed_tokens": "int4_g64"}
    assert_proven(tmp_path / "out")


def test_a_shared_quantized_table_becomes_dense_table_and_packed_head(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path / "source", num_hidden_layers=1, tie_word_embeddings=True)
    model = quantized(source, [{"match": "*", "weight": "int8_channel"}], tied="share")
    quiet_export(model, source, tmp_path / "out")
    folder = open_export(tmp_path / "out")
    assert "lm_head" in folder.modules and folder.config["tie_word_embeddings"] is False
    assert torch.equal(folder.dense("lm_head"), folder.reader.get("model.embed_tokens.weight"))
    assert_proven(tmp_path / "out")


@pytest.mark.parametrize("pair", [("fp8_channel", "fp8_token"), ("int4_g64", None)], ids=str)
def test_experts_keep_their_own_names(pair: Pair, tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe", tmp_path / "source", num_hidden_layers=1)
    rest = {"match": "*", "skip": "experts and routers"}
    model = quantized(source, [pair_rules(*pair, match="*.self_attn.*"), rest])
    quiet_export(model, source, tmp_path / "out")
    folder = open_export(tmp_path / "out")
    ignored = set(folder.quantization["ignore"])
    experts = {f"model.layers.0.mlp.experts.{e}.{leaf}_proj" for e in range(4) for leaf in ("gate", "up", "down")}
    assert experts | {"model.layers.0.mlp.gate", "lm_head"} == ignored
    assert {f"{path}.weight" for path in ignored} <= folder.names
    # Beside packed layers, plain transformers expects packed experts and cannot load dense ones.
    assert_proven(tmp_path / "out", skipped=pair[0] == "int4_g64")
    with torch.no_grad(), served(model):
        assert torch.equal(load_exported(tmp_path / "out")(ids()).logits, model(ids()).logits)


def test_tensors_the_model_never_loads_are_copied(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = quantized(small, [pair_rules("int4_g64", None), {"match": "*", "skip": "x"}])
    tensors = {**load_file(small / "model.safetensors"), "mtp.layers.0.up_proj.weight": torch.randn(8, 4)}
    with ShardWriter(source) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        for path in small.glob("*.json"):
            (writer.folder / path.name).write_bytes(path.read_bytes())
    quiet_export(model, source, tmp_path / "out")
    folder = open_export(tmp_path / "out")
    assert torch.equal(folder.reader.get("mtp.layers.0.up_proj.weight"), tensors["mtp.layers.0.up_proj.weight"])
    assert "mtp.layers.0.up_proj" in folder.quantization["ignore"]
    assert verify(tmp_path / "out", logits=False).ok


def test_shards_are_complete_and_equal(llama: Path, tmp_path: Path) -> None:
    model = export_pair(llama, tmp_path / "one", ("nvfp4", "nvfp4"))
    quiet_export(model, llama, tmp_path / "many", max_shard_bytes=40_000)
    one, many = ShardReader(tmp_path / "one"), ShardReader(tmp_path / "many")
    assert len(many.shards) > 3 and one.names() == many.names()
    assert all(digest(one.get(name)) == digest(many.get(name)) for name in one.names())
    assert_proven(tmp_path / "many")


# --- what must never be written -------------------------------------------------------------------


def spoil_weight(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = float("nan")


def spoil_scale(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight_quantizer.start[0, 0] = float("inf")


def spoil_norm(model: Any) -> None:
    model.model.norm.weight.data[0] = float("inf")


def spoil_fused(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight_quantizer.global_scale *= 2


def spoil_range(model: Any) -> None:
    layer = model.model.layers[0].mlp
    layer.down_proj.input_quantizer.amax.fill_(float("nan"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weight, r"mlp\.up_proj\.weight.*NaN"),
        (spoil_scale, r"mlp\.up_proj\.weight.*NaN"),
        (spoil_norm, r"model\.norm\.weight.*NaN"),
        (spoil_fused, r"gate_proj, .*up_proj.*global scales differ"),
        (spoil_range, r"mlp\.down_proj: the range of its input is nan"),
    ],
    ids=["weight", "scale", "norm", "fused", "range"],
)
def test_broken_models_leave_nothing_behind(spoil: Any, message: str, small: Path, tmp_path: Path) -> None:
    model = quantized(small, [pair_rules("nvfp4", "nvfp4"), {"match": "*", "skip": "x"}])
    with torch.no_grad():
        spoil(model)
    with pytest.raises(CheckpointError, match=message):
        export_model(model, small, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_source_is_refused(small: Path, llama: Path, tmp_path: Path) -> None:
    model = quantized(llama, [pair_rules("int4_g64", None), {"match": "*", "skip": "x"}])
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.1\..*loaded from"):
        export_model(model, small, tmp_path / "out")


def test_existing_folders_are_replaced_only_on_request(small: Path, tmp_path: Path) -> None:
    model = export_pair(small, tmp_path / "out", ("int4_g64", None))
    with pytest.raises(CheckpointError, match="not empty"):
        quiet_export(model, small, tmp_path / "out")
    (tmp_path / "out" / "stale").touch()
    quiet_export(model, small, tmp_path / "out", overwrite=True, extra={"note": "again"})
    assert not (tmp_path / "out" / "stale").exists()
    assert json.loads((tmp_path / "out" / RECORD).read_text())["run"] == {"note": "again"}


def test_a_run_is_exported_by_its_folder(small: Path, tmp_path: Path) -> None:
    rules = [pair_rules("nvfp4", "nvfp4"), {"match": "*", "skip": "x"}]
    model = quantized(small, rules, learn="dual_lsq")
    run = tmp_path / "run"
    run.mkdir()
    scheme = {"rules": rules, "learn": "dual_lsq"}
    (run / "job.yaml").write_text(json.dumps({"model": {"id": str(small)}, "scheme": scheme}))
    save_best(run, student_tensors(model), {"step": 17})
    export(run, tmp_path / "out")
    weights, folder = forward_weights(model), open_export(tmp_path / "out")
    assert all(torch.equal(folder.dense(path), weight) for path, weight in weights.items())
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["run"] == {
        "name": "run",
        "checkpoint": "best",
        "step": 17,
        "model": None,
    }  # a local path is not passed on
    assert verify(tmp_path / "out", logits=False).ok


def test_the_record_tells_the_truth(small: Path, tmp_path: Path) -> None:
    model = export_pair(small, tmp_path / "out", ("nvfp4", "nvfp4"))
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["target"] in TARGETS and record["activation_rules"] == ["vllm"]
    assert record["bits_per_weight"] == pytest.approx(4.5, rel=0.005)
    assert record["bytes"] == sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    for path, weight in forward_weights(model).items():
        entry = record["modules"][path]
        assert entry["sha256"] == digest(weight) and entry["shape"] == list(weight.shape)
        quantizer = model.get_submodule(path).input_quantizer
        assert entry["input"] == "nvfp4" and entry["input_amax"] == float(quantizer.amax)
    assert len(AFFINE) + len(SYMMETRIC) == len(pairs(target.ROWS))


# --- what is said ---------------------------------------------------------------------------------


def test_unsupported_formats_stop_an_export_before_it_starts(small: Path, tmp_path: Path) -> None:
    model = quantized(small, [pair_rules("nf4_g64", None), {"match": "*", "skip": "x"}])
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\..*nf4_g64.*int4_g64"):
        export_model(model, small, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=f"nearest: {TARGET}"):
        export_model(model, small, tmp_path / "out", "compressed_tensor")
    with pytest.raises(UnsupportedError, match="apply a scheme"):
        export_model(load_model(small), small, tmp_path / "out")


def test_known_surprises_are_warnings(small: Path, tmp_path: Path) -> None:
    model = quantized(small, [pair_rules("int4_g64_asym", None), {"match": "*", "skip": "x"}])
    with pytest.warns(UserWarning, match=r"int4_g64_asym: plain transformers .*dequantize=True"):
        export_model(model, small, tmp_path / "out")
    assert any("dequantize=True" in note for note in json.loads((tmp_path / "out" / RECORD).read_text())["notes"])


def test_config_of_the_source_is_kept(small: Path, tmp_path: Path) -> None:
    export_pair(small, tmp_path / "out", ("int4_g64", None))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (small, tmp_path / "out"))
    assert after.pop("quantization_config")["ignore"] == ["lm_head"]
    assert after.pop("tie_word_embeddings") is False and after["dtype"] == "bfloat16"
    assert {key: value for key, value in before.items() if key != "tie_word_embeddings"} == after
