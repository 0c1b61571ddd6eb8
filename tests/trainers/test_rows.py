"""Rows without a target are left out, counted and said, and never reach a step."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qat.cli import main
from qat.errors import DataError
from qat.trainers.data import Blocks, DataConfig, load_blocks
from qat.trainers.evaluate import Evaluator
from tests.tiny import tiny_model, tiny_tokenizer


def chats(path: Path, *questions: int) -> Path:
    """A chat for each number of words in its question, with a short answer."""
    records = [
        {"messages": [{"role": "user", "content": "Words " * count}, {"role": "assistant", "content": "Yes."}]}
        for count in questions
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def blocks_of(path: Path, **options: Any) -> Blocks:
    return load_blocks(DataConfig(source=str(path), seq_len=32, **options), tiny_tokenizer(), cache_dir=path.parent)


def length(count: int) -> int:
    tokenizer = tiny_tokenizer()
    chat = [{"role": "user", "content": "Words " * count}, {"role": "assistant", "content": "Yes."}]
    return len(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"])


def test_padded_rows_without_a_target_are_left_out_and_counted(tmp_path: Path) -> None:
    blocks = blocks_of(chats(tmp_path / "a.jsonl", 1, 50, 2, 60, 1), pack=False)
    assert (len(blocks), blocks.documents, blocks.empty_rows) == (3, 5, 2)
    assert blocks.tokens == sum(min(32, length(n)) for n in (1, 2, 1))
    assert blocks.tokens + blocks.dropped_tokens == sum(map(length, (1, 50, 2, 60, 1)))
    assert (blocks.array()[:, 1] != -100).any(axis=1).all()
    assert "2 rows without a token to learn left out" in blocks.summary


def test_packed_rows_without_a_target_are_left_out_and_counted(tmp_path: Path) -> None:
    path = chats(tmp_path / "a.jsonl", 1, 100, 2, 3)
    blocks = blocks_of(path)
    rows = blocks.array()
    total = sum(map(length, (1, 100, 2, 3)))
    assert blocks.empty_rows >= 2 and len(rows) + blocks.empty_rows == total // 32
    assert blocks.tokens + blocks.dropped_tokens == total
    assert (rows[:, 1] != -100).any(axis=1).all()
    assert blocks.loss_tokens == int((rows[:, 1] != -100).sum())
    # Where reading stops by plan, rows that teach nothing are no part of what was asked for.
    two = load_blocks(DataConfig(source=str(path), seq_len=32), tiny_tokenizer(), num_tokens=64, cache_dir=tmp_path)
    assert len(two) == 2 and (two.array() == rows[:2]).all() and two.dropped_tokens == 32 * two.empty_rows


@pytest.mark.parametrize("shape", ["sharegpt", "messages"])
def test_turns_that_chats_begin_with_are_left_out_and_counted(tmp_path: Path, shape: str) -> None:
    turns = [("gpt", "Left over"), ("human", "Why?"), ("gpt", "So."), ("gpt", "Left over")]
    spoken = {"gpt": "assistant", "human": "user"}
    form = {
        "sharegpt": lambda said: {"conversations": [{"from": who, "value": text} for who, text in said]},
        "messages": lambda said: {"messages": [{"role": spoken[who], "content": text} for who, text in said]},
    }[shape]
    path, cut = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text("\n".join(json.dumps(form(said)) for said in (turns[:3], [turns[3], *turns[:3]], turns[:1])))
    cut.write_text("\n".join(json.dumps(form(turns[1:3])) for _ in range(2)))
    found, other = blocks_of(path, pack=False), blocks_of(cut, pack=False)
    assert (found.array() == other.array()).all() and found.loss_tokens > 0
    assert (found.documents, found.skipped_documents, found.leading_turns) == (2, 1, 4)
    assert "4 assistant turns that chats began with left out" in found.summary
    assert "left out" not in other.summary
    path.write_text(json.dumps(form(turns[:1])))
    with pytest.raises(DataError, match="only 1 documents without an assistant turn to learn"):
        blocks_of(path, pack=False)


def test_a_text_of_such_rows_alone_is_refused(tmp_path: Path) -> None:
    for pack in (True, False):
        with pytest.raises(DataError, match=r"none of \d+ rows has a token to learn, since prompts are longer"):
            blocks_of(chats(tmp_path / "a.jsonl", 100), pack=pack)


def test_a_run_on_long_prompts_trains_on_what_teaches_and_reports_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
    job = {
        "name": "x", "model": {"id": str(model)}, "runs": str(tmp_path), "steps": 4, "rows": 1, "micro_rows": 1,
        "scheme": {"rules": [{"match": "model.embed_tokens", "skip": "kept"}, {"match": "lm_head", "skip": "kept"},
                             {"match": "*_proj", "weight": "int8_channel"}], "init": []},
        "data": {"source": str(chats(tmp_path / "a.jsonl", 50, 1, 60, 70, 2)), "seq_len": 32, "pack": False},
        "eval": {"data": {"source": "heldout", "seq_len": 32}, "tokens": 64}, "calibration_rows": 2,
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert main(["train", str(tmp_path / "job.yaml")]) == 0
    said = "5 documents (messages) in 2 rows of 32 tokens, 8 tokens to learn; 3 rows without a token to learn left out"
    assert f"training text: {said}" in " ".join(capsys.readouterr().err.split())
    assert f"- training text: {said}" in (tmp_path / "x" / "report.md").read_text()
    assert said in json.loads((tmp_path / "x" / "report.json").read_text())["texts"]["training"]
    with (tmp_path / "x" / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)


def test_evaluating_on_no_target_is_an_error_and_not_a_division_by_zero(tmp_path: Path) -> None:
    blocks = blocks_of(chats(tmp_path / "a.jsonl", 1), pack=False)
    rows = blocks.array().copy()
    rows[:, 1] = -100
    (blocks.path / "rows.bin").write_bytes(rows.tobytes())
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama", tmp_path / "model", num_hidden_layers=1))
    with pytest.raises(DataError, match="no token to predict"):
        Evaluator(None, blocks, device=torch.device("cpu")).score(model)
