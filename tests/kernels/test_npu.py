"""The kernels for Ascend NPUs, interpreted in a process of their own, and that they are offered honestly."""

import inspect

import pytest
import torch

from qat.kernels import npu
from qat.kernels.explain import for_npus
from qat.kernels.load import KERNELS, load
from tests.kernels.processes import in_a_process

pytest.importorskip("triton")


def test_the_interpreted_kernels_are_the_reference() -> None:
    printed = in_a_process("interpret_ascend.py", TRITON_INTERPRET="1")
    assert {"int4_g64", "int4_channel", "int8_channel", "mxfp4", "nvfp4"} <= set(printed.split())


def test_kernels_take_what_their_operators_give() -> None:
    from qat.kernels.packed_linear import ascend as linear
    from qat.kernels.quantize_input import ascend as quantizer

    for kernel, name in ((linear, "packed_linear"), (quantizer, "quantize_input")):
        schema = getattr(torch.ops.qat, name).default._schema
        assert list(inspect.signature(getattr(kernel, name)).parameters) == [given.name for given in schema.arguments]


def test_without_an_npu_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "npu" not in load(["quantize_input"])
    assert "frontend-checked only, no NPU has run them (they need an Ascend NPU" in for_npus()
    assert [name for name, files in KERNELS.items() if "npu" in files] == ["packed_linear", "quantize_input"]
    monkeypatch.setattr(npu, "find_spec", lambda name: object())
    assert npu.npu_problem() == "no Ascend NPU"
    monkeypatch.setattr(npu, "_present", lambda: True)
    assert npu.npu_problem() is None
    monkeypatch.setenv("QAT_KERNELS", "0")
    assert npu.npu_problem() == "QAT_KERNELS=0"
