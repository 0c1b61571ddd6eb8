"""A divided model is initialised as a whole one: two processes against one, tensor by tensor, and what they hold."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qat.errors import ConfigError
from qat.init.together import Together
from tests.qat.init.divided import BATCHES, BLOCKS, CASES, MORE, STOPPED, held, initialised, made

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT = 300
SAME = 0.999  # of the numbers, where sums over text have another order, which decides ties another way
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divided")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = ("2", str(folder / "store"), str(folder))
    command = [sys.executable, "-m", "tests.qat.init.divided"]
    processes = [
        subprocess.Popen([*command, rank, *arguments], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:
            process.terminate()
    assert [process.returncode for process in processes] == [0, 0], said
    return folder


def told(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"told-{rank}.json").read_text())
    return found


@pytest.mark.multi
@pytest.mark.parametrize("case", CASES)
def test_two_processes_initialise_what_one_does(case: str, folder: Path) -> None:
    kind, scheme = CASES[case]
    expected, said, _ = initialised(made(kind, scheme), scheme, text=MORE if case == "more" else BATCHES)
    start = made(kind, scheme).state_dict()
    first, second = (load_file(folder / f"{case}-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() == expected.keys()
    assert any(not torch.equal(start[name], expected[name]) for name in expected)
    assert [name for name in first if not torch.equal(first[name], second[name])] == [], "all ranks have one model"
    if case == "more":
        near = [torch.isclose(first[name].float(), expected[name].float(), **CLOSE) for name in expected]
        assert sum(int(each.sum()) for each in near) >= SAME * sum(each.numel() for each in near)
    else:
        assert [name for name in first if not torch.equal(first[name], expected[name])] == []
    assert told(folder)[case]["said"] == said


@pytest.mark.multi
@pytest.mark.parametrize("case", CASES)
def test_a_process_holds_its_share_and_one_block(case: str, folder: Path) -> None:
    kind, scheme = CASES[case]
    model: Any = made(kind, scheme)
    sizes = [sum(t.nbytes for t in (*block.parameters(), *block.buffers())) for block in model.model.layers]
    everything = held(model)
    outside = everything - sum(sizes)
    for rank in (0, 1):
        found = told(folder, rank)[case]
        assert found["share"] <= 0.51 * everything
        assert found["share"] < found["most"] <= found["share"] + max(*sizes, outside if case == "head" else 0)


@pytest.mark.multi
def test_a_walk_that_ended_goes_on_in_every_process(folder: Path) -> None:
    blocks = [f"model.layers.{number}" for number in range(BLOCKS)]
    for rank in (0, 1):
        found = told(folder, rank)
        assert found["attempt 0"]["seen"] == blocks[:STOPPED] and found["attempt 0"]["kept"] == STOPPED
        assert found["attempt 1"]["seen"] == blocks[STOPPED:]
        assert found["attempt 1"]["said"] == found["walk"]["said"]
        whole, resumed = (load_file(folder / f"{name}-{rank}.safetensors") for name in ("walk", "resumed"))
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_one_process_shares_with_nobody() -> None:
    together = Together(nn.Linear(2, 2))
    assert (together.rank, together.size) == (0, 1)
    assert together.rows([1, 2, 3]) == [1, 2, 3] and together.gather("a") == ["a"] and together.owns(5)
    together.rank, together.size = 1, 2
    assert together.rows([1, 2, 3, 4]) == [2, 4] and not together.owns(0) and together.owns(3)
    with pytest.raises(ConfigError, match="3 batches of calibration text cannot be divided among 2 processes"):
        together.rows([1, 2, 3])
