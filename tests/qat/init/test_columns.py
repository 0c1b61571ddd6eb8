"""Scales under the Hessian: what a block loses against the walk written out, and descent that never goes up."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qat.init.calibration import initialise, observe
from qat.init.columns import arrived, of_block, refitted
from qat.init.gptq import Gptq, compensate, compensated, damped, inverse
from qat.init.scales import initial_scales
from qat.numbers.catalog import lookup
from qat.numbers.numerics import Scales, fake_quantize
from qat.sites import weights
from qat.surgery import apply
from tests.qat.init.test_gptq import layer
from tests.qat.test_surgery import batches, build, usual

FORMATS = ["nvfp4", "mxfp4", "int4_g64", "int4_g32_asym", "int3_channel", "if4", "nf4_g64", "q4_k", "q6_k"]


def parts(name: str) -> tuple[Tensor, Scales, Tensor]:
    """Weight, scales and Gram matrix."""
    weight, inputs = layer(columns=lookup(name).super_block or 192)
    gram = inputs.T @ inputs / len(inputs)
    return weight, initial_scales(weight, lookup(name), importance=gram.diagonal()), gram


def errors(weight: Tensor, quantized: Tensor, matrix: Tensor) -> Tensor:
    """e^T H e of each row, in float64."""
    lost = (quantized - weight).double()
    return ((lost @ matrix.double()) * lost).sum(1)


@pytest.mark.parametrize("name", FORMATS)
def test_refitting_never_raises_a_rows_error_and_lowers_most(name: str) -> None:
    weight, scales, gram = parts(name)
    fmt, factor = lookup(name), inverse(gram)
    matrix = damped(gram, factor)
    latent = compensate(weight, fmt, scales, factor)
    before = errors(weight, fake_quantize(latent, fmt, scales), matrix)
    found = refitted(weight, latent, fmt, scales, matrix, 2)
    after = errors(weight, fake_quantize(found.latent, fmt, found.scales), matrix)
    assert (after <= before).all() and found.better == int((after < before).sum()) > len(weight) / 2
    assert found.left == pytest.approx(float(after.sum() / before.sum()), rel=1e-3)
    assert found.left < (0.99 if name == "mxfp4" else 0.97)
    stored = fmt.scale.store(found.scales.effective(), found.scales.global_scale)  # no number that is not stored
    assert torch.equal(fmt.scale.decode(stored), fmt.scale.decode(found.scales.stored))
    more = refitted(weight, latent, fmt, scales, matrix, 4)
    assert more.left <= found.left + 1e-6


@pytest.mark.parametrize("name", ["int4_g64", "nvfp4"])
def test_refitting_ends_where_no_other_code_of_a_column_would_lose_less(name: str) -> None:
    weight, scales, gram = parts(name)
    fmt, factor = lookup(name), inverse(gram)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    matrix, latent = damped(gram, factor), weight + 0.3 * weight.std() * noise
    found = refitted(weight, latent, fmt, scales, matrix, 40)
    values = fake_quantize(found.latent, fmt, found.scales)
    wanted = values - (values - weight) @ matrix / matrix.diagonal()
    assert found.better == len(weight)
    assert (fake_quantize(wanted, fmt, found.scales) == values).float().mean() > 0.999


def test_scales_that_are_off_come_back() -> None:
    """A weight on the grid, given scales a twentieth too large: nothing is left once they are found."""
    fmt, generator = lookup("int4_g64"), torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (24, 192), generator=generator).float()
    codes[:, ::64] = 7.0
    weight = codes * 0.125
    scales = initial_scales(weight, fmt, "amax")
    assert torch.equal(scales.effective(), torch.full((24, 3), 0.125))
    off = replace(scales, stored=fmt.scale.store(scales.effective() * 1.05))
    found = refitted(weight, weight, fmt, off, torch.eye(192), 8)
    assert found.left < 1e-3 and torch.equal(found.scales.effective(), scales.effective())
    assert torch.equal(fake_quantize(found.latent, fmt, found.scales), weight)


def test_a_perfect_start_and_a_spoiled_row_stay() -> None:
    fmt = lookup("int4_g64")
    weight = torch.randint(-7, 8, (4, 64), generator=torch.Generator().manual_seed(0)) * 0.125
    weight[:, 0] = 0.875
    scales = initial_scales(weight, fmt, "amax")
    found = refitted(weight, weight, fmt, scales, torch.eye(64), 2)
    assert found.better == 0 and torch.equal(found.latent, weight)
    weight[1, 3] = float("nan")
    spoiled = refitted(weight, weight, fmt, scales, torch.eye(64), 2)
    assert spoiled.better == 0 and torch.equal(spoiled.scales.stored, scales.stored)


@pytest.mark.parametrize("name", FORMATS)
def test_scales_chosen_on_arrival_lose_less(name: str) -> None:
    weight, scales, gram = parts(name)
    fmt, factor = lookup(name), inverse(gram)
    matrix = damped(gram, factor)
    before = errors(weight, fake_quantize(compensate(weight, fmt, scales, factor), fmt, scales), matrix)
    latent, found = compensated(weight, fmt, scales, factor, choose=True)
    after = errors(weight, fake_quantize(latent, fmt, found), matrix)
    assert after.sum() < (1.0 if fmt.scale.significant_bits == 1 else 0.98) * before.sum()
    again = compensate(weight, fmt, found, factor)  # the walk with these scales given is the same walk
    torch.testing.assert_close(again, latent, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["nvfp4", "int4_g32_asym", "int3_channel"])
def test_the_first_block_takes_the_best_of_its_neighbours(name: str) -> None:
    """Against each neighbour alone: quantize the columns one by one and take what is left of the whole matrix."""
    weight, scales, gram = parts(name)
    fmt, factor = lookup(name), inverse(gram)
    width = fmt.block_for(*weight.shape)[1]
    gram = gram[:width, :width]  # nothing after the block makes up for it
    factor = inverse(gram)
    fmt_weight = weight[:, :width].contiguous()
    scales = initial_scales(fmt_weight, fmt)
    own = arrived(fmt_weight.t(), fmt, of_block(scales, 0), factor.upper)
    matrix = damped(gram, factor)

    def lost(trial: Scales) -> Tensor:
        return errors(fmt_weight, fake_quantize(compensate(fmt_weight, fmt, trial, factor), fmt, trial), matrix)

    best = lost(own)
    assert (best <= lost(scales) * (1 + 1e-5)).all() and best.sum() < lost(scales).sum()
    if fmt.scale.sweep:
        for stored in fmt.scale.neighbours(scales.stored):
            assert (best <= lost(replace(scales, stored=stored)) * (1 + 1e-5)).all()


def test_settings_change_what_they_say_and_nothing_else() -> None:
    text = list(batches())
    plain = usual("nvfp4", "nvfp4")
    found = {}
    for name, settings in {
        "off": {},
        "refit": {"refit": 2},
        "arrival": {"choose": "arrival"},
        "sequential": {"refit": 2, "choose": "arrival", "sequential": True},
    }.items():
        model = apply(build(), plain)
        scheme = plain.model_copy(update={"init": (Gptq(**settings),)})
        said = initialise(model, text, scheme, observe(model, text))
        assert bool(said) == ("refit" in settings) and all("refitting lowered the error of" in s for s in said)
        found[name] = weights(model)["model.layers.0.mlp.down_proj"]
        for site in weights(model).values():  # what is kept is what is stored, below the fused per-tensor scale
            scales = site.quantizer.scales()
            assert torch.equal(scales.effective(), site.quantizer.start)
            assert torch.equal(scales.divisor, site.quantizer.start)
    off = found.pop("off")
    for name, site in found.items():
        assert not torch.equal(site.value(), off.value()), name
        assert torch.equal(site.quantizer.global_scale, off.quantizer.global_scale) or name == "sequential"


VIEWS = {
    *("view", "slice", "select", "unbind", "t", "transpose", "expand", "unsqueeze", "detach", "alias", "diagonal"),
    *("as_strided", "_unsafe_view", "permute", "empty", "empty_strided", "empty_like", "new_empty"),
}


class Launched(TorchDispatchMode):
    """Counts what computes: on a GPU, as many launches by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def test_a_column_takes_few_operations_however_many_rows_there_are() -> None:
    """Else a GPU waits for its host. 12 of them round a column and pass on what it lost, of each walk over columns."""
    weight, scales, gram = parts("nvfp4")
    fmt, factor = lookup("nvfp4"), inverse(gram)
    matrix = damped(gram, factor)
    latent = compensate(weight, fmt, scales, factor)

    def per_column(work: Callable[[], object]) -> float:
        with Launched() as launched:
            work()
        return launched.count / weight.shape[1]

    assert per_column(lambda: compensate(weight, fmt, scales, factor)) < 12
    assert per_column(lambda: compensated(weight, fmt, scales, factor, choose=True)) < 12 + 15
    one = per_column(lambda: refitted(weight, latent, fmt, scales, matrix, 1))
    three = per_column(lambda: refitted(weight, latent, fmt, scales, matrix, 3))
    assert (three - one) / 2 < 16 and one < 18
    tall = torch.cat([weight, weight])
    assert per_column(lambda: compensate(tall, fmt, Scales.joined([scales, scales]), factor)) < 12
