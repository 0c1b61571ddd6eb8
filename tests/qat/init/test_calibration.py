"""Calibration: ranges, weighted and compensated starts, and the inputs they are fitted to."""

import typing

import pytest
import torch
from torch import Tensor, nn

from qat.errors import FormatError
from qat.init import gptq
from qat.init.calibration import calibrate, initialise, input_products, observe
from qat.init.progressive import Progressive
from qat.init.scales import initial_scales
from qat.init.step import InitStep
from qat.modes import dense
from qat.numbers.catalog import lookup
from qat.numbers.numerics import fake_quantize
from qat.numbers.scale import broken
from qat.scheme import Rule, Step
from qat.sites import weights
from qat.surgery import apply
from tests.qat.test_surgery import LAYERS, batches, build, logits, rules, usual

STEPS = typing.get_args(typing.get_args(Step)[0])


def inputs_of(model: nn.Module, path: str) -> Tensor:
    """Everything the layer at `path` reads over the calibration batches."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("weighted", [True, False])
def test_calibration_sees_the_unquantized_model_and_weighs_by_it(weighted: bool) -> None:
    scheme = usual("nvfp4", "nvfp4", weighted_start=weighted)
    model, original = apply(build(), scheme), build()
    global_scales = {path: layer.quantizer.global_scale.clone() for path, layer in weights(model).items()}
    calibrate(model, batches(), scheme)
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        layer, seen = weights(model)[path], inputs_of(original, path)
        assert layer.input.amax == seen.abs().amax()
        importance = seen.square().mean(dim=0) if weighted else None
        expected = initial_scales(layer.weight.detach(), lookup("nvfp4"), "sweep", global_scales[path], importance)
        agree = layer.quantizer.start == expected.effective()
        assert agree.float().mean() > 0.99  # sums in another order may flip a tie
        assert torch.equal(layer.quantizer.global_scale, global_scales[path])
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert logits(model).isfinite().all()


def test_weighted_starts_lower_the_error_of_the_outputs() -> None:
    errors = []
    for weighted in (False, True):
        scheme = usual("int3_g64", weighted_start=weighted)
        model, original = apply(build(), scheme), build()
        with torch.no_grad():
            for m in (model, original):  # norms that excite some channels ten times more than others
                m.model.layers[0].input_layernorm.weight[::16] = 10.0
        calibrate(model, batches(), scheme)
        layer, x = (
            weights(model)["model.layers.0.self_attn.q_proj"],
            inputs_of(original, "model.layers.0.self_attn.q_proj"),
        )
        errors.append(((layer.value() - layer.weight) @ x.T).square().mean().item())
    assert errors[1] < 0.8 * errors[0]


def test_deferred_starts_are_found_by_calibration_for_linears_and_embeddings() -> None:
    scheme = rules(("*.embed_tokens", "int4_g64"), (LAYERS, "int4_g64"), ("*", None), weighted_start=False)
    searched, deferred = apply(build(), scheme), apply(build(), scheme, defer_init=True)
    paths = ("model.embed_tokens", "model.layers.0.mlp.up_proj")
    starts = [[weights(m)[path].quantizer.start for path in paths] for m in (searched, deferred)]
    assert not any(torch.equal(a, b) for a, b in zip(*starts, strict=True))
    calibrate(deferred, batches(), scheme)
    assert all(torch.equal(weights(deferred)[p].quantizer.start, s) for p, s in zip(paths, starts[0], strict=True))


def test_calibration_that_fails_leaves_no_hooks_and_dead_layers_are_named() -> None:
    scheme = usual("nvfp4", "nvfp4")
    model = apply(build(), scheme)
    with pytest.raises(ValueError, match="tokenizer"):
        calibrate(model, (_raise() for _ in range(1)), scheme)
    assert not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    with pytest.raises(FormatError, match=r"input of model\.layers\.1\.mlp\.(gate|up)_proj: no non-zero activations"):
        calibrate(model, batches(), scheme)


def test_starts_are_found_in_float32_whatever_the_caller_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = usual("int4_g64", compensate="gptq")
    starts = []
    for autocast in (False, True):
        model = apply(build(), scheme)
        text, mean_square = list(batches()), observe(model, batches())
        products = input_products(model, text)
        monkeypatch.setattr(gptq, "input_products", lambda *_, made=products: made)  # made before, in float32
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            initialise(model, text, scheme, mean_square)
        starts.append({path: layer.weight.detach() for path, layer in weights(model).items()})
    assert all(torch.equal(starts[0][path], starts[1][path]) for path in starts[0])


def test_compensation_meets_the_inputs_that_are_served() -> None:
    """The products are those of the quantized inputs; the layers before are not quantized."""
    scheme = usual("nvfp4", "nvfp4", compensate="gptq")
    model, original = apply(build(), scheme), build()
    observe(model, batches())
    found = input_products(model, batches())
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        seen = weights(model)[path].input.quantize(inputs_of(original, path))
        torch.testing.assert_close(found[path], seen.T @ seen / len(seen))
    assert found["model.layers.0.self_attn.q_proj"] is found["model.layers.0.self_attn.v_proj"]


@pytest.mark.parametrize("tied", [False, True])
def test_compensation_in_parts_is_compensation_at_once(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """All products of a large model do not fit beside it: a block's at a time give the same bits."""
    scheme = usual("int4_g64", "int8_token", compensate="gptq")
    if tied:
        scheme = scheme.model_copy(update={"rules": (Rule(match="*", weight="int4_g64"),), "tied": "share"})
    starts, sizes = [], []

    def counted(*arguments: object) -> dict[str, Tensor]:
        found = input_products(*arguments)  # type: ignore[arg-type]  # passed on as given
        sizes[-1].append(4 * sum(gram.numel() for gram in {id(gram): gram for gram in found.values()}.values()))
        return found

    monkeypatch.setattr(gptq, "input_products", counted)
    for limit in (1 << 40, 1):
        sizes.append([])
        model = build()
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        apply(model, scheme)
        squares = observe(model, batches())
        whole = {id(square): 4 * len(square) ** 2 for square in squares.values()}
        monkeypatch.setattr(gptq, "PRODUCTS", limit)
        calibrate(model, batches(), scheme)
        starts.append({path: (layer.weight, layer.quantizer.start) for path, layer in weights(model).items()})
    assert sizes[0] == [sum(whole.values())]
    assert len(sizes[1]) == 2 + tied and max(sizes[1]) < sizes[0][0] and sum(sizes[1]) == sizes[0][0]
    for path, pair in starts[0].items():
        assert all(torch.equal(a, b) for a, b in zip(pair, starts[1][path], strict=True)), path


