"""Measured tiles take the place of the rules' for their GPU and product, and of nothing else."""

import json
from pathlib import Path

import pytest

from qat.errors import ConfigError
from qat.kernels import tuned
from qat.kernels.packed_linear.choose import choose
from qat.kernels.quantized_matmul import choose as matmul
from qat.kernels.tuned import Launch, case, override
from qat.numbers.catalog import lookup

GPU = "NVIDIA Nothing 1000 (80GB)"
NAME = case("packed_linear", "int4_g128", 4096, 4096)
PAIR = case("quantized_matmul", "fp8_token x fp8_channel", 4096, 4096)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.table.cache_clear()
    told = {
        "about": "commit abc",
        "launches": {NAME: {"1": [64, 16, 4, 2], "16": None, "64": [128, 64, 8, 3]}, PAIR: {"16": [64, 16, 4, 5]}},
    }
    tuned.file(GPU).write_text(json.dumps(told), encoding="utf-8")
    return tuned.file(GPU)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1, Launch(64, 16, 4, 2)),
        (2, None),
        (16, None),
        (17, Launch(128, 64, 8, 3)),
        (64, Launch(128, 64, 8, 3)),
        (65, None),
    ],
)
def test_the_next_measured_number_of_tokens_counts(written: Path, tokens: int, expected: Launch | None) -> None:
    assert written.name == "nvidia-nothing-1000-80gb.json"
    rule = choose(tokens, 4096, 4096, 128, 132)
    tiles = override(rule, GPU, NAME, tokens)
    if expected is None:  # the rule was the fastest, or nothing as large was measured
        assert tiles is rule
        return
    assert (tiles.block_n, tiles.block_m, tiles.warps, tiles.stages) == expected
    assert tiles.splits == rule.splits and f"measured on {GPU}" in tiles.why and "commit abc" in tiles.why
    for gpu, name in (("", NAME), ("another GPU", NAME), (GPU, case("packed_linear", "int4_g128", 4096, 4097))):
        assert override(rule, gpu, name, tokens) is rule


def test_products_of_codes_keep_their_segments(written: Path) -> None:
    device = matmul.Device(capability=90, processors=132, shared=227 << 10)
    rule = matmul.choose(16, 4096, 4096, lookup("fp8_token"), lookup("fp8_channel"), device)
    tiles = override(rule, GPU, PAIR, 16)
    assert tiles.stages == 5 and (tiles.segments, tiles.operand, tiles.flush) == (
        rule.segments,
        rule.operand,
        rule.flush,
    )


@pytest.mark.parametrize("text", ["{", '{"about": "", "launches": {"a": {"1": [64, 16, 4]}}}', '{"launches": {}}',
                                  '{"about": "", "launches": {"a": {"1": [65, 16, 4, 2]}}}', "[]",
                                  '{"about": "", "launches": {"a": {"1": [64.0, 16, 4, 2]}}}',
                                  '{"about": "", "launches": {"a": {"0": [64, 16, 4, 2]}}}'])  # fmt: skip
def test_a_damaged_table_is_refused_by_name(written: Path, text: str) -> None:
    written.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=written.name):
        override(choose(1, 4096, 4096, 128, 132), GPU, NAME, 1)
