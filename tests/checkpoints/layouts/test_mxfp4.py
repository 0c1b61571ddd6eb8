"""gpt-oss's own layout: plain transformers itself must load the trained experts, bit for bit, and compute the same."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qat.checkpoints.export import check_export
from qat.checkpoints.exported import load_exported
from qat.checkpoints.hf import quiet
from qat.checkpoints.layouts import READERS, TARGETS, TargetLayer, check_layer, find_target, open_export
from qat.checkpoints.layouts.mxfp4 import write as target
from qat.checkpoints.verify import verify
from qat.cli import main
from qat.engines.transformers import load_packed
from qat.errors import CheckpointError, UnsupportedError
from qat.modes import served
from qat.numbers.catalog import lookup
from qat.sites import weights
from tests.checkpoints.exports import broken, edit, ids, pair_rules, quantized, quiet_export, rewrite
from tests.checkpoints.test_export_plan import job
from tests.tiny import tiny_model

GPT_OSS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "max_position_embeddings": 4096 * 32,
}
REST = {"match": "*", "skip": "the rest"}
EXPERTS = [pair_rules("mxfp4", None, "*.experts.*"), REST]
STACK = "model.layers.0.mlp.experts.gate_up_proj"
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model("gpt_oss", tmp_path_factory.mktemp("source") / "model", **GPT_OSS)

    def biases(tensors: dict[str, Tensor]) -> None:
        for name in sorted(tensors):
            if name.endswith("proj_bias"):  # which a fresh model has at zero
                tensors[name] = torch.randn(tensors[name].shape).to(torch.bfloat16)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rewrite(folder, biases)
    return folder


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    return quantized(source, EXPERTS, learn="dual_lsq")


@pytest.fixture
def exported(model: Any, source: Path, tmp_path: Path) -> Path:
    return quiet_export(model, source, tmp_path / "out", "mxfp4")


def trained(model: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return {path: site.value().to(torch.bfloat16) for path, site in weights(model).items()}


def test_tensors_are_those_of_the_published_checkpoints(exported: Path, source: Path) -> None:
    tensors, before = load_file(exported / "model.safetensors"), load_file(source / "model.safetensors")
    stacks = {"gate_up_proj": (4, 512, 128), "down_proj": (4, 128, 256)}
    for name, (experts, rows, columns) in stacks.items():
        path = STACK.replace("gate_up_proj", name)
        assert path not in tensors and path in before
        blocks, scales = tensors.pop(f"{path}_blocks"), tensors.pop(f"{path}_scales")
        assert blocks.dtype == scales.dtype == torch.uint8
        assert blocks.shape == (experts, rows, columns // 32, 16) and scales.shape == blocks.shape[:-1]
        assert tensors[f"{path}_bias"].dtype == torch.bfloat16
    assert tensors.keys() == {name for name in before if not name.endswith((*stacks,))}
    config = open_export(exported).config["quantization_config"]
    assert config["quant_method"] == "mxfp4" and config.keys() == {"quant_method", "modules_to_not_convert"}
    assert {"lm_head", "model.layers.0.mlp.router", "model.layers.0.self_attn.q_proj"} < {
        *config["modules_to_not_convert"]
    }


def test_bytes_decode_to_the_trained_weights_by_arithmetic_written_here(model: Any, exported: Path) -> None:
    tensors = load_file(exported / "model.safetensors")
    for path, weight in trained(model).items():
        blocks, scales = tensors[f"{path}_blocks"].numpy(), tensors[f"{path}_scales"].numpy()
        codes = np.stack([blocks % 16, blocks // 16], axis=-1).reshape(*scales.shape, 32)
        values = np.where(codes < 8, 1, -1) * VALUES[codes % 8] * 2.0 ** (scales.astype(np.float64) - 127)[..., None]
        assert torch.equal(torch.from_numpy(values.reshape(weight.shape)).to(torch.bfloat16), weight)


def test_the_reader_and_the_writers_inverse_give_the_trained_weights(model: Any, exported: Path) -> None:
    folder = open_export(exported)
    dense = dict(folder.dense_tensors())
    assert folder.modules.keys() == trained(model).keys()
    for path, weight in trained(model).items():
        assert torch.equal(folder.dense(path), weight) and torch.equal(dense[path], weight.transpose(-1, -2))
        q = target.unpack(folder.modules[path], folder.layer(path))
        assert torch.equal(q.dequantize(torch.bfloat16), weight)


def test_plain_transformers_loads_the_trained_experts(model: Any, exported: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(exported, quantization_config=Mxfp4Config(dequantize=True))
    for path, weight in trained(model).items():
        assert torch.equal(plain.get_parameter(path), weight.transpose(-1, -2))


def test_it_is_verified_to_the_last_logit_and_served_packed(model: Any, exported: Path) -> None:
    report = verify(exported)
    assert report.ok, report.checks
    assert report.checks[-1].detail == "weights only, largest logit difference 0.0 over 64 tokens"
    with torch.no_grad():
        dense = load_exported(exported)(input_ids=ids()).logits
        with served(model):  # whose stacks lie the other way in memory, which products sum in another order
            torch.testing.assert_close(dense, model(input_ids=ids()).logits, rtol=1e-5, atol=1e-5)
        packed = load_packed(exported, torch.float32)
        torch.testing.assert_close(packed(input_ids=ids()).logits, dense, rtol=1e-4, atol=1e-4)
    experts = packed.get_submodule("model.layers.0.mlp.experts")
    assert not dict(experts.named_parameters(recurse=False))  # biases went with the matrices
    assert len(list(experts.modules())) > 8


def test_the_road_of_a_user(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    local = tiny_model("gpt_oss", tmp_path / "model", **GPT_OSS)
    assert main(["train", job(local, EXPERTS), "data.pack=false", "eval.data.pack=false"]) == 0
    assert "Export this run with --target mxfp4" in capfd.readouterr().err
    run, out = str(tmp_path / "runs" / "run"), str(tmp_path / "out")
    assert main(["export", run, out]) == 2
    assert re.search(r"gpt_oss stores its experts as whole stacks; .*--target mxfp4", capfd.readouterr().err)
    assert main(["export", run, out, "--target", "mxfp4"]) == 0
    assert main(["verify", out]) == 0
    assert main(["generate", out, "The quick", "--tokens", "4"]) == 0


def test_names_of_published_configurations_are_understood(exported: Path) -> None:
    """Patterns, as openai/gpt-oss-20b has them, without a record of ours."""
    names = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit(exported, lambda c: c["quantization_config"].update(modules_to_not_convert=names), forget=True)
    folder = open_export(exported)
    assert folder.ignored("model.layers.0.self_attn.q_proj") and folder.ignored("model.layers.0.mlp.router")
    assert not folder.ignored(STACK) and len(folder.modules) == 2
    assert broken(exported, logits=True) == set()


@pytest.mark.parametrize("name", sorted(set(READERS) - {"mxfp4"}))
def test_other_targets_name_this_one(name: str, source: Path, model: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"{STACK}: {name} holds matrices, .* --target mxfp4$"):
        quiet_export(model, source, tmp_path / "out", name)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [pair_rules("mxfp4", "fp8_token", "*.experts.*"), REST],
            "with fp8_token inputs; nearest inputs",
        ),
        ([pair_rules("int4_g32", None, "*.experts.*"), REST], "cannot hold int4_g32 weights; nearest it can: mxfp4"),
        (
            [*EXPERTS[:1], pair_rules("mxfp4", None, "*_proj"), REST],
            "q_proj: mxfp4 holds the experts of gpt_oss only; skip this layer, or export it with --target compressed",
        ),
        ([pair_rules("mxfp4", None, "*.down_proj"), REST], r"experts: a stack of its experts stays dense.*\(1 stacks"),
    ],
)
def test_what_it_cannot_hold_is_refused(rules: Any, message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        quiet_export(quantized(source, rules), source, tmp_path / "out", "mxfp4")


def test_before_training_a_user_hears_what_no_target_holds(source: Path) -> None:
    int4 = quantized(source, [pair_rules("int4_g32", None, "*.experts.*"), REST])
    (note,) = check_export(int4, source)
    assert note.endswith("but not exported: no export target holds int4_g32 in the experts of gpt_oss")
    both = quantized(source, [*EXPERTS[:1], pair_rules("int4_g32", None, "*_proj"), REST])
    with pytest.raises(UnsupportedError, match=r"no export target can hold this model:\n(.*\n)*.*skip this layer"):
        check_export(both, source)


def test_stacks_of_other_models_have_no_layout() -> None:
    layer = TargetLayer("a.experts.down_proj", (4, 64, 64), lookup("mxfp4"), None, "", "llama4", transposed=True)
    for name in TARGETS:
        with pytest.raises(UnsupportedError, match="not exported: no layout holds the experts of llama4"):
            check_layer(find_target(name), layer)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scales", lambda t: t[..., :-1], r"scales is U8\[4, 512, 3\], not U8\[4, 512, 4\]"),
        ("scales", lambda t: torch.full_like(t, 255), "zero, negative or not finite in 8192 places"),
        ("blocks", lambda t: t.flatten(2), "has no four dimensions"),
        ("blocks", lambda t: t.view(torch.int8), "blocks is I8"),
        ("blocks", None, "blocks is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(name: str, change: Any, message: str, exported: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        stored = tensors.pop(f"{STACK}_{name}")
        if change is not None:
            tensors[f"{STACK}_{name}"] = change(stored)

    rewrite(exported, damage)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_exported(exported)
    assert STACK in str(caught.value)
    assert broken(exported) & {"tensors", "scales"}
    tensors = {name: torch.zeros(4, 512, 4, 16, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=rf"{STACK}_\w+ "):
        target.unpack(open_export(exported).modules.get(STACK) or open_export(exported)._module(STACK, ""), tensors)


def test_a_changed_nibble_is_noticed(exported: Path) -> None:
    rewrite(exported, lambda tensors: tensors[f"{STACK}_blocks"][3, 511, 3, 15].bitwise_xor_(0x10))
    assert broken(exported) == {"weights"}


def test_a_run_of_a_layout_that_stores_transposed_matrices_trains_and_is_not_exported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    local = tiny_model("gpt2", tmp_path / "model", n_layer=1, n_embd=128, n_head=4, n_positions=512)
    rules = [pair_rules("int4_g32", None, "*.c_*"), REST]
    sentence = "can be trained and evaluated, but not exported: no layout holds matrices that are stored transposed"
    assert main(["train", job(local, rules)]) == 0
    assert f"export: this {sentence}" in capfd.readouterr().err
    for name in READERS:
        assert main(["export", str(tmp_path / "runs" / "run"), str(tmp_path / "out"), "--target", name]) == 2
        assert f"c_attn {sentence}" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
