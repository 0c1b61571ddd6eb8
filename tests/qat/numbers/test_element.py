"""Elements against tables written out a second time: the grid of each number type, nearest-even rounding, and codes.

The oracle here knows nothing of bit tricks: it is a sorted list of values, the midpoints between neighbours, and the
    rule that a tie goes to the even code. It is compared on every midpoint, on the float32 numbers just beside each,
    and on random values; `ml_dtypes` is a third opinion on the small floats.
"""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch

from qat.numbers.catalog import E2M1, E2M3, E4M3, INT4_SIX_SEVENTHS, NF4
from qat.numbers.element import Element, integer, minifloat, table

INTEGERS = {bits: integer(bits) for bits in range(2, 9)}
FLOATS = {(2, 1): E2M1, (2, 3): E2M3, (3, 2): minifloat(3, 2), (4, 3): E4M3, (5, 2): minifloat(5, 2)}
HALVES = table("halves", (-3.0, -0.5, 0.0, 0.5, 4.0))  # five entries: a table need not fill its bits
ELEMENTS = [*INTEGERS.values(), *FLOATS.values(), INT4_SIX_SEVENTHS, NF4, HALVES]
IDS = [element.name for element in ELEMENTS]

# OCP Microscaling v1.0, tables 1 to 5, and OCP FP8: (largest, smallest normal, smallest subnormal).
LIMITS = {
    (2, 1): (6.0, 1.0, 0.5),
    (2, 3): (7.5, 1.0, 0.125),
    (3, 2): (28.0, 0.25, 0.0625),
    (4, 3): (448.0, 2.0**-6, 2.0**-9),
}


def magnitudes(exponent: int, mantissa: int) -> list[float]:
    """Non-negative values by position, from the written definition (-1)^s 2^(E-bias) (1 + m / 2^M)."""
    bias, found = 2 ** (exponent - 1) - 1, []
    for e, m in itertools.product(range(2**exponent), range(2**mantissa)):
        fraction = m / 2**mantissa
        found.append(2.0 ** (1 - bias) * fraction if e == 0 else 2.0 ** (e - bias) * (1 + fraction))
    return found[:-1] if (exponent, mantissa) == (4, 3) else found  # E4M3's last code is NaN


def oracle_grid(element: Element) -> tuple[np.ndarray, np.ndarray]:
    """(values ascending, code parity that a tie prefers), or all zeros where the lower entry wins a tie."""
    if element.kind == "table":
        values = np.sort(np.array(element.values))
        return values, np.zeros(len(values), dtype=int)
    if element.kind == "integer":
        top = 2 ** (element.bits - 1) - 1
        codes = np.arange(-top, top + 1)
        return codes * element.step, codes % 2
    exponent, mantissa = next(key for key, value in FLOATS.items() if value is element)
    positive = np.array(magnitudes(exponent, mantissa))
    return np.concatenate([-positive[:0:-1], positive]), np.abs(np.arange(1 - len(positive), len(positive))) % 2


def oracle_round(element: Element, x: np.ndarray) -> np.ndarray:
    values, odd = oracle_grid(element)
    exact = x.astype(np.float64)
    upper = np.searchsorted(values, exact).clip(1, len(values) - 1)
    lower = upper - 1
    middle = (values[lower] + values[upper]) / 2
    if element.kind == "table":  # its boundaries are float32 numbers by definition
        middle = middle.astype(np.float32).astype(np.float64)
    take_upper = (exact > middle) | ((exact == middle) & (odd[lower] == 1))
    return np.where(take_upper, values[upper], values[lower]).astype(np.float32)


def probes(element: Element) -> np.ndarray:
    """Every grid value and midpoint, both float32 neighbours of each, and random numbers of every size."""
    values, _ = oracle_grid(element)
    marks = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    beside = [np.nextafter(marks, np.float32(side)) for side in (-np.inf, np.inf)]
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(4000) * values.max() * np.exp2(rng.uniform(-12, 2, 4000))
    return np.concatenate([marks, *beside, spread.astype(np.float32), np.float32([1e30, -1e30, 1e-40, 0.0])])


@pytest.mark.parametrize("element", ELEMENTS, ids=IDS)
def test_round_is_nearest_with_ties_to_even(element: Element) -> None:
    x = probes(element)
    if element.step != 1.0:  # midpoints of a stretched grid are no float32 numbers: skip what the last bit decides
        values, _ = oracle_grid(element)
        middle = (values[1:] + values[:-1]) / 2
        x = x[(np.abs(x[:, None].astype(np.float64) - middle).min(axis=1) > 1e-6)]
    assert np.array_equal(element.round(torch.from_numpy(x)).numpy(), oracle_round(element, x))


@pytest.mark.parametrize("element", ELEMENTS, ids=IDS)
def test_round_saturates_and_keeps_nan_and_its_input(element: Element) -> None:
    x = torch.tensor([float("inf"), -float("inf"), 3e38, -3e38, float("nan"), 0.0])
    before = x.clone()
    rounded = element.round(x)
    assert rounded[:4].tolist() == pytest.approx([element.high, element.low, element.high, element.low])
    assert rounded[4].isnan()
    assert rounded[5] == 0.0
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("element", ELEMENTS, ids=IDS)
def test_every_producible_code_survives_decode_and_encode(element: Element) -> None:
    codes = torch.arange(len(element.values), dtype=torch.uint8)
    values = element.decode(codes)
    producible = torch.tensor([v in element.grid for v in element.values])
    negative_zero = (values == 0) & (codes != 0) & (element.kind == "minifloat")
    kept = producible & ~negative_zero
    assert torch.equal(element.encode(values[kept]), codes[kept])
    assert element.encode(values[negative_zero]).eq(0).all()
    assert torch.equal(element.round(values[kept]), values[kept])


