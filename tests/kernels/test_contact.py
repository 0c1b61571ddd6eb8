"""The checks of first contact with a device: on a GPU, where no kernel may fail one, and on the CPU, where references
(and C kernels) must pass all, a broken operator is found, and no operator goes unchecked."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.kernels.load import KERNELS
from qat.training.rows import KINDS
from tests.kernels.contact import SMALL, TINY, Check, checks
from tests.kernels.processes import ROOT

pytest.importorskip("triton")
CHECKS = list(checks("cpu", TINY))


def named(check: Check) -> str:
    return check.name


def test_every_operator_is_checked() -> None:
    assert {check.name.split(" ")[0] for check in CHECKS} == KERNELS.keys()
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_references_pass_every_check() -> None:
    failed = {check.name: found for check in CHECKS for good, found in [check.holds()] if not good}
    assert not failed


@pytest.mark.parametrize("operator", sorted(KERNELS))
def test_a_broken_operator_is_found(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte of 63 is wrong; where the CPU's own operator is the truth, in the first of its two calls only."""
    packet = getattr(torch.ops.qat, operator)
    whole = packet.default if operator == "packed_linear" else packet
    calls: list[None] = []

    def broken(*arguments: Any) -> Any:
        result = whole(*arguments)
        calls.append(None)
        first = result if isinstance(result, torch.Tensor) else result[0]
        if operator == "distill_rows":
            first = arguments[0]  # the gradient is written in its place
        if len(calls) % 2 or operator not in ("quantize_input", "rms_norm_quantize", "silu_mul_quantize"):
            first.view(-1).view(torch.uint8)[::63] ^= 0x55
        return result

    if operator == "packed_linear":
        monkeypatch.setattr("qat.serving.packed._OPERATOR", broken)
    else:
        monkeypatch.setattr(torch.ops.qat, operator, broken)
    own = [check for check in CHECKS if check.name.split(" ")[0] == operator and "in chunks" not in check.name]
    assert [check.name for check in own[:6] if check.holds()[0]] == []


def few() -> list[Check]:
    """One format of each kind: what is left has its own time in benchmarks/contact.py."""
    kinds = {"int4_g128", "int4_g64_asym", "int8_channel", "nvfp4", "mxfp4", "fp8_b128", "nf4_g64", "int8_tensor",
             "int8_token", "fp8_token", "fp8_tensor", "fp8_g128", *KINDS, "in"}  # fmt: skip
    return [check for check in checks("cuda", SMALL) if check.name.split(" ")[1] in kinds]


def test_a_gpu_has_a_test_of_every_operator() -> None:
    assert {check.name.split(" ")[0] for check in few()} == KERNELS.keys() and len(few()) < 330


@pytest.mark.gpu
@pytest.mark.parametrize("check", few(), ids=named)
def test_on_a_gpu(check: Check) -> None:
    from qat.kernels.load import load

    assert "cuda" in load()
    good, found = check.holds()
    assert good, f"{found} (at most {check.limit})"


HIDE = """
import sys
from importlib.machinery import PathFinder

class Hidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = ("gguf", "datasets", "wandb", "deepspeed", "compressed_tensors", "openai", "ml_dtypes")
        return None if name.split(".")[0] in absent else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Hidden if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.mark.slow
def test_gpu_tests_are_found_without_optional_packages(tmp_path: Path) -> None:
    """A GPU machine that was lent bare has neither gguf nor compressed-tensors: their absence hid every test."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--collect-only",
        "-m",
        "gpu",
        "tests/kernels",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {line.split(" ")[0] for line in done.stdout.split("test_on_a_gpu[")[1:]} >= KERNELS.keys()
