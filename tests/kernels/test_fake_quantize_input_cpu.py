"""The C kernel for dynamic inputs has the reference's bits: every format, adversarial rows, both dtypes."""

import pytest
import torch
from torch import Tensor

from qat.kernels.fake_quantize_input.cpu import fake_quantize_input, problem
from qat.kernels.load import cpu_problem
from qat.numbers.catalog import CATALOG, lookup
from qat.training.activations import fake_quantize_input_reference, static_part

pytestmark = pytest.mark.skipif(cpu_problem() is not None, reason=str(cpu_problem()))
FORMATS = [name for name, fmt in CATALOG.items() if problem(fmt) is None]


def adversarial(columns: int) -> Tensor:
    """Rows of all magnitudes, with ties, zeros, outliers, subnormals, NaN and infinities."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, columns, generator=generator) * torch.logspace(-42, 30, 64)[:, None]
    ties = torch.arange(columns).remainder(29) / 4 - 3.5  # halves and quarters of the grids
    special = [torch.zeros(columns), ties, ties * 448, torch.full((columns,), 6.0), torch.full((columns,), 1e-45)]
    for value in (1e4, 3e38, torch.nan, torch.inf, -torch.inf):
        row = torch.randn(columns, generator=generator)
        row[columns // 2] = value
        special.append(row)
    return torch.cat([x, torch.stack(special)])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["ste", "clipped"])
def test_it_is_the_reference(name: str, dtype: torch.dtype, estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.kernels.fake_quantize_input.cpu.fake_quantize_input_reference", None)  # C has to do it
    fmt = lookup(name)
    for columns, amax in ((384, 3.0), (128, 7e3)) if fmt.divides(128) else ((768, 3.0),):
        x = adversarial(columns).to(dtype)
        static = static_part(fmt, torch.tensor(amax))
        given = (x.view(2, -1, columns), static, name, estimator)
        found, expected = fake_quantize_input(*given), fake_quantize_input_reference(*given)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_what_it_does_not_take_runs_the_reference() -> None:
    for x, name in (
        (torch.randn(3, 24), "int8_token"),
        (torch.randn(3, 32).half(), "mxfp4"),
        (torch.randn(0, 32), "mxfp4"),
    ):
        found, expected = (f(x, None, name, "ste")[0] for f in (fake_quantize_input, fake_quantize_input_reference))
        assert torch.equal(found, expected) and found.dtype == x.dtype
    wide = torch.randn(5, 128)[:, ::2]
    assert torch.equal(fake_quantize_input(wide, None, "mxfp8", "ste")[0],
                       fake_quantize_input_reference(wide, None, "mxfp8", "ste")[0])  # fmt: skip


def test_threads_do_not_change_bits() -> None:
    x, threads = torch.randn(300, 512), torch.get_num_threads()
    try:
        results = []
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(fake_quantize_input(x, None, "mxfp4", "ste")[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
