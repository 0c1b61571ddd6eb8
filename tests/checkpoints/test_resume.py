"""The resumable state: what a run goes on from is what it had, random numbers included."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from qat.checkpoints import resume
from qat.checkpoints.hf import load_model
from qat.errors import CheckpointError
from qat.scheme import Scheme
from qat.surgery import apply
from tests.tiny import tiny_model


def _trained(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_everything_comes_back_and_the_next_random_numbers_are_the_same(tmp_path: Path) -> None:
    model, optimizer = _trained(0)
    average = {"0.weight": torch.full((4, 4), 3.0)}
    folder = resume.save_state(tmp_path, 3, model, optimizer, average, {"tokens": 30})
    expected = torch.randn(8)
    other, fresh = _trained(1)
    state, restored = resume.restore_state(folder, other, fresh)
    assert torch.equal(torch.randn(8), expected)
    assert state == {"tokens": 30, "step": 3}
    assert restored is not None and torch.equal(restored["0.weight"], average["0.weight"])
    for own, back in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, back)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[own][key], fresh.state[back][key]), key


def test_only_the_newest_state_is_kept_and_found(tmp_path: Path) -> None:
    model, optimizer = _trained(0)
    for step in (9, 10, 100):
        folder = resume.save_state(tmp_path, step, model, optimizer, None, {})
    assert resume.last_state(tmp_path) == folder
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000100"]


def test_of_several_complete_states_the_newest_is_taken(tmp_path: Path) -> None:
    """A process killed between writing a state and deleting the one before leaves both."""
    for step in (8, 12, 16):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        if step < 16:  # the newest is not complete
            (folder / "state.json").write_text("{}")
    assert resume.last_state(tmp_path).name == "step-00000012"


def test_learned_ranges_of_earlier_releases_have_no_dimension(tmp_path: Path) -> None:
    model = nn.Module()
    model.log_range = nn.Parameter(torch.tensor([0.5]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model.log_range.square().sum().backward()
    optimizer.step()
    folder = resume.save_state(tmp_path, 1, model, optimizer, {"log_range": torch.tensor([3.0])}, {})
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: t.view(()) if t.shape == (1,) else t for n, t in tensors.items()}, file)
    saved, moments = model.log_range.item(), {k: v.clone() for k, v in optimizer.state[model.log_range].items()}
    optimizer.step()
    _, average = resume.restore_state(folder, model, optimizer)
    assert model.log_range.item() == saved and average is not None and average["log_range"].tolist() == [3.0]
    for key, value in moments.items():
        assert optimizer.state[model.log_range][key].shape == value.shape, key
        assert torch.equal(optimizer.state[model.log_range][key], value), key


def test_no_state_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no resumable state"):
        resume.last_state(tmp_path)


@pytest.mark.parametrize(
    ("kind", "match", "weight"),
    [("llama", "*.down_proj", name) for name in ("nvfp4", "int4_g32_asym", "q4_k", "q6_k", "if4", "fp8_b128")]
    + [("qwen3_moe", "*.experts.*", name) for name in ("nvfp4", "int4_g32_asym")],
)
def test_a_student_comes_back_without_its_scales_being_looked_for(
    kind: str, match: str, weight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the file: a search before takes as long as the rest of a small model's export."""
    source, run = tiny_model(kind, tmp_path / "model", num_hidden_layers=1), tmp_path / "run"
    rules = [{"match": match, "weight": weight}, {"match": "*", "skip": "the rest"}]
    given: Any = {"rules": rules, "init": [], "learn": "dual_lsq"}
    model = apply(load_model(source), Scheme.model_validate(given))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    run.mkdir()
    (run / "job.yaml").write_text(yaml.safe_dump({"model": {"id": str(source)}, "scheme": given}), encoding="utf-8")
    resume.save_best(run, resume.student_tensors(model), {"step": 1})
    monkeypatch.delattr("qat.init.scales.find_scales")
    student, expected = resume.load_student(run)[0].state_dict(), model.state_dict()
    assert any("quantizer" in name for name in expected) and student.keys() == expected.keys()
    for name, tensor in expected.items():
        assert student[name].dtype == tensor.dtype and torch.equal(student[name], tensor), name
