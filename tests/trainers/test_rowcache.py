"""Rows at places of their own give the logits of whole documents; a model for which they would not is noticed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qat.trainers.rowcache import Rows, apart, in_bf16, rows_that_fit
from tests.tiny import VOCABULARY, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rowcache")


def load(folder: Path, kind: str, **changes: Any) -> Any:
    path = tiny_model(kind, folder / "-".join([kind, *changes]), **changes)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def drawn(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "qwen3_moe", "bloom"])
def test_each_row_is_a_document_of_its_own(folder: Path, kind: str) -> None:
    model = load(folder, kind)
    assert apart(model, 24)
    documents = drawn(9, 3, 4, 5)  # the second row holds three, one after another, of which the last is read in part
    rows = Rows(model, 2, 24)
    second = [(token, place) for ids in documents[1:] for place, token in enumerate(ids)]
    for place, (token, (other, at)) in enumerate(zip(documents[0], second, strict=False)):
        logits = rows.step([token, other], [place, at])
        ended = next((ids for ids in documents[1:] if ids[-1] == other and len(ids) == at + 1), None)
        for row, ids in ((0, documents[0][: place + 1]), (1, ended or [])):
            if ids:
                with torch.no_grad():
                    truth = model(input_ids=torch.tensor([ids])).logits[0, -1]
                torch.testing.assert_close(logits[row], truth, rtol=1e-4, atol=1e-4)


def test_rows_that_go_on_alone_keep_what_they_read(folder: Path) -> None:
    model = load(folder, "llama")
    documents = drawn(6, 6, 6)
    rows = Rows(model, 3, 8)
    for place in range(5):
        rows.step([ids[place] for ids in documents], [place] * 3)
    rows.keep([2, 0])
    logits = rows.step([documents[2][5], documents[0][5]], [5, 5])
    with torch.no_grad():
        truth = model(input_ids=torch.tensor([documents[2], documents[0]])).logits[:, -1]
    torch.testing.assert_close(logits, truth, rtol=1e-4, atol=1e-4)


def test_in_step_any_cache_will_do(folder: Path) -> None:
    model = load(folder, "gemma", sliding_window=8)
    assert not apart(model, 24) and apart(model, 8)  # windows shorter than a document
    rows, documents = Rows(model, 2, 24, apart=False), drawn(12, 12)
    for _ in range(2):  # the second time from the beginning
        for place in range(12):
            logits = rows.step([ids[place] for ids in documents], [place] * 2)
        with torch.no_grad():
            truth = model(input_ids=torch.tensor(documents)).logits[:, -1]
        torch.testing.assert_close(logits, truth, rtol=1e-4, atol=1e-4)


def test_a_model_that_mixes_rows_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder, "llama")
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *a, attention_mask=None, **k: forward(self, *a, **k))
    assert not apart(model, 24)


def test_bf16_is_lent_and_given_back(folder: Path) -> None:
    model = load(folder, "gemma")  # tied
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), in_bf16(model, True):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model(input_ids=torch.tensor([[5, 6]])).logits.isfinite().all()
        raise RuntimeError("inside")
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])
    with in_bf16(model, False):
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_memory_limits_the_rows(folder: Path) -> None:
    model = load(folder, "llama")
    one = 2 * 2 * 2 * 2 * 32 * 24  # keys and values, bytes, layers, heads, width, columns
    assert rows_that_fit(model, 24, 96, 4 * 10 * one) == 10
    assert rows_that_fit(model, 24, 96, 10**12) == 96 and rows_that_fit(model, 24, 96, 1) == 1
