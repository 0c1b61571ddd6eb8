"""Observers against slow or foreign ones."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.ao.quantization.observer import MovingAverageMinMaxObserver

from qat.errors import FormatError
from qat.numbers.catalog import lookup
from qat.observers import ColumnObserver, Histogram, Observer, RangeObserver, TwoSidedObserver, observer_for


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def observed(kind: Observer, batches: list[Tensor], name: str = "int8_tensor") -> float:
    observer = RangeObserver(kind, lookup(name))
    for batch in batches:
        observer.add(batch)
    return observer.amax()


def batches(count: int = 5) -> list[Tensor]:
    return [normal(40, 64, seed=seed) * (1 + seed) for seed in range(count)]


def with_outliers() -> list[Tensor]:
    """Gaussian, and one value in ten thousand at 40 sigma."""
    found = []
    for seed in range(4):
        x = normal(200, 100, seed=seed)
        x[0, :2] = 40.0
        found.append(x)
    return found


def test_minmax_is_the_largest_magnitude() -> None:
    assert observed("minmax", [*batches(), torch.tensor([-77.0, 3.0])]) == 77.0


def test_moving_average_equals_pytorch() -> None:
    reference = MovingAverageMinMaxObserver(averaging_constant=0.01)
    for batch in batches():
        reference(batch.abs())  # of one sign, so that its maximum is our magnitude
    assert observed("moving_average", batches()) == pytest.approx(reference.max_val.item(), rel=1e-6)


def test_percentile_equals_that_of_all_the_data() -> None:
    data = torch.cat([b.abs().flatten() for b in batches()]).numpy()
    width = 2 * float(data.max()) / 2048  # the histogram's limit is less than twice the maximum
    for percentile in (50.0, 99.0, 99.9):
        observer = RangeObserver("percentile", lookup("int8_tensor"), percentile)
        for batch in batches():
            observer.add(batch)
        assert observer.amax() == pytest.approx(
            np.percentile(data, percentile, method="inverted_cdf"), abs=1.01 * width
        )


@pytest.mark.parametrize("name", ["int4_tensor", "int8_tensor", "fp8_tensor"])
def test_mse_clip_is_the_best_on_the_data_itself(name: str) -> None:
    element, data = lookup(name).element, torch.cat(with_outliers()).abs().double()

    def cost(limit: float) -> float:
        scale = limit / element.max
        return float((element.round((data / scale).float()).double() * scale - data).square().mean())

    found = observed("mse", with_outliers(), name)
    assert cost(found) <= 1.02 * min(cost(40.0 * ratio / 100) for ratio in range(2, 101))
    assert found <= 40.0 and (element.bits > 4 or found < 20.0)


def slow_kl(counts: np.ndarray, width: float, levels: int) -> float:
    """TensorRT's calibration written as its slides describe it, one bin and one level at a time."""
    best, best_kl = len(counts), math.inf
    for keep in range(levels, len(counts) + 1, max(1, levels // 16)):
        p = counts[:keep].astype(float)
        p[-1] += counts[keep:].sum()
        q = np.zeros(keep)
        for level in range(levels):
            first, last = math.ceil(level * keep / levels), math.ceil((level + 1) * keep / levels)
            full = counts[first:last] > 0
            if full.any():
                q[first:last][full] = counts[first:last].sum() / full.sum()
        p, q = p / p.sum(), q / q.sum()
        kl = sum(a * math.log(max(a, 1e-30) / max(b, 1e-30)) for a, b in zip(p, q, strict=True) if a > 0)
        if kl < best_kl - 1e-12:
            best, best_kl = keep, kl
    return (best + 0.5) * width


def test_kl_equals_a_slow_second_implementation() -> None:
    for data in (with_outliers(), batches()):
        histogram = Histogram()
        for batch in data:
            histogram.add(batch)
        expected = slow_kl(histogram.counts.numpy(), histogram.limit / 2048, 128)
        assert observed("kl", data) == pytest.approx(expected, rel=1e-9)


def test_kl_and_percentile_clip_outliers_and_minmax_does_not() -> None:
    data = with_outliers()
    assert observed("minmax", data) == 40.0
    assert 2.5 < observed("kl", data) < 10.0
    assert 3.0 < observed("percentile", [*data, *[normal(200, 100, seed=9) for _ in range(8)]]) < 6.0


def test_the_histogram_equals_numpy_after_any_number_of_doublings() -> None:
    histogram = Histogram()
    parts = [normal(1000, seed=seed) * scale for seed, scale in enumerate((1e-3, 0.5, 0.1, 30.0, 4.0))]
    for part in parts:
        histogram.add(part)
    data = torch.cat(parts).abs()
    assert histogram.limit >= data.max() > histogram.limit / 2
    assert math.log2(histogram.limit / parts[0].abs().max().item()) == pytest.approx(15, abs=2)
    expected, _ = np.histogram(data.numpy().astype(np.float64), 2048, (0, histogram.limit))
    assert histogram.counts.sum() == 5000
    assert np.abs(histogram.counts.numpy() - expected).sum() <= 4  # values on an edge may fall to either side
    assert histogram.centres[0] == histogram.limit / 4096 and histogram.centres[-1] < histogram.limit


@pytest.mark.parametrize("kind", ["minmax", "moving_average", "percentile", "mse", "kl"])
def test_nan_infinity_and_empty_batches_do_not_spoil_a_range(kind: Observer) -> None:
    bad = normal(40, 64, seed=0)
    bad[0, 0], bad[1, 1], bad[2, 2] = math.nan, math.inf, -math.inf
    clean = torch.where(bad.isfinite(), bad, 0.0)
    assert observed(kind, [bad, normal(4, 4)]) == pytest.approx(observed(kind, [clean, normal(4, 4)]), rel=1e-3)
    if kind != "moving_average":
        assert observed(kind, [clean, torch.zeros(0, 4)]) == observed(kind, [clean])


@pytest.mark.parametrize("kind", ["minmax", "moving_average", "percentile", "mse", "kl"])
@pytest.mark.parametrize("data", [[], [torch.zeros(3, 3)]])
def test_nothing_observed_is_an_error(kind: Observer, data: list[Tensor]) -> None:
    with pytest.raises(FormatError, match="no non-zero activations were observed"):
        observed(kind, data)


def test_observers_take_any_shape_and_dtype_and_keep_no_data() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert observed("minmax", [torch.ones(2, 3, 4, dtype=dtype)]) == 1.0
    observer = RangeObserver("kl", lookup("int8_tensor"))
    x = normal(8, 8).requires_grad_()
    observer.add(x * 2)
    held = [v for v in vars(observer).values() if isinstance(v, Tensor)]
    assert not held and not observer._histogram.counts.requires_grad


def test_two_sides() -> None:
    """A static range with a zero point: lowest and highest value, whatever the other side does."""
    fmt = lookup("int8_tensor_asym")
    seen = TwoSidedObserver("minmax", fmt)
    for batch in (torch.tensor([-0.5, 2.0, 0.1]), torch.tensor([0.2, 1.0, -0.25])):
        seen.add(batch)
    assert seen.range() == (-0.5, 2.0) and seen.top == (0.5, 2.0)
    seen.widen((0.75, 1.0))
    assert seen.range() == (-0.75, 2.0)
    one = TwoSidedObserver("percentile", fmt)
    one.add(torch.tensor([1.0, 3.0]))
    low, high = one.range()
    assert low == 0.0 and 2.9 < high <= 3.01
    with pytest.raises(FormatError, match="no non-zero activations"):
        TwoSidedObserver("minmax", fmt).range()
    with pytest.raises(FormatError, match="mse finds a symmetric range, but int8_tensor_asym"):
        TwoSidedObserver("mse", fmt)


def test_a_range_for_each_column() -> None:
    fmt = lookup("int8_column")
    first, second = normal(2, 5, 3, seed=1), normal(4, 3, seed=2)
    every = torch.cat([first.flatten(0, 1), second])
    seen = ColumnObserver("minmax", fmt)
    seen.add(first.bfloat16().float())
    seen.add(second)
    assert seen.range() == tuple(torch.cat([first.bfloat16().float().flatten(0, 1), second]).abs().amax(0).tolist())
    other = ColumnObserver("minmax", fmt)
    other.widen(())  # a process that saw nothing yet
    for part in (first, second):
        alone = ColumnObserver("minmax", fmt)
        alone.add(part)
        other.widen(alone.top)
    assert other.range() == tuple(every.abs().amax(0).tolist())
    moving = ColumnObserver("moving_average", fmt)
    for part in (first, second):
        moving.add(part)
    tops = first.abs().flatten(0, 1).amax(0), second.abs().amax(0)
    assert torch.allclose(torch.tensor(moving.range()), 0.99 * tops[0] + 0.01 * tops[1])


def test_a_column_that_holds_nothing() -> None:
    """NaN and infinity count as nothing, and a column of zeros still has a scale: the smallest of the others."""
    seen = ColumnObserver("minmax", lookup("int8_column"))
    seen.add(torch.tensor([[0.0, 2.0, -3.0], [math.nan, -1.0, math.inf]]))
    assert seen.range() == (2.0, 2.0, 3.0)
    with pytest.raises(FormatError, match="no non-zero values were observed"):
        ColumnObserver("minmax", lookup("int8_column")).range()


@pytest.mark.parametrize(
    ("name", "kind", "made"),
    [
        ("int8_column", "minmax", ColumnObserver),
        ("int8_tensor_asym", "minmax", TwoSidedObserver),
        ("int8_tensor", "kl", RangeObserver),
        ("int8_channel_asym", "minmax", RangeObserver),
    ],
)
def test_which_observer_a_format_has(name: str, kind: Observer, made: type) -> None:
    assert type(observer_for(kind, lookup(name))) is made
    for histogram in ("percentile", "mse", "kl"):
        with pytest.raises(FormatError, match=f"{histogram} needs a histogram, and int8_column"):
            observer_for(histogram, lookup("int8_column"))  # type: ignore[arg-type]  # the loop widens it to str
