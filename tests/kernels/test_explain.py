"""What runs, and why, as `qat kernels` says it."""

import pytest
import torch

from qat.errors import FormatError
from qat.kernels.explain import explain, explain_all, explain_training
from qat.kernels.fake_quantize.choose import problem as training_problem
from qat.kernels.load import cpu_problem
from qat.kernels.packed_linear.cpu import FEW
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.scale import F32
from qat.serving.matmul import problem

WIDE = lookup("int8_channel"), lookup("int8_token")
WEIGHTS = [name for name, fmt in CATALOG.items() if problem(WIDE[1], fmt) is None]


def test_explain_names_the_pair() -> None:
    told = explain("int4_g128", 16, 4096, 4096, input_format="int8_token")
    assert told["operator"] == "qat::quantized_matmul" and told["input"] == "int8_token"
    here = "triton" if torch.cuda.is_available() else "c" if cpu_problem() is None else "reference"
    assert told["kernel"] == here and ("no product of codes here" in told["why"] or here == "triton")
    refused = explain("nf4_g64", 16, 4096, 4096, input_format="int8_token")
    assert refused["kernel"] == "none" and "table" in refused["why"]
    told_of = {row["format"] for row in explain_all(16, 4096, 4096, "int8_token") if row["kernel"] != "none"}
    assert told_of == {name for name in WEIGHTS if lookup(name).scale is not F32}


@pytest.mark.skipif(cpu_problem() is not None, reason=str(cpu_problem()))
def test_what_runs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.kernels.packed_linear.cpu._avx2_library", lambda: object())
    assert "9 tokens: codes are looked up by AVX2" in explain("int4_g64", 9, 64, 64)["why"]
    monkeypatch.setattr("qat.kernels.packed_linear.cpu._avx2_library", lambda: None)
    for tokens, roads, told in (
        (1, 3, "1 token: codes"),
        (2, 3, "by AMX"),
        (9, 1, "AVX-512 BF16"),
        (FEW + 1, 0, "slices"),
    ):
        monkeypatch.setattr("qat.kernels.packed_linear.cpu._bf16_library", lambda roads=roads: (None, roads))
        found = explain("int4_g64", tokens, 64, 64)
        assert found["kernel"] == "c" and told in found["why"]
    monkeypatch.setattr("qat.kernels.explain.cpu_problem", lambda: "no C compiler found")
    told = explain("int4_g64", 1, 64, 64)
    assert told["kernel"] == "reference" and "slower than BF16: no C compiler" in told["why"]


def test_only_two_element_types_minima_and_columns_keep_the_reference() -> None:
    refused = {name for name, fmt in CATALOG.items() if training_problem(fmt)}
    assert refused == {"int8_column", "q4_0", "q5_0", "q4_k", "q5_k", "q6_k", "if4"}
    told = explain_training("if4")["qat::fake_quantize"]
    assert told == {"kernel": "reference", "why": "its element type is chosen per block"}
    assert "static" in explain_training("fp8_tensor")["qat::fake_quantize_input"]["why"]
    with pytest.raises(FormatError, match="nearest: nvfp4"):
        explain_training("nvpf4")
