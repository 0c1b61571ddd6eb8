"""Layers of MX types with an odd number of groups in a row, whose scales do not make pairs, in vllm-ascend's own
classes: which version completes them. Experts are in `test_experts.py`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.checkpoints.exported import load_exported
from tests.ascend.places import ENGINES, by_engine
from tests.checkpoints.exports import Pair, export_pair, rewrite
from tests.tiny import tiny_model

pytestmark = pytest.mark.ascend
LAYER = "model.layers.0.mlp.down_proj"
LOADS: dict[str, tuple[Pair, tuple[str, ...]]] = {
    "W8A8_MXFP8": (("mxfp8", "mxfp8"), ENGINES),
    "W4A4_MXFP4": (("mxfp4", "mxfp4"), ENGINES[1:]),
}


@pytest.mark.parametrize("version", ENGINES)
def test_three_groups(version: str, tmp_path: Path) -> None:
    source = tiny_model("qwen3", tmp_path / "model", num_hidden_layers=1, intermediate_size=96)
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    save_file({LAYER: x}, tmp_path / "inputs")
    jobs = []
    for name, (pair, _) in LOADS.items():
        export_pair(source, tmp_path / name, pair, "ascend", activation_rule="ascend")
        jobs.append([str(tmp_path / name), str(tmp_path / "inputs"), str(tmp_path / f"{name}-y")])
    for (name, (_, versions)), said in zip(LOADS.items(), by_engine(version, "A5", jobs, tmp_path), strict=True):
        if version not in versions:
            assert said["error"].startswith("RuntimeError: shape '["), said
            continue
        assert "error" not in said, said
        with torch.no_grad():
            truth = load_exported(tmp_path / name).get_submodule(LAYER)(x.float())
        found = load_file(tmp_path / f"{name}-y")[LAYER].float()
        assert (found - truth).norm() <= 2.0**-8 * truth.norm(), name


@pytest.mark.parametrize("version", ENGINES)
def test_what_exports_refuse(version: str, tmp_path: Path) -> None:
    """W4A8_MXFP, of which three of four groups are left: both versions stop."""
    source, out = tiny_model("qwen3", tmp_path / "model", num_hidden_layers=1, intermediate_size=128), tmp_path / "out"
    export_pair(source, out, ("mxfp4", "mxfp8"), "ascend", activation_rule="ascend")
    rewrite(out, lambda tensors: tensors.update({name: cut(name, tensor) for name, tensor in tensors.items()}))
    save_file({LAYER: torch.zeros(7, 96).bfloat16()}, tmp_path / "inputs")
    (said,) = by_engine(version, "A5", [[str(out), str(tmp_path / "inputs"), str(tmp_path / "y")]], tmp_path)
    assert said["error"].startswith("RuntimeError: shape '["), said


def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, : tensor.shape[1] // 4 * 3].contiguous() if name.startswith(LAYER) else tensor
