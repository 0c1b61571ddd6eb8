"""Ascend checkpoints: the tensors of each type by an arithmetic of its own, the trained model read back, and refusals.

What the bytes mean is written here a third time, from the descriptions of vllm-ascend's operators, in whole numbers.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import TargetLayer, check_layer, described_by, open_export
from qat.checkpoints.layouts.arguments import weight_args
from qat.checkpoints.layouts.ascend import write as target
from qat.checkpoints.layouts.ascend.types import BY_NAME, TYPES, find_type, shape
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.packed import is_packed
from qat.checkpoints.verify import verify
from qat.errors import CheckpointError, UnsupportedError
from qat.modes import served
from qat.numbers.catalog import lookup
from qat.numbers.numerics import QTensor, quantize
from qat.training.activations import static_part
from tests.checkpoints.exports import Pair, broken, edit, export_pair, ids, pair_rules, quantized, quiet_export, rewrite
from tests.tiny import tiny_model

PAIRS: dict[str, list[Pair]] = {
    "W8A8_DYNAMIC": [("int8_channel", "int8_token")],
    "W8A8": [("int8_channel", "int8_tensor_asym"), ("int8_channel", "int8_tensor")],
    "W8A8_MIX": [("int8_channel", "int8_mix")],
    "W8A16": [("int8_channel", None)],
    "W4A16": [("int4_g64", None), ("int4_g64_asym", None)],
    "W4A4_DYNAMIC": [("int4_channel", "int4_token")],
    "W8A8_MXFP8": [("mxfp8", "mxfp8")],
    "W4A4_MXFP4": [("mxfp4", "mxfp4")],
    "W4A8_MXFP": [("mxfp4", "mxfp8")],
    "W4A8_DYNAMIC": [("int4_channel", "int8_token")],
}
EVERY = [(kind, pair) for kind, pairs in PAIRS.items() for pair in pairs]
ALL = [(kind, pair) for kind, pair in EVERY if not BY_NAME[kind].experts_only]
"""Those of dense layers; what else there is: test_ascend_int4_experts.py."""
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
DESCRIPTION = "quant_model_description.json"
RANGE = torch.tensor([-0.5, 3.0])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("source") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def static(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("static") / "out"
    export_pair(source, out, PAIRS["W8A8"][0], "ascend", activation_rule="ascend")
    return out


def coded(weight: str, rows: int = 6, columns: int = 64) -> QTensor:
    return quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)), lookup(weight))


def packed(kind: str, pair: Pair) -> tuple[QTensor, dict[str, Tensor]]:
    q, input = coded(pair[0]), lookup(pair[1]) if pair[1] else None
    amax = RANGE if input is not None and input.zero_point else torch.tensor(3.0)
    return q, target.pack(q, input, amax)


def test_every_type_has_its_pairs() -> None:
    assert {kind.name for kind in TYPES} == PAIRS.keys()
    for kind, (weight, input) in EVERY:
        found = find_type(lookup(weight), lookup(input) if input else None)
        assert found is not None and found.name == kind
    assert find_type(lookup("nvfp4"), lookup("nvfp4")) is None and find_type(lookup("int8_g64"), None) is None


def test_shapes_in_words() -> None:
    assert shape("n k/2", 6, 64, 32) == (6, 32) and shape("n k/g", 6, 64, 32) == (6, 2)
    assert shape("1", 6, 64, 0) == (1,) and shape("n 1", 6, 64, 0) == (6, 1) and shape("n/2 k", 6, 64, 0) == (3, 64)


@pytest.mark.parametrize(("kind", "pair"), ALL)
def test_tensors_have_the_types_and_shapes_of_the_table(kind: str, pair: Pair) -> None:
    _, tensors = packed(kind, pair)
    codes = {
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float32: "F32",
        torch.int32: "I32",
    }
    assert {name: (codes[t.dtype], tuple(t.shape)) for name, t in tensors.items()} == BY_NAME[kind].specs(6, 64)


@pytest.mark.parametrize(("kind", "pair"), ALL)
def test_unpacking_undoes_packing(kind: str, pair: Pair) -> None:
    q, tensors = packed(kind, pair)
    form = "mxfp4-pack-quantized" if BY_NAME[kind].packed else "int-quantized"
    found = target.unpack(PackedModule("a.b", form, weight_args(q.format) or {}, None), tensors)
    assert torch.equal(found.codes, q.codes) and torch.equal(found.scales.stored, q.scales.stored)


@pytest.mark.parametrize("pair", PAIRS["W8A8"])
def test_a_static_layer_computes_its_product_in_whole_numbers(pair: Pair) -> None:
    """out = (codes of x times codes of w + quant_bias) * deq_scale, as npu_quant_matmul says, is x times w."""
    q, tensors = packed("W8A8", pair)
    scale, offset = tensors["input_scale"], int(tensors["input_offset"])
    assert (offset != 0) == pair[1].endswith("asym") and torch.equal(scale, scale.bfloat16().float())  # type: ignore[union-attr]  # W8A8 has inputs
    codes = torch.randint(-128, 128, (5, 64), generator=torch.Generator().manual_seed(1))
    x = (codes - offset).double() * scale.double()
    sums = codes @ tensors["weight"].long().t() + tensors["quant_bias"].long()
    out = sums.double() * tensors["deq_scale"].double()
    assert torch.allclose(out, x @ q.dequantize().double().t(), rtol=1e-12, atol=0)


def test_nibbles_and_signs() -> None:
    q, tensors = packed("W4A4_MXFP4", PAIRS["W4A4_MXFP4"][0])
    assert torch.equal(tensors["weight"] & 15, q.codes[:, ::2]) and torch.equal(
        tensors["weight"] >> 4, q.codes[:, 1::2]
    )
    q, tensors = packed("W4A4_DYNAMIC", PAIRS["W4A4_DYNAMIC"][0])
    assert torch.equal(tensors["weight"].float() * q.scales.effective(), q.dequantize())
    assert int(tensors["weight"].min()) < 0 and not tensors["weight_offset"].any()


@pytest.mark.parametrize(("kind", "pair"), ALL)
def test_an_export_is_the_trained_model(kind: str, pair: Pair, source: Path, tmp_path: Path) -> None:
    trained = export_pair(source, tmp_path / "out", pair, "ascend", activation_rule="ascend")
    report = verify(tmp_path / "out")
    assert report.ok, report.checks
    assert report.checks[-1].detail.startswith("skipped: nothing but engines on Ascend")
    with torch.no_grad(), served(trained):
        assert torch.equal(load_exported(tmp_path / "out")(ids()).logits, trained(ids()).logits)
    described = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    assert {key: described.pop(key) for key in ("version", "model_quant_type", "group_size")} == {
        "version": "1.0.0",
        "model_quant_type": kind,
        "group_size": BY_NAME[kind].group,
    }
    stored = open_export(tmp_path / "out").names
    assert described.keys() == stored and described["lm_head.weight"] == described["model.norm.weight"] == "FLOAT"
    assert {described[f"{UP}.{name}"] for name in BY_NAME[kind].tensors} == {kind}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config.get("quantize", kind.lower()) == kind.lower()
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["quant_model_weights.safetensors"]


def test_a_bias_is_folded(tmp_path: Path) -> None:
    """Qwen2's q, k, v: the file, the trained model and the engine's whole numbers add the same."""
    source = tiny_model("qwen2", tmp_path / "source", num_hidden_layers=1)
    trained = export_pair(source, tmp_path / "out", PAIRS["W8A8"][0], "ascend", activation_rule="ascend")
    report = verify(tmp_path / "out")
    assert report.ok, report.checks
    with torch.no_grad(), served(trained):
        assert torch.equal(load_exported(tmp_path / "out")(ids()).logits, trained(ids()).logits)
    exported = open_export(tmp_path / "out")
    tensors, bias = exported.layer(Q), exported.reader.get(f"{Q}.bias").double()
    deq, rows = tensors["deq_scale"].double(), tensors["weight"].long().sum(dim=1)
    own = tensors["quant_bias"].long() + int(tensors["input_offset"]) * rows
    assert int(tensors["input_offset"]) and own.abs().max() > 10 and torch.equal(own, (bias / deq).round().long())
    assert json.loads((tmp_path / "out" / DESCRIPTION).read_text())[f"{Q}.bias"] == "FLOAT"
    rewrite(tmp_path / "out", lambda tensors: tensors[f"{Q}.quant_bias"].add_(2))
    with pytest.raises(CheckpointError, match="plus the layer's bias"):
        open_export(tmp_path / "out").dense(Q)


def test_a_bias_beyond_int32_is_refused() -> None:
    _, tensors = packed("W8A8", PAIRS["W8A8"][0])
    assert target.fold_bias({"weight": tensors["weight"]}, torch.ones(6)).keys() == {"weight"}
    with pytest.raises(UnsupportedError, match=r"bias of 1e\+09 .* does not fit int32; use int8_token"):
        target.fold_bias(tensors, torch.full((6,), 1e9))


def test_a_tied_head_is_described(tmp_path: Path) -> None:
    source = tiny_model("gemma", tmp_path / "source", num_hidden_layers=1)
    export_pair(source, tmp_path / "out", PAIRS["W8A8_DYNAMIC"][0], "ascend")
    described = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    assert described["lm_head.weight"] == "FLOAT" and verify(tmp_path / "out").ok


def test_a_folder_is_known_by_its_description(static: Path, source: Path) -> None:
    assert described_by(static) == ("ascend", DESCRIPTION) and is_packed(static)
    assert described_by(source) == (None, None)


def put(tensors: dict[str, Tensor], name: str, value: Tensor) -> None:
    tensors[name] = value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_offset", torch.tensor([200.0]), "input_offset is 200.0, not a whole number from -128 to 127"),
        ("input_offset", torch.tensor([1.5]), "input_offset is 1.5, not a whole number"),
        ("deq_scale", torch.full((256,), -1.0), "deq_scale must be finite and positive"),
        ("quant_bias", torch.ones(256, dtype=torch.int32), "quant_bias is not -input_offset times"),
        ("input_scale", torch.tensor([0.0]), "input_scale is zero, negative"),
        ("input_scale", torch.ones(2), r"input_scale is F32\[2\], not F32\[1\]"),
    ],
)
def test_damage_is_named(static: Path, tmp_path: Path, name: str, value: Tensor, message: str) -> None:
    copy = copied(static, tmp_path)
    rewrite(copy, lambda tensors: put(tensors, f"{UP}.{name}", value))
    with pytest.raises(CheckpointError, match=message):
        open_export(copy).dense(UP)
    assert broken(copy)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def describe(folder: Path, **changes: Any) -> None:
    described = {**json.loads((folder / DESCRIPTION).read_text()), **changes}
    kept = {name: value for name, value in described.items() if value is not None}
    (folder / DESCRIPTION).write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "0.1"}, "version '0.1', whose tensors differ"),
        ({f"{UP}.weight": "W8A8SC"}, r"is 'W8A8SC' \(its compressor.*readable: W8A8_DYNAMIC"),
        ({f"{UP}.deq_scale": "FLOAT"}, "up_proj.deq_scale is FLOAT, but its weight W8A8"),
        ({"model.norm.weight": None}, "does not say what model.norm.weight is"),
        ({"kv_cache_type": "C8"}, "asks for quantized caches"),
        ({"model.norm.weight": 3}, "model.norm.weight is 3, not the name of a type"),
    ],
)
def test_wrong_descriptions_are_refused(static: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    copy = copied(static, tmp_path)
    describe(copy, **changes)
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        _ = open_export(copy).modules


def test_weight_offsets_are_refused(source: Path, tmp_path: Path) -> None:
    export_pair(source, tmp_path / "out", PAIRS["W8A16"][0], "ascend")
    rewrite(tmp_path / "out", lambda tensors: tensors[f"{UP}.weight_offset"].fill_(1.0))
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight_offset is not zero"):
        open_export(tmp_path / "out").dense(UP)


def test_two_descriptions_must_agree(source: Path, tmp_path: Path) -> None:
    """A folder that both kinds of engines read: by config.json, and by the description where they know it."""
    pair = PAIRS["W8A8_DYNAMIC"][0]
    export_pair(source, tmp_path / "ascend", pair, "ascend")
    export_pair(source, tmp_path / "other", pair)
    other = json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"]
    edit(tmp_path / "ascend", lambda config: config.update(quantization_config=other))
    assert open_export(tmp_path / "ascend").METHOD == "ascend"
    other["config_groups"]["group_0"]["input_activations"] = None
    edit(tmp_path / "ascend", lambda config: config.update(quantization_config=other))
    with pytest.raises(CheckpointError, match=r"description.json and config.json \(compressed-tensors\) do not agree"):
        open_export(tmp_path / "ascend")


def test_mixed_fused_sets_are_refused(source: Path, tmp_path: Path) -> None:
    rules = [pair_rules("int8_channel", "int8_token", "*.q_proj"), pair_rules("int8_channel", None, "*_proj")]
    model = quantized(source, [*rules, {"match": "*", "skip": "rest"}], fused=())
    with pytest.raises(UnsupportedError, match=r"fuse these layers.*q_proj is W8A8_DYNAMIC.*k_proj is W8A16"):
        quiet_export(model, source, tmp_path / "out", "ascend")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (TargetLayer("a.b", (8, 64), lookup("nvfp4"), lookup("nvfp4")), "ascend cannot hold nvfp4 weights"),
        (
            TargetLayer("a.b", (8, 64), lookup("mxfp4"), lookup("mxfp8"), bias=True),
            "adds a bias, and W4A8_MXFP cannot: vllm-ascend gives",
        ),
        (
            TargetLayer("a.b", (8, 96), lookup("mxfp4"), lookup("mxfp8")),
            "a.b: vllm-ascend takes scales of W4A8_MXFP in pairs, columns by 64, but this has 96",
        ),
        (
            TargetLayer("a.experts.0.b", (8, 96), lookup("mxfp8"), lookup("mxfp8")),
            "a.experts.0.b has 96 columns, an odd number of groups of 32.*columns by 64",
        ),
        (
            TargetLayer("a.mlp.down_proj", (8, 64), lookup("int4_channel"), lookup("int8_token")),
            "a.mlp.down_proj: only experts can be W4A8_DYNAMIC: vllm-ascend has taken its loader",
        ),
        (
            TargetLayer("a.experts.0.b", (12, 64), lookup("int4_channel"), lookup("int8_token")),
            r"W4A8_DYNAMIC needs rows by 8 and columns by 16, but has \[12, 64\]",
        ),
        (
            TargetLayer("a.experts.0.b", (8, 40), lookup("int4_channel"), lookup("int8_token")),
            r"W4A8_DYNAMIC needs rows by 8 and columns by 16, but has \[8, 40\]",
        ),
        (
            TargetLayer("a.experts.0.b", (8, 64), lookup("int8_channel"), lookup("int8_tensor")),
            "no engine on Ascend runs experts as W8A8; they can be W8A8_DYNAMIC, W8A8_MXFP8",
        ),
    ],
)
def test_refusals(layer: TargetLayer, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        check_layer(target, layer)


def test_the_offset_is_the_zero_point() -> None:
    fmt = lookup("int8_tensor_asym")
    static = static_part(fmt, RANGE)
    assert static is not None
    scale, offset = static.tolist()
    assert abs((-128 - offset) * scale + 0.5) <= scale and abs((127 - offset) * scale - 3.0) <= 2 * scale
