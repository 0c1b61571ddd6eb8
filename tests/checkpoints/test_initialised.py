"""Blocks on disk: whole or absent whatever kills the process; a run that takes them up ends as if uninterrupted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qat.checkpoints.initialised import Initialised
from qat.trainers.claim import how_to_go_on
from qat.trainers.job import load_job
from qat.trainers.run import train
from tests.tiny import tiny_model
from tests.trainers.jobs import curve, write

INIT = [{"kind": "gptq", "sequential": True}, {"kind": "reconstruct", "steps": 2}]
KILLED = """
import os, signal, sys
from pathlib import Path
from qat.checkpoints.initialised import Initialised
from qat.trainers.job import load_job
from qat.trainers.run import train
plain, count = Initialised.write, 0

def write(self, *given):
    global count
    plain(self, *given)
    count += 1
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Initialised.write = write
train(load_job(Path(sys.argv[1])))
"""


def test_a_block_is_read_with_its_key_only(tmp_path: Path) -> None:
    store, tensors = (
        Initialised(tmp_path),
        {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(2, dtype=torch.int8)},
    )
    assert store.read("model.layers.0", "k") is None and len(store) == 0
    store.write("model.layers.0", "k", tensors, [{"rows": 3}])
    found = store.read("model.layers.0", "k")
    assert found is not None and found[1] == [{"rows": 3}]
    assert found[0].keys() == tensors.keys() and all(torch.equal(found[0][n], t) for n, t in tensors.items())
    assert store.read("model.layers.0", "other") is None and store.read("model.layers.1", "k") is None
    store.write("model.layers.0", "other", tensors, [])
    assert store.read("model.layers.0", "k") is None and len(store) == 1
    Initialised(tmp_path, writes=False).write("model.layers.1", "k", tensors, [])
    Initialised(tmp_path, writes=False).clear()
    assert len(store) == 1
    store.clear()
    assert len(store) == 0 and not store.folder.exists()


def test_a_run_that_is_killed_in_its_initialisation_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model", num_hidden_layers=4)
    scheme = {
        "rules": [{"match": "*_proj", "weight": "nvfp4", "input": "nvfp4"}, {"match": "*", "skip": "rest"}],
        "init": INIT,
    }
    settings = {"scheme": scheme, "steps": 2, "calibration_rows": 4}
    jobs = {name: load_job(write(tmp_path, model, name=name, **settings)) for name in ("whole", "cut")}
    train(jobs["whole"], table=False)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cut.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    run = jobs["cut"].folder
    assert len(Initialised(run)) == 2
    assert how_to_go_on(run) == "start it again: what its initialisation has finished is kept (2 parts)"
    before = {p: p.stat().st_mtime_ns for p in Initialised(run).folder.rglob("*.safetensors")}
    kept = []
    plain = Initialised.clear

    def clear(self: Initialised) -> None:
        kept.extend(p for p, when in before.items() if p.exists() and p.stat().st_mtime_ns == when)
        plain(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Initialised, "clear", clear)
        train(jobs["cut"], table=False)
    assert len(kept) == 2, "finished blocks are not written again"
    assert curve(jobs["cut"]) == curve(jobs["whole"])
    students = [load_file(job.folder / "checkpoints" / "best" / "student.safetensors") for job in jobs.values()]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0] | students[1])
    assert not Initialised(run).folder.exists()
