"""What training changed, counted in another way; which half of a gap is left, against models without the other."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qat.checkpoints.hf import load_model
from qat.init.calibration import calibrate
from qat.sites import weights
from qat.surgery import apply
from qat.trainers import why
from qat.trainers.data import Blocks
from qat.trainers.evaluate import Evaluator
from tests.qat.test_surgery import usual
from tests.tiny import tiny_model
from tests.trainers.reports import build
from tests.trainers.test_evaluate import Held


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def held() -> Held:
    values = {field.name: None for field in dataclasses.fields(Blocks)} | {"num_rows": 5, "seq_len": 12}
    return Held(**values)  # type: ignore[arg-type]  # only its size is asked for


def quantized(folder: Path, held: Held, weight: str, input: str | None = None) -> Any:
    scheme = usual(weight, input)
    model = apply(load_model(folder).float(), scheme)
    calibrate(model, [{"input_ids": held.rows(range(5))["input_ids"]}], scheme)
    return model.eval()


# --- codes and scales -----------------------------------------------------------------------------


def test_nothing_moved_before_training(tmp_path: Path, folder: Path, held: Held) -> None:
    model = quantized(folder, held, "nvfp4")
    assert why.moved(tmp_path, model) is None
    why.keep_start(tmp_path, model)
    found = why.moved(tmp_path, model)
    assert found is not None and found["flipped"] == 0 and found["drift"] == {"median": 0.0, "p95": 0.0}
    assert found["codes"] == sum(site.weight.numel() for site in weights(model).values())


def test_flips_are_those_of_the_sites_and_scales_move_in_octaves(tmp_path: Path, folder: Path, held: Held) -> None:
    model = quantized(folder, held, "int4_g64")
    why.keep_start(tmp_path, model)
    before = copy.deepcopy(model)
    paths = list(weights(model))
    with torch.no_grad():
        weights(model)[paths[0]].weight[:3].neg_()
        for path in paths[1:]:
            weights(model)[path].quantizer.log_scale += math.log(2.0)  # the divisor stays: no code changes by it
    found = why.moved(tmp_path, model)
    assert found is not None
    old, new = (weights(m)[paths[0]].value() for m in (before, model))
    assert found["sites"][paths[0]] == int((old != new).sum()) / old.numel() > 0.0
    assert all(found["sites"][path] == 0 for path in paths[1:])
    assert found["flipped"] == pytest.approx(int((old != new).sum()) / found["codes"])
    assert found["drift"] == {"median": 1.0, "p95": 1.0}


# --- which half of the gap ------------------------------------------------------------------------


def test_each_half_is_the_model_without_the_other(folder: Path, held: Held) -> None:
    evaluator = Evaluator(load_model(folder), held)
    model = quantized(folder, held, "nvfp4", "nvfp4")
    both = evaluator.score(model).kl
    found = why.gap(evaluator, model, both)
    alone = evaluator.score(quantized(folder, held, "nvfp4")).kl
    assert found["both"] == both and found["weights"] == pytest.approx(alone, rel=1e-4)
    assert abs(found["neither"]) < 1e-6  # an untrained student is its teacher
    assert 0 < found["inputs"] < both and found["inputs"] != pytest.approx(alone, rel=1e-3)
    assert evaluator.score(model).kl == both  # and every mode is back


def test_without_quantized_inputs_half_is_known_already(folder: Path, held: Held) -> None:
    evaluator = Evaluator(load_model(folder), held)
    model = quantized(folder, held, "int4_g64")
    found = why.gap(evaluator, model, 0.25)
    assert found["both"] == found["weights"] == 0.25 and found["inputs"] == found["neither"] < 1e-6


# --- whether the texts agree ----------------------------------------------------------------------


def history(loss: Any, kl: dict[int, float]) -> dict[str, Any]:
    step = np.arange(1.0, len(loss) + 1)
    return {"step": step, "loss": np.asarray(loss), "heldout_kl": np.array([kl.get(int(s), math.nan) for s in step])}


FALLING = 0.3 - 0.001 * np.arange(100) + 0.01 * np.random.default_rng(0).normal(size=100)


def test_a_text_is_unlike_where_its_loss_falls_and_the_other_rises() -> None:
    assert why.disagreement({}, 0.2) is None
    found = why.disagreement(history(FALLING, {20: 0.17, 60: 0.18, 100: 0.2}), 0.2)
    assert found is not None and (found["best_step"], found["last_step"], found["kl"]) == (20, 100, [0.17, 0.2])
    assert found["loss"][0] == pytest.approx(FALLING[14:24].mean()) and found["loss"][1] < found["loss"][0]
    assert why.warnings_of({"disagreement": found})[0].startswith("From step 20 to 100 the training loss fell (0.28")
    start = why.disagreement(history(FALLING, {50: 0.3, 100: 0.4}), 0.2)
    assert start is not None and start["best_step"] == 0


@pytest.mark.parametrize(
    ("loss", "kl"),
    [
        (FALLING, {50: 0.18, 100: 0.17}),  # both fall
        (FALLING, {50: 0.17, 100: 0.172}),  # a rise that says nothing
        (FALLING[::-1], {50: 0.17, 100: 0.2}),  # both rise: the rate is too high
        (np.tile([0.2, 0.3], 50), {50: 0.17, 100: 0.2}),  # noise
    ],
)
def test_no_warning_where_they_agree_or_nothing_is_clear(loss: Any, kl: dict[int, float]) -> None:
    assert why.disagreement(history(loss, kl), 0.25) is None


def test_adapters_that_moved_nothing_are_warned_of() -> None:
    few, more = ({"moved": {"flipped": share}, "lora": True} for share in (5e-4, 5e-3))
    assert why.warnings_of(few)[0].startswith("Only 0.050% of the codes differ")
    assert not why.warnings_of(more) and not why.warnings_of({**few, "lora": False})


def test_the_page_says_which_half_costs_what() -> None:
    moved = {"codes": 1000, "flipped": 0.02, "sites": {"a": 0.01, "b": 0.03}, "drift": {"median": 0.0, "p95": 1.0}}
    gap = {"both": 0.172, "weights": 0.073, "inputs": 0.169, "neither": 0.076}
    text = "\n".join(why.lines({"moved": moved, "gap": gap, "disagreement": None}))
    assert "2.00% of 1,000 codes" in text and "1.00% in `a`, 3.00% in `b`" in text
    assert "1.0000 (median) and 2.0000 (95th" in text
    assert "inputs' rounding costs +0.0990, the weights' +0.0030" in text and "0.0760 away" in text
    assert why.lines({}) == [] and "not known" in "\n".join(why.lines({"moved": None, "gap": gap}))
    assert build().to_dict()["why"] == {}
