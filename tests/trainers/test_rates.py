"""`optim.lr: auto` takes the rate that the choosing text prefers, says the cost, and leaves no trace but the rate."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from qat.trainers.job import load_job
from qat.trainers.optim import best_rate
from qat.trainers.run import train
from tests.tiny import tiny_model
from tests.trainers.jobs import curve, write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=1)


def test_auto_is_the_run_at_the_rate_it_chose(tmp_path: Path, model: Path) -> None:
    search = {"rates": [1e-5, 1e-3, 3e10], "steps": 3}
    said = io.StringIO()
    auto = load_job(write(tmp_path, model, name="auto", optim={"lr": "auto", "search": search}))
    report = train(auto, table=False, console=Console(file=said, width=300))
    assert [rate for rate, _ in report["rates"]] == search["rates"]
    rate = best_rate([pair for pair in report["rates"] if pair[1] is not None])
    assert rate < 1e9 and f"learning rate: {rate:.3g} (KL after 3 steps" in said.getvalue()
    assert "that cost 9 steps and 3 evaluations" in said.getvalue()
    assert "was chosen after a few steps with each" in (auto.folder / "report.md").read_text()
    plain = load_job(write(tmp_path, model, name="plain", optim={"lr": rate}))
    train(plain, table=False)
    assert curve(auto) == curve(plain)
    students = [load_file(job.folder / "checkpoints/best/student.safetensors") for job in (auto, plain)]
    assert all(tensor.equal(students[1][name]) for name, tensor in students[0].items())


def test_what_was_tried_is_not_tried_again(tmp_path: Path, model: Path) -> None:
    optim = {"lr": "auto", "search": {"rates": [1e-4, 1e-3]}}
    path = write(tmp_path, model, steps=4, optim=optim)
    first = train(load_job(path), table=False)["rates"]
    said = io.StringIO()
    again = train(load_job(path, ["steps=6"]), resume_run=True, table=False, console=Console(file=said, width=300))
    assert again["rates"] == first and "KL after" not in said.getvalue() and "steps: 4 -> 6" in said.getvalue()
    state = next((load_job(path).folder / "checkpoints").glob("step-*/state.json"))
    assert json.loads(state.read_text())["rates"] == first


def test_equal_rates_take_the_lower() -> None:
    assert best_rate([[3e-4, 0.2], [1e-4, 0.2], [1e-5, 0.3]]) == 1e-4
