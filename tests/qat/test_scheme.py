"""Schemes as people write them: which rule speaks of a module, and what a wrong rule is told."""

import re
from typing import Any

import pytest
import yaml

from qat.config import validate
from qat.errors import ConfigError
from qat.families import DEFAULT
from qat.init.gptq import Gptq
from qat.init.scales import ScaleSearch
from qat.numbers.catalog import CATALOG
from qat.scheme import Rule, Scheme, upgraded


def scheme(*rules: dict[str, Any], **fields: Any) -> Scheme:
    return validate(Scheme, {"rules": list(rules), **fields}, "job.yaml")


def refused(*rules: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        scheme(*rules, **fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
        ("*_proj", "model.layers.0.self_attn.q_proj", True),  # a star crosses dots
        ("*.mlp.*", "model.layers.10.mlp.experts.3.w1", True),
        ("*.self_attn.[qk]_proj", "model.layers.0.self_attn.k_proj", True),
        ("*.self_attn.[qk]_proj", "model.layers.0.self_attn.v_proj", False),
        ("*.layers.1.*", "model.layers.11.mlp.up_proj", False),
        ("MODEL.*", "model.x", False),
        ("*", "", True),
        (r"re:model\.layers\.\d+\.mlp\..*", "model.layers.12.mlp.up_proj", True),
        (r"re:layers", "model.layers.0", False),  # the whole path, not a part of it
        (r"re:model", "model.layers.0", False),
        (r"re:(?!.*lm_head).*", "lm_head", False),
    ],
)
def test_patterns_match_whole_paths(pattern: str, path: str, expected: bool) -> None:
    assert Rule(match=pattern, weight="int4_g32").matches(path) is expected


def test_the_first_match_wins() -> None:
    found = scheme(
        {"match": "*.v_proj", "weight": "int8_channel"},
        {"match": "*_proj", "weight": "int4_g32", "input": "int8_token"},
        {"match": "*", "skip": "norms and embeddings"},
    )
    assert found.rule_for("a.v_proj") is found.rules[0]
    assert found.rule_for("a.q_proj") is found.rules[1]
    assert found.rule_for("embed") is found.rules[2]
    assert scheme({"match": "x", "skip": "y"}).rule_for("z") is None


@pytest.mark.parametrize("name", CATALOG)
def test_every_format_can_be_a_weight_and_all_but_2d_blocks_an_input(name: str) -> None:
    if CATALOG[name].prompt:
        rule = {"match": "*", "weight": "int4_g32", "input": name}
        assert scheme(rule, activation_rule="ascend").rules[0].input == name
        return
    if CATALOG[name].is_columnwise:
        for rule in ({"weight": name}, {"weight": "int4_g32", "input": name}):
            assert f"{name} has a scale per column, which only the `key`" in refused({"match": "*", **rule})
        cached = {"match": "*", "key": name, "value": name}
        assert f"{name} caches need activation_rule: ascend, not vllm" in refused(cached)
        assert scheme(cached, activation_rule="ascend").rules[0].key == name
        return
    assert scheme({"match": "*", "weight": name}).rules[0].weight == name
    if CATALOG[name].block[0] > 1:
        assert "2-D blocks, which only weights can have" in refused({"match": "*", "weight": name, "input": name})
    else:
        assert scheme({"match": "*", "weight": "int4_g32", "input": name}).rules[0].input == name


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (
            {"match": "*"},
            "rule '*' needs exactly one of formats (`weight: FORMAT`, or `key` and `value`) and `skip:",
        ),
        ({"match": "*", "weight": "int4_g32", "skip": "both"}, "needs exactly one of"),
        (
            {"match": "*", "skip": "why", "input": "int8_token"},
            "has no `weight` format, so it takes no `input`",
        ),
        ({"match": "*", "key": "fp8_tensor"}, "must give both `key` and `value` a format"),
        (
            {"match": "*", "weight": "nvfp4", "init": ["smooth"]},
            "smooth concerns the whole model; put it into scheme.init",
        ),
        ({"match": "*", "weight": "nvpf4"}, "no format called 'nvpf4'; nearest: nvfp4, nvint4, nf4_g64"),
        ({"match": "*", "weight": "nvfp4", "input": "int8"}, "no format called 'int8'; nearest: "),
        ({"match": "re:(", "weight": "nvfp4"}, "rule 're:(' is not a valid regular expression"),
        ({"match": "*", "wieght": "nvfp4"}, "unknown key 'rules.0.wieght' (value 'nvfp4'); nearest: weight"),
        ({"weight": "nvfp4"}, "rules.0.match: required, but not given"),
    ],
)
def test_wrong_rules_say_what_is_wrong(rule: dict[str, Any], told: str) -> None:
    message = refused(rule)
    assert message.startswith("job.yaml: ") and told in message


