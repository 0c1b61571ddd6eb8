"""What a class keeps in float32 is what transformers leaves there when it loads BF16."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qat.float32 import float32_names, own_tensors, stored_dtype
from qat.modes import served
from qat.scheme import Scheme
from qat.surgery import apply
from tests.tiny import tiny_model

ODD = {
    "llama": {},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_layer_start_index": 0},
}


@pytest.mark.parametrize("kind", ODD)
def test_the_class_and_we_agree(kind: str, tmp_path: Path) -> None:
    more = {"topk_group": 1, "first_k_dense_replace": 0} if kind == "glm4_moe" else {}
    source = tiny_model(kind, tmp_path / "model", num_hidden_layers=1, **ODD[kind], **more)
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    truth = {name for name, tensor in own_tensors(loaded).items() if tensor.dtype == torch.float32}
    assert float32_names(loaded) == truth and bool(truth) == (kind != "llama")


def test_what_a_class_asks_for_is_kept(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama", tmp_path / "model", num_hidden_layers=1))
    model._keep_in_fp32_modules = {"mlp.*_proj"}
    model._keep_in_fp32_modules_strict = {"q_proj"}
    leaves = {name.split(".")[-2] for name in float32_names(model)}
    assert leaves == {"gate_proj", "up_proj", "down_proj", "q_proj"}


def test_served_rounds_the_rest_and_persistent_buffers_too() -> None:
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.tensor([1.001]))
    model.register_buffer("bias", torch.tensor([1.001]))
    model.register_buffer("table", torch.tensor([1.001]), persistent=False)
    with served(model):
        assert float(model.weight.detach()) == float(model.bias) == 1.0 and float(model.table) != 1.0
    assert float(model.weight.detach()) == float(model.bias) == float(torch.tensor(1.001))


@pytest.mark.parametrize(("rule", "dtype"), [("ascend", torch.bfloat16), ("ascend_310p", torch.float16)])
def test_the_other_numbers_have_the_type_of_who_serves_them(rule: str, dtype: torch.dtype) -> None:
    rules = [{"match": "*", "weight": "int8_channel", "input": "int8_token"}]
    model = nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8))
    assert stored_dtype(model) is torch.bfloat16
    apply(model, Scheme(rules=rules, learn="none", init=(), activation_rule=rule, round_bf16=False))
    assert stored_dtype(model) is dtype
    with torch.no_grad():
        model[1].bias.fill_(1 / 3)
        with served(model):
            assert torch.equal(model[1].bias, torch.full((8,), 1 / 3).to(dtype).float())
