"""vllm-ascend's own classes, two versions, on files: they choose a scheme, load every tensor, put weights into their
device's order and compute, over operators simulated from their documents, whose shapes torch_npu's rules confirm."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ascend.conftest import Produced
from tests.ascend.exchanged import KINDS, Kind
from tests.ascend.places import ENGINES, by_engine

pytestmark = pytest.mark.ascend
LAYERS = {"self_attn.q_proj": 128, "self_attn.o_proj": 128, "mlp.gate_proj": 128, "mlp.down_proj": 256}
every_engine = pytest.mark.parametrize("version", ENGINES)


def inputs(folder: Path) -> dict[str, torch.Tensor]:
    """BF16 inputs of the layers that are run, saved for the engine too."""
    generator = torch.Generator().manual_seed(3)
    made = {
        f"model.layers.0.{name}": torch.randn(7, columns, generator=generator).to(torch.bfloat16)
        for name, columns in LAYERS.items()
    }
    save_file(made, folder / "LAYERS.safetensors")
    return made


def outputs(version: str, kind: Kind, folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """What the engine computes, after checking what it said."""
    said: dict[str, Any] = by_engine(version, kind.device, folder, scratch / "LAYERS.safetensors")
    assert said["checked"] == sorted(kind.operators)
    for path, layer in said["layers"].items():
        wanted = {"scheme": kind.scheme, "missing": [], "derived": list(kind.derived), "unexpected": []}
        assert layer == wanted, path
    return load_file(scratch / "OUT.safetensors")


@every_engine
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.produced])
def test_files_of_msmodelslim(name: str, version: str, produced: Produced, tmp_path: Path, model: Path) -> None:
    """An independent producer's files: nothing missing, nothing unexpected, and the layer is still the model's,
    as far as the type allows."""
    x = inputs(tmp_path)
    y = outputs(version, KINDS[name], produced(name), tmp_path)
    dense = load_file(model / "model.safetensors")
    limit = {"W4A4_MXFP4": 0.25, "W4A8_MXFP": 0.2, "W8A8_MXFP8": 0.06}.get(name, 0.03)
    for path, given in x.items():
        truth = given.float() @ dense[f"{path}.weight"].float().t()
        error = (y[path].float() - truth).norm() / truth.norm()
        assert error < limit or name == "W8A8", f"{path}: {error}"  # static scales belong to other inputs
