"""W4A16 by msmodelslim's older service, which alone makes it, without and with an offset, in groups of 64 and 128: the
tensors, types, shapes and description of our export, and our reader reads its files."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qat.checkpoints.layouts import open_export
from qat.numbers.catalog import lookup
from qat.numbers.numerics import quantize
from tests.ascend.places import by_msmodelslim
from tests.ascend.test_producer import DESCRIPTION, UP, stored
from tests.checkpoints.exports import export_pair
from tests.tiny import tiny_model

pytestmark = pytest.mark.ascend
FORMATS = ("int4_g64", "int4_g64_asym", "int4_g128")
WIDE = {"hidden_size": 256, "num_attention_heads": 8}
NAME = "quant_model_weights.safetensors"  # as the newer service calls it; by itself it puts the type into the name
Made = Callable[[str], Path]


def config(group: int, symmetric: bool) -> dict[str, Any]:
    """Its YAML; the newer service has no 4-bit weights in groups."""
    label = {"w_bit": 4, "a_bit": 16, "is_sparse": False, "kv_cache": False}
    metadata = {"config_id": "tiny", "score": 90, "verified_model_types": ["Qwen3-8B"], "label": label}
    calibration = {"w_bit": 4, "a_bit": 16, "mm_tensor": False, "is_lowbit": True, "open_outlier": False}
    calibration |= {"group_size": group, "w_sym": symmetric, "w_method": "MinMax", "disable_names": ["lm_head"]}
    spec = {
        "calib_cfg": calibration,
        "calib_params": {"disable_level": "L0"},
        "calib_save_params": {"safetensors_name": NAME},
        "calib_dataset": "mix_calib.jsonl",
    }
    return {"apiversion": "modelslim_v0", "metadata": metadata, "spec": spec}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two groups or more, and biases in attention."""
    root = tmp_path_factory.mktemp("w4a16")
    folder = tiny_model("qwen3", root / "model", num_hidden_layers=1, attention_bias=True, **WIDE)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}  # the name that older versions of transformers know
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def made(source: Path) -> Made:
    @cache
    def make(name: str) -> Path:
        fmt = lookup(name)
        assert fmt.group is not None
        return by_msmodelslim(source, source.parent / name, config(fmt.group, not fmt.zero_point))

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_tensors_and_description(name: str, made: Made, source: Path) -> None:
    out = source.parent / f"ours-{name}"
    export_pair(source, out, (name, None), "ascend", activation_rule="ascend")
    theirs, ours = stored(made(name)), stored(out)
    assert {key: (t.dtype, t.shape) for key, t in ours.items()} == {
        key: (t.dtype, t.shape) for key, t in theirs.items()
    }
    described = [json.loads((folder / DESCRIPTION).read_text()) for folder in (made(name), out)]
    assert described[0] == described[1] and described[0]["group_size"] == lookup(name).group
    offset = theirs[f"{UP}.weight_offset"]
    assert bool(offset.any()) == name.endswith("asym") and torch.equal(offset, offset.round())


@pytest.mark.parametrize("name", FORMATS)
def test_our_reader_reads_its_files(name: str, made: Made, source: Path) -> None:
    folder, dense = open_export(made(name)), load_file(source / "model.safetensors")
    assert len(folder.modules) == 7
    for path, module in folder.modules.items():
        truth = dense[f"{path}.weight"].float()
        assert (folder.dense(path).float() - truth).norm() / truth.norm() < 0.14
        assert module.weights["symmetric"] != name.endswith("asym")


def test_codes(made: Made, source: Path) -> None:
    """Of symmetric groups: the scale is amax / 7 in float32, where ours is a BF16 number; codes are neighbours."""
    theirs, dense = stored(made("int4_g64")), load_file(source / "model.safetensors")[f"{UP}.weight"].float()
    scale = theirs[f"{UP}.weight_scale"]
    assert torch.allclose(scale, dense.unflatten(-1, (-1, 64)).abs().amax(-1) / 7, rtol=1e-6)
    pairs = theirs[f"{UP}.weight"].view(torch.uint8)
    codes = torch.stack((pairs & 15, pairs >> 4), dim=1).flatten(0, 1)
    apart = (codes.int() - quantize(dense, lookup("int4_g64")).codes.int() + 8).remainder(16) - 8
    assert apart.abs().max() <= 1 and (apart == 0).float().mean() > 0.9
