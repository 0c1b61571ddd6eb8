"""Keys and values as sites: what is quantized where, in which families, and what else of a model stays as it was."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from qat.errors import ConfigError, FormatError, TrainingError, UnsupportedError
from qat.init.calibration import calibrate, observe
from qat.modes import dense, served
from qat.numbers.catalog import lookup
from qat.numbers.numerics import quantize
from qat.scheme import Scheme
from qat.sites import sites
from qat.surgery import apply, report
from tests.tiny import tiny_model

IDS = torch.arange(48).mul(37).remainder(300).view(2, 24) + 3
Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def caches(key: str, value: str, match: str = "*.self_attn", **more: Any) -> Scheme:
    """Only caches."""
    rules = [{"match": match, "key": key, "value": value}, {"match": "*", "skip": "left alone"}]
    return Scheme.model_validate({"rules": rules, "init": (), **more})


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS, use_cache=False, **more).logits
    return result


def fp8_by_torch(amax: float) -> Change:
    scale = torch.tensor(amax / 448).to(torch.bfloat16).float()
    return lambda x: (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def by_numerics(name: str) -> Change:
    return lambda x: quantize(x, lookup(name)).dequantize()


def patched(folder: Path, changes: dict[tuple[int, str], Change]) -> Any:
    """The model with eager attention that changes keys and values itself, by layer and role."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        key, value = changes[module.layer_idx, "key"](key), changes[module.layer_idx, "value"](value)
        return eager_attention_forward(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("patched_by_a_test", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("patched_by_a_test", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return load(folder, attn_implementation="patched_by_a_test")


@pytest.mark.parametrize("names", [("fp8_tensor", "fp8_tensor"), ("int4_token", "int8_token"), ("int4_g32", "mxfp4")])
def test_keys_after_their_rotation_and_values_are_quantized(folder: Path, names: tuple[str, str]) -> None:
    model = apply(load(folder, attn_implementation="eager"), caches(*names))
    observe(model, [{"input_ids": IDS}])
    changes = {
        (index // 2, site.role): fp8_by_torch(float(site.quantizer.amax))
        if lookup(name).block == (0, 0)
        else by_numerics(name)
        for index, (site, name) in enumerate(zip(sites(model, "key", "value"), names * 2, strict=True))
    }
    assert torch.equal(logits(model), logits(patched(folder, changes)))
    assert not torch.equal(logits(model), logits(load(folder, attn_implementation="eager")))


@pytest.mark.parametrize("kind", ["qwen3", "gemma", "gemma2", "bloom", "gpt2", "phi3", "gpt_neox", "qwen3_moe"])
def test_families(kind: str, tmp_path: Path) -> None:
    model, match = load(tiny_model(kind, tmp_path)), "re:.*(attn|attention)"
    before = logits(model)
    apply(model, caches("fp8_token", "int8_tensor", match))
    with pytest.raises(TrainingError, match="calibrate"):
        logits(model)
    observe(model, [{"input_ids": IDS}])
    assert len(sites(model, "key")) == 2 and all(site.quantizer.amax > 0 for site in sites(model, "value"))
    quantized = logits(model)
    assert 0 < (quantized - before).abs().median() < 0.2
    assert torch.equal(logits(copy.deepcopy(model)), quantized)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, use_cache=True).logits, quantized)
    with dense(model, inputs=True):
        assert torch.equal(logits(model), before)
    other = apply(load(tmp_path), caches("fp8_token", "int8_tensor", match))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), quantized)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_passes_where_nothing_is_clipped(folder: Path, checkpointing: bool) -> None:
    model = apply(load(folder), caches("fp8_tensor", "nvfp4"))
    observe(model, [{"input_ids": IDS}])
    plain = load(folder)
    if checkpointing:
        model.gradient_checkpointing_enable()
    for each in (model, plain):
        each.train()(input_ids=IDS, labels=IDS).loss.backward()
    for name in ("k_proj", "v_proj"):
        ours, theirs = (m.model.layers[0].self_attn.get_submodule(name).weight.grad for m in (model, plain))
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.8


def test_one_token_at_a_time_gives_the_same_logits(folder: Path) -> None:
    model = apply(load(folder), caches("fp8_tensor", "int4_token"))
    observe(model, [{"input_ids": IDS}])
    whole, cache, steps = logits(model), None, []
    with torch.no_grad():
        for token in IDS.split(1, dim=1):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-4)


