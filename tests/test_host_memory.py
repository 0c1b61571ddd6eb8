"""A model is in the host's memory once while it is loaded, quantized and exported: what benchmarks/host_memory.py
measures of a small model with a large matrix (an output layer of 33 M weights beside 3 M of a layer)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "host_memory.py"
SLACK = 48e6  # the rounding of a part of a matrix takes 40 MB; the rest is the allocator's


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_one_model_and_one_matrix_at_a_time() -> None:
    sizes = ["--layers", "1", "--hidden", "512", "--ffn", "512", "--vocabulary", "65536", "--json"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, SCRIPT, *sizes], env=settings, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)["1"]
    model, largest = found["model"]["own"], found["largest matrix"]["own"]
    assert largest == 4 * 512 * 65536
    wide, narrow = found["load as float32"], found["load as BF16"]
    assert wide["own"] == pytest.approx(model, abs=SLACK)
    assert wide["mapped"] <= model / 2 + SLACK and wide["mapped after"] <= SLACK
    assert narrow["own"] <= SLACK and narrow["mapped"] == pytest.approx(model / 2, abs=SLACK)
    scales = 3 * model / 16  # where they start, and two corrections that are learned
    assert found["quantize (nvfp4, Dual-LSQ)"]["own"] <= scales + 1.25 * largest + SLACK
    assert found["export"]["own"] <= 1.25 * largest + SLACK
