"""The modelopt layout: bytes and configurations, against the independent reader and the compressed-tensors twin."""

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import TargetLayer, check_layer, open_export
from qat.checkpoints.layouts.compressed_tensors import write as twin
from qat.checkpoints.layouts.modelopt import write as target
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.layouts.support import pairs
from qat.checkpoints.shards import ShardReader, ShardWriter
from qat.checkpoints.verify import verify
from qat.errors import CheckpointError, UnsupportedError
from qat.families import DEFAULT, fused_sets
from qat.modes import served
from qat.numbers.catalog import lookup
from qat.numbers.numerics import QTensor, quantize
from qat.sites import weights
from tests.checkpoints.exports import (
    Pair,
    broken,
    forward_weights,
    ids,
    mixed_rules,
    projections,
    quantized,
    quiet_export,
    rewrite,
)
from tests.tiny import tiny_model

O, I = 96, 256  # noqa: E741  # rows and columns, as in descriptions of the layout
ALGORITHMS: dict[str, Pair] = {
    "NVFP4": ("nvfp4", "nvfp4"),
    "W4A16_NVFP4": ("nvfp4", None),
    "FP8": ("fp8_tensor", "fp8_tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8_channel", "fp8_token"),
    "MXFP8": ("mxfp8", "mxfp8"),
}
E4M3, F32, U8 = torch.float8_e4m3fn, torch.float32, torch.uint8
TENSORS: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {
    "NVFP4": {
        "weight": (U8, (O, I // 2)),
        "weight_scale": (E4M3, (O, I // 16)),
        "weight_scale_2": (F32, ()),
        "input_scale": (F32, ()),
    },
    "W4A16_NVFP4": {"weight": (U8, (O, I // 2)), "weight_scale": (E4M3, (O, I // 16)), "weight_scale_2": (F32, ())},
    "FP8": {"weight": (E4M3, (O, I)), "weight_scale": (F32, ()), "input_scale": (F32, ())},
    "FP8_PER_CHANNEL_PER_TOKEN": {"weight": (E4M3, (O, I)), "weight_scale": (F32, (O,))},
    "MXFP8": {"weight": (E4M3, (O, I)), "weight_scale": (U8, (O, I // 32))},
}


def random_layer(name: str) -> tuple[QTensor, dict[str, Tensor], TargetLayer]:
    generator = torch.Generator().manual_seed(5)
    spread = torch.exp(torch.randn(O, 1, generator=generator))
    weight, input = (lookup(n) if n else None for n in ALGORITHMS[name])
    assert weight is not None
    q = quantize(torch.randn(O, I, generator=generator) * spread, weight)
    return q, target.pack(q, input, torch.tensor(5.0)), TargetLayer("a.b", (O, I), weight, input)


def described(q: QTensor) -> PackedModule:
    how = twin.layout(q.format)
    return PackedModule("a.b", how.format, how.weights, None)


def written(tensors: dict[str, Tensor], layer: TargetLayer, folder: Path) -> Path:
    with ShardWriter(folder) as writer:
        for key, tensor in tensors.items():
            writer.add(f"{layer.path}.{key}", tensor)
        config = {"quantization_config": target.quantization_config([layer], [])}
        (writer.folder / "config.json").write_text(json.dumps(config))
    return folder


# --- bytes ----------------------------------------------------------------------------------------


def test_the_target_holds_these_pairs() -> None:
    assert sorted(pairs(target.ROWS), key=str) == sorted(ALGORITHMS.values(), key=str)
    assert {name: target.algorithm(*(lookup(n) if n else None for n in pair)) for name, pair in ALGORITHMS.items()} == {
        name: name for name in ALGORITHMS
    }


@pytest.mark.parametrize("name", ALGORITHMS)
def test_tensors_are_as_the_layout_says_and_unpack(name: str) -> None:
    q, tensors, _ = random_layer(name)
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()} == TENSORS[name]
    found = target.unpack(described(q), tensors)
    stored = q.scales.stored.expand(O, 1) if name == "FP8" else q.scales.stored  # one scale comes back as one per row
    assert torch.equal(found.codes, q.codes) and found.scales.stored.dtype == stored.dtype
    assert torch.equal(found.scales.stored.view(U8), stored.contiguous().view(U8))
    assert torch.equal(found.dequantize(), q.dequantize())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_independent_reader_agrees(name: str, tmp_path: Path) -> None:
    q, tensors, layer = random_layer(name)
    folder = open_export(written(tensors, layer, tmp_path / "out"))
    assert torch.equal(folder.dense("a.b"), q.dequantize(torch.bfloat16))


def test_even_columns_lie_in_low_nibbles_and_scales_multiply() -> None:
    q, tensors, _ = random_layer("NVFP4")
    assert torch.equal(tensors["weight"][:, 3] & 15, q.codes[:, 6]) and torch.equal(
        tensors["weight"][:, 3] >> 4, q.codes[:, 7]
    )
    value = lookup("nvfp4").element.decode(q.codes[4, 33:34]) * tensors["weight_scale"][4, 2].float()
    assert torch.equal(value * tensors["weight_scale_2"], q.dequantize()[4, 33:34])
    theirs = twin.pack(q, lookup("nvfp4"), torch.tensor(5.0))
    assert torch.equal(theirs["weight_packed"], tensors["weight"])
    assert float(theirs["weight_global_scale"] * tensors["weight_scale_2"]) == 1.0
    assert float(theirs["input_global_scale"] * tensors["input_scale"]) == 1.0


@pytest.mark.parametrize(
    ("name", "key", "change", "message"),
    [
        ("NVFP4", "weight_scale_2", None, "weight_scale_2 is missing"),
        ("NVFP4", "weight", lambda t: t[:, 8:], r"weight_scale is torch.float8_e4m3fn \[96, 16\], not .* \[96, 15\]"),
        ("NVFP4", "weight_scale", lambda t: t.view(U8), "weight_scale is torch.uint8"),
        ("NVFP4", "weight_scale_2", torch.zeros_like, "weight_scale_2 must be finite and positive"),
        ("FP8", "weight_scale", lambda t: t * torch.nan, "weight_scale must be finite and positive"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "weight_scale", lambda t: t * 1.01, "weight_scale holds scales that fp8_channel"),
        ("MXFP8", "weight_scale", lambda t: torch.full_like(t, 255), "weight_scale must be finite and positive"),
    ],
)
def test_what_cannot_be_unpacked_is_named(name: str, key: str, change: Any, message: str) -> None:
    q, tensors, _ = random_layer(name)
    stored = tensors.pop(key)
    if change is not None:
        tensors[key] = change(stored)
    with pytest.raises(CheckpointError, match=message):
        target.unpack(described(q), tensors)


# --- whole models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("source") / "model", num_hidden_layers=1)


def trained(source: Path, name: str) -> nn.Module:
    """Fused layers agree in their scale where there is one per tensor, as the layout needs."""
    model = projections(source, ALGORITHMS[name])
    if name == "FP8":
        modules = weights(model)
        for members in fused_sets(modules, DEFAULT.fused):
            largest = max(float(modules[path].quantizer.start) for path in members)
            for path in members:
                modules[path].quantizer.start.fill_(largest)
    return model


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_export_is_the_trained_model_and_its_twin(name: str, source: Path, tmp_path: Path) -> None:
    model = trained(source, name)
    quiet_export(model, source, tmp_path / "out", "modelopt")
    quiet_export(model, source, tmp_path / "twin")
    report = verify(tmp_path / "out")
    assert report.ok, report.checks
    assert report.checks[-1].detail.startswith("skipped: plain transformers fails on modelopt")
    folder, other = open_export(tmp_path / "out"), open_export(tmp_path / "twin")
    assert folder.quantization["quant_algo"] == name and folder.quantization["ignore"] == ["lm_head"]
    for path, weight in forward_weights(model).items():
        assert torch.equal(folder.dense(path), weight) and torch.equal(other.dense(path), weight)
        ours, theirs = folder.static_input(path), other.static_input(path)
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))  # type: ignore[arg-type]  # both or neither
    with torch.no_grad(), served(model):
        assert torch.equal(load_exported(tmp_path / "out")(ids()).logits, model(ids()).logits)


def test_the_legacy_file_says_the_same(source: Path, tmp_path: Path) -> None:
    quiet_export(projections(source, ("nvfp4", "nvfp4")), source, tmp_path / "out", "modelopt")
    legacy = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert legacy["producer"]["name"] == "modelopt"
    expected = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
    assert legacy["quantization"] == expected
    flat = open_export(tmp_path / "out").quantization
    group = flat["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"] and group["weights"]["group_size"] == flat["group_size"] == 16
    (tmp_path / "out" / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {**expected, "quant_algo": "FP8"}})
    )
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: quant_algo differs"):
        open_export(tmp_path / "out")
    assert broken(tmp_path / "out") == {"complete"}


def test_everything_dense_is_excluded_and_nothing_else(tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe", tmp_path / "source", num_hidden_layers=2)
    rules = [{"match": "*.0.self_attn.*", "weight": "nvfp4", "input": "nvfp4"}, {"match": "*", "skip": "x"}]
    model = quantized(source, rules)
    quiet_export(model, source, tmp_path / "out", "modelopt")
    folder = open_export(tmp_path / "out")
    excluded = folder.quantization["ignore"]
    assert "model.layers.0.mlp.experts*" in excluded and "model.layers.1.mlp.experts*" in excluded
    matrices = [n for n in ShardReader(source).names() if len(ShardReader(source).info(n).shape) == 2]
    for path in (name.removesuffix(".weight") for name in matrices if "embed" not in name):
        assert any(fnmatchcase(path, pattern) for pattern in excluded) == (path not in folder.modules)
        # vLLM also leaves out what merely contains a listed name.
        assert path not in folder.modules or not any(pattern in path for pattern in excluded)
    assert verify(tmp_path / "out").ok


# --- refusals -------------------------------------------------------------------------------------


def test_fused_layers_with_scales_of_their_own_are_refused(source: Path, tmp_path: Path) -> None:
    model = projections(source, ALGORITHMS["FP8"])
    with pytest.raises(UnsupportedError, match=r"q_proj, .*k_proj, .*v_proj under one scale.*compressed-tensors"):
        quiet_export(model, source, tmp_path / "out", "modelopt")
    assert not (tmp_path / "out").exists()
    quiet_export(model, source, tmp_path / "out")  # which stores one scale per row


def test_several_algorithms_are_refused(source: Path, tmp_path: Path) -> None:
    rules = mixed_rules([("nvfp4", "nvfp4"), ("nvfp4", None)])
    model = quantized(source, [*rules, {"match": "*", "skip": "x"}])
    with pytest.raises(UnsupportedError, match=r"q_proj is NVFP4, .*o_proj is W4A16_NVFP4.*compressed-tensors"):
        quiet_export(model, source, tmp_path / "out", "modelopt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weight", "input", "message"),
    [
        (
            "int4_g64",
            None,
            r"a.b: modelopt .*int4_g64 weights \(ascend, compressed-tensors can\); nearest .*: nvfp4",
        ),
        ("nvfp4", "int8_token", r"nvfp4 weights with int8_token inputs; nearest inputs for them: nvfp4, none"),
        ("mxfp8", None, r"mxfp8 weights without quantized inputs \(compressed-tensors can\); .*: mxfp8"),
        ("fp8_b128", "fp8_g128", r"fp8_b128 weights \(compressed-tensors, fp8 can\)"),
    ],
)
def test_refusals_say_who_can(weight: str, input: str | None, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        check_layer(target, TargetLayer("a.b", (O, I), lookup(weight), lookup(input) if input else None))


def test_names_that_engines_cannot_tell_apart_are_refused() -> None:
    assert target.exclusions(["a.gate", "lm_head"], ["a.fc"]) == ["a.gate", "lm_head"]
    with pytest.raises(UnsupportedError, match=r"a\.gate stays dense.*a\.gate_proj"):
        target.exclusions(["a.gate"], ["a.gate_proj"])
    experts = [f"m.experts.{n}.up" for n in range(3)]
    assert target.exclusions(experts, ["m.fc"]) == ["m.experts*"]
    assert target.exclusions(experts[1:], [experts[0]]) == experts[1:]


# --- mutations ------------------------------------------------------------------------------------

DOWN = "model.layers.0.mlp.down_proj"


def swap_nibbles(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"] >> 4 | tensors[f"{DOWN}.weight"] << 4


def forget_reciprocal(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight_scale_2"] = tensors[f"{DOWN}.weight_scale_2"].reciprocal()


def forget_reciprocal_of_inputs(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.input_scale"] = tensors[f"{DOWN}.input_scale"].reciprocal()


def shift_groups(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight_scale"] = tensors[f"{DOWN}.weight_scale"].view(U8).roll(1, 1).view(E4M3)


def shift_rows(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight_scale"] = tensors[f"{DOWN}.weight_scale"].view(U8).roll(1, 0).view(E4M3)


def unequal_fused(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_scale_2"] *= 2


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = projections(source, ("nvfp4", "nvfp4"))
    return quiet_export(model, source, tmp_path_factory.mktemp("exported") / "out", "modelopt")


@pytest.mark.parametrize(
    ("damage", "checks"),
    [
        (swap_nibbles, {"weights"}),
        (forget_reciprocal, {"weights"}),
        (forget_reciprocal_of_inputs, {"weights"}),
        (shift_groups, {"weights"}),
        (shift_rows, {"weights"}),
        (unequal_fused, {"weights", "fused"}),
    ],
)
def test_mutations_are_found(damage: Any, checks: set[str], exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "out")
    rewrite(tmp_path / "out", damage)
    assert broken(tmp_path / "out") == checks
