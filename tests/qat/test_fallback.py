"""What a fallback may say."""

import pytest

from qat.config import validate
from qat.errors import ConfigError
from qat.fallback import Fallback


def test_levels_and_numbers_say_the_same() -> None:
    assert Fallback(level="L10").count == Fallback(layers=10).count == 10


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "exactly one of"),
        ({"level": "L3", "layers": 3}, "exactly one of"),
        ({"level": "10"}, "for example L10"),
        ({"level": "L0"}, "for example L10"),
        ({"level": "L3", "input": "fp8_token"}, "no `weight` format"),
        ({"level": "L3", "weight": "fp8_chanel"}, "nearest: fp8_channel"),
        ({"level": "L3", "by": "guess"}, "kl"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(Fallback, given, "job")
