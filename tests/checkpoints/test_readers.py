"""What no reader may take for a good checkpoint: other layouts, unknown variants, tensors that do not fit (by name)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.checkpoints.export import RECORD
from qat.checkpoints.exported import load_exported
from qat.checkpoints.readers import READERS, open_export
from qat.checkpoints.targets import TARGETS, unpack_layer
from qat.checkpoints.verify import verify
from qat.errors import CheckpointError, UnsupportedError
from tests.checkpoints.exports import broken, edit, projections, quiet_export, rewrite
from tests.tiny import tiny_model

PAIRS = {
    "compressed-tensors": ("nvfp4", "nvfp4"),
    "modelopt": ("nvfp4", "nvfp4"),
    "fp8": ("fp8_b128", "fp8_g128"),
}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exports")
    source = tiny_model("llama", root / "source", num_hidden_layers=1)
    models = {pair: projections(source, pair) for pair in set(PAIRS.values())}
    for target, pair in PAIRS.items():
        quiet_export(models[pair], source, root / target, target)
    quiet_export(models[PAIRS["modelopt"]], source, root / "sharded", "modelopt", max_shard_bytes=30_000)
    return root


@pytest.fixture
def copy(exports: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        shutil.copytree(exports / name, tmp_path / name)
        return tmp_path / name

    return make


def test_every_target_has_a_reader(exports: Path) -> None:
    assert READERS.keys() == TARGETS.keys() == PAIRS.keys()
    for target in TARGETS:
        assert isinstance(open_export(exports / target), READERS[target])
        assert verify(exports / target, logits=False).ok


@pytest.mark.parametrize("target", PAIRS)
def test_packed_layers_are_those_that_the_reader_decodes(target: str, exports: Path) -> None:
    folder = open_export(exports / target)
    for path, module in folder.modules.items():
        tensors = folder.layer(path)
        q = unpack_layer(target, module, tensors)
        assert torch.equal(q.dequantize(torch.bfloat16), folder.dense(path))
        name = f"weight_{'packed' if 'weight_packed' in tensors else ''}".rstrip("_")
        with pytest.raises(CheckpointError, match=rf"{path}\.{name} is missing"):
            unpack_layer(target, module, {key: tensor for key, tensor in tensors.items() if key != name})


@pytest.mark.parametrize("target", PAIRS)
@pytest.mark.parametrize("other", PAIRS)
def test_a_checkpoint_labelled_as_another_target_is_refused(target: str, other: str, copy: Any, exports: Path) -> None:
    """Its own configuration with another method, and another's configuration over its tensors."""
    if target == other:
        return
    folder = copy(target)
    edit(folder, lambda c: c["quantization_config"].update(quant_method=other))
    with pytest.raises((CheckpointError, UnsupportedError), match="quantization_config"):
        open_export(folder)
    theirs = json.loads((exports / other / "config.json").read_text())["quantization_config"]
    edit(folder, lambda c: c.update(quantization_config=theirs), forget=True)
    assert broken(folder)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0"):
        load_exported(folder)


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        ("modelopt", {"quant_method": "awq"}, "quant_method 'awq'; readable: compressed-tensors, modelopt, fp8"),
        ("modelopt", {"quant_method": None}, "describes no quantization"),
        ("modelopt", {"quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ'; readable: NVFP4"),
        ("modelopt", {"quant_algo": None}, "quant_algo None"),
        ("modelopt", {"group_size": 32}, "NVFP4 with group_size 32"),
        ("modelopt", {"ignore": ["lm_head", "other"]}, "exclude_modules differs"),
        ("fp8", {"weight_block_size": None}, "weight_block_size None"),
        ("fp8", {"weight_block_size": [1, 32]}, r"weight_block_size \[1, 32\]"),
        ("fp8", {"activation_scheme": "static"}, "activation_scheme 'static'; readable: 'dynamic'"),
        ("fp8", {"scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0'"),
        ("fp8", {"fmt": "e5m2"}, "fmt 'e5m2'"),
        ("compressed-tensors", {"quantization_status": "frozen"}, "quantization_status: compressed"),
    ],
)
def test_unknown_variants_are_refused(target: str, change: dict[str, Any], message: str, copy: Any) -> None:
    folder = copy(target)
    edit(folder, lambda c: c["quantization_config"].update(change))
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        open_export(folder)
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        load_exported(folder)
    assert broken(folder) == {"complete"}


def test_records_of_a_later_version_are_refused(copy: Any) -> None:
    folder = copy("fp8")
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, "record_version": 99}))
    (check,) = verify(folder).checks
    assert not check.ok and "record_version 99" in check.detail


@pytest.mark.parametrize(
    ("target", "suffix", "change", "message"),
    [
        ("modelopt", "weight_scale", lambda t: t.view(torch.uint8), r"is U8\[128, 8\], not F8_E4M3\[128, 8\]"),
        ("modelopt", "weight_scale", lambda t: t[:, :-1], r"is F8_E4M3\[128, 7\]"),
        ("modelopt", "weight_scale_2", lambda t: t.reshape(1), r"is F32\[1\], not F32\[\]"),
        ("modelopt", "weight_scale_2", torch.zeros_like, "is zero, negative or not finite in 1 places"),
        ("modelopt", "weight_scale_2", lambda t: t * torch.inf, "is zero, negative or not finite"),
        ("modelopt", "input_scale", lambda t: t * torch.nan, "is zero, negative or not finite"),
        ("modelopt", "weight_scale_2", None, "is missing"),
        ("modelopt", "weight", lambda t: t.view(torch.int8), r"is I8\[128, 64\], not U8\[128, 64\]"),
        ("modelopt", "weight", lambda t: t.flatten(), "not a matrix"),
        ("fp8", "weight_scale_inv", lambda t: t.double(), r"is F64\[1, 1\], not F32\[1, 1\]"),
        ("fp8", "weight_scale_inv", lambda t: t.expand(2, 1), r"is F32\[2, 1\]"),
        ("fp8", "weight_scale_inv", lambda t: -t, "is zero, negative or not finite"),
        ("fp8", "weight", lambda t: t.bfloat16(), r"is BF16\[128, 128\], not F8_E4M3"),
        ("fp8", "weight", None, "no tensor"),
        ("compressed-tensors", "weight_scale", lambda t: t.view(torch.uint8), r"is U8\[128, 8\]"),
        ("compressed-tensors", "weight_global_scale", torch.zeros_like, "is zero, negative or not finite"),
        ("compressed-tensors", "weight_packed", lambda t: t[:, 1:], r"is F8_E4M3\[128, 8\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    target: str, suffix: str, change: Any, message: str, copy: Any
) -> None:
    folder, name = copy(target), f"{Q}.{suffix}"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        stored = tensors.pop(name)
        if change is not None:
            tensors[name] = change(stored)

    rewrite(folder, damage)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_exported(folder)
    assert Q in str(caught.value)
    assert broken(folder) & {"tensors", "scales"}


def test_a_truncated_shard_is_refused_by_name(copy: Any) -> None:
    folder = copy("sharded")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=shard.name):
        load_exported(folder)
    assert broken(folder) == {"complete"}
