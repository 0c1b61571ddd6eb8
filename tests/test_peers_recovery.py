"""benchmarks/peers_recovery.py judges as our reports do, sees a model that is not quantized, and names what failed."""

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qat import Rule, Scheme, apply, calibrate
from qat.checkpoints.hf import load_model
from qat.numbers.catalog import lookup
from qat.numbers.numerics import quantize
from qat.trainers.data import Blocks
from qat.trainers.evaluate import Evaluator
from qat.trainers.packing import model_inputs
from tests.tiny import VOCABULARY, tiny_model

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
ROWS, SEQ_LEN = 3, 24


def _script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, FOLDER / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


worker, driver = _script("peer_recovery/worker.py"), _script("peers_recovery.py")


class Held(Blocks):
    """Rows of two documents each, in memory."""

    def array(self) -> Any:
        rows = np.zeros((ROWS, 3, SEQ_LEN), np.int32)
        rows[:, 0] = np.random.default_rng(3).integers(3, VOCABULARY, (ROWS, SEQ_LEN))
        rows[:, 1, :-1] = rows[:, 0, 1:]
        rows[:, 1, [9, -1]] = -100
        rows[:, 2, 10:] = 1
        return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("models") / "teacher", num_hidden_layers=2)


@pytest.fixture(scope="module")
def rows() -> dict[str, Tensor]:
    values = {field.name: None for field in dataclasses.fields(Blocks)} | {"num_rows": ROWS, "seq_len": SEQ_LEN}
    return Held(**values).rows(list(range(ROWS)))  # type: ignore[arg-type]  # only its size is asked for


def test_the_judge_of_peers_is_the_evaluator_of_our_reports(folder: Path, rows: dict[str, Tensor]) -> None:
    teacher, student = load_model(folder, torch.float32).eval(), load_model(folder, torch.float32).eval()
    for module in student.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = quantize(module.weight.data, lookup("int4_g64")).dequantize().bfloat16().float()
    values = {field.name: None for field in dataclasses.fields(Blocks)} | {"num_rows": ROWS, "seq_len": SEQ_LEN}
    held = Held(**values)  # type: ignore[arg-type]  # only its size is asked for
    expected = Evaluator(teacher, held, 2, "cpu", torch.bfloat16).score(student)
    found = worker.judge(student, teacher, rows)
    assert {name: float(v.double().mean()) for name, v in found.items()} == pytest.approx(
        {"kl": expected.kl, "nll": expected.nll, "top1": expected.top1}, rel=1e-6
    )
    assert len(found["kl"]) == expected.tokens and expected.kl > 1e-3


@pytest.mark.parametrize("name", ["int4_g64", "nvfp4", "mxfp4"])
def test_what_is_multiplied_is_counted(folder: Path, rows: dict[str, Tensor], name: str) -> None:
    """Seven products in each of two layers; the head and a model in BF16 do not count."""
    group = lookup(name).group
    inputs = {} if name == "int4_g64" else {"input": name}
    rules = (Rule(match="lm_head", skip="head"), Rule(match="*embed*", skip="16 bits"))
    scheme = Scheme(rules=(*rules, Rule(match="*_proj", weight=name, **inputs)), init=())
    student = apply(load_model(folder), scheme)
    calibrate(student, [model_inputs(rows)], scheme)
    assert worker.products(student.eval(), rows, group) == (14, 14 if inputs else 0)
    assert worker.products(load_model(folder).eval(), rows, group) == (0, 0)


def test_a_row_that_does_not_multiply_its_format_is_no_number() -> None:
    cell = driver.Cell("torchao", "nvfp4", "qad")
    score = {"heldout": {"kl": 0.1, "nll": 3.0, "top1": 0.8, "tokens": 9}}
    result = {"versions": {"torchao": "0.18.0"}, "four_bit_weights": 14, "four_bit_inputs": 13, "scores": score}
    assert "13 with four-bit inputs" in driver.checked(cell, result)["error"]
    assert "error" not in driver.checked(cell, {**result, "four_bit_inputs": 14})
    assert "error" in driver.checked(cell, {**result, "four_bit_weights": 0, "four_bit_inputs": 0})


