"""Prompts in INT8: what a model computes is what attention over keys and queries on the grids of blocks computes, only
where it is asked for and only in prompts; the rest is left as it was and said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

from qat.cli import main
from qat.engines.attention import FEW
from qat.engines.cache import QuantizedCache
from qat.engines.prompts import NAME, int8_attention
from qat.errors import UnsupportedError
from tests.checkpoints.exports import export_pair
from tests.engines.test_cache import made
from tests.tiny import tiny_model

LONG = 3 + torch.arange(150).remainder(61)[None]  # no token pads


def on_grid(x: Tensor, size: int) -> Tensor:
    """x (batch, heads, tokens, width) rounded in float64, 127 steps to the largest of `size` tokens of a head."""
    parts = []
    for part in x.double().split(size, dim=2):
        step = part.abs().amax(dim=(2, 3), keepdim=True) / 127
        parts.append((part / step).round() * step)
    return torch.cat(parts, dim=2)


def by_hand(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any) -> Any:
    """Attention of float64 numbers on those grids."""
    smooth = on_grid(key.double() - key.double().mean(dim=2, keepdim=True), 64)
    sides = on_grid(query, 128), smooth, value.half().double()
    found = functional.scaled_dot_product_attention(*sides, is_causal=True, enable_gqa=True, scale=more["scaling"])
    return found.transpose(1, 2).to(query.dtype), None


AttentionInterface.register("by_hand", by_hand)
AttentionMaskInterface.register("by_hand", sdpa_mask)


@pytest.fixture(params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A tiny one in float32, whose weights are large enough for attention to matter."""
    tiny: Any = AutoModelForCausalLM.from_pretrained(tiny_model(request.param, tmp_path / "model"), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in tiny.named_parameters():
            weight.mul_(4 if "_proj" in name else 1)
    return tiny.eval()


@pytest.mark.filterwarnings("ignore:no kernel computes INT8")
@torch.no_grad()
def test_prompts_are_computed_on_the_grids(model: Any) -> None:
    plain = model(LONG).logits
    model.set_attn_implementation("by_hand")
    expected = model(LONG).logits
    model.set_attn_implementation("sdpa")
    int8_attention(model)
    found = model(LONG).logits
    assert (found - plain).norm() > 10 * (found - expected).norm()


@pytest.mark.filterwarnings("ignore:no kernel computes INT8")
@torch.no_grad()
def test_steps_and_short_prompts_stay_as_they_are(model: Any) -> None:
    before = model(LONG[:, :FEW]).logits
    int8_attention(model)
    assert torch.equal(model(LONG[:, :FEW]).logits, before)
    options: Any = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    step = model.generate(LONG, **options)
    again = model(LONG, use_cache=True)
    torch.testing.assert_close(step.logits[0], again.logits[:, -1])  # one row of the head, or all
    after = model(step.sequences[:, 150:151], past_key_values=again.past_key_values).logits[:, -1]
    torch.testing.assert_close(step.logits[1], after)


@pytest.mark.filterwarnings("ignore:no kernel computes INT8")
@torch.no_grad()
def test_padding_is_left_to_sdpa_with_a_warning(model: Any) -> None:
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :5] = 0
    ids = LONG[:, :20].repeat(2, 1)
    before = model(ids, attention_mask=mask).logits
    int8_attention(model)
    with pytest.warns(UserWarning, match="is not computed in INT8: a mask"):
        assert torch.equal(model(ids, attention_mask=mask).logits, before)


@pytest.mark.filterwarnings("ignore:no kernel computes INT8")
@torch.no_grad()
def test_quantized_caches_go_with_it(tmp_path: Path) -> None:
    model = made(tiny_model("llama", tmp_path / "model"), "fp8_tensor", "fp8_tensor")
    int8_attention(model)
    options: Any = {"max_new_tokens": 4, "do_sample": False}
    assert model.generate(LONG, past_key_values=QuantizedCache(model), **options).shape == (1, 154)


def test_other_attention_is_refused(model: Any) -> None:
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedError, match="'eager'; load it with the former"):
        int8_attention(model)
    assert model.config._attn_implementation == "eager" != NAME


def test_the_commands_take_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_pair(tiny_model("llama", tmp_path / "model"), tmp_path / "out", ("int8_channel", None))
    out = str(tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    int8 = ["--prompt-attention", "int8"]
    assert main(["eval", out, "--text", str(text), "--tokens", "256"]) == 0
    before = capfd.readouterr().out
    with pytest.warns(UserWarning, match="no kernel computes INT8 attention on cpu"):
        assert main(["eval", out, "--text", str(text), "--tokens", "256", *int8]) == 0
    assert capfd.readouterr().out != before
    with pytest.warns(UserWarning, match="no kernel computes INT8 attention on cpu"):
        assert main(["generate", out, "quick " * 20, "--tokens", "2", *int8]) == 0
    assert main(["serve", out, "--engine", "vllm", *int8]) == 2
    assert "goes with --engine transformers" in capfd.readouterr().err
