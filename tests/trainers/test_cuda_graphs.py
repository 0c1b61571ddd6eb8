"""Recorded passes give the losses and gradients of passes that are run, whatever a step is made of.

A CPU has no CUDA graphs: there, what stands for one computes the recorded pass again, from the recorded batch's memory
into the recorded gradients', as a graph does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qat.trainers import cuda_graphs
from qat.trainers.cuda_graphs import LENGTHS, Passes, Record, padded
from qat.trainers.forward import Head
from qat.trainers.job import load_job
from qat.trainers.run import train
from qat.training.losses import IGNORE, chunked
from qat.training.objectives import CrossEntropy, ForwardKL, JensenShannon, ReverseKL, TopKL
from tests.tiny import tiny_model
from tests.trainers.jobs import metrics, write


def again(model: nn.Module) -> Record:
    """What stands for a graph: bound to the gradients that it was recorded with, which making it does not touch."""

    def record(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        bound = {parameter: parameter.grad for parameter in model.parameters()}
        result = torch.zeros(())

        def replay() -> None:
            outside = {parameter: parameter.grad for parameter in bound}
            for parameter, gradient in bound.items():
                parameter.grad = gradient
            result.copy_(work())
            for parameter, gradient in outside.items():
                parameter.grad = gradient

        return replay, result

    return record


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("graphs") / "model")


# --- places without a token -----------------------------------------------------------------------


@pytest.mark.parametrize("loss", [ForwardKL(), ReverseKL(), JensenShannon(), CrossEntropy(), TopKL(k=3)])
def test_a_place_without_a_token_costs_and_teaches_nothing(loss: Any) -> None:
    torch.manual_seed(0)
    hidden, other = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    targets = torch.randint(0, 11, (2, 6)).masked_fill(torch.rand(2, 6) < 0.4, IGNORE)
    own, teacher = nn.Linear(8, 11, bias=False), nn.Linear(8, 11, bias=False)
    found = []
    kept = (targets.flatten() != IGNORE).nonzero().squeeze(1)
    for places, gaps in ((kept, False), (torch.cat((kept, kept.new_full((5,), -1))), True)):
        states, own.weight.grad = hidden.clone().requires_grad_(), None
        total = chunked(loss, states, Head(own), other, Head(teacher), targets, 4, None, places, gaps)
        total.backward()
        assert states.grad is not None and own.weight.grad is not None
        found.append((total, states.grad, own.weight.grad))
    for plain, gapped in zip(*found, strict=True):
        torch.testing.assert_close(gapped, plain, rtol=1e-6, atol=1e-7)


def test_places_come_in_few_lengths_and_keep_those_that_count() -> None:
    lengths = set()
    for count in range(41):
        kept = torch.arange(count)
        places = padded({"kept": kept, "targets": torch.zeros(4, 10, dtype=torch.long)})["places"]
        assert torch.equal(places[:count], kept) and bool((places[count:] == -1).all())
        lengths.add(len(places))
    assert len(lengths) <= LENGTHS and max(lengths) == 40


# --- passes ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers, one of which no loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.idle = nn.Linear(3, 1), nn.Linear(3, 1)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.read(batch["input_ids"].float()).square().sum()


def test_gradients_add_up_over_a_steps_passes_recorded_or_not() -> None:
    torch.manual_seed(0)
    net = Net()
    passes = Passes(net.loss, net, lambda _: None, again(net))
    batches = [{"input_ids": torch.randint(0, 9, (rows, 3))} for rows in (2, 2, 4, 2, 4, 4)]
    for step, eager in ((batches[:1], None), (batches, 3), (batches[2:], 0)):
        net.zero_grad()
        expected = [torch.zeros_like(p) for p in net.read.parameters()]
        for batch in step:
            for total, gradient in zip(
                expected, torch.autograd.grad(net.loss(batch), net.read.parameters()), strict=True
            ):
                total += gradient
        for index, batch in enumerate(step):
            if index == eager:  # one that is run as it is
                net.loss(batch).backward()
                continue
            loss = passes(batch, index == 0)
            if index == 0:
                net.zero_grad()  # as Lightning does, between the two halves of a pass
            passes.give()
            assert loss is not None and torch.equal(loss, net.loss(batch).detach())
        for parameter, total in zip(net.read.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, total)
        assert net.idle.weight.grad is None  # an optimizer would decay what has a gradient of zero
    assert len(passes.sentences) == 1


def test_a_parameter_that_moved_is_not_read_where_it_was() -> None:
    net = Net()
    batch = {"input_ids": torch.ones(1, 3)}
    held: list[Tensor] = []

    def bound(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """As a graph is: to the memory of the weight."""
        weight, (replay, result) = net.read.weight.data, again(net)(work)
        held.append(weight)

        def from_there() -> None:
            now, net.read.weight.data = net.read.weight.data, weight
            replay()
            net.read.weight.data = now

        return from_there, result

    passes = Passes(net.loss, net, lambda _: None, bound)
    passes(batch, True)
    net.read.weight.data = net.read.weight.data + 1
    loss = passes(batch, True)
    assert len(held) == 2 and loss is not None
    torch.testing.assert_close(loss, net.loss(batch).detach())


def test_what_cannot_be_recorded_is_run_and_named() -> None:
    net, said = Net(), list[str]()

    def refused(work: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    passes = Passes(net.loss, net, said.append, refused)
    net.loss({"input_ids": torch.ones(1, 3)}).backward()
    before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    assert passes({"input_ids": torch.ones(2, 3)}, False) is None
    assert passes({"input_ids": torch.ones(2, 3)}, True) is None
    for parameter, gradient in zip(net.parameters(), before, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert said == ["no CUDA graphs: RuntimeError: operation not permitted when stream is capturing"]


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_graph_that_computes_something_else_is_not_used(share: float) -> None:
    net, said = Net(), list[str]()

    def other(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        return again(net)(lambda: work() * share)

    assert Passes(net.loss, net, said.append, other)({"input_ids": torch.ones(2, 3)}, True) is None
    assert "a replayed pass gives" in said[0] and all(p.grad is None for p in net.parameters())


# --- runs -----------------------------------------------------------------------------------------

STEP = {"steps": 4, "rows": 4, "micro_rows": 2}


def test_a_run_of_recorded_passes_has_the_losses_of_one_that_is_run(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for name in ("run", "recorded"):
        if name == "recorded":
            monkeypatch.setattr(
                "qat.trainers.module.passes", lambda own: Passes(own.share, own.student, own.say, again(own.student))
            )
        job = load_job(write(tmp_path, model, name=name, **STEP))
        report = train(job, table=False)
        losses.append([(float(row["loss"]), float(row["grad_norm"])) for row in metrics(job)])
        assert bool(report["graphs"]) == (name == "recorded")
    assert len(losses[0]) == STEP["steps"]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({}, "this run is on cpu"), ({"cuda_graphs": False}, "")],
)
def test_who_asks_for_graphs_is_told_why_there_are_none(
    changes: dict[str, Any], reason: str, tmp_path: Path, model: Path
) -> None:
    job = load_job(write(tmp_path, model, **{"cuda_graphs": True, **changes}))
    said = list[str]()

    class Module:
        student, teacher, taught, device, say = None, None, None, torch.device("cpu"), said.append

    Module.job = job  # type: ignore[attr-defined] # of a module that trains
    assert cuda_graphs.passes(Module) is None  # type: ignore[arg-type]  # what of it is read
    assert said == ([f"no CUDA graphs: they need a CUDA device, and {reason}"] if reason else [])


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", {}, None),
        ("mixtral", {}, "which experts its tokens choose"),
        ("llama", {"attention_dropout": 0.1}, "has dropout"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "longest sequence"),
        ("llama", {"_attn_implementation": "flash_attention_2"}, "counts the documents"),
    ],
)
def test_models_that_ask_the_device_on_the_way_are_named(
    kind: str, changes: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    told = {name: changes.pop(name) for name in list(changes) if name.startswith("_")}
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind, tmp_path / "model", **changes))
    for name, value in told.items():
        setattr(model.config, name, value)
    found = cuda_graphs._waits(model)
    assert (found is None) == (reason is None) and (reason is None or reason in str(found))


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"rows": 6}, {"lora": {"rank": 2}}], ids=["whole", "accumulated", "adapters"])
def test_on_a_gpu_graphs_have_the_losses_of_passes_that_are_run(
    changes: dict[str, Any], tmp_path: Path, model: Path
) -> None:
    losses = []
    for graphs in (False, True):
        job = load_job(write(tmp_path, model, name=f"graphs-{graphs}", cuda_graphs=graphs, **{**STEP, **changes}))
        report = train(job, table=False)
        losses.append([(float(row["loss"]), float(row["grad_norm"])) for row in metrics(job)])
        assert any("one launch" in sentence for sentence in report["graphs"]) == graphs
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-6)
