"""Smoothing: what the model computes stays bit for bit, for every family; what is balanced, shared and refused."""

import pytest
import torch
from torch import Tensor, nn

from qat.errors import UnsupportedError
from qat.init.calibration import calibrate, observe
from qat.init.samples import Products, Sample
from qat.init.scales import shared_global_scale
from qat.init.smooth import Fold, Searched, smooth
from qat.modes import dense
from qat.numbers.catalog import lookup
from qat.scheme import Rule, Scheme
from qat.sites import weights
from qat.surgery import apply
from tests.qat.test_surgery import MOE, batches, build, ids, usual

GEMMA3 = {"query_pre_attn_scalar": 32}
STRENGTH = 0.5
NEOX_RULES = (
    Rule(match="re:.*(query_key_value|dense.*)", weight="nvfp4", input="nvfp4"),
    Rule(match="*", skip="the rest"),
)
MOE_RULES = (
    Rule(match="*.mlp.*", skip="experts and router"),
    Rule(match="*_proj", weight="nvfp4", input="nvfp4"),
    Rule(match="*", skip="the rest"),
)
# kind, config, folds per layer: norms with weight w and 1 + w, with bias, fused projections, parallel, post-norms
FAMILIES = [
    ("llama", {}, 4),
    ("qwen2", {}, 4),
    ("qwen3", {}, 4),
    ("mistral", {}, 4),
    ("gemma", {}, 4),
    ("gemma3_text", GEMMA3, 4),
    ("olmo2", {}, 2),
    ("phi3", {"pad_token_id": 0}, 2),
    ("gpt_neox", {}, 2),
    ("cohere", {}, 3),
    ("qwen3_moe", MOE, 2),
]


@torch.no_grad()
def uneven(kind: str, **overrides: object) -> nn.Module:
    """A model whose channels differ in size by factors of two and four."""
    model = build(kind, **overrides)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape[-1], generator=torch.Generator().manual_seed(parameter.numel()))
        if parameter.dim() == 1:
            parameter.add_(0.3 * noise)
        elif parameter.dim() == 2:
            parameter.mul_(noise.exp())
    return model


def prepared(kind: str, **overrides: object) -> tuple[nn.Module, Tensor]:
    """An uneven model under a W4A4 scheme, and what it computed before."""
    model = uneven(kind, **overrides)
    scheme = usual("nvfp4", "nvfp4", smooth=0.5)
    if kind in ("gpt_neox", "qwen3_moe"):
        scheme = scheme.model_copy(update={"rules": NEOX_RULES if kind == "gpt_neox" else MOE_RULES})
    with torch.no_grad():
        before = model(input_ids=ids()).logits
    apply(model, scheme, defer_init=True)
    return model, before