def test_unknown_formats_are_answered_with_three_names() -> None:
    names = refused({"match": "*", "weight": "int4_g63"}).split("nearest: ")[1].split(" (all")[0].split(", ")
    assert len(names) == 3 and set(names) <= set(CATALOG) and names[0] == "int4_g64"


@pytest.mark.parametrize(
    ("field", "bad", "allowed"),
    [
        ("learn", "yes", "'none', 'lsq', 'dual_lsq', 'focus' or 'refit'"),
        ("observer", "max", "'minmax', 'moving_average', 'percentile', 'mse' or 'kl'"),
        ("estimator", "dge", "'ste' or 'clipped'"),
        ("tied", "split", "'error', 'share' or 'untie'"),
        ("activation_rule", "trt", "'vllm'"),
    ],
)
def test_choices_list_what_is_allowed(field: str, bad: str, allowed: str) -> None:
    message = refused({"match": "*", "skip": "x"}, **{field: bad})
    assert message.startswith(f"job.yaml: {field}: ") and allowed in message and repr(bad) in message


def test_what_engines_fuse_is_fused_by_default() -> None:
    assert scheme({"match": "*", "skip": "x"}).fused is None
    assert ("q_proj", "k_proj", "v_proj") in DEFAULT.fused and ("gate_proj", "up_proj") in DEFAULT.fused
    assert scheme({"match": "*", "skip": "x"}, fused=[["a", "b"]]).fused == (("a", "b"),)


@pytest.mark.parametrize(
    ("old", "steps"),
    [
        ({"start": "mse"}, "[{kind: scales, search: mse}]"),
        ({"start": "amax"}, "[]"),
        ({"weighted_start": False}, "[{kind: scales, weighted: false}]"),
        ({"smooth": 0.5}, "[smooth, scales]"),
        ({"smooth": 0.25, "compensate": "gptq"}, "[{kind: smooth, strength: 0.25}, gptq]"),
    ],
)
def test_old_keys_are_answered_with_the_steps_that_replace_them(old: dict[str, Any], steps: str) -> None:
    rule = {"match": "*", "weight": "int4_g32"}
    message = refused(rule, **old)
    assert message == f"job.yaml: {', '.join(sorted(old))} became `init`, a list of steps; write init: {steps}"
    written = yaml.safe_load(message.rpartition("init: ")[2])
    assert scheme(rule, init=written) == Scheme(**upgraded({"rules": (rule,), **old}))


def test_rules_may_have_an_initialisation_and_learning_of_their_own() -> None:
    own = scheme({"match": "a", "weight": "int4_g32", "init": ["gptq"]}, {"match": "*", "weight": "int4_g32"})
    assert own.init_of("a", "") == (Gptq(),) and own.init_of("b", "") == (ScaleSearch(),)
    assert own.rtn().init_of("a", "") == ()


def test_the_weights_that_blocks_are_compared_with_must_still_be_there() -> None:
    with pytest.raises(ValueError, match=re.escape("gptq before reconstruct must be {kind: gptq, sequential: true}")):
        scheme({"match": "*", "weight": "int4_g32"}, init=["gptq", "reconstruct"])
    both = scheme({"match": "*", "weight": "int4_g32"}, init=[{"kind": "gptq", "sequential": True}, "reconstruct"])
    assert [step.kind for step in both.init] == ["gptq", "reconstruct"]


