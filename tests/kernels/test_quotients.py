"""The quotients of the training kernels are IEEE division's, for all float32 significands: their arithmetic in C, over
every pair whose quotient an error of theirs could round otherwise (`quotient` in kernels/fake_quantize/rounding)."""

import ctypes
from pathlib import Path

import pytest

from qat.kernels.compiler import compiler, load_library

BF16, FP16 = 8, 11  # significant bits


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if compiler() is None:
        pytest.skip("no C compiler")
    found = load_library(Path(__file__).parent / "quotients.c", exact=True)
    for function in (found.wrong, found.wrong_near_halves):
        function.restype = ctypes.c_int64
    return found


def near_halves(library: ctypes.CDLL, corrections: int, remainder: int) -> tuple[int, int]:
    """(Quotients that differ, of how many)."""
    pairs = ctypes.c_int64()
    wrong = library.wrong_near_halves(corrections, remainder, ctypes.byref(pairs))
    return wrong, pairs.value


@pytest.mark.parametrize("remainder", [1, 2, 3, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_correction_divides_all_that_is_hard(library: ctypes.CDLL, remainder: int, sign: int) -> None:
    """With a and b in [1, 2), an inverse that is off by at most 2^-25 and a product that is off by at most

        2^-25 a + 2^-24 where a >= b, or 2^-25 (a + 1) where not,

    the corrected sum misses the quotient by 2^-25 b times that, and where a < b by 2^-47 / b more for the residual.
    From halfway it is remainder / (b 2^47) away, or remainder / (b 2^48): nearer only for remainders up to 4.
    """
    wrong, pairs = near_halves(library, 1, sign * remainder)
    assert wrong == 0 and pairs > 2.9e6
    assert near_halves(library, 0, sign * remainder)[0] > 1e6


@pytest.mark.parametrize(("bits", "step"), [(BF16, 13), (FP16, 211)])
def test_and_what_is_not(library: ctypes.CDLL, bits: int, step: int) -> None:
    assert library.wrong(bits, 1, step) == 0
    assert library.wrong(bits, 0, step) > 0
