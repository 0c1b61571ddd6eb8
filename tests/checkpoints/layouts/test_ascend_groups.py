"""W4A16: bytes that hold two rows, groups with scales and offsets, by an arithmetic of its own, nibble by nibble."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import TargetLayer, check_layer, open_export
from qat.checkpoints.layouts.arguments import weight_args
from qat.checkpoints.layouts.ascend import write as target
from qat.checkpoints.layouts.ascend.simulate import SimulatedLinear
from qat.checkpoints.layouts.ascend.types import find_type, type_called
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.verify import verify
from qat.cli import main
from qat.errors import CheckpointError, UnsupportedError
from qat.modes import served
from qat.numbers.catalog import lookup
from qat.numbers.numerics import QTensor, quantize
from tests.checkpoints.exports import export_pair, ids, pair_rules, quantized, quiet_export, rewrite
from tests.tiny import tiny_model

FORMATS = ["int4_g64", "int4_g64_asym", "int4_g128", "int4_g128_asym"]
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
DESCRIPTION = "quant_model_description.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(
        "llama",
        tmp_path_factory.mktemp("source") / "model",
        num_hidden_layers=1,
        hidden_size=256,
        num_attention_heads=8,
    )


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    export_pair(source, tmp_path / "out", ("int4_g64_asym", None), "ascend", activation_rule="ascend")
    return tmp_path / "out"


def coded(name: str) -> tuple[QTensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(6, 256, generator=generator) + (0.3 if name.endswith("asym") else 0.0)
    weight[:, 64:] *= 3  # so that groups differ
    q = quantize(weight, lookup(name))
    return q, target.pack(q)


def by_hand(tensors: dict[str, Tensor]) -> Tensor:
    """(code - offset) * scale in float64: row 2 i in the low four bits of row i of bytes, row 2 i + 1 above."""
    pairs, scale, offset = (tensors[name].tolist() for name in ("weight", "weight_scale", "weight_offset"))
    group, rows = len(pairs[0]) // len(scale[0]), []
    for row in range(2 * len(pairs)):
        nibbles = [(byte % 256 // (16 if row % 2 else 1)) % 16 for byte in pairs[row // 2]]
        codes = [nibble - 16 if nibble > 7 else nibble for nibble in nibbles]
        rows.append([(c - offset[row][k // group]) * scale[row][k // group] for k, c in enumerate(codes)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("name", FORMATS)
def test_the_bytes_are_the_weight(name: str) -> None:
    q, tensors = coded(name)
    group = lookup(name).group
    assert {key: (str(t.dtype), tuple(t.shape)) for key, t in tensors.items()} == {
        "weight": ("torch.int8", (3, 256)),
        "weight_scale": ("torch.float32", (6, 256 // group)),
        "weight_offset": ("torch.float32", (6, 256 // group)),
    }
    assert bool(tensors["weight_offset"].any()) == name.endswith("asym")
    assert torch.equal(tensors["weight_scale"], tensors["weight_scale"].bfloat16().float())
    assert torch.equal(by_hand(tensors).float(), q.dequantize())


@pytest.mark.parametrize("name", FORMATS)
def test_unpacking_undoes_packing(name: str) -> None:
    q, tensors = coded(name)
    module = PackedModule("a.b", "int-quantized", weight_args(q.format) or {}, None)
    found = target.unpack(module, tensors)
    assert torch.equal(found.codes, q.codes) and torch.equal(found.scales.stored, q.scales.stored)
    assert torch.equal(found.dequantize(), q.dequantize())
    for key, tensor, message in [
        ("weight", tensors["weight"].view(torch.uint8), "weight is torch.uint8"),
        ("weight_scale", tensors["weight_scale"][:, :1], "weight_scale is torch.float32"),
        ("weight_offset", tensors["weight_offset"][:3], "weight_offset is torch.float32"),
        ("weight_scale", tensors["weight_scale"] * 1.01, "not exact in bf16"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            target.unpack(module, {**tensors, key: tensor})


@pytest.mark.parametrize("name", FORMATS)
def test_a_simulated_layer(name: str) -> None:
    """x @ (code - offset) * scale, the weight rounded to BF16 once: whole numbers times powers of two, so exactly."""
    q, tensors = coded(name)
    kind = find_type(q.format, None)
    assert kind is not None and kind.group == q.format.group
    x = torch.eye(256)[:9].bfloat16()
    bias = torch.arange(6).float()
    assert torch.equal(SimulatedLinear(kind, tensors)(x), by_hand(tensors).t()[:9].float().bfloat16())
    assert torch.equal(
        SimulatedLinear(kind, tensors, bias)(x),
        (by_hand(tensors).t()[:9].bfloat16().float() + bias).bfloat16(),
    )


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_is_the_trained_model(name: str, source: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    trained = export_pair(source, out, (name, None), "ascend", activation_rule="ascend")
    report = verify(out)
    assert report.ok, report.checks
    exported = open_export(out)
    with torch.no_grad(), served(trained):
        assert torch.equal(load_exported(out)(ids()).logits, trained(ids()).logits)
    described = json.loads((out / DESCRIPTION).read_text())
    assert (described["group_size"], described["model_quant_type"]) == (lookup(name).group, "W4A16")
    assert json.loads((out / "config.json").read_text())["quantize"] == "w4a16"
    assert exported.modules[UP].weights["symmetric"] != name.endswith("asym") and exported.shape(UP) == (256, 256)
    stored = exported.layer(UP)
    assert torch.equal(exported.dense(UP), by_hand(stored).bfloat16())
    assert main(["verify", str(out), "--engine", "mindie", "--json"]) == 0
    said = {check["name"]: check["detail"] for check in json.loads(capsys.readouterr().out)["checks"]}["mindie"]
    assert said.startswith("7 layers load on a2, a3 (1.0.0 to 2.3.0)")
    assert main(["verify", str(out), "--engine", "vllm-ascend", "--json"]) == 1
    assert "no device on which vllm-ascend" in capsys.readouterr().out


def swap(tensors: dict[str, Tensor]) -> None:
    codes = tensors[f"{UP}.weight"].view(torch.uint8)
    tensors[f"{UP}.weight"] = (codes << 4 | codes >> 4).view(torch.int8)


def negate(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight_offset"] = -tensors[f"{UP}.weight_offset"].clamp(-7, 7)


def shift(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].roll(1, dims=1)


@pytest.mark.parametrize("damage", [swap, negate, shift])
def test_damage_is_found(damage: Any, folder: Path) -> None:
    rewrite(folder, damage)
    assert "weights" in {check.name for check in verify(folder, logits=False).checks if not check.ok}


@pytest.mark.parametrize(("value", "ok"), [(-8.0, True), (7.0, True), (8.0, False), (-9.0, False), (0.5, False)])
def test_offsets_are_codes(value: float, ok: bool, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors[f"{UP}.weight_offset"].fill_(value))
    if ok:
        open_export(folder).layer(UP)
        return
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_offset must hold whole numbers from -8 to 7"):
        open_export(folder).layer(UP)


def test_other_group_sizes_are_refused(folder: Path, source: Path, tmp_path: Path) -> None:
    description = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps({**description, "group_size": 32}))
    with pytest.raises(UnsupportedError, match="W4A16 with group_size 32; readable: 64, 128"):
        open_export(folder)
    assert type_called("W4A16", 32) is None and type_called("W8A8", 32) is type_called("W8A8", 0)
    rules = [pair_rules("int4_g64", None, "*.mlp.*_proj"), pair_rules("int4_g128", None, "*.self_attn.*_proj")]
    model = quantized(source, [*rules, {"match": "*", "skip": "x"}], activation_rule="ascend")
    with pytest.raises(UnsupportedError, match=r"a model has one group size, but these layers need \[64, 128\]"):
        quiet_export(model, source, tmp_path / "mixed", "ascend")


@pytest.mark.parametrize(
    ("shape", "name", "message"),
    [
        ((7, 128), "int4_g64", r"a\.b: W4A16 packs two rows into a byte, in groups of 64 columns, but this is 7 x 128"),
        ((8, 192), "int4_g128", r"a\.b: W4A16 .*groups of 128 columns, but this is 8 x 192"),
        ((8, 64), "int4_g64", r"a\.b has one group of 64 columns in a row, by which engines know"),
        ((8, 128), "int4_g32", r"int4_g32"),
    ],
)
def test_refusals(shape: tuple[int, int], name: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        check_layer(target, TargetLayer("a.b", shape, lookup(name), None))
    check_layer(target, TargetLayer("a.b", (8, 256), lookup("int4_g128_asym"), None))
    experts = TargetLayer("model.layers.0.mlp.experts.1.up_proj", (8, 128), lookup("int4_g64"), None)
    with pytest.raises(UnsupportedError, match="runs experts as W4A16; they can be W8A8_DYNAMIC"):
        check_layer(target, experts)
