"""The step `hadamard`: what the model computes stays, outliers cost less, later steps work on what was folded."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from qat.errors import ConfigError, FormatError, UnsupportedError
from qat.init.calibration import calibrate
from qat.modes import dense
from qat.numbers.hadamard import BlockHadamard
from qat.scheme import Rule, Scheme
from qat.sites import weights
from qat.surgery import apply, report, rotate_inputs
from tests.qat.init.test_smooth import uneven
from tests.qat.test_surgery import MOE, batches, build, ids, logits, refused, rules, usual

GPT2: dict[str, Any] = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0}
EVERYTHING = Rule(match="re:.*(c_attn|c_proj|c_fc|_proj)", weight="mxfp4", input="mxfp4")
REST = Rule(match="*", skip="the rest")
SIXTEEN = {"kind": "hadamard", "size": 16}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {}),
    ("gemma3_text", {"query_pre_attn_scalar": 32}),
    ("gpt2", GPT2),
]


def initialised(model: nn.Module, *init: Any, **fields: Any) -> nn.Module:
    scheme = Scheme(rules=(EVERYTHING, REST), init=init, learn="none", **fields)
    calibrate(apply(model, scheme, defer_init=True), batches(), scheme)
    return model


def outlying() -> nn.Module:
    """Channels of every block that stand out, as no smoothing has spread."""
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[5::40] = 12.0
    return model


@pytest.mark.parametrize(("kind", "config"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_what_the_unquantized_model_computes_stays(kind: str, config: dict[str, Any]) -> None:
    model = build(kind, **config)
    before, originals = logits(model), dict(model.state_dict())
    kept = {name: tensor.clone() for name, tensor in originals.items()}
    initialised(model, "hadamard")
    with dense(model, inputs=True):
        torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * float(before.abs().max()))
    for site in weights(model).values():
        assert site.input is not None and site.input.transforms == (BlockHadamard(32),)
        name = f"{site.module}.{site.slot}"
        original = kept[name].t() if site.owner.TRANSPOSED else kept[name]
        torch.testing.assert_close(BlockHadamard(32)(site.weight), original, rtol=0, atol=1e-6)


def test_outliers_cost_less_and_error_compensation_works_on_the_folded_weights() -> None:
    exact = logits(outlying())

    def error(*init: Any) -> float:
        return float((logits(initialised(outlying(), *init)) - exact).square().mean())

    plain, rotated, compensated = error(), error("hadamard"), error("hadamard", "gptq")
    assert rotated < 0.8 * plain and compensated < rotated


def test_smoothing_goes_before() -> None:
    model = uneven("llama")
    before = logits(model)
    initialised(model, "smooth", SIXTEEN)
    with dense(model, inputs=True):
        torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * float(before.abs().max()))


def test_ranges_and_squares_are_those_of_the_rotated_inputs() -> None:
    model = build("llama")
    seen: list[Tensor] = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    largest = max(float(BlockHadamard(16)(x).abs().max()) for x in seen)
    scheme = usual("nvfp4", "nvfp4").model_copy(update={"init": Scheme(rules=(REST,), init=[SIXTEEN]).init})
    calibrate(apply(model, scheme, defer_init=True), batches(), scheme)
    assert float(model.model.layers[0].self_attn.q_proj.input_quantizer.amax) == pytest.approx(largest, rel=1e-5)


def test_a_saved_student_comes_back_and_a_second_run_of_the_step_changes_nothing() -> None:
    model = initialised(build("llama"), "hadamard", "gptq")
    scheme = Scheme(rules=(EVERYTHING, REST), init=("hadamard", "gptq"), learn="none")
    other = rotate_inputs(apply(build("llama", initializer_range=0.3), scheme, defer_init=True), scheme)
    other.load_state_dict(model.state_dict())
    expected = logits(model)
    assert torch.equal(logits(other), expected)
    latent = {path: site.weight.clone() for path, site in weights(other).items()}
    only = scheme.model_copy(update={"init": Scheme(rules=(REST,), init=["hadamard"]).init})
    calibrate(other, batches(), only)
    assert all(torch.equal(site.weight, latent[path]) for path, site in weights(other).items())


def test_gradients_reach_what_is_before() -> None:
    model = initialised(build("llama"), "hadamard")
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids()).logits.float().square().mean().backward()
    gradient = model.model.layers[0].input_layernorm.weight.grad
    assert gradient is not None and bool(gradient.abs().gt(0).all())


def test_rounding_to_nearest_is_not_rotated_and_coverage_says_what_is() -> None:
    scheme = usual("mxfp4", "mxfp4").model_copy(update={"init": Scheme(rules=(REST,), init=["hadamard"]).init})
    assert {m.rotation for m in report(build(), scheme).modules if m.weight} == {32}
    assert {m.rotation for m in report(build(), scheme.rtn()).modules} == {0}
    assert report(apply(build(), scheme)).by_format()[0][1] == "mxfp4"
    calibrate(model := apply(build(), scheme), batches(), scheme)
    assert report(model).by_format()[0][1] == "mxfp4 rotated by 32"


@pytest.mark.parametrize(
    ("init", "says"),
    [
        (["hadamard", "smooth"], "`smooth` after it"),
        (["gptq", "hadamard"], "`gptq` before it"),
        (["hadamard", "hadamard"], "it twice"),
        ([{"kind": "hadamard", "size": 24}], "not 24"),
    ],
)
def test_lists_that_cannot_be_are_refused(init: list[Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Scheme(rules=(REST,), init=init)
    with pytest.raises(ValidationError):
        Rule(match="*", weight="mxfp4", input="mxfp4", init=init)


def test_layers_that_cannot_be_rotated_are_named_before_anything_changes() -> None:
    wide = [{"kind": "hadamard", "size": 256}]
    assert "blocks of 256 do not divide a width of 128" in refused(
        usual("mxfp4", "mxfp4", init=wide), error=FormatError
    )
    assert "no rule has an `input` format" in refused(usual("mxfp4", init=["hadamard"]), error=ConfigError)
    experts = rules(("*.experts.*", "mxfp4", "mxfp4"), ("*", None), init=["hadamard"])
    assert "fused experts" in refused(experts, build("qwen3_moe", **MOE), UnsupportedError)
    tied = rules(("model.embed_tokens", "mxfp4"), ("*", "mxfp4", "mxfp4"), init=["hadamard"], tied="share")
    assert "one tensor (tied)" in refused(tied, build(tie_word_embeddings=True))
    apart = Scheme(
        rules=(Rule(match="*.q_proj", weight="mxfp4", input="mxfp4", init=[SIXTEEN]), EVERYTHING, REST),
        init=["hadamard"],
    )
    assert "rotated by 16" in refused(apart)
