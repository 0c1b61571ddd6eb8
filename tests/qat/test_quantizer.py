"""Quantizers and layers: the forward pass equals what is exported, the input cache is exact, scales learn."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qat.adapters.embedding import QatEmbedding
from qat.adapters.linear import QatLinear
from qat.errors import TrainingError
from qat.numbers.catalog import CATALOG, lookup
from qat.numbers.numerics import find_scales, per_block, to_blocks
from qat.quantizer import InputQuantizer, WeightQuantizer
from qat.scheme import Learn
from qat.training.ops import fake_quantize

every_format = pytest.mark.parametrize("name", CATALOG)
every_mode = pytest.mark.parametrize("learn", ["none", "lsq", "dual_lsq", "refit"])


def test_parts_of_eight_learn_divisors_that_no_export_holds() -> None:
    """FOCUS: with equal divisors it is Dual-LSQ; with others the codes change and the stored scales do not."""
    weight, fmt = normal(6, 64), lookup("nvfp4")
    dual, focus = (WeightQuantizer(fmt, find_scales(weight, fmt), learn) for learn in ("dual_lsq", "focus"))
    assert [tuple(p.shape) for p in focus.parameters()] == [(6, 4), (6, 8)]
    assert torch.equal(focus(weight), dual(weight))
    grads = [torch.autograd.grad(q(weight).square().sum(), list(q.parameters())) for q in (dual, focus)]
    torch.testing.assert_close(grads[1][1].view(6, 4, 2).sum(-1), grads[0][1])
    nn.init.normal_(focus.log_divisor, std=0.3)
    assert torch.equal(focus.quantize(weight).dequantize(torch.bfloat16).float(), focus(weight))
    assert torch.equal(focus.scales().effective(), dual.scales().effective())
    changed = (focus(weight) != dual(weight)).view(6, 8, 8).any(-1)
    assert changed.any() and not changed.all()
    layer = QatLinear.wrap(nn.Linear(64, 6), focus, None)
    layer(normal(3, 64)).square().sum().backward()
    assert focus.log_divisor.grad is not None and focus.log_divisor.grad.any()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_quantizer(name: str, weight: Tensor, learn: Learn, moved: float = 0.0) -> WeightQuantizer:
    """A quantizer whose learned corrections have moved, some of them far beyond the stored dtype's range."""
    quantizer = WeightQuantizer(lookup(name), find_scales(weight, lookup(name)), learn)
    for seed, parameter in enumerate(quantizer.parameters()):
        nn.init.normal_(parameter, std=moved, generator=torch.Generator().manual_seed(seed))
        if moved:
            parameter.data.flatten()[:2] = torch.tensor([-30.0, 30.0])[: parameter.numel()]
    return quantizer


@every_format
@every_mode
def test_the_forward_pass_is_what_an_export_stores(name: str, learn: Learn) -> None:
    weight = normal(6, 256)
    for moved in (0.0, 0.2):
        quantizer = weight_quantizer(name, weight, learn, moved)
        stored = quantizer.quantize(weight)
        assert stored.scales.stored.dtype == lookup(name).scale.storage
        assert torch.equal(quantizer.multiplier().detach(), stored.scales.effective())
        assert torch.equal(quantizer(weight), stored.dequantize(torch.bfloat16).float())
        assert torch.equal(
            quantizer(weight.bfloat16()), quantizer.quantize(weight.bfloat16()).dequantize(torch.bfloat16)
        )
        quantizer.round_bf16 = False
        assert torch.equal(quantizer(weight), stored.dequantize())


@every_mode
def test_learning_modes_own_the_right_parameters(learn: Learn) -> None:
    quantizer = weight_quantizer("nvfp4", normal(4, 64), learn)
    names = {"lsq": ["log_scale"], "dual_lsq": ["log_scale", "log_divisor"]}.get(learn, [])
    assert [n for n, _ in quantizer.named_parameters()] == names
    assert all(p.shape == (4, 4) and not p.any() for p in quantizer.parameters())
    assert (quantizer.divisor() is not None) is (learn == "dual_lsq")
    assert f"learn={learn}" in repr(quantizer) and "nvfp4" in repr(quantizer)


