"""What happens after a step: averaging, the metrics file, and which student is kept."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qat.trainers.callbacks import Average, Keeper, MetricsFile
from qat.trainers.evaluate import Scores
from qat.trainers.strategy import ALONE


def test_average_follows_its_definition() -> None:
    """v <- d v + (1 - d) p with d = min(decay, (1 + step) / (10 + step)), step by step in float64."""
    model = nn.Linear(3, 2)
    average = Average(model, decay=0.6)
    average.begin()
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for step in range(1, 30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += step * torch.ones_like(parameter)
        average.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    for name, value in average.values.items():
        assert torch.allclose(value.double(), expected[name], rtol=1e-5)


def test_averaged_values_are_in_the_model_only_inside_the_context() -> None:
    model = nn.Linear(2, 2)
    average = Average(model, decay=0.9)
    average.begin()
    own = model.weight.detach().clone()
    average.values["weight"].fill_(7.0)
    with average.applied():
        assert bool((model.weight == 7.0).all())
    assert torch.equal(model.weight, own)


def test_rows_of_undone_steps_are_dropped_and_the_last_done_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path, after=0)
    for step in (1, 2, 3, 4):
        first.write({"step": step, "seconds": float(step), "loss": 1 / step})
    first.close()
    again = MetricsFile(path, after=2)
    again.write({"step": 3, "seconds": 2.5, "loss": 0.5})
    again.close()
    lines = path.read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2", "3"]
    assert lines[3].split(",")[2] == "2.5"


class _Evaluator:
    """Scores a model by a number that it holds."""

    ranks = ALONE

    def score(self, model: Any, what: str = "") -> Scores:
        return Scores(nll=1.0, kl=float(model.bias.detach()), top1=0.5, tokens=10)


def _keeper(tmp_path: Path, patience: int) -> tuple[Keeper, nn.Module]:
    model = nn.Linear(1, 1)
    job: Any = SimpleNamespace(lora=None, eval=SimpleNamespace(patience=patience))
    evaluator: Any = _Evaluator()
    return Keeper(tmp_path, job, evaluator, {}), model


def test_lowest_held_out_kl_is_kept(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    keeper, model = _keeper(tmp_path, 0)
    for step, kl in enumerate((0.5, 0.3, 0.4), start=1):
        nn.init.constant_(model.bias, kl)
        keeper.evaluate(model, step)
    assert keeper.best == {"step": 2, "kl": pytest.approx(0.3), "since": 1}
    kept = load_file(tmp_path / "checkpoints" / "best" / "student.safetensors")
    assert float(kept["bias"]) == pytest.approx(0.3)
    assert not keeper.exhausted


def test_patience_counts_evaluations_without_a_better_student(tmp_path: Path) -> None:
    keeper, model = _keeper(tmp_path, 2)
    seen = []
    for step, kl in enumerate((0.5, 0.6, 0.4, 0.4, 0.7), start=1):
        nn.init.constant_(model.bias, kl)
        keeper.evaluate(model, step)
        seen.append(keeper.exhausted)
    assert seen == [False, False, False, False, True]
