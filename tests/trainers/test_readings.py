"""Nothing waits for the device between two readings, and reading later changes no number."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qat
from qat.trainers.callbacks import StepLoop
from qat.trainers.readings import Readings
from qat.trainers.strategy import ALONE
from tests.tiny import tiny_model
from tests.trainers import jobs

LOG_EVERY = 3
# What makes the host wait for a GPU, as PyTorch dispatches it, and by name where a CPU's tensor is read directly.
WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "bincount")
READING = ("tolist", "numpy", "cpu")


class Watch(TorchDispatchMode):
    """Refuses, while it is armed, what waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.armed, self.watched = False, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.armed:
            self.watched += 1
            name = func.overloadpacket.__name__.rstrip("_")
            by = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
            masks = any(isinstance(t, Tensor) and t.dtype is torch.bool for t in by)
            assert name not in WAITING and not masks, f"{func} inside a step"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Armed from the beginning of each micro-batch to where its step is read, or to its end; data is loaded between."""
    watch = Watch()
    ends = StepLoop.on_train_batch_end

    def begin(loop: StepLoop, trainer: Any, *rest: Any) -> None:
        watch.armed = True
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")

    def end(loop: StepLoop, trainer: Any, *rest: Any) -> None:
        watch.armed = not (trainer.global_step % LOG_EVERY == 0 or trainer.global_step == loop.job.steps)
        if torch.cuda.is_available() and not watch.armed:
            torch.cuda.set_sync_debug_mode("default")
        ends(loop, trainer, *rest)
        watch.armed = False
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(StepLoop, "on_train_batch_start", begin)
    monkeypatch.setattr(StepLoop, "on_train_batch_end", end)
    for name in READING:
        own = getattr(Tensor, name)

        def read(tensor: Tensor, *args: Any, own: Any = own, name: str = name, **named: Any) -> Any:
            assert not watch.armed, f"{name} inside a step"
            return own(tensor, *args, **named)

        monkeypatch.setattr(Tensor, name, read)
    return watch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=1)


def job(folder: Path, model: Path, **changes: Any) -> Any:
    settings = {"steps": 2 * LOG_EVERY + 1, "checkpoint_every": 0, "log_every": LOG_EVERY}
    path = jobs.write(folder, model, **{**settings, **changes})
    return qat.load_job(path, ["eval.every=0", "eval.why=false"])


def of(learn: str, input: str | None = None) -> dict[str, Any]:
    return {
        "rules": [{"match": "*_proj", "weight": "nvfp4", "input": input}, {"match": "*", "skip": "x"}],
        "learn": learn,
    }


CASES: dict[str, dict[str, Any]] = {
    "qad": {},
    "qat, one micro-batch": {"method": "qat", "micro_rows": 4},
    "refit, damped": {"scheme": of("refit"), "optim": {"cage": {"strength": 1.0, "begin": 0.0}, "refit_every": 1}},
    "recomputed": {"activation_checkpointing": True, "hold_weights": True, "scheme": of("dual_lsq", "mxfp4")},
    "jsd": {"loss": {"kind": "jsd"}, "data": {"source": "embedded", "seq_len": 32, "max_tokens": 8192, "pack": False}},
}


@pytest.mark.parametrize("name", CASES)
def test_no_step_waits_for_the_device(name: str, tmp_path: Path, model: Path, watch: Watch) -> None:
    """Forward, loss, backward, clipping, optimizer, what follows a step, averages and rows, of all steps; a kernel
    counts as one operation that waits for nothing."""
    with watch:
        qat.train(job(tmp_path, model, **CASES[name]))
    assert watch.watched > 1000


def test_a_reading_would_be_noticed(tmp_path: Path, model: Path, watch: Watch) -> None:
    with watch, pytest.raises(AssertionError, match="inside a step"):
        qat.train(job(tmp_path, model, log_every=1))


@pytest.mark.gpu
def test_no_step_waits_for_a_gpu(tmp_path: Path, model: Path, watch: Watch) -> None:
    """As PyTorch itself sees it (`torch.cuda.set_sync_debug_mode`)."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from qat.kernels.load import load_for_training

    load_for_training()
    qat.train(job(tmp_path, model))


def test_reading_later_changes_no_number(tmp_path: Path, model: Path) -> None:
    found = []
    for log_every in (1, LOG_EVERY):
        wanted = job(tmp_path, model, name=f"every-{log_every}", log_every=log_every)
        qat.train(wanted)
        rows = jobs.metrics(wanted)
        assert [int(row["step"]) for row in rows] == list(range(1, 8))
        assert all(float(row["tokens_per_second"]) > 0 for row in rows)
        kept = [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]
        found.append((kept, load_file(wanted.folder / "checkpoints" / "best" / "student.safetensors")))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


def test_a_step_that_is_not_finite_is_left_out_on_the_device() -> None:
    """The fused optimizer moves neither weights nor moments, and goes on afterwards as if it had not been."""
    states = []
    for grads in ([1.0, 2.0], [1.0, math.nan, 2.0]):
        weight = torch.nn.Parameter(torch.ones(4))
        optimizer, readings = torch.optim.AdamW([weight], lr=0.1, fused=True), Readings()
        for step, grad in enumerate(grads):
            weight.grad = torch.full((4,), grad)
            readings.add(step, [torch.tensor(0.5), torch.tensor(0.25)], weight.grad.norm())
            readings.guard(optimizer)
            optimizer.step()
        states.append([weight.detach(), *optimizer.state[weight].values()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    found = readings.read(ALONE)
    assert [reading.step for reading in found] == [0, 1, 2] and [reading.loss for reading in found] == [0.75] * 3
    assert [reading.problem for reading in found] == [None, "norm of the gradients became nan", None]
    assert list(readings.take()) == [0, 1, 2] and readings.take() == {} and readings.read(ALONE) == []
