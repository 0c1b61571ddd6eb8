"""Rows against what they are made of, and packed logits against those of each document alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from qat.checkpoints.hf import load_model
from qat.trainers.forward import hidden_states
from qat.trainers.packing import (
    Batch,
    arrange,
    collate,
    evaluating,
    known,
    leakage,
    model_inputs,
    pack,
    pad,
    position_ids,
)
from qat.trainers.tokens import Tokens
from qat.training.rows import IGNORE
from tests.qat.training.operations import Operations
from tests.tiny import tiny_model

VOCABULARY = 61
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "sdpa", {}),
    "llama-eager": ("llama", "eager", {}),
    "qwen3": ("qwen3", "sdpa", {}),
    "mistral-window": ("mistral", "sdpa", {"sliding_window": 5}),
    "gemma2": ("gemma2", "eager", {**WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", "sdpa", {**WINDOW, "query_pre_attn_scalar": 8}),
}


def model_of(kind: str, attention: str, extra: dict[str, Any]) -> Any:
    """Weights drawn wide, so that attention depends strongly on what it sees."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**{**BASE, **extra})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def documents_of(lengths: list[int], seed: int = 0) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        made.append(Tokens(rng.integers(3, VOCABULARY, length, dtype=np.int32), rng.random(length) < 0.7))
    return made


# ---- rows


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(8, 17), st.integers(0, 9))
def test_packing_keeps_every_token_once_in_order_with_the_right_target(
    lengths: list[int], seq_len: int, seed: int
) -> None:
    documents = documents_of(lengths, seed)
    rows = list(pack(iter(documents), seq_len))
    # The slow definition: walk the tokens one at a time.
    flat, number, last = [], 0, (-1, -1)
    for which, document in enumerate(documents):
        for place, token in enumerate(document.ids):
            at = len(flat) % seq_len
            if at == 0:
                number = 0
            elif which != last[0]:
                number += 1
            following = place + 1
            known = following < len(document.ids) and document.learn[following]
            flat.append((token, document.ids[following] if known else IGNORE, number))
            last = (which, place)
    assert len(rows) == len(flat) // seq_len
    whole = np.array(flat[: len(rows) * seq_len], np.int32).reshape(len(rows), seq_len, 3).transpose(0, 2, 1)
    assert np.array_equal(np.array(rows, np.int32).reshape(whole.shape), whole)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(8, 17))
def test_padding_gives_one_document_per_row(lengths: list[int], seq_len: int) -> None:
    documents = documents_of(lengths)
    batch = collate(np.stack(list(pad(iter(documents), seq_len, 0))))
    assert torch.equal(batch["position_ids"], torch.arange(seq_len).expand(len(lengths), -1))
    for row, document in enumerate(documents):
        count = min(seq_len, len(document.ids))
        assert batch["input_ids"][row].tolist() == [*document.ids[:count], *[0] * (seq_len - count)]
        assert batch["document_ids"][row].tolist() == [0] * count + [-1] * (seq_len - count)
        for place, target in enumerate(batch["targets"][row].tolist()):
            learnt = place < count and place + 1 < len(document.ids) and document.learn[place + 1]
            assert target == (document.ids[place + 1] if learnt else IGNORE)


def test_positions_restart_with_each_document() -> None:
    found = position_ids(np.array([[0, 0, 0, 1, 2, 2], [0, 0, 0, 0, -1, -1]]))
    assert found.tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]


# ---- rows and models


def packed_batch() -> tuple[Batch, list[tuple[int, int, int]]]:
    """Two rows of three documents each, and every document as (row, begin, end)."""
    spans = [(0, 0, 9), (0, 9, 10), (0, 10, 24), (1, 0, 13), (1, 13, 20), (1, 20, 24)]
    documents = documents_of([end - begin for _, begin, end in spans])
    return collate(np.stack(list(pack(iter(documents), 24)))), spans