@pytest.mark.parametrize("name", ["int4_g32", "nvfp4", "mxfp4", "int4_g32_asym", "if4", "nf4_g64", "q4_k", "q6_k"])
def test_gradients_reach_weight_scale_and_divisor_through_the_stored_rounding(name: str) -> None:
    weight, fmt = normal(4, 256).requires_grad_(), lookup(name)
    quantizer = weight_quantizer(name, weight.detach(), "dual_lsq")
    quantizer.round_bf16 = False
    grad = normal(4, 256, seed=1)
    found = torch.autograd.grad((quantizer(weight) * grad).sum(), [weight, quantizer.log_scale, quantizer.log_divisor])
    scales = quantizer.scales()
    multiplier, divisor = (t.detach().requires_grad_() for t in (quantizer.multiplier(), quantizer.divisor()))
    y = fake_quantize(weight, name, scales, multiplier=multiplier, divisor=divisor)
    expected = torch.autograd.grad((y * grad).sum(), [weight, multiplier, divisor])
    assert torch.equal(found[0], expected[0])
    latent = quantizer.start  # log corrections are 0, so d scale / d log = scale
    torch.testing.assert_close(found[1], expected[1] * latent)
    torch.testing.assert_close(found[2], expected[2] * latent)
    assert all(g.any() for g in found) and fmt.grid_shape(4, 256) == found[1].shape


def test_lsq_learns_a_better_scale() -> None:
    """From a scale three times too large, descent on the error finds one as good as the search does."""
    weight = normal(8, 64)
    fmt = lookup("int4_g32")
    quantizer = WeightQuantizer(fmt, find_scales(weight * 3, fmt), "lsq")
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    errors = []
    for _ in range(100):
        error = (quantizer(weight) - weight).square().sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    plain = (WeightQuantizer(fmt, find_scales(weight, fmt), "none")(weight) - weight).square().sum().item()
    assert errors[-1] < 1.1 * plain < 0.5 * errors[0]


@every_mode
def test_states_are_restored_exactly(learn: Learn) -> None:
    weight = normal(4, 64)
    for name in ("nvfp4", "int4_g32_asym", "if4"):
        trained = weight_quantizer(name, weight, learn, 0.1)
        fresh = weight_quantizer(name, normal(4, 64, seed=5), learn)
        missing = fresh.load_state_dict(trained.state_dict(), strict=True)
        assert not missing.missing_keys and not missing.unexpected_keys
        assert torch.equal(fresh(weight), trained(weight))


def test_new_scales_forget_learned_corrections() -> None:
    weight = normal(4, 64)
    quantizer = weight_quantizer("int4_g32", weight, "dual_lsq", 0.3)
    quantizer.set_scales(find_scales(weight * 2, lookup("int4_g32")))
    assert not any(p.any() for p in quantizer.parameters())
    assert torch.equal(quantizer.multiplier().detach(), find_scales(weight * 2, lookup("int4_g32")).effective())


def test_a_diverged_weight_is_stored_as_nan() -> None:
    weight = normal(4, 64)
    quantizer = weight_quantizer("int4_g32", weight, "lsq")
    weight[2, 5] = math.nan
    values = to_blocks(quantizer.quantize(weight).dequantize(), lookup("int4_g32"))
    assert values[2, :, 0].isnan().all() and values.isnan().sum() == 32


def input_quantizer(name: str = "mxfp8", consumers: int = 1, amax: float = math.nan) -> InputQuantizer:
    quantizer = InputQuantizer(lookup(name), "vllm", "clipped", "minmax")
    quantizer.consumers = consumers
    quantizer.amax.fill_(amax)
    return quantizer


def test_consumers_of_one_tensor_share_one_result() -> None:
    quantizer = input_quantizer(consumers=3)
    for _ in range(2):
        x = normal(4, 64)
        results = [quantizer(x) for _ in range(3)]
        assert results[1] is results[0] and results[2] is results[0]
        assert quantizer._same.seen(x) is None  # nothing is kept alive afterwards
        assert torch.equal(results[0], input_quantizer()(x))
    assert quantizer(x) is not results[0]


def test_other_tensors_never_get_an_old_result() -> None:
    """Two of three consumers run, so a result stays behind; the next tensor may even have its address and id."""
    quantizer = input_quantizer(consumers=3)
    addresses, ids = set(), set()
    for seed in range(20):
        x = normal(4, 64, seed=seed)
        addresses.add(x.data_ptr())
        ids.add(id(x))
        expected = input_quantizer()(x)
        assert torch.equal(quantizer(x), expected) and torch.equal(quantizer(x), expected)
        del x
    assert len(addresses) < 20 or len(ids) < 20, "the test must see memory used again"


def test_equal_but_different_tensors_are_computed_again() -> None:
    quantizer = input_quantizer(consumers=2)
    x = normal(4, 64)
    assert quantizer(x) is not quantizer(x.clone())


