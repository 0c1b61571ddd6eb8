"""What becomes of tensors that are not quantized in BF16 and in FP16, and which have no place there."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qat.checkpoints.dense_types import check_finite, check_held, check_source, narrowed
from qat.checkpoints.export_plan import plan_export, refusals
from qat.checkpoints.hf import load_model
from qat.checkpoints.layouts import TARGETS
from qat.errors import CheckpointError
from tests.checkpoints.exports import pair_rules, quantized, quiet_export, rewrite
from tests.tiny import tiny_model

NORM = "model.norm.weight"
RULES = [pair_rules("int8_channel", "int8_token"), {"match": "*", "skip": "rest"}]
HALF = {"activation_rule": "ascend_310p", "round_bf16": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("source") / "model", num_hidden_layers=1)


def test_types_that_change_are_counted(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4).half(), "c": torch.ones(5).bfloat16(), "d": torch.ones(1)}
    save_file({**tensors, "e": torch.ones(3, dtype=torch.int32)}, tmp_path / "model.safetensors")
    names = {"a", "b", "c", "e", "absent"}
    said = (
        "1 tensors ({} numbers) that are not quantized are {} in the source and become {to}, as {to} servers hold them"
    )
    assert narrowed(names, tmp_path, torch.bfloat16) == [
        said.format(4, "FP16", to="BF16"),
        said.format(6, "float32", to="BF16"),
    ]
    assert narrowed(names, tmp_path, torch.float16) == [
        said.format(5, "BF16", to="FP16"),
        said.format(6, "float32", to="FP16"),
    ]


@pytest.mark.parametrize("value", [65504.0, -65504.0, 65519.0, float("inf"), float("nan")])
def test_what_fits_or_never_did(value: float) -> None:
    """Up to half a step above the largest number rounds to it; what is not finite is refused elsewhere."""
    check_held("w", torch.tensor([1.0, value]), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_is_named_wherever_it_stands(value: float, dtype: torch.dtype) -> None:
    for place in (0, 3, 7):
        tensor = torch.linspace(-2, 2, 8, dtype=dtype)
        check_finite("w", tensor)
        tensor[place] = value
        with pytest.raises(CheckpointError, match="w holds NaN or infinity; nothing was written"):
            check_finite("w", tensor)
    check_finite("w", torch.empty(0, dtype=dtype))
    check_finite("w", torch.tensor([1, 2]))


@pytest.mark.parametrize("value", [65520.0, -1e6])
def test_what_becomes_infinite_is_named(value: float) -> None:
    with pytest.raises(
        CheckpointError, match=rf"w holds {abs(value):.6g}.*largest number of FP16.* is 65504".replace("+", r"\+")
    ):
        check_held("w", torch.tensor([1.0, value]), torch.float16)
    check_held("w", torch.tensor([1.0, value]), torch.bfloat16)
    check_held("w", torch.tensor([100000]), torch.float16)  # a whole number, which keeps its type
    check_held("w", torch.empty(0), torch.float16)


def test_files_are_read_for_fp16_alone(tmp_path: Path) -> None:
    save_file({"a": torch.full((2,), 1e5).bfloat16(), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    check_source({"b"}, tmp_path, torch.float16)
    check_source({"a", "b"}, tmp_path, torch.bfloat16)
    with pytest.raises(CheckpointError, match="a holds 99840, but"):
        check_source({"a", "b"}, tmp_path, torch.float16)


def test_such_a_model_is_refused_before_training_and_when_it_is_written(source: Path, tmp_path: Path) -> None:
    model = quantized(source, RULES, **HALF)
    assert plan_export(model, source, TARGETS["ascend"]).dtype is torch.float16
    with torch.no_grad():
        dict(model.named_parameters())[NORM].mul_(1e6)
    with pytest.raises(CheckpointError, match=f"{NORM} holds .*FP16"):
        quiet_export(model, source, tmp_path / "out", "ascend")
    assert not (tmp_path / "out").exists()
    copy = tiny_model("llama", tmp_path / "copy", num_hidden_layers=1)
    rewrite(copy, lambda tensors: tensors[NORM].fill_(1e6))
    with pytest.raises(CheckpointError, match=f"{NORM} holds .*FP16"):
        refusals(quantized(copy, RULES, **HALF), copy)
    refusals(quantized(copy, RULES), copy)
    assert load_model(copy) is not None
