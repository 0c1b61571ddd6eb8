"""FP4 by integers: every code under every scale, on units that keep subnormals and on units that flush them.

`torch.set_flush_denormal` makes this processor treat subnormal operands and results as zero, which is what is asked of
here: FTZ and DAZ of SSE, in the very operators that are tested.
"""

from collections.abc import Iterator

import pytest
import torch

from qat.serving.fp4 import by_exponent, by_integers, times_e4m3, times_e8m0

# OCP MX 1.0, table of E2M1.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CODES = torch.arange(16, dtype=torch.uint8)
TRUTH = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.float64)
SMALLEST = 2.0**-126


@pytest.fixture(params=[False, True], ids=["keeps", "flushes"])
def flushes(request: pytest.FixtureRequest) -> Iterator[bool]:
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this processor cannot flush subnormals")
    yield request.param
    torch.set_flush_denormal(False)


def same(found: torch.Tensor, truth: torch.Tensor) -> bool:
    """Equal values and signs, looked at as integers: comparisons of a processor that flushes call subnormals zero."""
    return torch.equal(found.view(torch.int16), truth)


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """The bits of float64 values as BF16, exactly, by way of integers."""
    torch.set_flush_denormal(False)
    return values.to(torch.bfloat16).view(torch.int16)


def test_units_that_keep_subnormals() -> None:
    assert same(by_exponent(CODES), bits_of(TRUTH))


def test_units_that_flush_lose_a_half() -> None:
    """Why there are two ways."""
    truth = bits_of(torch.where(TRUTH.abs() == 0.5, TRUTH * 0, TRUTH))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    found = by_exponent(CODES)
    torch.set_flush_denormal(False)
    assert same(found, truth)


def test_integers_lose_nothing(flushes: bool) -> None:
    found = by_integers(CODES)
    assert same(found, bits_of(TRUTH))


def test_every_code_under_every_power_of_two(flushes: bool) -> None:
    """Byte 255 is NaN, which no weight has. Products below the normal numbers are zero, with their sign."""
    scales = torch.arange(255, dtype=torch.uint8)
    found = times_e8m0(CODES[:, None], scales[None, :])
    truth = TRUTH[:, None] * torch.exp2(torch.arange(255, dtype=torch.float64) - 127)
    truth = torch.where(truth.abs() < SMALLEST, truth * 0, truth)
    assert same(found, bits_of(truth))


def test_every_code_under_every_e4m3_scale(flushes: bool) -> None:
    scales = torch.arange(127, dtype=torch.uint8)
    found = times_e4m3(CODES[:, None], scales[None, :])
    torch.set_flush_denormal(False)
    truth = TRUTH[:, None] * scales.view(torch.float8_e4m3fn).to(torch.float64)
    assert same(found, bits_of(truth))
    assert torch.equal(truth.to(torch.bfloat16).to(torch.float64), truth), "six bits: exact"
