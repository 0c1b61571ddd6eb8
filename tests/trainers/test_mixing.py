"""Shares in rows, their order, and the mix of real texts: the rows of its parts, all of them, each in its own order."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.config import validate
from qat.errors import ConfigError
from qat.trainers.data import DataConfig, load_blocks
from qat.trainers.mixing import counts, order
from tests.tiny import tiny_tokenizer

SHARES = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@given(SHARES, st.integers(6, 5000))
def test_counts_are_the_shares_in_whole_rows(shares: list[float], total: int) -> None:
    found = counts(shares, total)
    assert min(found) >= 1 and total <= sum(found) <= total + len(shares)
    for share, count in zip(shares, found, strict=True):
        assert abs(count - share / sum(shares) * total) <= max(1, len(shares) - 1)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_every_beginning_holds_the_shares(given_rows: list[int]) -> None:
    found = order(given_rows)
    assert np.bincount(found).tolist() == given_rows
    for text, count in enumerate(given_rows):
        seen = np.cumsum(found == text)
        expected = np.arange(1, len(found) + 1) * count / len(found)
        assert np.abs(seen - expected).max() <= len(given_rows)


def mix(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    parts = [{"share": 3, "source": "embedded"}, {"share": 1, "source": str(tmp_path / "a.txt")}]
    return {"mix": parts, "seq_len": 32, **changes}


def test_rows_of_a_mix_are_those_of_its_parts(tmp_path: Path) -> None:
    config = validate(DataConfig, mix(tmp_path), "data")
    tokenizer, cache = tiny_tokenizer(), tmp_path / "cache"
    mixed = load_blocks(config, tokenizer, num_tokens=40 * 32, cache_dir=cache)
    parts = [
        load_blocks(DataConfig(source=part.source, seq_len=32), tokenizer, num_tokens=rows * 32, cache_dir=cache)
        for part, rows in zip(config.mix, (30, 10), strict=True)
    ]
    places = order([30, 10])
    assert len(mixed) == 40 and mixed.loss_tokens == sum(part.loss_tokens for part in parts)
    for text, part in enumerate(parts):
        assert np.array_equal(mixed.array()[places == text], part.array())
    assert mixed == load_blocks(config, tokenizer, num_tokens=40 * 32, cache_dir=cache)
    assert "embedded" in mixed.source and "a.txt" in mixed.source
    again = validate(DataConfig, config.model_dump(mode="json"), "data")
    assert again == config and [part.seq_len for part in again.mix] == [32, 32]
    other = validate(DataConfig, mix(tmp_path, seq_len=16), "data")
    assert load_blocks(other, tokenizer, num_tokens=40 * 32, cache_dir=cache).digest != mixed.digest


def test_a_text_too_short_for_its_share_is_named(tmp_path: Path) -> None:
    config = validate(DataConfig, mix(tmp_path), "data")
    with pytest.warns(UserWarning, match=r"a\.txt has \d+ of the 500 rows that its share"):
        load_blocks(config, tiny_tokenizer(), num_tokens=2000 * 32, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source": "embedded"}, "a mix needs source: mix"),
        ({"source": "mix", "mix": []}, "a mix needs source: mix"),
        ({"text_field": "body"}, "text_field beside mix has no effect"),
        ({"mix": [{"source": "embedded"}]}, "share"),
        ({"mix": [{"share": 0, "source": "embedded"}]}, "share"),
        ({"mix": [{"share": 1, "seq_len": 64}]}, "give both beside mix only"),
        ({"mix": [{"share": 1, "source": "embedded", "generate": {"chats": 0.5}}]}, "only works with source: teacher"),
        ({"mix": [{"share": 1, "mix": [{"share": 1, "source": "embedded"}]}]}, "a mix itself"),
    ],
)
def test_mixes_that_mean_nothing(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        validate(DataConfig, mix(tmp_path, **changes), "data")