@pytest.mark.parametrize("element", ELEMENTS, ids=IDS)
def test_codes_of_rounded_values_decode_to_them(element: Element) -> None:
    rounded = element.round(torch.from_numpy(probes(element)))
    codes = element.encode(rounded)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**element.bits
    assert torch.equal(element.decode(codes), rounded)


@pytest.mark.parametrize("bits", INTEGERS)
def test_integers_are_twos_complement_and_round_symmetrically(bits: int) -> None:
    element = integer(bits)
    for code in range(2**bits):
        signed = int.from_bytes(bytes([code << (8 - bits)]), "big", signed=True) >> (8 - bits)
        assert element.values[code] == signed
    top = 2 ** (bits - 1) - 1
    assert element.grid == tuple(range(-top, top + 1))
    assert element.max == top


@pytest.mark.parametrize("shape", LIMITS)
def test_minifloats_have_the_limits_of_their_specification(shape: tuple[int, int]) -> None:
    element, (largest, normal, subnormal) = FLOATS[shape], LIMITS[shape]
    assert (element.max, element.min_normal) == (largest, normal)
    assert element.grid[len(element.grid) // 2 + 1] == subnormal
    assert element.max_exponent == int(np.floor(np.log2(largest)))
    assert element.significant_bits == shape[1] + 1


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 1), ml_dtypes.float4_e2m1fn),
        ((2, 3), ml_dtypes.float6_e2m3fn),
        ((3, 2), ml_dtypes.float6_e3m2fn),
        ((4, 3), ml_dtypes.float8_e4m3fn),
    ],
)
def test_minifloats_agree_with_ml_dtypes(shape: tuple[int, int], dtype: type) -> None:
    element = FLOATS[shape]
    codes = np.arange(2**element.bits, dtype=np.uint8)
    decoded = codes.view(dtype).astype(np.float32)
    assert np.array_equal(element.decode(torch.from_numpy(codes)).numpy(), decoded, equal_nan=True)
    x = probes(element)
    x = x[np.abs(x) <= element.max]
    rounded = element.round(torch.from_numpy(x))
    assert np.array_equal(rounded.numpy(), x.astype(dtype).astype(np.float32))
    bits = x.astype(dtype).view(np.uint8)
    nonzero = rounded.numpy() != 0  # ml_dtypes keeps the sign of zero, we write +0 only
    assert np.array_equal(element.encode(rounded).numpy()[nonzero], bits[nonzero])
    assert not element.encode(rounded)[~torch.from_numpy(nonzero)].any()


def test_e2m1_rounds_at_the_published_boundaries() -> None:
    cases = {0.25: 0, 0.26: 0.5, 0.75: 1, 1.25: 1, 1.26: 1.5, 1.75: 2, 2.5: 2, 2.51: 3, 3.5: 4, 5.0: 4, 5.01: 6, 99: 6}
    x = torch.tensor([*cases, *(-v for v in cases)], dtype=torch.float32)
    assert E2M1.round(x).tolist() == [*cases.values(), *(-v for v in cases.values())]


def test_stretched_integers_share_their_codes_with_plain_ones() -> None:
    plain = integer(4)
    values = torch.tensor(plain.grid)
    assert torch.equal(INT4_SIX_SEVENTHS.encode(values * 6 / 7), plain.encode(values))
    assert INT4_SIX_SEVENTHS.max == pytest.approx(6.0)
    assert INT4_SIX_SEVENTHS.significant_bits == NF4.significant_bits == 24  # arbitrary fractions: never exact


def test_tables_are_read_by_position_in_any_order() -> None:
    shuffled = table("shuffled", (2.0, -1.0, 0.0, 5.0))
    assert shuffled.encode(shuffled.round(torch.tensor([4.0, -9.0, 0.4, 1.7]))).tolist() == [3, 1, 2, 0]
    assert shuffled.bits == 2 and HALVES.bits == 3
    assert shuffled.max == 5.0 and table("below", (-3.0, 0.0, 1.0)).max == 3.0  # the largest magnitude of either sign
    assert shuffled.round(torch.tensor([1.0, 3.5])).tolist() == [0.0, 2.0]  # ties go down


def test_full_integers_have_every_code_and_may_be_mirrored() -> None:
    down, up = integer(4, full=True), integer(4, step=-1.0, full=True)
    assert (down.low, down.high, down.max) == (-8.0, 7.0, 8.0) and (up.low, up.high, up.max) == (-7.0, 8.0, 8.0)
    x = torch.linspace(-10, 10, 81)
    for element, sign in ((down, 1), (up, -1)):
        rounded = element.round(x)
        wanted = np.clip(np.round(x.numpy() * sign), -8, 7) * sign  # numpy rounds half to even, too
        assert np.array_equal(rounded.numpy(), wanted)
        codes = element.encode(rounded)
        assert torch.equal(element.decode(codes), rounded) and int(codes.max()) <= 15
        nibbles = torch.where(codes < 8, codes.int(), codes.int() - 16)
        assert torch.equal(nibbles * sign, rounded.int())
    assert not any(value == 0 and np.signbit(value) for value in up.values) and len({integer(4), down, up}) == 3