@pytest.mark.parametrize(("kind", "config", "per_layer"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_what_the_model_computes_stays(kind: str, config: dict[str, object], per_layer: int) -> None:
    model, before = prepared(kind, **config)
    before_weights = {path: layer.weight.detach().clone() for path, layer in weights(model).items()}
    folds = smooth(model, observe(model, batches()), STRENGTH, ids())
    with dense(model, inputs=True), torch.no_grad():
        after = model(input_ids=ids()).logits
    assert len(folds) == per_layer * model.config.num_hidden_layers
    one_plus = kind.startswith("gemma")  # w + 1 is not always exact in float32
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 if one_plus else 0)
    moved = [r for f in folds for r in f.readers if not torch.equal(weights(model)[r].weight, before_weights[r])]
    assert len(moved) > len(before_weights) / 4


def test_both_sides_come_out_balanced() -> None:
    model, _ = prepared("llama")
    attention = model.model.layers[1].self_attn
    path = "model.layers.1.self_attn.q_proj"

    def apart() -> float:
        """How far the ratio of the root mean squares strays from its middle, in powers of two."""
        mean_square = observe(model, batches())
        weights = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        ratio = (mean_square[path] / weights.detach().square().mean(dim=0)).log2() / 2
        return float((ratio - ratio.mean()).abs().max())

    assert apart() > 3
    smooth(model, observe(model, batches()), 0.5, ids())
    assert apart() < 1.2  # a factor is a power of two and moves both sides: at most half an exponent off, twice


def test_an_outlier_channel_costs_less() -> None:
    def error(strength: float) -> float:
        model = build("llama")
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight[5] = 40.0
            for name in "qkv":
                getattr(model.model.layers[0].self_attn, f"{name}_proj").weight[:, 5] /= 40.0
            before = model(input_ids=ids()).logits
            scheme = usual("mxfp4", "mxfp4", smooth=strength)
            calibrate(apply(model, scheme), batches(), scheme)
            return float((model(input_ids=ids()).logits - before).square().mean())

    assert error(0.5) < 0.9 * error(0.0)


def test_a_caller_under_autocast_sees_the_moved_weights() -> None:
    """Autocast keeps BF16 copies of weights for as long as its context lasts."""
    seen = []
    for one_context in (True, False):
        model, _ = prepared("llama")
        with torch.autocast("cpu", torch.bfloat16):
            mean_square = observe(model, batches())
            if one_context:
                smooth(model, mean_square, STRENGTH, ids())
                seen.append(observe(model, batches()))
        if not one_context:
            smooth(model, mean_square, STRENGTH, ids())
            with torch.autocast("cpu", torch.bfloat16):
                seen.append(observe(model, batches()))
    assert all(torch.equal(seen[0][path], seen[1][path]) for path in seen[0])


def test_fused_layers_share_the_scale_of_the_moved_weights() -> None:
    model, _ = prepared("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 500.0  # moves much into q, k and v
    calibrate(model, batches(), usual("nvfp4", "nvfp4", smooth=STRENGTH))
    attention = model.model.layers[0].self_attn
    members = [attention.q_proj, attention.k_proj, attention.v_proj]
    expected = shared_global_scale([m.weight for m in members], lookup("nvfp4"))
    assert all(torch.equal(m.weight_quantizer.global_scale, expected) for m in members)


class Bypass(nn.Module):
    """Reads its input twice, once where no linear layer can be seen doing it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


def test_a_reader_that_is_not_a_linear_layer_is_found_out() -> None:
    model = uneven("llama")
    for layer in model.model.layers:
        layer.mlp = Bypass(layer.mlp)
    scheme = usual("int4_g64", smooth=0.5)
    with pytest.raises(
        UnsupportedError,
        match=r"smoothing changed the outputs of LlamaForCausalLM by .*leave `smooth` out of",
    ):
        calibrate(apply(model, scheme), batches(), scheme)


def test_nothing_to_smooth_is_said() -> None:
    rules = (Rule(match="model.embed_tokens", weight="int8_channel"), Rule(match="*", skip="the rest"))
    scheme = Scheme(rules=rules, init=("smooth",))
    with pytest.raises(UnsupportedError, match="nothing to smooth in LlamaForCausalLM"):
        calibrate(apply(build("llama"), scheme), batches(), scheme)


@pytest.mark.parametrize(("kind", "config"), [("llama", {}), ("gemma3_text", GEMMA3), ("qwen2", {})])
@pytest.mark.parametrize("inputs", ["nvfp4", None])
def test_a_searched_strength_keeps_the_model_and_loses_less(kind: str, config: dict, inputs: str | None) -> None:
    def error(*steps: object) -> float:
        model = uneven(kind, **config)
        with torch.no_grad():
            before = model(input_ids=ids()).logits
        scheme = usual("int4_g32", inputs).model_copy(update={"init": Scheme(rules=(), init=steps).init})
        calibrate(apply(model, scheme), batches(), scheme)
        with torch.no_grad():
            with dense(model, inputs=True):
                torch.testing.assert_close(model(input_ids=ids()).logits, before, rtol=0, atol=1e-4)
            return float((model(input_ids=ids()).logits - before).square().mean())

    assert error({"kind": "smooth", "strength": "auto"}) < 0.9 * error()


@pytest.mark.parametrize(("kind", "config"), [("llama", {}), ("gemma3_text", GEMMA3), ("qwen2", {})])
def test_a_flexible_search_keeps_the_model(kind: str, config: dict) -> None:
    model, before = prepared(kind, **config)
    given = {path: site.weight.detach().clone() for path, site in weights(model).items()}
    smooth(model, {}, "flex", ids(), batches())
    assert sum(not torch.equal(site.weight, given[path]) for path, site in weights(model).items()) > 3
    with dense(model, inputs=True), torch.no_grad():
        after = model(input_ids=ids()).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 if kind.startswith("gemma") else 0)


@pytest.mark.parametrize("seed", range(4))
def test_the_flexible_search_ends_at_the_best_pair_around_the_best_of_the_grid(seed: int) -> None:
    """Once more, over everything it may try: s = max|x|^a / max|w|^b."""
    model, _ = prepared("llama")
    site = weights(model)["model.layers.1.mlp.down_proj"]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 256, generator=generator) * torch.randn(256, generator=generator).exp()
    sample = Sample(x, x.abs().amax(0), x.square().mean(0))
    fold, products = Fold("model.layers.1.mlp.up_proj", (site.path,)), Products(sample, [site])
    w = site.weight.detach().abs().amax(0)

    def lost(a: int, b: int) -> tuple[float, Tensor]:
        exponents = a / 10 * sample.amax.log2() - b / 10 * w.log2()
        factors = torch.exp2((exponents - exponents.mean()).round())
        amax = (sample.amax / factors).amax()
        return float(products.lost(lambda r: r * factors, lambda v: v / factors, amax)), factors

    coarse = min(((a, b) for a in range(0, 11, 2) for b in range(0, 11, 2)), key=lambda pair: lost(*pair)[0])
    around = [(coarse[0] + a, coarse[1] + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    least, factors = min((lost(*pair) for pair in around), key=lambda found: found[0])
    found = Searched(fold, products, site.weight.detach()).flex()
    assert found is not None and torch.equal(torch.exp2(found.reshape(-1)), factors)
    assert least <= lost(*coarse)[0]


def test_a_fixed_strength_is_what_it_was() -> None:
    """The formula, once more: s = rms(x)^a / rms(w)^(1 - a) as a power of two."""
    model, _ = prepared("llama", num_key_value_heads=4)
    mean_square = observe(model, batches())
    layer = model.model.layers[0]
    x, w = mean_square["model.layers.0.mlp.up_proj"], torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
    exponent = 0.3 * x.sqrt().log2() - (1 - 0.3) * w.detach().square().mean(dim=0).sqrt().log2()
    expected = layer.post_attention_layernorm.weight.detach() / torch.exp2((exponent - exponent.mean()).round())
    smooth(model, mean_square, 0.3, ids())
    assert torch.equal(layer.post_attention_layernorm.weight, expected)
