"""Fused experts against the same experts one by one, with the arithmetic of linear layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.adapters import adapter_for
from qat.init.calibration import calibrate, initialise, observe
from qat.modes import dense
from qat.numbers.catalog import lookup
from qat.numbers.numerics import fake_quantize, find_scales
from qat.scheme import Scheme
from qat.sites import Site, sites, weights
from qat.surgery import apply, report
from tests.qat.test_surgery import MOE, batches, build, ids, logits

KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": MOE,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "pad_token_id": 0,
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "num_hidden_layers": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "num_key_value_heads": 4,
    },
}


def experts_only(weight: str, input: str | None = None, **options: Any) -> Scheme:
    rules = [{"match": "*.experts.*", "weight": weight, "input": input}, {"match": "*", "skip": "no expert"}]
    return Scheme(rules=rules, **{"init": (), **options})


def one_by_one(module: Any, hidden: Tensor, chosen: Tensor, shares: Tensor, sites: dict[str, Site]) -> Tensor:
    """Each expert as two products of its own, quantized by the reference arithmetic."""
    total = torch.zeros_like(hidden)
    for expert in range(module.num_experts):
        x = hidden
        for slot in ("gate_up_proj", "down_proj"):
            site = sites[slot]
            fmt, weight = site.format, site.weight[expert].detach()
            on_grid = fake_quantize(weight, fmt, find_scales(weight, fmt)).to(torch.bfloat16).float()
            x = x if site.input is None else site.input.quantize(x)
            x = x @ on_grid.T
            bias = module._parameters.get(f"{slot}_bias")
            x = x if bias is None else x + bias[expert]
            if slot == "gate_up_proj":
                gate, up = x.chunk(2, dim=-1)
                x = type(module).__bases__[1]._apply_gate(module, x) if bias is not None else module.act_fn(gate) * up
        share = ((chosen == expert) * shares).sum(dim=-1, keepdim=True)
        total += share * x
    return total


@pytest.mark.parametrize(("weight", "input"), [("nvfp4", "nvfp4"), ("int4_g32", None), ("mxfp4", "fp8_token")])
@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_computes_what_it_would_alone(kind: str, weight: str, input: str | None) -> None:
    model, scheme = build(kind, **KINDS[kind]), experts_only(weight, input)
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []
    apply(model, scheme)
    calibrate(model, batches(), scheme)
    found = {site.slot: site for site in weights(model).values()}
    module: Any = found["down_proj"].owner
    module.register_forward_hook(lambda _, args, output: seen.append((args, output)))
    with torch.no_grad():
        model(input_ids=ids())
        (hidden, chosen, shares), output = seen[-1]
        expected = one_by_one(module, hidden, chosen, shares, found)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_inputs_of_experts_are_rounded_by_their_own_rule() -> None:
    """2.5 is halfway between two numbers of FP4: to even for experts, away from zero for layers."""
    own = [{"match": match, "weight": "mxfp4", "input": "mxfp4"} for match in ("*.experts.*", "*_proj")]
    rules = [*own, {"match": "*", "skip": "the rest"}]
    model = apply(build("qwen3_moe", **MOE), Scheme(rules=rules, init=(), activation_rule="ascend"))
    x = torch.tensor([4.0, 2.5] * 16)[None]
    for path, site in weights(model).items():
        assert site.input is not None
        assert site.input.quantize(x)[0, 1] == (2.0 if ".experts." in path else 3.0), path


@pytest.mark.parametrize("kind", KINDS)
def test_dense_experts_are_the_original_ones_and_routers_stay(kind: str) -> None:
    model, before = build(kind, **KINDS[kind]), logits(build(kind, **KINDS[kind]))
    names = [name for name, _ in model.named_parameters()]
    apply(model, experts_only("nvfp4", "nvfp4"))
    with dense(model, inputs=True):
        assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_parameters() if "quantizer" not in name] == names
    rows = report(model).modules
    assert [row.path.rpartition(".")[2] for row in rows if row.weight] == ["gate_up_proj", "down_proj"]
    assert all(row.skip for row in rows if "experts." not in row.path)


def test_each_expert_has_a_global_scale_which_gate_and_up_share() -> None:
    model = build("qwen3_moe", **MOE)
    stack = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    with torch.no_grad():
        stack[1] *= 100
        stack[2, :5] *= 50  # of the gate only
    apply(model, experts_only("nvfp4"))
    above = weights(model)["model.layers.0.mlp.experts.gate_up_proj"].quantizer.global_scale.view(4, -1)
    alone = [find_scales(matrix, lookup("nvfp4")).global_scale for matrix in stack.detach()]
    assert torch.equal(above, torch.stack(alone)[:, None].expand(above.shape)) and above[1, 0] > 50 * above[0, 0]


def test_every_expert_learns_its_scales() -> None:
    model = apply(build("qwen3_moe", **MOE), experts_only("nvfp4", "nvfp4"))
    calibrate(model, batches(), experts_only("nvfp4", "nvfp4"))
    model(input_ids=ids(), labels=ids()).loss.backward()
    for site in weights(model).values():
        for parameter in (site.parameter, site.quantizer.log_scale, site.quantizer.log_divisor):
            assert all(bool(part.any()) for part in parameter.grad.chunk(4)), site.path


def test_experts_are_smoothed_over_searched_and_compensated_like_layers() -> None:
    scheme = experts_only("int3_g32", init=["gptq"])
    errors = {}
    for name, chosen in (("rtn", scheme.rtn()), ("gptq", scheme)):
        model, original = build("qwen3_moe", **MOE), logits(build("qwen3_moe", **MOE))
        apply(model, scheme, defer_init=True)
        text = list(batches())
        initialise(model, text, chosen, observe(model, text))
        errors[name] = float((logits(model) - original).square().mean())
    assert errors["gptq"] < 0.9 * errors["rtn"]


def test_experts_that_no_token_reaches_are_counted_and_finite() -> None:
    model, scheme = build("qwen3_moe", **MOE), experts_only("nvfp4", "nvfp4", init=["scales"])
    router = model.get_submodule("model.layers.0.mlp.gate")
    with torch.no_grad():
        router.weight[2:] = 0.0
        router.weight[:2] *= 100
        model.get_submodule("model.layers.0.post_attention_layernorm").weight.fill_(1.0)
    apply(model, scheme)
    unreached = observe(model, list(batches())) and sites(model, "weight")[0].owner.unreached()
    assert unreached[1] == 4 and 0 <= unreached[0] <= 2
    calibrate(model, batches(), scheme)
    for site in weights(model).values():
        assert bool(site.value().isfinite().all()) and bool(site.quantizer.scales().effective().isfinite().all())


def test_blocks_that_would_span_experts_are_refused() -> None:
    from qat.errors import FormatError

    with pytest.raises(FormatError, match="blocks of all rows, which would span experts of 256 rows"):
        apply(build("qwen3_moe", **MOE), experts_only("fp8_tensor"))


def test_a_copy_computes_the_same_and_adapters_know_quantized_modules() -> None:
    import copy

    model = apply(build("qwen3_moe", **MOE), experts_only("int4_g32"))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    module: nn.Module = weights(twin)["model.layers.0.mlp.experts.down_proj"].owner
    adapter = adapter_for(module)
    assert adapter is not None and [slot.name for slot in adapter.slots(module)] == ["gate_up_proj", "down_proj"]


def test_npus_stay_in_float32_between_the_two_products() -> None:
    scheme = experts_only("int8_channel", "int8_token", activation_rule="ascend", learn="none")
    model = apply(build("qwen3_moe", **MOE), scheme)
    inputs = next(m.input_quantizers for m in model.modules() if hasattr(m, "input_quantizers"))
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for slot, wide in {"gate_up_proj": False, "down_proj": True}.items():
        assert torch.equal(inputs[slot](x), inputs[slot](x.bfloat16().float())) is not wide