@torch.no_grad()
def worst_difference(model: Any, batch: Batch, spans: list[tuple[int, int, int]], **changed: Any) -> float:
    """Largest difference between packed logits and each document's alone, for documents after the first."""
    logits = model(**{**model_inputs(batch), **changed}).logits
    alone = {
        span: model(batch["input_ids"][span[0] : span[0] + 1, span[1] : span[2]], use_cache=False).logits[0]
        for span in spans
        if span[1] > 0
    }
    return max((logits[row, begin:end] - found).abs().max().item() for (row, begin, end), found in alone.items())


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    model = model_of(*MODELS[name])
    batch, spans = packed_batch()
    assert worst_difference(model, batch, spans) < 5e-5
    assert leakage(model) < 1e-5
    # Each of the ways that look right and leak: the test must notice every one.
    assert worst_difference(model, batch, spans, position_ids=None) > 0.1
    assert worst_difference(model, batch, spans, use_cache=True) > 0.1
    assert worst_difference(model, batch, spans, attention_mask=torch.ones_like(batch["input_ids"])) > 0.1


def test_leakage_finds_a_model_that_ignores_position_ids() -> None:
    model = model_of("llama", "sdpa", {})
    forward = model.forward
    model.forward = lambda **inputs: forward(**{**inputs, "position_ids": None})
    assert leakage(model) == pytest.approx(1.0)


def test_one_document_per_row_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path: causal attention without a mask, for rows of one document, padded ones included."""
    seen: list[tuple[bool, bool]] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Any = None, is_causal: bool = False, **rest: Any) -> torch.Tensor:
        seen.append((attn_mask is None, is_causal))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model = model_of("llama", "sdpa", {})

    def masks(rows: Iterator[Any]) -> set[tuple[bool, bool]]:
        seen.clear()
        with torch.no_grad():
            model(**model_inputs(collate(np.stack(list(rows)))))
        return set(seen)

    assert masks(pack(iter(documents_of([24, 24])), 24)) == {(True, True)}
    assert masks(pad(iter(documents_of([24, 5])), 24, 0)) == {(True, True)}
    assert masks(pack(iter(documents_of([20, 28])), 24)) == {(False, False)}


def test_flash_attention_gets_one_long_row() -> None:
    batch, spans = packed_batch()
    model = model_of("llama", "sdpa", {})
    assert arrange(batch, model) is batch
    model.config._attn_implementation = "flash_attention_2"
    flat = arrange(batch, model)
    model.config._attn_implementation = "sdpa"
    assert {name: tuple(tensor.shape) for name, tensor in flat.items()} == dict.fromkeys(batch, (1, 48))
    whole = [(0, row * 24 + begin, row * 24 + end) for row, begin, end in spans]
    assert worst_difference(model, flat, whole) < 5e-5


def test_evaluating_restores_each_module() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]


def test_what_the_host_knows_of_a_batch_is_not_asked_of_the_device(tmp_path: Path) -> None:
    """The hidden states of packed rows and of whole ones are the same to the bit, and no operation reads a number."""
    model: Any = load_model(tiny_model("llama", tmp_path / "model", num_hidden_layers=1)).eval()
    for documents in ([[0] * 8, [0] * 8], [[0] * 3 + [1] * 5, [0] * 8]):
        rows = np.zeros((2, 3, 8), np.int32)
        rows[:, 0], rows[:, 2] = np.arange(3, 11), documents
        batch = collate(rows)
        found = known(batch)
        assert found["packed"].numel() == (max(map(max, documents)) > 0)
        assert torch.equal(found["kept"], (batch["targets"].flatten() != IGNORE).nonzero().flatten())
        with torch.no_grad(), Operations() as operations:
            asked = hidden_states(model, batch)
        assert any("is_nonzero" in name or "_local_scalar" in name for name in operations.seen)
        with torch.no_grad(), Operations() as operations:
            assert torch.equal(hidden_states(model, {**batch, **found}), asked)
        assert not any("nonzero" in name or "_local_scalar" in name for name in operations.seen)
