"""Rotated inputs in files: what is said, that the library of the format reads it as we do, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.transform import TransformConfig
from torch import Tensor, nn

from qat.checkpoints.export import check_export
from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import open_export
from qat.checkpoints.verify import verify
from qat.engines.transformers import load_packed
from qat.errors import CheckpointError, QatError, UnsupportedError
from qat.modes import served
from tests.checkpoints.exports import edit, ids, pair_rules, quantized, quiet_export
from tests.tiny import tiny_model

SIXTEEN = [{"kind": "hadamard", "size": 16}]
RULES = [
    pair_rules("mxfp4", "mxfp4", "*.mlp.*"),
    {**pair_rules("int4_channel", "int4_token", "*.o_proj"), "init": SIXTEEN},
    {**pair_rules("nvfp4", "nvfp4", "*_proj"), "init": []},
    {"match": "*", "skip": "rest"},
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def model(source: Path) -> nn.Module:
    """Rotated by 32 and by 16, and as it is."""
    return quantized(source, RULES, init=("smooth", "hadamard", "gptq"))


@pytest.fixture(scope="module")
def folder(source: Path, model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quiet_export(model, source, tmp_path_factory.mktemp("rotated") / "out")


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids(), use_cache=False).logits
    return found.float()


def test_config_json_says_it_in_the_words_of_the_library(folder: Path) -> None:
    given = json.loads((folder / "config.json").read_text())["quantization_config"]["transform_config"]
    groups = TransformConfig.model_validate(given).config_groups
    assert {name: scheme.head_dim for name, scheme in groups.items()} == {"hadamard_32": 32, "hadamard_16": 16}
    assert all(scheme.precision is torch.float32 for scheme in groups.values())
    for scheme in groups.values():
        assert [(part.location, part.inverse) for part in scheme.apply] == [("weight_input", True), ("input", False)]
    sizes = {path.rsplit(".", 1)[1]: module.rotation for path, module in open_export(folder).modules.items()}
    expected = {"gate_proj": 32, "up_proj": 32, "down_proj": 32, "o_proj": 16, "q_proj": 0, "k_proj": 0, "v_proj": 0}
    assert sizes == expected


def test_the_library_computes_our_logits_exactly_and_every_other_check_holds(folder: Path) -> None:
    report = verify(folder)
    assert report.ok, report
    (said,) = [check.detail for check in report.checks if check.name == "transformers"]
    assert said.startswith("with its transform_config applied") and "difference 0.0 " in said


@pytest.mark.usefixtures("library_sums")
def test_files_compute_what_training_did_dense_and_packed(folder: Path, model: nn.Module) -> None:
    with served(model):
        expected = logits(model)
    assert torch.equal(logits(load_exported(folder)), expected)
    packed, dense = load_packed(folder, torch.bfloat16), load_exported(folder, dtype=torch.bfloat16)
    assert torch.equal(logits(packed), logits(dense))


def test_inputs_are_rotated_even_where_they_are_not_rounded(folder: Path, model: nn.Module) -> None:
    exact, rounded = (logits(load_exported(folder, quantize_inputs=flag)) for flag in (False, True))
    distance = float((exact - rounded).square().mean() / rounded.square().mean())
    assert 0 < distance < 0.5


def test_a_reader_that_ignores_it_computes_something_else(folder: Path, tmp_path: Path, source: Path) -> None:
    out = quiet_export(quantized(source, RULES, init=("hadamard",)), source, tmp_path / "out")
    right = logits(load_exported(out))
    edit(out, lambda config: config["quantization_config"].pop("transform_config"))
    wrong = logits(load_exported(out))
    assert float((wrong - right).square().mean()) > 0.5 * float(right.square().mean())


def test_targets_that_cannot_say_it_refuse_and_name_the_one_that_can(
    model: nn.Module, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="modelopt cannot say that inputs are rotated; export it with"):
        quiet_export(model, source, tmp_path / "out", "modelopt")
    assert not (tmp_path / "out").exists()


def test_what_engines_do_with_it_is_said_before_training(model: Any, source: Path) -> None:
    notes = " ".join(check_export(model, source))
    assert "plain transformers ignores `transform_config`" in notes and "vLLM rotates inputs" in notes


def group(**changes: Any) -> dict[str, Any]:
    parts = [{"targets": ["re:.*mlp.*"], "location": where, "inverse": False} for where in ("input", "weight_input")]
    return {"type": "hadamard", "head_dim": 32, "apply": parts} | changes


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"R1": 1}, CheckpointError, "not a table of config_groups"),
        ({"R4": group(type="random-matrix")}, UnsupportedError, r"R4\.type is 'random-matrix'; readable: 'hadamard'"),
        ({"R4": group(randomize=True)}, UnsupportedError, r"randomize is True"),
        ({"R4": group(precision="torch.bfloat16")}, UnsupportedError, r"precision is 'torch.bfloat16'"),
        ({"R4": group(head_dim=None)}, UnsupportedError, r"head_dim is None: blocks need a size"),
        ({"R4": group(head_dim=24)}, UnsupportedError, r"head_dim is 24"),
        ({"R4": group(apply=[{"targets": "Linear", "location": "output"}])}, UnsupportedError, "applies to 'output'"),
        ({"R4": group(apply=[{"targets": "Linear", "location": "input"}])}, UnsupportedError, "other weights than"),
        ({"R4": group(), "R5": group(head_dim=16)}, UnsupportedError, r"rotates the input of \S+ more than once"),
    ],
)
def test_other_transforms_are_refused_by_name(
    config: dict[str, Any], error: type[QatError], says: str, folder: Path, tmp_path: Path, source: Path, model: Any
) -> None:
    copy = quiet_export(model, source, tmp_path / "copy")
    edit(copy, lambda given: given["quantization_config"].update(transform_config={"config_groups": config}))
    with pytest.raises(error, match=says):
        assert open_export(copy).modules
