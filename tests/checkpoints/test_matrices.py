"""Matrices are coded part by part, with the bytes that coding them whole would give."""

from pathlib import Path

import pytest

from qat.checkpoints import matrices
from qat.sites import weights
from tests.checkpoints.exports import Pair, pair_rules, quantized, quiet_export
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("kind", "pair"),
    [
        ("llama", ("nvfp4", None)),
        ("llama", ("fp8_tensor", "fp8_tensor")),
        ("llama", ("fp8_b128", "fp8_g128")),
        ("qwen3_moe", ("nvfp4", "nvfp4")),
    ],
)
def test_matrices_are_coded_in_parts(kind: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of blocks at a time gives the bytes of all at once, of layers and tables, and of each expert."""
    source = tiny_model(kind, tmp_path / "source", num_hidden_layers=1)
    rules = [pair_rules(*pair), {"match": "*embed_tokens", "weight": pair[0]}, {"match": "*", "skip": "x"}]
    model = quantized(source, rules, learn="dual_lsq")
    quiet_export(model, source, tmp_path / "whole")
    monkeypatch.setattr(matrices, "PART", 1)
    assert len(list(matrices.Matrix(weights(model)["model.embed_tokens"], "").parts())) > 1 or pair[0] == "fp8_tensor"
    quiet_export(model, source, tmp_path / "parts")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()
