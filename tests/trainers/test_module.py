"""The gradient of an optimizer step against one made in float64 from whole logits, and stops before NaN is written."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import lightning as lit
import numpy as np
import pytest
import torch

from qat.errors import TrainingError
from qat.quantizer import WeightQuantizer
from qat.surgery import apply
from qat.trainers.data import Batches, Blocks
from qat.trainers.job import Job
from qat.trainers.module import MicroBatches, QatModule
from qat.training.losses import IGNORE
from tests.tiny import VOCABULARY, tiny_model

ROWS, SEQ_LEN = 8, 10


class Rows(Blocks):
    """Rows in memory; every one predicts another number of tokens."""

    def array(self) -> Any:
        draw = np.random.default_rng(5)
        rows = np.zeros((ROWS, 3, SEQ_LEN), np.int32)
        rows[:, 0] = draw.integers(3, VOCABULARY, (ROWS, SEQ_LEN))
        rows[:, 1, :-1] = rows[:, 0, 1:]
        for row in range(ROWS):
            rows[row, 1, row + 1 :] = IGNORE
        return rows


@pytest.fixture(scope="module")
def batches() -> Batches:
    values = {field.name: None for field in dataclasses.fields(Blocks)} | {"num_rows": ROWS, "seq_len": SEQ_LEN}
    return Batches(Rows(**values), 4, seed=7)  # type: ignore[arg-type]  # only its size is asked for


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    student = tiny_model("llama", root / "student", **sizes)
    return [student, tiny_model("llama", root / "teacher", seed=1, vocab_size=VOCABULARY + 16, **sizes)]


def models(folders: list[Path]) -> list[Any]:
    from qat.checkpoints.hf import load_model

    return [load_model(folder) for folder in folders]


def job(**changes: Any) -> Job:
    scheme = {"rules": [{"match": "*", "weight": "nvfp4"}]}
    settings = {"name": "x", "model": {"id": "x"}, "scheme": scheme, "steps": 3, "rows": 4, "micro_rows": 1}
    return Job.model_validate({**settings, "optim": {"clip": 1e9}, **changes})


class Gradients(lit.Callback):
    """Keeps what the optimizer is about to see."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = list(pl_module.student.named_parameters())
        self.seen.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        self.weights.append({name: p.detach().clone() for name, p in named})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        if trainer.global_step > len(self.losses):
            self.losses.append(pl_module.step_loss)
            pl_module.step_loss = 0.0


def fit(module: QatModule, wanted: Job, steps: int, callback: lit.Callback) -> None:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    accumulate = wanted.rows // wanted.micro_rows
    lit.Trainer(
        max_steps=steps, accumulate_grad_batches=accumulate, accelerator="cpu", callbacks=[callback], **quiet
    ).fit(module)