def test_the_table_begins_with_the_best_and_ends_with_what_failed(tmp_path: Path) -> None:
    def scored(kl: float) -> dict[str, Any]:
        return {
            "scores": {driver.HELDOUT[0]: {"kl": kl, "nll": 3.0, "top1": 0.75, "tokens": 9}},
            "seconds": 12.3,
            "text": "train",
        }

    scheme = [{"weight": "nvfp4", "input": "nvfp4"}, {"weight": "skipped: head", "input": "none"}]
    names = {"bf16": 0.0, "ptq": 0.4, "best_ptq": 0.2}
    report = {
        "scheme": scheme, "eval_hash": "ab", "seconds": 60.0, "tokens": 1024,
        "rows": [{"name": k, "kl": v, "nll": 3.0, "top1": 0.7, "tokens": 9} for k, v in names.items()],
    }  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(report))
    rows = list(driver.ours(tmp_path, {"ab": driver.HELDOUT[0]}))
    rows.append({"tool": "x", "label": "x 1", "format": "nvfp4", "method": "m", "passes": 512, **scored(0.1)})
    rows.append({"tool": "y", "label": "y 2", "format": "nvfp4", "method": "m", "text": "", "error": "needs | a GPU"})
    lines = driver.table(rows, "nvfp4")[4:-1]
    assert [line.split("|")[1].strip() for line in lines] == ["x 1", *[f"ours ({tmp_path.name})"] * 2, "y 2"]
    assert "| 75.0% |" in lines[0] and "| 50.0% |" in lines[1] and "needs / a GPU" in lines[3]
    with pytest.raises(SystemExit, match="other rows"):
        list(driver.ours(tmp_path, {"cd": driver.HELDOUT[0]}))


def test_a_cell_that_was_killed_is_run_again(tmp_path: Path) -> None:
    python = tmp_path / "torchao" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "torchao" / "requirements.txt").write_text("\n".join(driver.REQUIREMENTS["torchao"]))
    python.write_text("#!/bin/sh\necho was here >> ran\nkill -TERM $$\n".replace("ran", str(tmp_path / "ran")))
    python.chmod(0o755)
    arguments = argparse.Namespace(out=tmp_path, environments=tmp_path, threads=1)
    for times in (1, 2):
        texts = driver.Texts(tmp_path / "texts.safetensors", {})
        row = driver.measured(driver.Cell("torchao", "int4_g64", "prepared"), "model", texts, arguments)
        assert row["error"].startswith("exit status -15")
        assert (tmp_path / "ran").read_text().count("was here") == times


def test_every_cell_has_files_of_its_own_and_a_tool_that_is_installed() -> None:
    cells = driver.cells(dict.fromkeys(driver.RECIPES, 1e-4))
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.tool for cell in cells} == driver.REQUIREMENTS.keys()
    assert {cell.format for cell in cells} == driver.RECIPES.keys()
    for tool in driver.REQUIREMENTS:
        assert (FOLDER / "peer_recovery" / f"with_{tool.replace('-', '_')}.py").is_file()


SMOKE = [
    ("auto-round", "int4_g64", "1 x 2", {"iters": 1, "batch_size": 2}),
    ("auto-round", "nvfp4", "1 x 2", {"iters": 1, "batch_size": 2}),
    ("auto-round", "mxfp4", "0 x 2", {"iters": 0, "batch_size": 2}),
    *[("llm-compressor", name, how, {}) for name in driver.RECIPES for how in ("rtn", "gptq")],
    ("llm-compressor", "nvfp4", "smoothquant+gptq", {}),
    ("modelopt", "int4_g64", "awq_lite", {}),
    ("modelopt", "int4_g64", "max+qad", {"lr": 1e-3}),
    ("torchao", "int4_g64", "qad", {"lr": 1e-3}),
    ("torchao", "mxfp4", "qat", {"lr": 1e-3}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("tool", "name", "method", "settings"), SMOKE)
def test_tools_that_are_installed_quantize_a_tiny_model(
    tmp_path: Path, folder: Path, rows: dict[str, Tensor], tool: str, name: str, method: str, settings: dict[str, Any]
) -> None:
    """Every adapter against the tool's real version; what it returns multiplies four bits and is judged."""
    environments = FOLDER.parent / ".versions" / "peers"
    if not (environments / tool / "requirements.txt").is_file():
        pytest.skip(f"{tool} is not installed: python benchmarks/peers_recovery.py installs it")
    tensors = {f"{text}.{k}": rows[k] for text in ("train", "calibration", *driver.HELDOUT) for k in rows}
    texts = driver.Texts(tmp_path / "texts.safetensors", {})
    save_file({key: value.clone() for key, value in tensors.items()}, texts.path)
    arguments = argparse.Namespace(out=tmp_path, environments=environments, threads=1)
    row = driver.measured(driver.Cell(tool, name, method, settings=settings), str(folder), texts, arguments)
    assert "error" not in row, next(tmp_path.glob("*.log")).read_text()[-3000:]
    assert row["four_bit_weights"] == 14
    assert all(0 < row["scores"][text]["kl"] < 1 for text in driver.HELDOUT)
