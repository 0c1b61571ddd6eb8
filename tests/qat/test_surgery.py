"""Applying a scheme to real (tiny, random) models: coverage, sharing, tying, calibration, and the way back."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from qat.adapters import candidates
from qat.adapters.embedding import QatEmbedding
from qat.adapters.linear import QatLinear
from qat.errors import ConfigError, FormatError, UnsupportedError
from qat.init.calibration import calibrate
from qat.numbers.catalog import lookup
from qat.numbers.numerics import find_scales
from qat.quantizer import InputQuantizer, WeightQuantizer
from qat.scheme import Rule, Scheme, upgraded
from qat.sites import weights
from qat.surgery import apply, plan, report, trained_together

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "num_hidden_layers": 1}
LAYERS = "model.layers.*_proj"


def build(kind: str = "llama", **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **overrides}))
    return model.eval()


def rules(*given: tuple[str, str | None] | tuple[str, str, str], **fields: Any) -> Scheme:
    """('pattern', 'weight format'[, 'input format']) or ('pattern', None) to skip."""
    made = []
    for pattern, weight, *rest in given:
        skip = "not quantized here" if weight is None else None
        made.append(Rule(match=pattern, weight=weight, input=rest[0] if rest else None, skip=skip))
    return Scheme(**upgraded({"rules": tuple(made), **fields}))


def usual(weight: str = "int4_g64", input: str | None = None, **fields: Any) -> Scheme:
    body = (LAYERS, weight) if input is None else (LAYERS, weight, input)
    return rules(body, ("*", None), **fields)


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(seed))


def batches(count: int = 3) -> Iterator[dict[str, Tensor]]:
    return ({"input_ids": ids(seed)} for seed in range(count))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def refused(scheme: Scheme, model: nn.Module | None = None, error: type[Exception] = ConfigError) -> str:
    model = build() if model is None else model
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(error) as caught:
        apply(model, scheme)
    assert before == {n: type(m) for n, m in model.named_modules()}, "a refused scheme leaves the model as it was"
    return str(caught.value)


@pytest.mark.parametrize("name", ["int4_g64", "nvfp4", "mxfp4", "int8_channel", "int4_g32_asym", "fp8_b128"])
def test_the_quantized_model_equals_one_with_the_stored_weights(name: str) -> None:
    model, stored = build(), build()
    apply(model, usual(name))
    found = weights(model)
    assert len(found) == 14
    with torch.no_grad():
        for path, layer in found.items():
            weight = layer.quantizer.quantize(layer.weight).dequantize(torch.bfloat16)
            stored.get_submodule(path).weight.copy_(weight)
    assert torch.equal(logits(model), logits(stored))
    assert not torch.equal(logits(model), logits(build()))


def test_parameters_keep_their_identity_and_names() -> None:
    model = build()
    before = dict(model.named_parameters())
    assert apply(model, usual()) is model
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all("weight_quantizer" in name for name in set(after) - set(before))
    assert not model.training


def test_every_quantized_layer_learns() -> None:
    model = apply(build(), usual("nvfp4", "nvfp4"))
    calibrate(model, batches(), usual("nvfp4", "nvfp4"))
    model(input_ids=ids(), labels=ids()).loss.backward()
    for path, layer in weights(model).items():
        for name, parameter in layer.owner.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), f"{path}.{name}"


def test_an_unmatched_module_is_named() -> None:
    message = refused(rules((LAYERS, "int4_g64"), ("lm_head", None)))
    assert message.startswith("no rule of the scheme matches model.embed_tokens; give them a format, or `skip:`")
    message = refused(rules(("lm_head", None)))
    assert message.endswith("give them a format, or `skip:` with a reason") and "and 11 more" in message


def test_idle_and_shadowed_rules_are_told_apart() -> None:
    idle = refused(rules(("*.w1", "int4_g64"), (LAYERS, "int4_g64"), ("*", None)))
    assert "rule '*.w1' has no effect: no weighted module matches; modules end in: down_proj, embed_tokens" in idle
    shadowed = refused(rules((LAYERS, "int4_g64"), ("*.down_proj", "int8_channel"), ("*", None)))
    assert "rule '*.down_proj' has no effect: every module it matches is taken by an earlier rule" in shadowed


def test_a_width_problem_names_the_layer_and_a_group_that_works() -> None:
    model = build(hidden_size=192, head_dim=48)
    message = refused(usual("int4_g128"), model, FormatError)
    assert message.startswith("model.layers.0.self_attn.q_proj: int4_g128: groups of 128 do not divide a width of 192")
    assert "nearest group that divides 192 is 64" in message
    message = refused(usual("int4_channel", "fp8_g128"), build(hidden_size=192, head_dim=48), FormatError)
    assert message.startswith("model.layers.0.self_attn.q_proj: fp8_g128")


def test_fused_layers_need_one_treatment() -> None:
    message = refused(rules(("*.q_proj", "int8_channel"), (LAYERS, "int4_g64"), ("*", None)))
    assert message.startswith("engines fuse these layers, so they need one treatment: ")
    assert "q_proj: int8_channel/-" in message and "v_proj: int4_g64/-" in message
    message = refused(rules(("*.up_proj", None), (LAYERS, "int4_g64"), ("*", None)))
    assert "gate_proj: int4_g64/-" in message and "up_proj: skip/-" in message
    message = refused(rules(("*.k_proj", "int4_g64", "int8_token"), (LAYERS, "int4_g64"), ("*", None)))
    assert "k_proj: int4_g64/int8_token" in message
    loose = rules(("*.up_proj", None), (LAYERS, "int4_g64"), ("*", None), fused=())
    assert len(weights(apply(build(), loose))) == 12


def test_fused_sets_share_the_global_scale_and_the_input_quantizer() -> None:
    model = build()
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.v_proj").weight.mul_(30)
    apply(model, usual("nvfp4", "nvfp4"))
    found = weights(model)
    alone = {path: find_scales(layer.weight, lookup("nvfp4")).global_scale for path, layer in found.items()}
    sets = trained_together(model, usual(), found)
    assert [len(s) for s in sets] == [3, 2, 3, 2]
    for members in sets:
        scales = {found[m].quantizer.global_scale.item() for m in members}
        assert scales == {max(alone[m].item() for m in members)}
        assert len({id(found[m].input) for m in members}) == 1
        assert len({id(found[m].quantizer) for m in members}) == len(members)
        assert found[members[0]].input.consumers == len(members)
    first = found["model.layers.0.self_attn.q_proj"]
    assert first.quantizer.global_scale > alone["model.layers.0.self_attn.q_proj"]
    singles = [path for path in found if path.endswith(("o_proj", "down_proj"))]
    assert all(found[path].input.consumers == 1 for path in singles)
    assert len({id(layer.input) for layer in found.values()}) == len(sets) + len(singles)


def test_routers_are_refused_loudly_until_skipped() -> None:
    everything = rules(("lm_head", None), ("*.embed_tokens", None), ("*", "int4_g64"))
    message = refused(everything, build("qwen3_moe", **MOE), UnsupportedError)  # the router is no nn.Linear
    assert message.startswith("model.layers.0.mlp.gate (Qwen3MoeTopKRouter, weights [(4, 128)]): this kind of module")
    assert "add a rule `match: model.layers.0.mlp.gate` with `skip:`" in message


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (nn.Conv1d(4, 8, 3), "convolutions"),
        (nn.Conv2d(4, 8, 3), "convolutions"),
    ],
    ids=["conv1d", "conv2d"],
)
def test_other_modules_are_called_what_they_are(module: nn.Module, what: str) -> None:
    message = refused(rules(("*", "int4_g64")), nn.ModuleDict({"mixer": module}), UnsupportedError)
    assert (
        message.startswith(f"mixer ({type(module).__name__}, weights ") and f": {what} cannot be quantized" in message
    )


def test_experts_and_routers_are_covered_although_they_are_no_linear_layers() -> None:
    model = build("qwen3_moe", **MOE)
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.gate"} <= {c.path for c in candidates(model)}
    message = refused(rules(("*.self_attn.*", "int4_g64"), ("lm_head", None), ("*.embed_tokens", None)), model)
    assert "matches model.layers.0.mlp.experts.gate_up_proj, model.layers.0.mlp.experts.down_proj, " in message
    coverage = report(model, usual())
    rows = {row.path: row for row in coverage.modules}
    assert rows["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 256, 128)
    assert sum(row.parameters for row in coverage.modules) == matrix_parameters(model)


def test_experts_do_not_know_prompts_from_answers() -> None:
    mixed = rules(("*.mlp.experts.*", "int8_channel", "int8_mix"), ("*", None), activation_rule="ascend", fused=())
    message = refused(mixed, build("qwen3_moe", **MOE), UnsupportedError)
    assert message.startswith("model.layers.0.mlp.experts.gate_up_proj: int8_mix inputs ask which tokens are a prompt")
    assert "give '*.mlp.experts.*' int8_token inputs" in message
    linear = rules(("*.q_proj", "int8_channel", "int8_mix"), ("*", None), activation_rule="ascend", fused=())
    apply(build("qwen3_moe", **MOE), linear)


def test_embeddings_take_a_weight_but_no_input_format_and_subclasses_are_refused() -> None:
    message = refused(rules(("*.embed_tokens", "int8_channel", "int8_token"), ("*", None)))
    assert "model.embed_tokens is an embedding: its input is token ids" in message
    model = apply(build(), rules(("*.embed_tokens", "int8_channel"), ("*", None)))
    assert isinstance(model.get_submodule("model.embed_tokens"), QatEmbedding)
    scaled = build("gemma3_text", query_pre_attn_scalar=32, layer_types=["full_attention"] * 2)
    message = refused(rules(("*.embed_tokens", "int8_channel"), ("*", None)), scaled, UnsupportedError)
    assert "Gemma3TextScaledWordEmbedding" in message  # it multiplies its output: wrapping would lose that


def matrix_parameters(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if p.dim() >= 2 and "quantizer" not in n)


@pytest.mark.parametrize("tied", [False, True])
def test_the_report_counts_every_matrix_once(tied: bool) -> None:
    scheme = usual("nvfp4", "nvfp4")
    model = build(tie_word_embeddings=tied)
    total = matrix_parameters(model)
    planned = report(model, scheme)
    assert not weights(model), "reporting changes nothing"
    applied = report(apply(model, scheme))
    for coverage in (planned, applied):
        assert sum(row.parameters for row in coverage.modules) == total == matrix_parameters(model)
        quantized = [row for row in coverage.modules if row.weight]
        assert {(row.weight, row.input) for row in quantized} == {("nvfp4", "nvfp4")} and len(quantized) == 14
        share = sum(row.parameters for row in quantized) / total
        assert coverage.quantized_share == pytest.approx(share)
        bits = sum(lookup("nvfp4").bits_per_weight(*row.shape) * row.parameters for row in quantized)
        assert coverage.bits_per_weight == pytest.approx(bits / total + 16 * (1 - share))
        rows = coverage.by_format()
        assert sum(row[2] for row in rows) == len(coverage.modules) and sum(row[3] for row in rows) == total
        assert [row[3] for row in rows] == sorted((row[3] for row in rows), reverse=True)
    assert {row.skip for row in planned.modules if not row.weight} == {"not quantized here"}


HEAD_AND_TABLE = [("lm_head", "int8_channel"), ("*.embed_tokens", "int8_channel"), ("*", None)]


def test_tied_weights_are_an_error_by_default() -> None:
    message = refused(rules(*HEAD_AND_TABLE), build(tie_word_embeddings=True))
    assert (
        "model.embed_tokens and lm_head are one tensor (tied), but the rules say int8_channel and int8_channel"
        in message
    )
    message = refused(rules(("lm_head", "int8_channel"), ("*", None)), build(tie_word_embeddings=True))
    assert "skip and int8_channel; skip both, or set scheme.tied to `share`" in message
    both_skipped = apply(build(tie_word_embeddings=True), usual())
    assert both_skipped.lm_head.weight is both_skipped.model.embed_tokens.weight


def test_tied_weights_can_be_shared() -> None:
    model = apply(build(tie_word_embeddings=True), rules(*HEAD_AND_TABLE, tied="share"))
    head, table = model.lm_head, model.model.embed_tokens
    assert isinstance(head, QatLinear) and isinstance(table, QatEmbedding)
    assert head.weight is table.weight and head.weight_quantizer is table.weight_quantizer
    message = refused(rules(("lm_head", "int8_channel"), ("*", None), tied="share"), build(tie_word_embeddings=True))
    assert "skip and int8_channel" in message  # one tensor cannot be both
    stored = build(tie_word_embeddings=True)
    with torch.no_grad():
        stored.lm_head.weight.copy_(head.weight_quantizer.quantize(head.weight).dequantize(torch.bfloat16))
    assert torch.equal(logits(model), logits(stored))


@pytest.mark.parametrize("body", ["int8_channel", None])
def test_what_will_be_untied_is_counted_twice_before_it_is(body: str | None) -> None:
    scheme = rules(("lm_head", "int4_g64"), ("*.embed_tokens", body), ("*", None), tied="untie")
    model = build(tie_word_embeddings=True)
    before = report(model, scheme)
    after = report(apply(model, scheme))
    assert before.bits_per_weight == after.bits_per_weight
    assert [(m.path, m.weight) for m in before.modules] == [(m.path, m.weight) for m in after.modules]


def test_tied_weights_can_be_untied() -> None:
    model = build(tie_word_embeddings=True)
    before = model.lm_head.weight.detach().clone()
    apply(model, rules(("lm_head", "int8_channel"), ("*", None), tied="untie"))
    head, table = model.lm_head, model.model.embed_tokens
    assert isinstance(head, QatLinear) and type(table) is nn.Embedding
    assert head.weight is not table.weight and head.weight.data_ptr() != table.weight.data_ptr()
    assert torch.equal(head.weight, before) and torch.equal(table.weight, before)
    assert model.config.tie_word_embeddings is False
    assert sum(row.parameters for row in report(model).modules) == matrix_parameters(model)


def test_plans_and_paths_of_an_applied_model_are_those_of_the_original() -> None:
    model, scheme = build(), usual("nvfp4", "nvfp4")
    paths = [candidate.path for candidate in candidates(model)]
    planned = {path: rule.weight for path, rule in plan(model, scheme).items()}
    apply(model, scheme)
    assert [candidate.path for candidate in candidates(model)] == paths
    assert {path: rule.weight for path, rule in plan(model, scheme).items()} == planned
    assert {type(m) for m in model.modules()} & {WeightQuantizer, InputQuantizer, QatLinear}
