"""Peak memory is this process's own."""

import subprocess
import sys

import torch

from qat.trainers.memory import peak_bytes

CHILD = "import torch; from qat.trainers.memory import peak_bytes; print(peak_bytes(torch.device('cpu')))"


def test_a_child_does_not_inherit_its_parents_peak() -> None:
    """Linux hands the resident size of a parent on through vfork and exec in ru_maxrss."""
    large = torch.ones(700 * 2**20 // 4)
    mine = peak_bytes(torch.device("cpu"))
    assert mine >= large.nbytes
    child = int(subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True).stdout)
    assert 2**20 < child < mine - large.nbytes // 4
