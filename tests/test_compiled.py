"""benchmarks/compiled.py: what compiled kernels cost is no worse than what is kept for this compiler, and the model
that makes times of it misses what was measured by no more than is told."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
KEPT: dict[str, dict[str, Any]] = json.loads((FOLDER / "results" / "compiled.json").read_text(encoding="utf-8"))
OLDEST = min(KEPT)  # what the measured kernels were compiled by


@pytest.fixture(scope="module")
def machine() -> ModuleType:
    spec = importlib.util.spec_from_file_location("machine", FOLDER / "machine.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["machine"] = module
    spec.loader.exec_module(module)
    return module


def checked(only: str) -> None:
    """By the script itself: Triton compiles in a process of its own."""
    command = [sys.executable, str(FOLDER / "compiled.py"), "--check", "--only", only]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if "nothing is kept for" in process.stderr:
        pytest.skip(process.stderr.strip().splitlines()[-1])
    assert process.returncode == 0 and "no worse" in process.stdout, process.stdout + process.stderr


@pytest.mark.parametrize("only", ["nvfp4 8192x8192 M=16", "fake_quantize nvfp4", "cached_attention int4_token"])
def test_compiled_kernels_are_no_worse(only: str) -> None:
    checked(only)


@pytest.mark.slow
def test_no_compiled_kernel_is_worse() -> None:
    checked("")


def test_predictions_come_near_what_was_measured(machine: ModuleType) -> None:
    times = machine.measured(FOLDER / "results" / "h200-times.jsonl")
    kernels = [machine.Compiled(**each) for each in KEPT[OLDEST].values()]
    found = machine.errors(kernels, machine.H200, times)
    packed = [error for name, error in found.items() if name.startswith("packed_linear")]
    assert len(packed) == 6 and machine.spread(packed) < 0.08 and max(map(abs, packed)) < 0.12
    others = [error for name, error in found.items() if name not in packed]
    assert len(others) > 2 and max(map(abs, others)) < 0.25


def test_what_a_prediction_follows(machine: ModuleType) -> None:
    """By hand: 1,320 blocks of four warps on 132 processors, two at a time, that issue or move or multiply."""
    plain = replace(machine.H200, start=1.0, again=0.5, hidden=2.0, sharpness=50.0, clock=1.0, bandwidth=4.0)
    kernel = machine.Compiled("", 1320, 4, 1000.0, 1.0, "value", 40, 0, 100 * 1024, 0, 0.0)
    assert kernel.resident == 2 and kernel.held(plain) == 2
    # 1,320 x 4 x 1,000 instructions over 132 x 4 schedulers: 10,000 cycles at 1 GHz, half of which two warps fill.
    assert machine.predicted(kernel, plain) == pytest.approx(1.0 + 20.0)
    assert machine.predicted(replace(kernel, launches=3), plain) == pytest.approx(2.0 + 20.0)
    assert machine.predicted(replace(kernel, bytes=400e6), plain) == pytest.approx(1.0 + 100.0)
    assert machine.floor(replace(kernel, bytes=400e6), plain) == pytest.approx(100.0)
    assert machine.predicted(replace(kernel, operations=98.9e9), plain) == pytest.approx(1.0 + 100.0)
    assert replace(kernel, shared=0).resident == 12 and replace(kernel, shared=0, registers=20).resident == 16
    assert replace(kernel, blocks=100).held(plain) == 1


def test_a_fit_finds_what_times_were_made_with(machine: ModuleType) -> None:
    kernels = [
        machine.Compiled(f"{blocks} {moved}", blocks, 4, 2000.0, 1.0, "value", 64, 0, 40960, 0, moved * 1e6, launches=n)
        for blocks, moved, n in ((132, 5.0, 1), (264, 40.0, 2), (528, 2.0, 1), (660, 60.0, 1), (2000, 20.0, 2))
    ]
    true = replace(machine.H200, start=2.0, again=1.0, hidden=6.0, sharpness=3.0)
    times = {each.what: machine.predicted(each, true) for each in kernels}
    found = machine.fit(kernels, machine.H200, times)
    assert machine.spread(machine.errors(kernels, found, times).values()) < 0.01
    assert found.start == pytest.approx(2.0, rel=0.2) and found.hidden == pytest.approx(6.0, rel=0.2)
