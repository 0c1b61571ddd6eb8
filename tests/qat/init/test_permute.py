"""Orders of channels: what the model computes stays under any of them, for every family; the chosen one loses less."""

import pytest
import torch
from torch import nn

from qat.errors import UnsupportedError
from qat.init.calibration import calibrate, observe
from qat.init.permute import alone, dealt, permute, places, reorder
from qat.init.samples import samples
from qat.modes import dense
from qat.scheme import Rule, Scheme
from qat.sites import weights
from qat.surgery import apply
from tests.qat.init.test_smooth import GEMMA3, MOE_RULES, NEOX_RULES, uneven
from tests.qat.test_surgery import MOE, batches, build, ids, logits, usual

GPT2_RULES = (Rule(match="*.c_*", weight="nvfp4", input="nvfp4"), Rule(match="*", skip="the rest"))
EXPERTS = (Rule(match="*.experts.*", weight="nvfp4", input="nvfp4"), *MOE_RULES)
# kind, config, rules, places of a model of two layers, what is fixed
FAMILIES = [
    ("llama", {}, None, 5, []),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, None, 5, []),
    ("llama", {"num_key_value_heads": 4}, None, 5, []),
    ("qwen2", {}, None, 5, []),
    ("qwen3", {}, None, 5, []),
    ("mistral", {}, None, 5, []),
    ("gemma", {}, None, 5, []),
    ("gemma2", {"query_pre_attn_scalar": 32}, None, 5, []),
    ("gemma3_text", GEMMA3, None, 5, []),
    ("olmo2", {}, None, 5, []),
    ("phi3", {"pad_token_id": 0}, None, 1, ["2 o_proj (by an attention)", "2 down_proj (by chunk)"]),
    ("gpt_neox", {}, NEOX_RULES, 3, ["2 dense (by an attention)"]),
    ("cohere", {}, None, 5, []),
    ("gpt2", {}, GPT2_RULES, 3, ["2 c_proj (by an attention)"]),
    ("qwen3_moe", MOE, MOE_RULES, 2, []),
]


def prepared(kind: str, config: dict[str, object], given: tuple[Rule, ...] | None) -> nn.Module:
    scheme = usual("nvfp4", "nvfp4")
    scheme = scheme if given is None else scheme.model_copy(update={"rules": given})
    return apply(uneven(kind, **config), scheme, defer_init=True)


@pytest.mark.parametrize(("kind", "config", "given", "count", "fixed"), FAMILIES)
def test_what_the_model_computes_stays_under_any_order(
    kind: str, config: dict[str, object], given: tuple[Rule, ...] | None, count: int, fixed: list[str]
) -> None:
    model = prepared(kind, config, given)
    found, stuck = places(model, ids()[:1])
    assert len(found) == count and len(stuck) == len(fixed)
    assert all(a.partition(" (by")[0] == b.partition(" (by")[0] for a, b in zip(stuck, fixed, strict=True))
    generator = torch.Generator().manual_seed(0)
    with dense(model, inputs=True), torch.no_grad():
        before = logits(model)
        for place in found:
            table = [torch.randperm(place.width, generator=generator) for _ in range(place.heads)]
            old = [member.parameter.clone() for member in place.members]
            reorder(place, torch.stack(table))
            assert not any(torch.equal(m.parameter, o) for m, o in zip(place.members, old, strict=True))
        after = logits(model)
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5 * float(before.abs().max()))


@pytest.mark.parametrize(("kind", "config"), [("llama", {}), ("gemma3_text", GEMMA3), ("qwen3_moe", MOE)])
def test_the_step_keeps_the_model_and_says_what_it_did(kind: str, config: dict[str, object]) -> None:
    rules = EXPERTS if kind == "qwen3_moe" else usual("nvfp4", "nvfp4").rules
    scheme = Scheme(rules=rules, init=("permute", "scales"))
    model = uneven(kind, **config)
    before = logits(model)
    sentences = calibrate(apply(model, scheme), batches(), scheme)
    with dense(model, inputs=True):
        torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5 * float(before.abs().max()))
    assert any(s.startswith("reordered channels: ") and "of 1 residual stream" in s for s in sentences)


def outliers(kind: str = "llama") -> nn.Module:
    """A model whose large channels stand side by side."""
    model = build(kind)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:8] = 20.0
            layer.post_attention_layernorm.weight[:8] = 20.0
            layer.mlp.up_proj.weight[:16] *= 20.0
    return model


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int4_g32"])
def test_products_lose_less_on_other_text(name: str) -> None:
    def error(*steps: str) -> float:
        scheme = usual(name, name).model_copy(update={"init": Scheme(rules=(), init=steps).init})
        model = apply(outliers(), scheme)
        calibrate(model, batches(), scheme)
        seen = samples(model, [{"input_ids": ids(seed)} for seed in range(7, 10)], list(weights(model)))
        total = 0.0
        for path, site in weights(model).items():
            exact = seen[path].x @ site.weight.detach().t()
            got = site.input.quantize(seen[path].x) @ site.value().t()
            total += float((got - exact).square().sum() / exact.square().sum())
        return total

    assert error("permute") < (0.97 if name == "nvfp4" else 1.0) * error()


def test_ranges_and_statistics_are_those_of_the_new_order() -> None:
    model = apply(outliers(), usual("nvfp4", "nvfp4"))
    observe(model, batches())
    permute(model, list(batches()))
    after = observe(model, batches())["model.layers.0.self_attn.q_proj"]
    per_block = (after.view(-1, 16) > 10 * after.median()).sum(dim=1)
    assert per_block.sum() >= 8 and per_block.max() <= 2


def test_dealing() -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).view(1, 64)
    for deal in (dealt, alone):
        table = deal(order, 16).view(4, 16)
        assert torch.equal(table.flatten().sort().values, torch.arange(64))
        assert torch.equal(table[:, 0], order[0, :4])  # the largest ones, one to each block
    assert torch.equal(dealt(order, 16).view(4, 16)[:, 1], order[0, 4:8].flip(0))
    assert torch.equal(alone(order, 16).view(4, 16)[0, 1:], order[0, -15:].flip(0))  # the smallest, to the largest


def test_formats_without_blocks_are_refused() -> None:
    scheme = usual("int8_channel", "int8_token").model_copy(update={"init": Scheme(rules=(), init=("permute",)).init})
    with pytest.raises(UnsupportedError, match=r"int8_channel, int8_token has no blocks along columns.*leave it out"):
        calibrate(apply(build(), scheme), batches(), scheme)


def test_groups_of_integers_are_reordered_too() -> None:
    scheme = usual("int4_g64").model_copy(update={"init": Scheme(rules=(), init=("permute", "scales")).init})
    model = apply(outliers(), scheme)
    assert len(places(model, ids()[:1])[0]) == 3  # a head of 32 has no two groups of 64
    assert "residual" in calibrate(model, batches(), scheme)[0] and weights(model)
