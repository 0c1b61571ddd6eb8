"""State dicts of prepared models: no tensor twice, no checkpoint without scales that trains on in silence."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import load_sharded_checkpoint

import qat
from qat.errors import CheckpointError
from tests.tiny import tiny_model
from tests.trainers.plugging import loaded, made, rows, states_differ


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("state") / "model")


def reads(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model(rows()[0]["input_ids"][None])


def test_every_tensor_has_one_name(source: Path, tmp_path: Path) -> None:
    model = made(source)
    state = model.state_dict(keep_vars=True)
    assert len({id(tensor) for tensor in state.values()}) == len(state)
    assert any("q_proj.input_quantizer" in name for name in state)
    assert not any("k_proj.input_quantizer" in name for name in state)
    inside = torch.nn.Sequential(model).state_dict()
    assert {name.removeprefix("0.") for name in inside} == state.keys()
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == state.keys()


def test_what_is_loaded_is_whole(source: Path) -> None:
    rules = [{"match": "*_attn.*_proj", "weight": "nvfp4", "input": "nvfp4"}, {"match": "*", "skip": "rest"}]
    model, other = made(source), made(source, {"rules": rules})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    again = made(source)
    result = again.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    reads(again)
    assert not states_differ(model, again)
    for state, word in ((loaded(source).state_dict(), "lacks"), (other.state_dict(), "lacks")):
        broken = made(source)
        broken.load_state_dict(state, strict=False)
        with pytest.raises(CheckpointError, match=word):
            reads(broken)
        broken.load_state_dict(model.state_dict())
        reads(broken)
        reads(broken)
    with pytest.raises(RuntimeError, match="size mismatch"):  # torch's own
        made(source, "int4_g64").load_state_dict(model.state_dict(), strict=False)
    richer = made(source)
    richer.load_state_dict({**richer.state_dict(), "model.norm.scale": torch.ones(1)}, strict=False)
    with pytest.raises(CheckpointError, match=r"also holds model\.norm\.scale"):
        reads(richer)


def test_a_checkpoint_in_shards_is_read_in_parts(source: Path, tmp_path: Path) -> None:
    model = made(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path / "saved", max_shard_size="400KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    again = made(source)
    load_sharded_checkpoint(again, tmp_path / "saved", strict=False)
    reads(again)
    assert not states_differ(model, again)
    assert not states_differ(model, qat.load_prepared(tmp_path / "saved", source=source))


def test_load_prepared_wants_exactly_its_scales(source: Path, tmp_path: Path) -> None:
    made(source).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("log_scale"))
    for changed, said in (
        ({n: t for n, t in tensors.items() if n != name}, name),
        ({**tensors, "model.other.weight_quantizer.start": torch.ones(1)}, "model.other"),
        ({**tensors, name: torch.ones(3)}, r"is \[3\]"),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=said):
            qat.load_prepared(tmp_path / "saved", source=source)
