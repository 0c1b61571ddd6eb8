"""Body plus head is the model, in float32 and BF16, for every way in which architectures end."""

from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from qat.errors import TrainingError, UnsupportedError
from qat.scheme import Scheme
from qat.surgery import apply
from qat.trainers.forward import Head, heads, hidden_states, split
from qat.training.phases import Phase, answering
from qat.training.rows import IGNORE

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# name -> (model type, settings, what follows the last matrix)
MODELS: dict[str, tuple[str, dict[str, Any], tuple[tuple[str, float], ...]]] = {
    "llama": ("llama", SIZES, ()),
    "granite-6": ("granite", {**SIZES, "logits_scaling": 6.0}, (("divide", 6.0),)),
    "granite-8": ("granite", {**SIZES, "logits_scaling": 8.0}, (("divide", 8.0),)),
    "granitemoe": ("granitemoe", {**SIZES, "logits_scaling": 3.0, "num_local_experts": 2}, (("divide", 3.0),)),
    "hyperclovax": ("hyperclovax", {**SIZES, "logits_scaling": 0.7}, (("multiply", 0.7),)),
    "cohere": ("cohere", {**SIZES, "logit_scale": 0.3}, (("multiply", 0.3),)),
    "falcon_h1": (
        "falcon_h1",
        {
            **SIZES,
            "lm_head_multiplier": 0.7,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 2,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
        },
        (("multiply", 0.7),),
    ),
    "gemma2": ("gemma2", {**SIZES, "final_logit_softcapping": 3.0}, (("softcap", 3.0),)),
    "gemma2-uncapped": ("gemma2", {**SIZES, "final_logit_softcapping": None}, ()),
    "gemma3": ("gemma3", {"text_config": {**SIZES, "final_logit_softcapping": 2.0}, "vision_config": VISION}, ()),
    "opt-projected": ("opt", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 16}, ()),
    "bloom": ("bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 1, "n_head": 2}, ()),
    "llama4": ("llama4_text", {**SIZES, "num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 16}, ()),
}
MODELS = {name: model for name, model in MODELS.items() if model[0] in CONFIG_MAPPING}  # older releases have fewer


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, settings, _ = MODELS[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings), dtype=dtype).eval()


def whole_and_parts(model: Any, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "position_ids": torch.arange(9).expand(2, -1)}
    with torch.no_grad():
        return model(**batch, use_cache=False).logits, head(hidden_states(model, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_body_and_head_are_the_model(name: str, dtype: torch.dtype) -> None:
    """Bit for bit, in BF16 too. (Gemma-3 with a vision tower does not apply its cap.)"""
    model = build(name, dtype)
    head = split(model)
    assert head.steps == MODELS[name][2]
    whole, parts = whole_and_parts(model, head)
    assert torch.equal(whole, parts)
    product = head.as_product()
    assert product is not None and product.weight is head.linear.weight and product.steps == head.steps


def test_inputs_know_prompts_from_answers() -> None:
    """A chat (prompt of four tokens) in a batch: its layers' inputs are rounded by the mask of the batch."""
    model = build("llama")
    rules = [{"match": "*.q_proj", "weight": "int8_channel", "input": "int8_mix"}, {"match": "*", "skip": "rest"}]
    apply(model, Scheme(rules=rules, learn="none", init=(), activation_rule="ascend", fused=()))
    ids = torch.arange(8)[None] + 3
    targets = torch.where(torch.arange(8) >= 3, ids + 1, IGNORE)
    batch = {"input_ids": ids, "targets": targets, "position_ids": torch.arange(8)[None]}
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    layer.input_quantizer.amax.copy_(torch.tensor([-1.0, 1.0]))
    seen: list[torch.Tensor] = []
    layer.input_quantizer.register_forward_hook(lambda module, given, made: seen.extend((*given, made)))
    hidden_states(model, batch)
    x, rounded = seen[:2]
    alone = {}
    for phase in get_args(Phase):
        with answering(phase):
            alone[phase] = layer.input_quantizer.quantize(x)
    assert torch.equal(rounded[:, :4], alone["prompt"][:, :4]) and torch.equal(rounded[:, 4:], alone["answer"][:, 4:])
    assert not torch.equal(alone["prompt"], alone["answer"])


def test_heads_compare_the_rows_that_both_have() -> None:
    small, large = (build(name) for name in ("llama", "cohere"))
    large.resize_token_embeddings(104, mean_resizing=False)
    for student, teacher in ((small, large), (large, small)):
        own, other = heads(student, teacher)
        assert other is not None and own.vocabulary == other.vocabulary == 96
        for model, head in ((student, own), (teacher, other)):
            whole, parts = whole_and_parts(model, head)
            assert parts.shape[-1] == 96 and torch.allclose(whole[..., :96], parts, atol=1e-6)
    assert heads(small, None)[1] is None


def test_unknown_ends_and_nan_are_named() -> None:
    model = build("llama")
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: plain(hidden)  # the head is asked by the model and by us alike
    forward = model.forward

    def strange(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits.sin()
        return output

    model.forward = strange
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM changes its logits .*report the architecture"):
        split(model)
    model.forward = forward
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="NaN"):
        split(model)


def test_a_head_keeps_the_gradients_of_its_layer() -> None:
    layer = nn.Linear(4, 6)
    hidden = torch.randn(3, 4)
    Head(layer, (("divide", 2.0), ("softcap", 3.0)), rows=5)(hidden).sum().backward()
    assert layer.weight.grad is not None and bool((layer.weight.grad[5] == 0).all())
    expected = (torch.tanh(layer(hidden)[:, :5] / 2 / 3) * 3).sum()
    (wanted,) = torch.autograd.grad(expected, layer.weight)
    assert torch.allclose(layer.weight.grad, wanted)
