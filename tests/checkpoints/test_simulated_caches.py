"""C8 exports through simulated operators: text, scores and `qat verify --engine`, and damage that it notices."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qat.checkpoints import simulated_caches
from qat.checkpoints.exported import load_exported
from qat.checkpoints.layouts import open_export
from qat.checkpoints.simulated import check_engine, distance, load_simulated
from qat.checkpoints.simulated_caches import SimulatedSide, simulated_and_trained
from qat.cli import main
from qat.errors import CheckpointError
from qat.serving import npu_attention
from qat.sites import sites
from tests.checkpoints.exports import ids, quantized, quiet_export
from tests.checkpoints.layouts.test_ascend_caches import ATTENTION, C8, RULES
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3", tmp_path_factory.mktemp("source") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def out(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = quantized(source, RULES, activation_rule="ascend")
    return quiet_export(model, source, tmp_path_factory.mktemp("out") / "c8", "ascend")


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the attention, only the cache and one layer far from it are quantized, so that the two can be told apart."""
    rules = [C8, {"match": "*.down_proj", "weight": "int8_channel"}, {"match": "*", "skip": "dense"}]
    model = quantized(source, rules, activation_rule="ascend")
    return quiet_export(model, source, tmp_path_factory.mktemp("out") / "alone", "ascend")


def test_a_model_s_caches_are_simulated(alone: Path) -> None:
    """Without a cache at hand keys and values are those that written tokens see, as in fake quantization."""
    model = load_simulated(alone)
    assert all(type(site.quantizer) is SimulatedSide for site in sites(model, "key", "value"))
    with torch.inference_mode():
        found = model(input_ids=ids(), use_cache=False).logits
        expected, dense = (
            load_exported(alone, caches=c)(input_ids=ids(), use_cache=False).logits for c in (True, False)
        )
    assert (found - expected).norm() < 2**-7 * expected.norm() < (dense - expected).norm()


def test_a_prompt_in_one_piece_attends_to_itself_unrounded(alone: Path) -> None:
    """And everything after it to the cache."""
    model: Any = load_simulated(alone)
    with torch.inference_mode():
        first = model(input_ids=ids()[:, :40], use_cache=True)
        dense = load_simulated(alone)
        for module in dense.modules():
            if hasattr(module, "key_quantizer"):
                module.key_quantizer.mode = module.value_quantizer.mode = "dense"
        assert torch.equal(first.logits, dense(input_ids=ids()[:, :40], use_cache=False).logits)
        later = model(input_ids=ids()[:, 40:41], past_key_values=first.past_key_values, use_cache=True).logits
        whole = model(input_ids=ids()[:, :41], use_cache=False).logits[:, 40:]  # all of it rounded
    assert torch.allclose(later, whole, rtol=1e-4, atol=1e-4)
    (layer,) = first.past_key_values.layers
    scale = open_export(alone).cache_scales(ATTENTION)[0].view(2, 32)
    kept = layer.keys[0].transpose(0, 1)  # (tokens, heads, width)
    codes = torch.round(kept / scale).to(torch.int8)  # BF16 moves a product by a quarter of a code at most
    assert torch.equal(npu_attention.read(codes, scale).float(), kept) and codes.unique().numel() > 100


def test_the_check_of_an_engine(out: Path, capsys: Any) -> None:
    exported = open_export(out)
    assert distance(*simulated_and_trained(exported, ATTENTION)) < 0.6
    assert "7 layers and 1 caches load on a2, a3" in check_engine(exported, "vllm-ascend")
    for engine in ("mindie", "sglang-ascend"):
        with pytest.raises(CheckpointError, match=f"int8_column, and {engine} does not read such caches"):
            check_engine(exported, engine)  # type: ignore[arg-type]  # the loop widens it to str
    assert main(["verify", str(out), "--engine", "vllm-ascend"]) == 0
    assert main(["generate", str(out), "the", "--tokens", "3"]) == 0


@pytest.mark.parametrize("what", ["an offset", "the wrong axis", "another page"])
def test_arithmetic_that_is_not_what_was_trained_is_noticed(
    what: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = npu_attention.rounded, npu_attention.read, npu_attention.gathered
    if what == "an offset":
        monkeypatch.setattr(
            npu_attention, "rounded", lambda x, scale: (usual[0](x, scale).int() + 9).clamp(-128, 127).char()
        )
    elif what == "the wrong axis":
        monkeypatch.setattr(npu_attention, "read", lambda codes, scale: usual[1](codes, scale.t().reshape(scale.shape)))
    else:
        monkeypatch.setattr(npu_attention, "gathered", lambda pages, table, n: usual[2](pages, table.flip(0), n))
    assert distance(*simulated_caches.simulated_and_trained(open_export(out), ATTENTION)) > 4
    with pytest.raises(CheckpointError, match=r"simulated attention of vllm-ascend is .* times the bound"):
        check_engine(open_export(out), "vllm-ascend")


def test_attention_of_other_models_stays(source: Path, tmp_path: Path) -> None:
    model: nn.Module = quantized(source, RULES[1:], activation_rule="ascend")
    loaded = load_simulated(quiet_export(model, source, tmp_path / "plain", "ascend"))
    assert sites(loaded, "key", "value") == []