def definition(student: Any, teacher: Any, batch: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """Mean loss over the tokens that count, of the whole batch at once."""
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    q = student(**inputs).logits.double().log_softmax(-1)
    losses = []
    for row, column in (batch["targets"] != IGNORE).nonzero().tolist():
        if kind == "qat":
            losses.append(-q[row, column, batch["targets"][row, column]])
        else:
            p = teacher(**inputs).logits.double()[row, column, :VOCABULARY].log_softmax(-1).detach()
            losses.append((p.exp() * (p - q[row, column])).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("method", ["qad", "qat"])
@pytest.mark.parametrize("micro_rows", [1, 2])
def test_gradient_of_a_step_is_that_of_the_mean_over_its_tokens(
    folders: list[Path], batches: Batches, method: str, micro_rows: int
) -> None:
    """Whatever the micro-batches, from step 1 of a resumed run on; the teacher's padding rows play no part."""
    student, teacher = models(folders)
    wanted = job(method=method, micro_rows=micro_rows)
    module = QatModule(student, teacher if method == "qad" else None, wanted, batches, start_step=1)
    seen = Gradients()
    fit(module, wanted, 2, seen)
    assert len(seen.seen) == 2
    for step, (gradients, weights, loss) in enumerate(zip(seen.seen, seen.weights, seen.losses, strict=True), start=1):
        exact = copy.deepcopy(student).double()
        exact.load_state_dict(weights)
        expected = definition(exact, copy.deepcopy(teacher).double(), batches.batch(step), method)
        exact.zero_grad()
        expected.backward()
        assert loss == pytest.approx(float(expected), rel=1e-4)
        for name, parameter in exact.named_parameters():
            wide = float(parameter.grad.abs().max())
            assert torch.allclose(gradients[name].double(), parameter.grad, rtol=1e-3, atol=1e-4 * wide), name


def test_nan_stops_before_the_optimizer_writes_it(folders: list[Path], batches: Batches) -> None:
    student, teacher = models(folders)
    token = int(batches.batch(0)["input_ids"][0, 0])
    with torch.no_grad():
        student.model.embed_tokens.weight[token] = math.nan
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    wanted = job()
    with pytest.raises(TrainingError, match=r"became nan at step 1; the last good checkpoint is kept"):
        fit(QatModule(student, teacher, wanted, batches, 0), wanted, 1, Gradients())
    assert all(
        torch.equal(p.detach().nan_to_num(7.0), before[n].nan_to_num(7.0)) for n, p in student.named_parameters()
    )


def test_a_step_that_is_read_later_is_left_out_meanwhile(folders: list[Path], batches: Batches) -> None:
    student, teacher = models(folders)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    student.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    wanted = job(log_every=4)
    module = QatModule(student, teacher, wanted, batches, 0)
    fit(module, wanted, 2, Gradients())
    assert all(torch.equal(p.detach(), before[n]) for n, p in student.named_parameters())
    with pytest.raises(TrainingError, match=r"norm of the gradients became nan at step 1; the last good checkpoint"):
        module.read()


def test_gradients_beyond_floats_stop_too(folders: list[Path], batches: Batches) -> None:
    """The loss is fine, its gradient is not: without the check clipping would multiply every weight's step by NaN."""
    student, teacher = models(folders)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    student.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    wanted = job()
    with pytest.raises(TrainingError, match="norm of the gradients became"):
        fit(QatModule(student, teacher, wanted, batches, 0), wanted, 1, Gradients())
    assert all(torch.equal(p.detach(), before[n]) for n, p in student.named_parameters())


@pytest.mark.parametrize("targets", [0, 1])
def test_a_step_with_one_target_or_none(folders: list[Path], batches: Batches, targets: int) -> None:
    class Few(Rows):
        def array(self) -> Any:
            rows = super().array()
            rows[:, 1] = IGNORE
            rows[batches.indices(0)[0], 1, 4] = 7 if targets else IGNORE
            return rows

    values = {field.name: None for field in dataclasses.fields(Blocks)} | {"num_rows": ROWS, "seq_len": SEQ_LEN}
    few = Batches(Few(**values), 4, seed=7)  # type: ignore[arg-type]  # as above
    student, teacher = models(folders)
    expected = float(definition(student, teacher, few.batch(0), "qad").detach()) if targets else 0.0
    wanted, seen = job(), Gradients()
    fit(QatModule(student, teacher, wanted, few, 0), wanted, 1, seen)
    assert seen.losses == [pytest.approx(expected, rel=1e-4)]
    assert targets or all(bool((g == 0).all()) for g in seen.seen[0].values())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_weights_that_are_held_over_a_step_change_no_number(
    folders: list[Path], batches: Batches, checkpointed: bool
) -> None:
    found = []
    for holds in (False, True):
        student, teacher = models(folders)
        if checkpointed:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        apply(student, (wanted := job(hold_weights=holds, optim={})).scheme)
        seen = Gradients()
        fit(QatModule(student.train(), teacher, wanted, batches, 0), wanted, 3, seen)
        found.append((seen.losses, seen.seen, seen.weights))
        held = [m._held for m in student.modules() if isinstance(m, WeightQuantizer)]
        assert held and not any(held)
    assert job().holds and not job(micro_rows=4).holds and not job(activation_checkpointing=True).holds
    assert found[0][0] == found[1][0]
    for parts in zip(*(each[1] + each[2] for each in found), strict=True):
        assert parts[0].keys() == parts[1].keys() and all(torch.equal(t, parts[1][n]) for n, t in parts[0].items())


def test_every_row_of_a_step_is_read_once(batches: Batches) -> None:
    """Over two processes together, with the count of the whole step on every micro-batch."""
    for rank_count in (1, 2):
        shares = [Batches(batches.blocks, 4, batches.seed, rank, rank_count) for rank in range(rank_count)]
        found = [list(MicroBatches(share, 1, 3, 1, rank_count)) for share in shares]
        for offset, step in enumerate((1, 2)):
            whole = batches.batch(step)
            parts = [part for mine in found for part in mine[offset * 4 // rank_count : (offset + 1) * 4 // rank_count]]
            ids = torch.cat([part["input_ids"] for part in parts])
            assert sorted(ids.tolist()) == sorted(whole["input_ids"].tolist())
            assert {int(part["step_tokens"]) for part in parts} == {int((whole["targets"] != IGNORE).sum())}


def test_hidden_states_that_a_step_moves_are_not_compared() -> None:
    scheme = {"rules": [{"match": "*", "weight": "nvfp4"}], "init": ["permute", "scales"]}
    with pytest.raises(ValueError, match=r"permute in scheme\.init puts their channels elsewhere"):
        job(scheme=scheme, loss={"kind": "forward_kl", "hidden": 0.1})
    assert job(scheme=scheme, loss={"kind": "forward_kl"}).objective.hidden == 0