def _raise() -> dict[str, Tensor]:
    raise ValueError("tokenizer")


def test_starts_follow_the_scheme() -> None:
    for start in ("amax", "mse", "auto"):
        layer = weights(apply(build(), usual("int4_g64", start=start)))["model.layers.0.mlp.up_proj"]
        expected = initial_scales(layer.weight.detach(), lookup("int4_g64"), start).effective()
        assert torch.equal(layer.quantizer.start, expected)
    plain = weights(apply(build(), usual("int4_g64", start="amax", learn="none", round_bf16=False)))
    layer = plain["model.layers.0.mlp.up_proj"]
    assert torch.equal(layer.value(), fake_quantize(layer.weight, lookup("int4_g64")))


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_every_step_leaves_scales_to_train_from(step: type[InitStep]) -> None:
    """And one for the whole model that trains no weights leaves alone what the unquantized model computes."""
    scheme = usual("nvfp4", "int8_token").model_copy(update={"init": (step(),)})
    model = apply(build(), scheme)
    with dense(model, inputs=True):
        before = logits(model)
    calibrate(model, batches(), scheme)
    for site in weights(model).values():
        assert not broken(site.quantizer.scales().stored, site.quantizer.format.scale)
    with dense(model, inputs=True):
        after = logits(model)
    assert logits(model).isfinite().all()
    if step.WHOLE_MODEL and step is not Progressive:
        torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * float(before.abs().max()))
