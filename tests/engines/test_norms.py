"""Norms that are replaced are those that compute the same; all others stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qat.engines.norms import Norm, fuse_norms
from tests.checkpoints.exports import ids
from tests.tiny import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "count"), [("llama", 5), ("qwen3", 9), ("opt", 0), ("gemma3", 0), ("mixtral", 5)])
def test_a_model_computes_the_same(kind: str, count: int, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny_model(kind, tmp_path / "model", num_hidden_layers=2)
    model, plain = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for _ in range(2))
    names = set(model.state_dict())
    assert fuse_norms(model) == count == sum(isinstance(module, Norm) for module in model.modules())
    assert set(model.state_dict()) == names
    with torch.inference_mode():
        found, expected = (each(input_ids=ids(40), use_cache=False).logits.float() for each in (model, plain))
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=close, atol=close)


def test_it_rounds_where_llama_s_does() -> None:
    """Before the weight multiplies: rounded once at the end, one in ten numbers would be another."""
    torch.manual_seed(0)
    norm = LlamaRMSNorm(512, eps=1e-5).bfloat16()
    norm.weight.data = torch.randn(512).bfloat16()
    holder = nn.ModuleDict({"norm": norm})
    x = torch.randn(64, 512).bfloat16()
    expected: Any = norm(x)
    assert fuse_norms(holder) == 1
    assert (holder["norm"](x) != expected).float().mean() < 0.01


@pytest.mark.parametrize("change", ["eps", "offset", "gate", "hook", "dtype"])
def test_others_stay(change: str) -> None:
    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            if change == "eps":
                return super().forward(hidden_states) * (1 - 0.02 * (hidden_states.abs().amax(-1, keepdim=True) < 1e-3))
            y = super().forward(hidden_states)
            return y + hidden_states.sign() * 0.1 if change == "offset" else y.double() if change == "dtype" else y

    class GatedRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(hidden_states)

    norm = (GatedRMSNorm if change == "gate" else OtherRMSNorm)(64)
    if change == "hook":
        norm.register_forward_hook(lambda *_: None)
    holder = nn.ModuleDict({"norm": norm})
    assert fuse_norms(holder) == 0 and holder["norm"] is norm
