"""Error-compensated rounding against optimal brain surgery written out literally, and what it must and must not do."""

import pytest
import torch
from torch import Tensor

from qat.errors import FormatError
from qat.init import gptq
from qat.init.calibration import initialise, observe
from qat.init.gptq import DAMPING, Gptq, compensate, corrected
from qat.init.scales import initial_scales
from qat.modes import dense
from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.numbers.numerics import Scales, fake_quantize
from qat.sites import weights
from qat.surgery import apply
from tests.qat.test_surgery import batches, build, logits, usual


def layer(rows: int = 24, columns: int = 192) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs with some strong channels."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator)
    strength = 0.1 + 3 * torch.rand(columns, generator=generator)
    inputs = torch.randn(1500, columns, generator=generator) @ mix * strength
    return 0.05 * torch.randn(rows, columns, generator=generator), inputs


def surgeon(weight: Tensor, fmt: Format, scales: Scales, gram: Tensor) -> Tensor:
    """GPTQ by its definition: after each column, the inverse of the remaining Hessian says who makes up for it."""
    hessian = gram.double().clone()
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    current, result = weight.double().clone(), weight.clone()
    for column in range(weight.shape[1]):
        result[:, column] = current[:, column].float()
        inverse = torch.linalg.inv(hessian[column:, column:])
        quantized = fake_quantize(current.float(), fmt, scales)[:, column].double()
        lost = (current[:, column] - quantized) / inverse[0, 0]
        current[:, column:] -= torch.outer(lost, inverse[0])
    return fake_quantize(result, fmt, scales)


@pytest.mark.parametrize(
    "name", ["nvfp4", "mxfp4", "int4_g64", "int4_g32_asym", "int3_channel", "if4", "nf4_g64", "q4_k"]
)
def test_equals_optimal_brain_surgery_and_lowers_the_output_error(name: str) -> None:
    fmt = lookup(name)
    weight, inputs = layer(columns=fmt.super_block or 192)
    gram = inputs.T @ inputs / len(inputs)
    scales = initial_scales(weight, fmt, importance=gram.diagonal())
    found = fake_quantize(compensate(weight, fmt, scales, gram), fmt, scales)
    expected = surgeon(weight, fmt, scales, gram)
    assert (found != expected).float().mean() < 0.02  # float32 against float64 decides a tie differently now and then

    def error(quantized: Tensor) -> float:
        return float(((quantized - weight) @ inputs.T).square().mean())

    assert error(found) < 0.8 * error(fake_quantize(weight, fmt, scales))
    assert error(found) == pytest.approx(error(expected), rel=0.05)


def test_uncorrelated_inputs_leave_the_weights_alone() -> None:
    weight, _ = layer()
    fmt = lookup("nvfp4")
    latent = compensate(weight, fmt, initial_scales(weight, fmt), torch.diag(torch.rand(192) + 0.1))
    assert torch.allclose(latent, weight, atol=1e-6)


def test_inputs_that_are_always_zero_are_survived() -> None:
    weight, inputs = layer()
    inputs[:, 5:9] = 0.0
    fmt, gram = lookup("int4_g64"), inputs.T @ inputs / len(inputs)
    assert torch.isfinite(compensate(weight, fmt, initial_scales(weight, fmt), gram)).all()


def test_blocks_over_several_rows_are_refused() -> None:
    weight, inputs = layer()
    fmt = lookup("fp8_b128")
    with pytest.raises(FormatError, match="use init: scales"):
        compensate(weight, fmt, initial_scales(weight, fmt, "amax"), inputs.T @ inputs)


def test_inputs_that_lost_nothing_leave_the_weights_as_they_are() -> None:
    weight, inputs = layer()
    gram = inputs.T @ inputs / len(inputs)
    assert torch.equal(corrected(weight, torch.zeros_like(gram), gram, 1.0), weight)


def test_the_correction_is_the_damped_least_squares_solution() -> None:
    """|W X - W' X'|^2 + d |W' - W|^2, by stacking what damps below the inputs."""
    weight, inputs = layer()
    worse = (
        inputs + 0.3 * inputs.roll(1, 1) + 0.2 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1))
    )
    gram, lost = worse.T @ worse / len(worse), (inputs - worse).T @ worse / len(worse)
    damping = (DAMPING * gram.diagonal().mean() * len(worse)).sqrt() * torch.eye(192)
    stacked, wanted = torch.cat([worse, damping]), torch.cat([inputs @ weight.T, damping @ weight.T])
    expected = torch.linalg.lstsq(stacked.double(), wanted.double()).solution.T.float()
    torch.testing.assert_close(corrected(weight, lost, gram, 1.0), expected, rtol=1e-3, atol=1e-5)
    half = corrected(weight, lost, gram, 0.5)
    torch.testing.assert_close(half, (weight + expected) / 2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("input", [None, "int8_token"])
def test_sequential_fits_layers_to_what_the_quantized_ones_before_give(input: str | None) -> None:
    plain = usual("int3_g64", input).model_copy(update={"init": (Gptq(),)})
    text, found = list(batches()), {}
    for name, step in {
        "plain": Gptq(),
        "sequential": Gptq(sequential=True),
        "corrected": Gptq(sequential=True, correction=1.0),
    }.items():
        model = apply(build(), plain)
        with dense(model, inputs=True):
            target = logits(model)
        said = initialise(model, text, plain.model_copy(update={"init": (step,)}), observe(model, text))
        assert said == []
        found[name] = model, float((logits(model) - target).square().mean())
    names = found if input is None else ("plain", "sequential")  # nothing before the first layers is quantized
    first = [weights(found[name][0])["model.layers.0.self_attn.k_proj"].weight for name in names]
    assert all(torch.equal(first[0], weight) for weight in first)
    assert found["corrected"][1] < found["plain"][1]


def test_a_correction_without_sequential_is_refused() -> None:
    with pytest.raises(ValueError, match="set sequential: true too"):
        Gptq(correction=0.5)


def test_dead_inputs_and_singular_moments_are_counted() -> None:
    for sequential in (False, True):
        model, scheme = build(), usual("int4_g64")
        with torch.no_grad():
            model.model.layers[0].post_attention_layernorm.weight[:5] = 0.0
        apply(model, scheme)
        said = initialise(
            model,
            list(batches()),
            scheme.model_copy(update={"init": (Gptq(sequential=sequential),)}),
            observe(model, batches()),
        )
        assert said == ["gptq: 5 of 1280 input channels were zero in all of the text; more calibration text may help"]


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("name", ["nvfp4", "int4_g32_asym"])
def test_weights_that_read_one_tensor_are_walked_as_each_by_itself(
    name: str, sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = usual(name, "nvfp4").model_copy(
        update={"init": (Gptq(sequential=sequential, choose="arrival", refit=1),), "learn": "none"}
    )
    text, found = list(batches()), []
    for most in (gptq.STACKED, 0):
        monkeypatch.setattr(gptq, "STACKED", most)
        model = apply(build(), scheme)
        with torch.no_grad():  # fused weights share a per-tensor scale, other ones of a group need not
            model.model.layers[0].mlp.up_proj.weight.mul_(8.0)
        found.append((model, initialise(model, text, scheme, observe(model, text))))
    (together, said), (alone, expected) = found
    assert said == expected
    for path, site in weights(together).items():
        other = weights(alone)[path]
        same = torch.isclose(site.weight, other.weight, rtol=1e-4, atol=1e-6)
        assert same.float().mean() > 0.99, path  # products of other heights add up in another order: ties
        assert (site.quantizer.start == other.quantizer.start).float().mean() > 0.99, path