def test_learning_modes_that_formats_do_not_have_are_refused() -> None:
    for learn, names in (("focus", ("int4_channel", "fp8_b128", "int8_tensor")), ("dual_lsq", ())):
        for name in names:
            message = refused({"match": "*", "weight": name}, learn=learn)
            assert "parts of 8, which" in message and name in message
    message = refused({"match": "*", "weight": "nvfp4", "input": "nvfp4"}, learn_inputs="true")
    assert "no rule has an input format with one scale per tensor" in message and "nvfp4" in message
    static = {"match": "*", "weight": "fp8_tensor", "input": "fp8_tensor"}
    assert "activation_rule: vllm" in refused(static, learn_inputs="true", activation_rule="compressed_tensors")
    mixed = {"match": "*", "weight": "int8_channel", "input": "int8_mix"}
    assert "int8_mix inputs need activation_rule: ascend, not vllm" in refused(mixed)
    for weight, given, wanted in (("q4_k", "q8_0", "q8_k"), ("q4_0", "q8_k", "q8_0"), ("q8_0", "int8_token", "q8_0")):
        pair = {"match": "*", "weight": weight, "input": given}
        message = f"inputs of {weight} weights to {wanted}, not {given}; write `input: {wanted}` beside"
        assert message in refused(pair, activation_rule="llama_cpp")
        right = {**pair, "input": wanted}
        scheme(right, activation_rule="llama_cpp")
        fallback = {"level": "L1", "weight": weight, "input": given}
        assert message in refused(right, activation_rule="llama_cpp", fallback=fallback)
    assert "int8_mix rounds prompts and answers differently" in refused({"match": "*", "weight": "int8_mix"})
    affine = {"match": "*", "weight": "int8_channel", "input": "int8_tensor_asym"}
    assert "has two ends" in refused(affine, learn_inputs="true")


def test_npus_multiply_integers_as_they_are() -> None:
    """Weights are rounded to BF16 where a product takes BF16 weights."""
    rule = {"match": "*", "weight": "int8_channel", "input": "int8_token"}
    for activation_rule, exact in {"vllm": False, "ascend": True, "ascend_310p": True}.items():
        found = scheme(rule, activation_rule=activation_rule)
        assert found.rounds_bf16("int8_channel", "int8_token") is not exact
    npu = scheme(rule, activation_rule="ascend")
    assert npu.rounds_bf16("int8_channel", None) and npu.rounds_bf16("mxfp4", "mxfp8")
    assert not scheme(rule, activation_rule="ascend", round_bf16=False).rounds_bf16("int8_channel", None)


@pytest.mark.parametrize(
    ("pair", "more", "told"),
    [
        (("int8_channel", None), {"round_bf16": False}, "but the scheme has int8_channel with dense inputs"),
        (("int4_channel", "int4_token"), {"round_bf16": False}, "int4_channel with int4_token inputs"),
        (("mxfp8", "mxfp8"), {"round_bf16": False}, "INT8 products alone.*mxfp8 with mxfp8 inputs"),
    ],
)
def test_fp16_models_are_int8_products(pair: tuple[str, str | None], more: dict[str, Any], told: str) -> None:
    rule = {"match": "*", "weight": pair[0], **({"input": pair[1]} if pair[1] else {})}
    with pytest.raises(ValueError, match=told):
        scheme(rule, activation_rule="ascend_310p", **more)
    able = {"match": "*", "weight": "int8_channel", "input": "int8_token"}
    cached = {"match": "*.self_attn", "key": "fp8_token", "value": "fp8_token"}
    with pytest.raises(ValueError, match="no quantized caches; leave fp8_token out"):
        scheme(cached, able, activation_rule="ascend_310p")
