"""Ascend checkpoints of FP16 models: `deq_scale` as integers, dense tensors in FP16, and what is refused by name. What
an integer means is read here by `struct`, digit by digit."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import TARGETS, TargetLayer, check_layer, open_export
from qat.checkpoints.layouts.arguments import weight_args
from qat.checkpoints.layouts.ascend import write as target
from qat.checkpoints.layouts.ascend.types import BY_NAME
from qat.checkpoints.layouts.reader import PackedModule
from qat.checkpoints.simulated import check_engine, distance, load_simulated
from qat.checkpoints.verify import verify
from qat.cli import main
from qat.errors import CheckpointError, UnsupportedError
from qat.modes import served
from qat.numbers.catalog import lookup
from qat.training.half import held_range
from tests.checkpoints.exports import Pair, broken, edit, export_pair, ids, rewrite
from tests.checkpoints.layouts.test_ascend import RANGE, UP, Q, coded, put
from tests.tiny import tiny_model

PAIRS: list[Pair] = [("int8_channel", name) for name in ("int8_token", "int8_tensor", "int8_tensor_asym")]
HALF: dict[str, Any] = {"activation_rule": "ascend_310p", "round_bf16": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen2", tmp_path_factory.mktemp("source") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def static(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("static") / "out"
    export_pair(source, out, PAIRS[2], "ascend", **HALF)
    return out


def as_read(integer: int) -> float:
    """The number that hardware makes of an integer: the low 32 bits as a float, whose last 13 digits are zero."""
    low = format(integer & 0xFFFFFFFF, "032b")
    value: float = struct.unpack("<f", struct.pack("<I", int(low[:19] + "0" * 13, 2)))[0]
    return value


def static_tensors(name: str) -> tuple[Any, dict[str, Tensor]]:
    q, fmt = coded("int8_channel"), lookup(name)
    amax = held_range(RANGE if fmt.zero_point else torch.tensor(3.0), fmt)
    return q, target.pack(q, fmt, amax)


@pytest.mark.parametrize("name", ["int8_tensor", "int8_tensor_asym"])
def test_the_integer_is_read_as_the_product_of_both_scales(name: str) -> None:
    q, tensors = static_tensors(name)
    stored = target.in_half(tensors)["deq_scale"]
    assert stored.dtype == torch.int64
    for integer, scale in zip(stored.tolist(), q.scales.effective().flatten().tolist(), strict=True):
        assert as_read(integer) == scale * float(tensors["input_scale"]) and integer < 1 << 32
    form = PackedModule("a.b", "int-quantized", weight_args(q.format) or {}, None)
    found = target.unpack(form, {**tensors, "deq_scale": stored})
    assert torch.equal(found.codes, q.codes) and torch.equal(found.scales.stored, q.scales.stored)
    assert target.in_half({"weight": tensors["weight"]}).keys() == {"weight"}


def test_scales_that_would_be_cut_are_refused() -> None:
    _, tensors = static_tensors("int8_tensor")
    for digits, able in ((10, True), (11, False)):
        odd = {**tensors, "deq_scale": torch.full((6,), 1 + 2.0**-digits)}
        if able:
            target.in_half(odd)
            continue
        with pytest.raises(UnsupportedError, match=r"more than 11 significant bits.*calibrate inputs with"):
            target.in_half(odd)


@pytest.mark.parametrize("pair", PAIRS)
def test_an_export_is_the_trained_model(pair: Pair, source: Path, tmp_path: Path, capsys: Any) -> None:
    """Bit by bit where engines are not simulated, by the bound of FP16 where they are."""
    trained = export_pair(source, tmp_path / "out", pair, "ascend", **HALF)
    report = verify(tmp_path / "out")
    assert report.ok, report.checks
    exported = open_export(tmp_path / "out")
    assert exported.half and exported.rule == "ascend_310p"  # type: ignore[attr-defined]  # this layout's reader
    with torch.no_grad(), served(trained):
        truth = trained(ids()).logits
        assert torch.equal(load_exported(tmp_path / "out")(ids()).logits, truth)
        apart = load_simulated(tmp_path / "out")(ids()).logits - truth
        assert apart.norm() < 0.06 * truth.norm()  # one sum rounded the other way moves codes after it
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16" and exported.config.get("torch_dtype", "float16") == "float16"
    dense = exported.names - exported.quantized_names
    assert {exported.reader.info(name).code for name in dense} == {"F16"} and f"{Q}.bias" in dense
    assert main(["verify", str(tmp_path / "out"), "--engine", "vllm-ascend", "--json"]) == 0
    checks = {check["name"]: check["detail"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["vllm-ascend"].startswith("7 layers load on 310p (")
    assert main(["verify", str(tmp_path / "out"), "--engine", "mindie", "--json"]) != 0


def test_a_static_layer_computes_its_product_in_whole_numbers(static: Path) -> None:
    """out = (codes of x times codes of w + quant_bias) * what is read of deq_scale, is x times w and the bias."""
    exported = open_export(static)
    tensors, bias = exported.layer(Q), exported.reader.get(f"{Q}.bias").double()
    scale, offset = float(tensors["input_scale"]), int(tensors["input_offset"])
    deq = torch.tensor([as_read(each) for each in tensors["deq_scale"].tolist()]).double()
    assert offset and torch.tensor(scale).half() == scale
    codes = torch.randint(-128, 128, (5, tensors["weight"].shape[1]), generator=torch.Generator().manual_seed(1))
    out = (codes @ tensors["weight"].long().t() + tensors["quant_bias"].long()).double() * deq
    product = ((codes - offset).double() * scale) @ exported.multiplied(Q).double().t()
    assert torch.equal((out - product) / deq, ((out - product) / deq).round())  # a whole number of scales: the bias
    assert ((out - product - bias).abs() <= deq / 2 * 1.001).all() and bias.abs().max() > deq.max()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            torch.full((256,), 0.01),
            "deq_scale is F32, but config.json says that the model is float16, whose",
        ),
        (torch.full((256,), 1 << 46 | 947716096), "deq_scale has more than the 32 bits of a float32 number"),
        (torch.full((256,), -947716096), "deq_scale has more than the 32 bits"),
        (torch.zeros(256, dtype=torch.int64), "deq_scale must be finite and positive"),
        (torch.full((256,), 255 << 23), "deq_scale must be finite and positive"),
        (torch.full((256,), 1), "deq_scale must be finite and positive"),  # nothing is left of it
        (torch.ones(3, dtype=torch.int64), r"deq_scale is I64\[3\], not I64\[256\]"),
    ],
)
def test_wrong_codings_are_named(static: Path, tmp_path: Path, value: Tensor, message: str) -> None:
    copy = Path(shutil.copytree(static, tmp_path / "copy"))
    rewrite(copy, lambda tensors: put(tensors, f"{UP}.deq_scale", value))
    with pytest.raises(CheckpointError, match=message):
        open_export(copy).dense(UP)
    assert broken(copy)


def test_the_type_in_config_json_decides(static: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(static, tmp_path / "copy"))
    edit(copy, lambda config: config.update(dtype="bfloat16"))
    with pytest.raises(CheckpointError, match=r"deq_scale is I64, but config\.json says that the model is not float16"):
        open_export(copy).dense(UP)


def test_digits_that_hardware_drops_are_dropped_by_the_reader(static: Path, tmp_path: Path) -> None:
    """Files of other tools may hold all 24 digits of a product; the number is the one that is read."""
    whole = open_export(static).multiplied(UP)
    copy = Path(shutil.copytree(static, tmp_path / "copy"))
    rewrite(copy, lambda tensors: tensors[f"{UP}.deq_scale"].add_((1 << 13) - 1))
    assert torch.equal(open_export(copy).multiplied(UP), whole)
    assert "7 layers load on 310p" in check_engine(open_export(copy), "vllm-ascend")
    rewrite(copy, lambda tensors: tensors[f"{UP}.deq_scale"].add_(1))
    assert not torch.equal(open_export(copy).multiplied(UP), whole)


def test_other_targets_and_types_are_refused() -> None:
    layer = TargetLayer("a.up_proj", (64, 64), lookup("int8_channel"), lookup("int8_token"), half=True)
    with pytest.raises(UnsupportedError, match=r"up_proj is of an FP16 model .*compressed-tensors.*--target ascend"):
        check_layer(TARGETS["compressed-tensors"], layer)
    check_layer(TARGETS["ascend"], layer)
    with pytest.raises(UnsupportedError, match=r"no engine loads W8A16 in FP16 models; it can be W8A8_DYNAMIC, W8A8$"):
        check_layer(TARGETS["ascend"], TargetLayer("a.up_proj", (64, 64), lookup("int8_channel"), None, half=True))
    assert BY_NAME["W8A8_DYNAMIC"].specs(6, 64, half=True) == BY_NAME["W8A8_DYNAMIC"].specs(6, 64)


def test_a_bound_of_fp16_is_an_eighth() -> None:
    y = torch.linspace(-1, 1, 64)[None]
    assert distance(y * 1.001, y, torch.float16) == pytest.approx(8 * distance(y * 1.001, y))


def test_a_scale_that_was_not_cut_is_noticed(static: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that read all digits of such files, or fewer, would be outside of the bound."""
    from qat.serving import npu

    copy = Path(shutil.copytree(static, tmp_path / "copy"))
    rewrite(copy, lambda tensors: tensors[f"{UP}.deq_scale"].add_((1 << 13) - 1))
    for mask in (~0, ~0x3FFFF):
        monkeypatch.setattr(npu, "_readable", lambda s, mask=mask: (s.to(torch.int32) & mask).view(torch.float32))
        with pytest.raises(CheckpointError, match="times the bound"):
            check_engine(open_export(copy), "vllm-ascend")
