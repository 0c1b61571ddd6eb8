"""Evaluation against an independent oracle: whole models, all logits, float64, one loop over the tokens."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qat.cli import main
from qat.errors import DataError, TrainingError
from qat.trainers.data import Blocks
from qat.trainers.evaluate import EvalConfig, Evaluator, Scores, gap_closed
from qat.trainers.packing import collate
from qat.training.losses import IGNORE
from tests.tiny import VOCABULARY, tiny_model

ROWS, SEQ_LEN = 5, 12


class Held(Blocks):
    """Rows in memory, with positions that predict nothing, unequally many per row."""

    def array(self) -> Any:
        draw = np.random.default_rng(3)
        rows = np.zeros((ROWS, 3, SEQ_LEN), np.int32)
        rows[:, 0] = draw.integers(3, VOCABULARY, (ROWS, SEQ_LEN))
        rows[:, 1, :-1] = rows[:, 0, 1:]
        for row in range(ROWS):
            rows[row, 1, SEQ_LEN - 2 * row - 1 :] = IGNORE
        return rows


@pytest.fixture(scope="module")
def held() -> Held:
    values = {field.name: None for field in dataclasses.fields(Blocks)} | {"num_rows": ROWS, "seq_len": SEQ_LEN}
    return Held(**values)  # type: ignore[arg-type]  # only its size is asked for


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "student": tiny_model("llama", root / "student", num_hidden_layers=1),
        "teacher": tiny_model("llama", root / "teacher", seed=1, num_hidden_layers=2),
        "padded": tiny_model("llama", root / "padded", seed=1, vocab_size=VOCABULARY + 16, num_hidden_layers=1),
    }


def model(folder: Path) -> Any:
    from qat.checkpoints.hf import load_model

    return load_model(folder).eval()


@torch.no_grad()
def oracle(student: Any, teacher: Any, held: Held) -> dict[str, float]:
    batch = collate(held.array())
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    x, y = (m(**inputs).logits.double() for m in (student, teacher))
    common = min(x.shape[-1], y.shape[-1])
    q, q_common, p = (z.softmax(-1) for z in (x, x[..., :common], y[..., :common]))
    nll = kl = same = count = 0.0
    for row, column in (batch["targets"] != IGNORE).nonzero().tolist():
        nll -= math.log(q[row, column, batch["targets"][row, column]])
        kl += float((p[row, column] * (p[row, column] / q_common[row, column]).log()).sum())
        same += float(p[row, column].argmax() == q_common[row, column].argmax())
        count += 1
    return {"nll": nll / count, "kl": kl / count, "top1": same / count, "tokens": count}


PAIRS = [("student", "teacher"), ("teacher", "student"), ("student", "padded"), ("padded", "student")]


@pytest.mark.parametrize("pair", PAIRS)
def test_scores_are_those_of_the_definition(models: dict[str, Path], held: Held, pair: tuple[str, str]) -> None:
    """Direction of the KL, the tokens that count, the rows compared: batches of 2, 2 and 1 rows."""
    student, teacher = (model(models[name]) for name in pair)
    found = Evaluator(teacher, held, batch=2).score(student)
    expected = oracle(student, teacher, held)
    assert dataclasses.asdict(found) == pytest.approx(expected, rel=1e-4)
    assert oracle(teacher, student, held)["kl"] != pytest.approx(expected["kl"], rel=3e-3)  # the direction shows
    assert 0 < found.tokens < ROWS * (SEQ_LEN - 1)


def test_without_a_teacher_only_the_loss_is_known(models: dict[str, Path], held: Held) -> None:
    student = model(models["student"])
    found = Evaluator(None, held).score(student)
    assert found.nll == pytest.approx(oracle(student, student, held)["nll"], rel=1e-5)
    assert math.isnan(found.kl) and math.isnan(found.top1)


def test_evaluation_leaves_the_model_as_it_was(models: dict[str, Path], held: Held) -> None:
    student = model(models["student"])
    student.train()
    student.model.layers[0].eval()
    Evaluator(None, held).score(student)
    assert student.training and not student.model.layers[0].training


def test_a_model_that_computes_nan_is_named(models: dict[str, Path], held: Held) -> None:
    student = model(models["student"])
    with torch.no_grad():
        student.model.embed_tokens.weight[int(held.array()[0, 0, 3])] = math.nan  # one token of the text
    with pytest.raises(TrainingError, match="computes NaN or infinity"):
        Evaluator(None, held).score(student)
    with torch.no_grad():
        student.model.norm.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="computes NaN or infinity"):
        Evaluator(None, held).score(student)


def test_text_without_a_target_is_named(models: dict[str, Path], held: Held) -> None:
    class Empty(Held):
        def array(self) -> Any:
            rows = super().array()
            rows[:, 1] = IGNORE
            return rows

    empty = Empty(**dataclasses.asdict(held))
    with pytest.raises(DataError, match="no token"):
        Evaluator(None, empty).score(model(models["student"]))


def test_perplexity_has_no_limit() -> None:
    assert Scores(2.0, 0.0, 0.0, 1).ppl == pytest.approx(math.exp(2.0))
    assert Scores(800.0, 0.0, 0.0, 1).ppl == math.inf


def test_what_decides_is_another_text_only_where_it_is_said() -> None:
    default = EvalConfig()
    assert default.choose is not None
    assert (default.choose.source, default.data.source) == ("heldout/choosing", "heldout/reporting")
    assert EvalConfig.model_validate({"tokens": 64}).choose == default.choose
    for old in ({"data": {"source": "heldout"}}, {"data": {"source": "mine.txt"}, "tokens": 64}):
        assert EvalConfig.model_validate(old).choose is None
    assert EvalConfig.model_validate(default.model_dump()) == default
    with pytest.raises(ValueError, match="hold the same documents"):
        EvalConfig.model_validate({"data": {"source": "heldout"}, "choose": {"source": "heldout/choosing"}})


def test_gap_closed_is_a_share_of_the_way_down() -> None:
    assert gap_closed(reference=1.0, before=3.0, after=2.5) == pytest.approx(0.25)
    assert gap_closed(reference=1.0, before=3.0, after=4.0) == pytest.approx(-0.5)
    assert math.isnan(gap_closed(reference=1.0, before=1.0, after=2.0))


def test_eval_of_a_model_agrees_with_the_oracle(models: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and then the dog jumps over the fox. " * 60)
    command = ["eval", str(models["student"]), "--text", str(text), "--tokens", "512", "--json"]
    assert main([*command, "--teacher", str(models["teacher"])]) == 0
    teacher, student = json.loads(capsys.readouterr().out)["rows"]
    assert abs(teacher["kl"]) < 1e-6 and teacher["top1"] == 1.0
    assert main([*command, "--teacher", str(models["student"])]) == 0
    itself = json.loads(capsys.readouterr().out)["rows"][-1]
    assert abs(itself["kl"]) < 1e-6 and itself["nll"] == student["nll"] and student["kl"] > 0.01
