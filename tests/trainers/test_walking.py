"""The time of an initialisation against walks that are timed, launches that are counted, and steps of training."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor

from qat.init.columns import refitted
from qat.init.gptq import Gptq, compensated, damped, inverse
from qat.init.scales import initial_scales
from qat.numbers.catalog import lookup
from qat.numbers.numerics import Scales
from qat.trainers import speeds, walking
from qat.trainers.estimate import estimate
from qat.trainers.footprint import job_facts
from qat.trainers.speeds import Machine, step_seconds, timed
from qat.trainers.walking import initial_seconds
from tests.qat.init.test_columns import Launched
from tests.tiny import tiny_model
from tests.trainers.test_estimate import job

CPU = Machine("cpu", "a CPU", False, None, 1e-11, 1e-9, 1e-9, 1e-7, 1e-9, 1e-10, 1e-10)
GPU = replace(CPU, kind="cuda", name="a GPU", per_flop=0.0, per_launch=5e-6, per_operator=5e-5)
REPEATS = 5
BEST = {"kind": "gptq", "choose": "arrival", "refit": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


def seconds(folder: Path, machine: Machine, *init: dict[str, object]) -> float:
    wanted = job(folder, scheme={"init": list(init)})
    return initial_seconds(wanted, job_facts(wanted), machine)


def walked(weight: Tensor, scales: Scales, step: Gptq) -> None:
    """As the step does it, with the inverse that its plan counts."""
    fmt, gram = lookup("nvfp4"), torch.eye(weight.shape[1])
    factor = inverse(gram)
    latent, found = compensated(weight, fmt, scales, factor, step.choose == "arrival")
    if step.refit:
        refitted(weight, latent, fmt, found, damped(gram, factor), step.refit)


@pytest.mark.parametrize("settings", [{}, {"choose": "arrival"}, {"refit": 2}, {"choose": "arrival", "refit": 2}])
def test_walks_take_about_as_long_as_predicted(
    folder: Path, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of stacks of the shapes that the model has: those that read one tensor, one below the other. Predicted and walked
    in turn, and the median of the ratios counts: other work on this machine slows one of the two at a time."""
    monkeypatch.setattr(speeds, "MEASURE_SECONDS", 0.05)
    wanted, step, fmt = job(folder), Gptq.model_validate(settings), lookup("nvfp4")
    shapes = {m.path: m.shape for m in job_facts(wanted).coverage.modules if m.weight}
    stacks = []
    for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        for layer in {path.split(".")[2] for path in shapes}:
            own = [shape for path, shape in shapes.items() if path.split(".")[2] == layer and path.endswith(names)]
            weight = torch.randn(sum(rows for rows, _ in own), own[0][1], generator=torch.Generator().manual_seed(0))
            stacks.append((weight, initial_scales(weight, fmt, "amax")))
    ratios = []
    for _ in range(REPEATS):
        predicted = seconds(folder, CPU, {"kind": "gptq", **settings})
        ratios.append(predicted / sum(timed(partial(walked, weight, scales, step)) for weight, scales in stacks))
    assert median(ratios) == pytest.approx(1, rel=0.6)


def test_a_gpu_takes_as_long_as_the_launches_that_are_counted(folder: Path) -> None:
    fmt, weight = lookup("nvfp4"), torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    scales, factor = initial_scales(weight, fmt, "amax"), inverse(torch.eye(256))
    latent = weight
    for choose, launches in ((False, walking.WALK_LAUNCHES), (True, walking.WALK_LAUNCHES + walking.ARRIVAL_LAUNCHES)):
        with Launched() as launched:
            latent, _ = compensated(weight, fmt, scales, factor, choose)
        assert launched.count / 256 == pytest.approx(launches, rel=0.25)
    with Launched() as launched:
        refitted(weight, latent, fmt, scales, torch.eye(256), 4)
    assert launched.count / 256 / 4 == pytest.approx(walking.REFIT_LAUNCHES, rel=0.25)
    columns = sum(m.shape[1] for m in job_facts(job(folder)).coverage.modules if m.weight and _first(m.path))
    plain, best = seconds(folder, GPU, {"kind": "gptq"}), seconds(folder, GPU, BEST)
    more = (walking.ARRIVAL_LAUNCHES + 2 * walking.REFIT_LAUNCHES) * columns * GPU.per_launch
    assert best - plain == pytest.approx(more, rel=0.1)


def _first(path: str) -> bool:
    """Of those that read one tensor."""
    return not path.endswith(("k_proj", "v_proj", "up_proj"))


def test_reconstruction_is_training_without_logits_and_teacher(folder: Path) -> None:
    wanted = job(folder, method="qat")
    step = step_seconds(wanted, job_facts(wanted), CPU)
    one, two = (seconds(folder, CPU, {"kind": "reconstruct", "steps": steps, "rows": 2}) for steps in (1, 2))
    assert two == pytest.approx(2 * one) and 0.3 * step < one < step
    assert seconds(folder, CPU, {"kind": "reconstruct", "steps": 1, "rows": 4}) > 1.5 * one


def test_the_plan_counts_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "MEASURE_SECONDS", 0.0)
    found = [
        estimate(job(folder, scheme={"init": init})).plans[-1].other_seconds
        for init in ([{"kind": "gptq"}], [BEST], [{**BEST, "sequential": True}, {"kind": "reconstruct"}])
    ]
    assert found == sorted(found) and found[0] < 0.7 * found[1] < found[2]