class Attention(nn.Module):
    """q, k and v on one input, with one shared or three separate input quantizers."""

    def __init__(self, shared: bool, name: str = "int8_token") -> None:
        super().__init__()
        torch.manual_seed(0)
        quantizer = input_quantizer(name, 3 if shared else 1)
        self.projections = nn.ModuleList()
        for _ in range(3):
            linear = nn.Linear(64, 64)
            weight = WeightQuantizer(lookup("int4_g32"), find_scales(linear.weight, lookup("int4_g32")), "lsq")
            own = quantizer if shared else copy.deepcopy(quantizer)
            self.projections.append(QatLinear.wrap(linear, weight, own))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x) * 3
        q, k, v = (projection(x) for projection in self.projections)
        return (q @ k.T).softmax(-1) @ v


def run(model: nn.Module, checkpointed: bool = False, steps: int = 3) -> list[Tensor]:
    found = []
    for seed in range(steps):
        x = normal(6, 64, seed=seed).requires_grad_()
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        y.square().sum().backward()
        assert x.grad is not None
        found += [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found


def test_the_cache_changes_no_value_and_no_gradient() -> None:
    shared, separate = run(Attention(shared=True)), run(Attention(shared=False))
    assert len(shared) == len(separate) > 20
    for a, b in zip(shared, separate, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(shared[:1], separate[:1], strict=True))


def test_the_cache_survives_activation_checkpointing() -> None:
    for a, b in zip(run(Attention(shared=True)), run(Attention(shared=True), checkpointed=True), strict=True):
        assert torch.equal(a, b)


def test_an_input_quantizer_with_a_cached_result_can_be_copied() -> None:
    quantizer = input_quantizer(consumers=2)
    x = normal(4, 64)
    quantizer(x)
    again = copy.deepcopy(quantizer)
    assert torch.equal(again(x), input_quantizer()(x))


@pytest.mark.parametrize("name", ["nvfp4", "fp8_tensor", "int8_tensor"])
def test_formats_with_a_static_part_must_be_calibrated(name: str) -> None:
    quantizer = input_quantizer(name)
    assert quantizer.needs_calibration
    with pytest.raises(TrainingError, match=rf"{name} inputs need a calibrated range; run qat\.calibrate"):
        quantizer(normal(4, 64))
    quantizer.observe()
    x = normal(4, 64)
    assert quantizer(x) is x  # unchanged while observing
    quantizer.freeze()
    assert quantizer.amax == x.abs().amax()
    assert not torch.equal(quantizer(x), x)


@pytest.mark.parametrize("name", ["mxfp4", "int8_token", "fp8_token"])
def test_dynamic_formats_need_no_calibration(name: str) -> None:
    quantizer = input_quantizer(name)
    assert not quantizer.needs_calibration
    quantizer.observe()
    quantizer(normal(4, 64))
    quantizer.freeze()
    assert quantizer.amax.isnan()
    assert quantizer(normal(4, 64)).isfinite().all()
    assert name in repr(quantizer)


def test_a_shared_input_is_observed_once() -> None:
    """A moving average must not move three times because three layers read the tensor."""
    quantizer = InputQuantizer(lookup("int8_tensor"), "vllm", "clipped", "moving_average")
    quantizer.consumers = 3
    quantizer.observe()
    for top in (1.0, 2.0):
        x = torch.full((2, 2), top)
        for _ in range(3):
            quantizer(x)
    quantizer.freeze()
    assert quantizer.amax.item() == pytest.approx(1.01)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_keeps_its_parameters_and_quantizes_both_operands(bias: bool) -> None:
    linear = nn.Linear(64, 32, bias=bias).eval()
    fmt = lookup("int4_g32")
    layer = QatLinear.wrap(linear, WeightQuantizer(fmt, find_scales(linear.weight, fmt), "none"), input_quantizer())
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.training and (layer.in_features, layer.out_features) == (64, 32)
    assert {"weight", *(["bias"] if bias else [])} <= set(layer.state_dict())
    x = normal(5, 64)
    weight = layer.weight_quantizer.quantize(linear.weight).dequantize(torch.bfloat16).float()
    assert torch.equal(layer(x), functional.linear(input_quantizer()(x), weight, linear.bias))
    layer.input_quantizer = None
    assert torch.equal(layer(x), functional.linear(x, weight, linear.bias))


def test_an_embedding_quantizes_its_table_and_keeps_its_padding() -> None:
    embedding = nn.Embedding(50, 64, padding_idx=3)
    fmt = lookup("int8_channel")
    layer = QatEmbedding.wrap(embedding, WeightQuantizer(fmt, find_scales(embedding.weight, fmt), "lsq"))
    assert layer.weight is embedding.weight and layer.padding_idx == 3
    ids = torch.tensor([[1, 3], [7, 1]])
    table = layer.weight_quantizer.quantize(layer.weight).dequantize(torch.bfloat16).float()
    assert torch.equal(layer(ids), table[ids])
    layer(ids).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad[1].eq(2).all()
    assert not layer.weight.grad[3].any() and not layer.weight.grad[0].any()


def test_bf16_rounding_happens_only_where_it_changes_something() -> None:
    weight = normal(4, 64)
    for name, changes in (("nvfp4", False), ("int4_g32", True)):
        quantizer = weight_quantizer(name, weight, "none")
        rounded = quantizer(weight)
        quantizer.round_bf16 = False
        assert torch.equal(rounded, quantizer(weight)) is not changes


def test_scales_are_per_block_of_the_weight() -> None:
    """Moving one learned scale changes the values of that block only."""
    weight = normal(4, 64)
    quantizer = weight_quantizer("int4_g32", weight, "dual_lsq")
    before = quantizer(weight).detach()
    with torch.no_grad():
        quantizer.log_scale[1, 1] = 0.5
    changed = (quantizer(weight).detach() != before).view(4, 2, 32).any(-1)
    assert changed.nonzero().tolist() == [[1, 1]]
    with torch.no_grad():
        quantizer.log_divisor[2, 0] = 0.5
    changed = (quantizer(weight).detach() != before).view(4, 2, 32).any(-1)
    assert changed.nonzero().tolist() == [[1, 1], [2, 0]]
    assert per_block(quantizer.start).shape == (4, 1, 2, 1)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_in_training_computes_what_it_computes_without_gradients(autocast: bool) -> None:
    """Two code paths, one meaning: also under autocast, which must reach the input and not the scales."""
    linear = nn.Linear(64, 48)
    quantizer = weight_quantizer("int4_g32", linear.weight.detach(), "dual_lsq", moved=0.1)
    layer, x = QatLinear.wrap(linear, quantizer, None), normal(5, 64, seed=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trained = layer(x)
        with torch.no_grad():
            evaluated = layer(x)
    assert trained.requires_grad and trained.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(trained, evaluated)
    trained.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("name", ["nvfp4", "int4_g32_asym", "mxfp4", "if4", "fp8_b128", "q4_k", "q6_k"])
def test_what_a_refit_found_is_multiplied_with_stored_and_restored(name: str) -> None:
    weight, fmt = normal(64, 256), lookup(name)
    quantizer = WeightQuantizer(fmt, find_scales(weight * 1.4, fmt), "refit")
    before = (quantizer(weight) - weight).square().sum()
    buffers = {key: tensor.data_ptr() for key, tensor in quantizer.named_buffers()}
    quantizer.refit(weight)
    assert (quantizer(weight) - weight).square().sum() < before
    assert buffers == {key: tensor.data_ptr() for key, tensor in quantizer.named_buffers()}  # in place
    assert torch.equal(quantizer.quantize(weight).dequantize(torch.bfloat16).float(), quantizer(weight))
    again = WeightQuantizer(fmt, find_scales(normal(64, 256, seed=4), fmt), "refit")
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(weight), quantizer(weight))


def test_a_learned_range_finds_the_clip_that_loses_least() -> None:
    """One outlier stretches the calibrated range; descent on the error comes as near as a search over ranges."""
    x, fmt = normal(64, 64), lookup("int8_tensor")
    x[0, 0] = 60.0
    x.requires_grad_()
    quantizer = InputQuantizer(fmt, "vllm", "clipped", "minmax", learn=True)
    quantizer.amax.fill_(float(x.detach().abs().amax()))

    def error() -> Tensor:
        return (quantizer(x)[1:] - x[1:]).square().sum()

    optimizer = torch.optim.Adam([quantizer.log_range], lr=0.05, betas=(0.9, 0.95))
    first = float(error().detach())
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 if step < 120 else 0.005
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    found, best = float(error().detach()), first
    for ratio in torch.logspace(-3, 0, 200).tolist():
        other = InputQuantizer(fmt, "vllm", "clipped", "minmax")
        other.amax.fill_(float(quantizer.amax) * ratio)
        best = min(best, float((other(x)[1:] - x[1:]).square().sum().detach()))
    assert found < first and found < 1.3 * best
    fixed = InputQuantizer(fmt, "vllm", "clipped", "minmax")
    fixed.amax.fill_(float(quantizer.limit))
    assert torch.equal(fixed(x), quantizer(x))  # what an export stores of it
    with torch.no_grad():
        assert torch.equal(fixed(x), quantizer(x))