@pytest.mark.parametrize("init", [["scales"], ["smooth", "gptq"]])
def test_weights_and_inputs_are_initialised_as_without(folder: Path, init: list[str]) -> None:
    def made(more: list[dict[str, str]]) -> Any:
        weights = {"match": "*.layers.*_proj", "weight": "int4_g32", "input": "int8_token"}
        rules = [*more, weights, {"match": "*", "skip": "left alone"}]
        scheme = Scheme.model_validate({"rules": rules, "init": init})
        model = apply(load(folder), scheme)
        calibrate(model, [{"input_ids": IDS}], scheme)
        return model

    model, without = made([{"match": "*.self_attn", "key": "int8_tensor", "value": "int8_tensor"}]), made([])
    with dense(model, inputs=True), dense(without, inputs=True):
        assert torch.equal(logits(model), logits(without))
    for ours, theirs in zip(sites(model, "weight"), sites(without, "weight"), strict=True):
        assert torch.equal(ours.value(), theirs.value())
    with served(model):
        assert torch.isfinite(logits(model)).all()


def test_coverage_counts_bytes_per_token(folder: Path) -> None:
    model = load(folder)
    assert report(model, Scheme.model_validate({"rules": [{"match": "*", "skip": "x"}]})).by_cache() == []
    scheme = caches("int8_tensor", "nvfp4", "*.0.self_attn")
    width, heads = 32, 2
    row = ("int8_tensor", "nvfp4", 1, heads * (width + width / 2 + width / 16), heads * width * 4)
    assert report(model, scheme).by_cache() == [row, ("bf16", "bf16", 1, heads * width * 4, heads * width * 4)]
    assert report(apply(model, scheme)).by_cache() == report(load(folder), scheme).by_cache()
    tokens = report(load(folder), caches("fp8_token", "int4_token")).by_cache()
    assert tokens == [("fp8_token", "int4_token", 2, 2 * heads * (width + 4 + width / 2 + 4), 2 * heads * width * 4)]


def test_refusals_name_the_reason(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attention module with a cache matches"):
        apply(load(folder), caches("fp8_tensor", "fp8_tensor", "*.mlp"))
    with pytest.raises(FormatError, match="128"):
        apply(load(folder), caches("int4_g128", "int4_g128"))
    latent = {"head_dim": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
    small = {"q_lora_rank": 32, "kv_lora_rank": 32, "first_k_dense_replace": 2}
    with pytest.raises(UnsupportedError, match="latent attention"):
        apply(load(tiny_model("deepseek_v3", tmp_path, **latent, **small)), caches("fp8_tensor", "fp8_tensor"))


def test_attention_that_caches_otherwise_is_refused_when_it_runs(folder: Path) -> None:
    model = apply(load(folder), caches("int8_token", "int8_token"))
    module = model.model.layers[1].self_attn
    module.KIND.forward, before = lambda self, hidden_states, **_: (hidden_states, None), module.KIND.forward
    try:
        with pytest.raises(UnsupportedError, match="LlamaAttention did not hand"):
            logits(model)
    finally:
        module.KIND.forward = before


def test_a_scale_for_each_channel_of_each_head(folder: Path) -> None:
    """Keys after their rotation and values, by hand: channel d of head h has the scale number 32 h + d."""
    model = apply(
        load(folder, attn_implementation="eager"), caches("int8_column", "int8_column", activation_rule="ascend")
    )
    observe(model, [{"input_ids": IDS}])
    seen: dict[tuple[int, str], Tensor] = {}

    def watch(place: tuple[int, str]) -> Change:
        def see(x: Tensor) -> Tensor:  # (batch, heads, tokens, width)
            seen[place] = x.abs().amax(dim=(0, 2))
            return x

        return see

    def by_hand(place: tuple[int, str]) -> Change:
        scale = (seen[place] / 127).bfloat16()[None, :, None]
        return lambda x: (torch.round(x.bfloat16() * (1 / scale)).clamp(-128, 127) * scale).float()

    places = [(layer, role) for layer in (0, 1) for role in ("key", "value")]
    logits(patched(folder, {place: watch(place) for place in places}))
    expected = logits(patched(folder, {place: by_hand(place) for place in places}))
    assert torch.equal(logits(model), expected)
    with dense(model, inputs=True):
        assert not torch.equal(logits(model), expected)
    for place, site in zip(places, sites(model, "key", "value"), strict=True):
        assert torch.equal(site.quantizer.amax, seen[place].flatten())
    (cached, *_) = report(model).caches
    assert cached.key == "int8_column" and cached.bytes * 2 == cached.dense_bytes  # no scale per token


def test_gradients_of_a_channel_s_keys(folder: Path) -> None:
    model = apply(load(folder), caches("int8_column", "int8_column", activation_rule="ascend", estimator="clipped"))
    observe(model, [{"input_ids": IDS}])
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for name in ("k_proj", "v_proj"):
        gradient = model.get_submodule(f"model.layers.1.self_attn.{name}").weight.grad
        assert gradient.isfinite().all() and gradient.any()
