"""What adapters weigh, counted on the model that would be trained; the rest of the estimate: `test_estimate.py`."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qat.lora import attach
from qat.surgery import apply
from qat.trainers import lora_footprint
from qat.trainers.footprint import GIB, job_facts, memory
from qat.trainers.job import load_job
from tests.qat.adapters.test_experts import KINDS
from tests.tiny import tiny_model
from tests.trainers.test_estimate import ROOT, job


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_adapters_are_all_that_has_moments(tmp_path: Path) -> None:
    tiny = tiny_model("llama", tmp_path, tie_word_embeddings=True)
    for lora in ({"rank": 4}, {"rank": 4, "dora": True, "norms": True, "targets": "*.self_attn.*_proj"}):
        wanted = job(tiny, scheme={"learn": "none"}, lora=lora)
        assert wanted.lora is not None
        model = apply(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), wanted.scheme)
        dense = sum(p.numel() for p in model.parameters())
        attach(model, wanted.lora)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        parts = memory(wanted, job_facts(wanted), "cpu", False)
        added = sum(p.numel() for p in model.parameters()) - dense
        assert parts["master weights"] == 4 * (dense + added)
        assert parts["gradients"] == 4 * trained and parts["Adam moments"] == 8 * trained


def test_adapters_of_an_8b_model_need_much_less() -> None:
    recipe = ROOT / "configs" / "qad" / "llama-3.1-8b-nvfp4-8gpu.yaml"
    common = [
        "strategy=auto",
        "devices=1",
        "rows=1",
        "micro_rows=1",
        "activation_checkpointing=true",
        "scheme.learn=none",
    ]
    full, low = (load_job(recipe, [*common, *more]) for more in ([], ["lora={rank: 16}"]))
    before, after = (sum(memory(each, job_facts(each), "cuda", True).values()) for each in (full, low))
    assert before >= 2.5 * after


def test_a_packed_base_weighs_its_codes(tmp_path: Path) -> None:
    tiny = tiny_model("llama", tmp_path)
    wanted = job(tiny, scheme={"learn": "none"}, lora={"rank": 4, "base": "packed"})
    assert wanted.lora is not None
    model = apply(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), wanted.scheme)
    attach(model, wanted.lora)
    held = sum(b.nbytes for name, b in model.named_buffers() if ".held." in name)
    parameters = sum(p.nbytes for p in model.parameters())
    parts = memory(wanted, job_facts(wanted), "cpu", False)
    assert parts["master weights"] == pytest.approx(held + parameters, rel=1e-3)
    assert parts["quantized weights for backward"] == 0


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_packed_experts_weigh_their_codes(kind: str, tmp_path: Path) -> None:
    """And one matrix of a stack is what is dense while it is made, whatever the number of experts."""
    tiny = tiny_model(kind, tmp_path, **{**KINDS[kind], "num_hidden_layers": 1})
    rules = [{"match": "*.experts.*", "weight": "nvfp4"}, {"match": "*", "skip": "the rest"}]
    common = {"scheme": {"learn": "none", "rules": rules}}
    wanted, plain = (
        job(tiny, **common, lora={"rank": 4, "base": base, "targets": "*.experts.*"}) for base in ("packed", "dense")
    )
    assert wanted.lora is not None
    model = apply(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), wanted.scheme)
    attach(model, wanted.lora)
    held = sum(b.nbytes for name, b in model.named_buffers() if ".held." in name)
    parts = memory(wanted, job_facts(wanted), "cpu", False)
    assert parts["master weights"] == pytest.approx(held + sum(p.nbytes for p in model.parameters()), rel=1e-3)
    assert parts["quantized weights for backward"] == 0
    coverage = job_facts(wanted).coverage
    stack = max((c.shape for c in coverage.modules if c.weight), key=math.prod)
    assert lora_footprint.largest(wanted, coverage) == math.prod(stack[1:])
    assert lora_footprint.largest(plain, coverage) == math.prod(stack)


def test_adapters_of_experts_are_counted(tmp_path: Path) -> None:
    tiny = tiny_model("qwen3_moe", tmp_path)
    for targets in ((), ("*.experts.*",), ("*_proj",)):
        rules = [{"match": "*_proj", "weight": "nvfp4"}, {"match": "*", "skip": "the rest"}]
        wanted = job(tiny, scheme={"learn": "none", "rules": rules}, lora={"rank": 4, "targets": targets})
        assert wanted.lora is not None
        model = apply(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), wanted.scheme)
        attach(model, wanted.lora)
        assert job_facts(wanted).trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_adapters_beside_their_layers_keep_inputs_as_they_were(tmp_path: Path) -> None:
    tiny = tiny_model("llama", tmp_path)
    pairs = [job(tiny, scheme={"learn": "none"}, lora={"rank": 4, "merge": merge}) for merge in (True, False)]
    merged, beside = (memory(each, job_facts(each), "cpu", False)["activations"] for each in pairs)
    tokens = pairs[0].micro_rows * pairs[0].data.seq_len
    assert beside - merged == tokens * 2 * 4 * (2 * 128 + 128 + 256)


def test_a_packed_base_of_an_8b_model_needs_less_still(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ROOT / "configs" / "qad" / "llama-3.1-8b-nvfp4-8gpu.yaml"
    common = ["strategy=auto", "devices=1", "rows=1", "micro_rows=1", "activation_checkpointing=true"]
    common.append("scheme.learn=none")
    variants = ([], ["lora={rank: 16}"], ["lora={rank: 16, base: packed}"])
    full, low, held = (load_job(recipe, [*common, *more]) for more in variants)
    peaks = [sum(memory(each, job_facts(each), "cuda", True).values()) for each in (full, low, held)]
    assert peaks[0] >= 2.5 * peaks[2] and peaks[2] < peaks[1]
    parts = memory(held, job_facts(held), "cuda", True)
    assert parts["initialisation, beyond that"] > 10 * GIB  # a packed checkpoint is never dense there
    monkeypatch.setattr(lora_footprint, "dense_first", lambda job: False)
    assert peaks[0] >= 4 * sum(memory(held, job_facts(held), "cuda", True).values())


QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def test_packed_experts_of_a_30b_model_fit_where_dense_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a packed checkpoint, as docs/train.md says."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    monkeypatch.setattr(lora_footprint, "dense_first", lambda job: False)
    rules = [{"match": "*_proj", "weight": "nvfp4"}, {"match": "*", "skip": "the rest"}]
    text = {"source": "embedded", "seq_len": 4096, "max_tokens": 1 << 20}
    common: dict[str, Any] = {"data": text, "scheme": {"rules": rules, "learn": "none"}, "rows": 1, "micro_rows": 1}
    adapters = {"rank": 16, "targets": "*_proj"}
    wanted = [
        job(tmp_path, **common, activation_checkpointing=True, **more)
        for more in ({}, {"lora": adapters}, {"lora": {**adapters, "base": "packed"}})
    ]
    full, dense, packed = (sum(memory(each, job_facts(each), "cuda", True).values()) / GIB for each in wanted)
    assert packed < 100 and dense > 2 * packed and full > 5 * packed
