"""How numbers and lists are written: every unit, its borders, and no rounding to what is not so."""

import pytest

from qat.text import duration, percent, size, some


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("", ""),
        ("a", "a"),
        ("abcd", "a, b, c, d"),
        ("abcde", "a, b, c, d and 1 more"),
        ("abcdefg", "a, b, c, d and 3 more"),
    ],
)
def test_some(names: str, text: str) -> None:
    assert some(iter(names)) == text


def test_some_by_count_and_joint() -> None:
    assert some(["a", "b", "c"], 1) == "a and 2 more" and some(["a", "b", "c"], joint="; ") == "a; b; c"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (134_515_008, "134.5 MB"), (2.5e9, "2.50 GB"), (4e13, "40.00 TB")],
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.754, "75 %"),
        (0.004, "0.4 %"),
        (0.9996, "99.96 %"),
        (1e-6, "1.0e-04 %"),
        (-0.5, "-50 %"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (119.9, "119.9 s"),
        (120, "2.0 min"),
        (7200, "2.0 h"),
        (172_800, "2.0 days"),
        (1e8, "1,157.4 days"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
