"""From a source to batches: where reading stops, what is cached, pure batches, and what a teacher writes."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoModelForCausalLM

from qat.config import validate
from qat.errors import ConfigError, DataError
from qat.trainers import data, tokens
from qat.trainers.data import Batches, Blocks, DataConfig, load_blocks
from qat.trainers.overlap import overlap
from qat.trainers.selfwritten import Generate
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = [
    f"Text {i}. " + "The fox jumps over the dog and a model predicts the next token. " * (i % 5) for i in range(40)
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return path


def config_of(path: Path, **options: Any) -> DataConfig:
    return DataConfig(**{"source": str(path), "seq_len": 32, **options})


def flat(blocks: Blocks) -> list[int]:
    """All ids that are not padding, row by row."""
    batch = blocks.rows(range(len(blocks)))
    return batch["input_ids"][batch["document_ids"] >= 0].tolist()


def expected() -> list[int]:
    tokenizer = tiny_tokenizer()
    return [i for text in TEXTS for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


# ---- from source to rows


def test_rows_hold_the_whole_text_and_count_what_they_drop(corpus: Path, tmp_path: Path) -> None:
    blocks = load_blocks(config_of(corpus), tiny_tokenizer(), cache_dir=tmp_path)
    ids = expected()
    assert flat(blocks) == ids[: len(ids) // 32 * 32]
    assert (len(blocks), blocks.tokens, blocks.dropped_tokens) == (
        len(ids) // 32,
        len(ids) // 32 * 32,
        len(ids) % 32,
    )
    assert (blocks.documents, blocks.skipped_documents) == (len(TEXTS), 0)
    batch = blocks.rows(range(len(blocks)))
    assert blocks.loss_tokens == int((batch["targets"] != -100).sum())
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "targets", "document_ids"), (torch.int64, (len(blocks), 32))
    )
    assert torch.equal(blocks.rows([2, 0])["targets"], batch["targets"][[2, 0]])


def test_padded_rows_count_what_they_cut(corpus: Path, tmp_path: Path) -> None:
    blocks = load_blocks(config_of(corpus, pack=False), tiny_tokenizer(), cache_dir=tmp_path)
    lengths = [len(tiny_tokenizer()(text)["input_ids"]) + 1 for text in TEXTS]
    assert (len(blocks), blocks.tokens) == (len(TEXTS), sum(min(32, length) for length in lengths))
    assert blocks.tokens + blocks.dropped_tokens == sum(lengths)


@pytest.mark.parametrize(
    ("options", "num_tokens", "rows"),
    [
        ({}, 100, 4),
        ({"max_tokens": 100}, None, 3),
        ({"max_tokens": 100}, 40, 2),
        ({"max_tokens": 64}, 640, 2),
    ],
)
def test_reading_stops_early(corpus: Path, tmp_path: Path, options: Any, num_tokens: int | None, rows: int) -> None:
    blocks = load_blocks(config_of(corpus, **options), tiny_tokenizer(), num_tokens=num_tokens, cache_dir=tmp_path)
    assert (len(blocks), blocks.dropped_tokens) == (rows, 0)
    assert flat(blocks) == expected()[: rows * 32]
    whole = load_blocks(config_of(corpus), tiny_tokenizer(), cache_dir=tmp_path)
    assert np.array_equal(blocks.array(), whole.array()[:rows])


def test_a_padded_cap_cuts_the_last_document(corpus: Path, tmp_path: Path) -> None:
    blocks = load_blocks(config_of(corpus, pack=False, max_tokens=50), tiny_tokenizer(), cache_dir=tmp_path)
    assert blocks.tokens + blocks.dropped_tokens == 50
    few = load_blocks(config_of(corpus, pack=False), tiny_tokenizer(), num_tokens=33, cache_dir=tmp_path)
    assert len(few) == 2


def test_more_than_the_source_has_gives_what_there_is(corpus: Path, tmp_path: Path) -> None:
    blocks = load_blocks(config_of(corpus), tiny_tokenizer(), num_tokens=10**6, cache_dir=tmp_path)
    assert blocks.tokens == len(expected()) // 32 * 32


def test_chats_without_an_assistant_are_skipped_and_counted(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": m}) for m in ([user], [user, answer], [user])))
    blocks = load_blocks(config_of(path, pack=False, seq_len=64), tiny_tokenizer(), cache_dir=tmp_path)
    assert (len(blocks), blocks.documents, blocks.skipped_documents) == (1, 1, 2)
    learnt = blocks.rows([0])["targets"]
    assert tiny_tokenizer().decode(learnt[learnt != -100]) == "Answer.<|im_end|>"
    path.write_text(json.dumps({"messages": [user]}))
    with pytest.raises(DataError, match="only 1 documents without an assistant turn"):
        load_blocks(config_of(path), tiny_tokenizer(), cache_dir=tmp_path)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("0123456789")
    with pytest.raises(DataError, match=r"gives (\d+) tokens, but one packed row needs seq_len = 32"):
        load_blocks(config_of(path), tiny_tokenizer(), cache_dir=tmp_path)
    path.write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        load_blocks(config_of(path), tiny_tokenizer(), cache_dir=tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()], "a refused source leaves nothing behind"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"seq_len": 4}, "seq_len"),
        ({"max_tokens": 100}, "raise it or set pack: false"),
        ({"generate": {"tokens": 5}}, "only works with source: teacher"),
        ({"sequence_length": 64}, "nearest: seq_len"),
        ({"source": "teacher", "generate": {"temperature": 0}}, "generate.temperature"),
    ],
)
def test_wrong_configurations(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        validate(DataConfig, given, "data")


# ---- the cache


def test_a_second_load_reads_no_text(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_blocks(config_of(corpus), tiny_tokenizer(), cache_dir=tmp_path)
    monkeypatch.setattr(tokens, "encode", None)
    assert load_blocks(config_of(corpus, seed=5), tiny_tokenizer(), cache_dir=tmp_path) == first
    assert first.path.parent == tmp_path and not list(tmp_path.rglob("*.partial*"))


def test_whatever_changes_the_rows_changes_the_key(corpus: Path, tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["predicts"])
    found = [load_blocks(config_of(corpus), tiny_tokenizer(), cache_dir=tmp_path)]
    found.append(load_blocks(config_of(corpus), other, cache_dir=tmp_path))
    for options in ({"seq_len": 16}, {"pack": False}, {"max_tokens": 64}):
        found.append(load_blocks(config_of(corpus, **options), tiny_tokenizer(), cache_dir=tmp_path))
    corpus.write_text(corpus.read_text().replace("Text 3", "Text 4"))
    found.append(load_blocks(config_of(corpus), tiny_tokenizer(), cache_dir=tmp_path))
    assert len({blocks.path for blocks in found}) == len({blocks.digest for blocks in found}) == len(found)


@pytest.mark.parametrize("damage", ["short", "no meta", "broken meta", "empty"])
def test_a_damaged_cache_is_made_again(corpus: Path, tmp_path: Path, damage: str) -> None:
    first = load_blocks(config_of(corpus), tiny_tokenizer(), cache_dir=tmp_path)
    rows, meta = first.path / "rows.bin", first.path / "meta.json"
    if damage == "short":
        rows.write_bytes(rows.read_bytes()[:-4])
    elif damage == "no meta":
        meta.unlink()
    elif damage == "broken meta":
        meta.write_text(meta.read_text()[:-9])
    else:
        shutil.rmtree(first.path)
        first.path.mkdir()
    with pytest.warns(UserWarning, match="is damaged"):
        again = load_blocks(config_of(corpus), tiny_tokenizer(), cache_dir=tmp_path)
    assert again == first and again.array().shape == (len(again), 3, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_blocks(config_of(corpus), tiny_tokenizer(), cache_dir=tmp_path)


def test_the_default_cache_is_in_the_home_folder(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    blocks = load_blocks(config_of(corpus), tiny_tokenizer())
    assert blocks.path.parent == tmp_path / ".cache" / "qat" / "data"


# ---- batches


def blocks_of(rows: int) -> Blocks:
    return Blocks(Path(), "none", rows, 8, rows * 8, rows * 7, 0, rows, 0, "")


@given(st.integers(1, 23), st.sampled_from([1, 2, 3, 6]), st.integers(1, 5), st.integers(0, 3))
def test_every_epoch_visits_each_row_once(rows: int, world: int, share: int, seed: int) -> None:
    size = world * share
    ranks = [Batches(blocks_of(rows), size, seed, rank, world) for rank in range(world)]
    epochs = 3
    seen = [int(i) for index in range(-(-rows * epochs // size)) for rank in ranks for i in rank.indices(index)]
    for epoch in range(epochs):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_batches_are_pure_and_orders_differ() -> None:
    one, same, other = (Batches(blocks_of(50), 10, seed) for seed in (0, 0, 1))
    forward = [one.indices(i).tolist() for i in range(12)]
    data._order.cache_clear()
    assert [same.indices(i).tolist() for i in reversed(range(12))] == forward[::-1]
    assert forward[:5] != forward[5:10] and forward[:5] != [other.indices(i).tolist() for i in range(5)]


def test_batch_gives_the_rows_of_its_indices(corpus: Path, tmp_path: Path) -> None:
    blocks = load_blocks(config_of(corpus), tiny_tokenizer(), cache_dir=tmp_path)
    batches = Batches(blocks, 2 * len(blocks), seed=3)  # more rows than there are: wraps around
    batch = batches.batch(4)
    assert all(torch.equal(batch[name], tensor) for name, tensor in blocks.rows(batches.indices(4)).items())
    assert len(batch["input_ids"]) == 2 * len(blocks)


@pytest.mark.parametrize(("rows", "rank", "world"), [(0, 0, 1), (5, 0, 2), (4, 2, 2), (4, -1, 2)])
def test_wrong_shares_are_refused(rows: int, rank: int, world: int) -> None:
    with pytest.raises(ConfigError):
        Batches(blocks_of(9), rows, 0, rank, world)


# ---- overlap


def test_overlap_is_the_share_of_held_out_ngrams(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def made(name: str, texts: list[str], seq_len: int = 64) -> Blocks:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        return load_blocks(config_of(path, seq_len=seq_len), tiny_tokenizer(), cache_dir=tmp_path)

    def noise(count: int) -> list[str]:
        return ["".join(map(chr, rng.integers(97, 123, 90))) for _ in range(count)]

    shared = noise(4)
    train, held = made("train", [*noise(20), *shared, *noise(9)]), made("held", [*noise(6), *shared], 48)

    def ngrams(blocks: Blocks) -> list[tuple[int, ...]]:
        found = []
        for ids, _, document in blocks.array().tolist():
            spans = [(i, i + 13) for i in range(len(ids) - 12)]
            found += [tuple(ids[a:b]) for a, b in spans if len(set(document[a:b])) == 1]
        return found

    known = set(ngrams(train))
    truth = [gram in known for gram in ngrams(held)]
    assert overlap(train, held) == pytest.approx(sum(truth) / len(truth)) and 0.1 < sum(truth) / len(truth) < 0.6
    assert overlap(train, train) == 1.0 and overlap(made("other", noise(9)), held) == 0.0
    assert overlap(train, made("tiny", noise(3), 8)) == 0.0


# ---- text written by the teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_model("llama", tmp_path_factory.mktemp("teacher"), num_hidden_layers=1, initializer_range=0.3)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def written(teacher: Any, cache: Path, *, seed: int = 0, pack: bool = False, **generate: Any) -> Blocks:
    generate = {"tokens": 24 * 12, "batch": 5, "precision": "fp32", **generate}
    config = DataConfig(source="teacher", seq_len=24, pack=pack, seed=seed, generate=Generate(**generate))
    return load_blocks(config, tiny_tokenizer(), cache_dir=cache, teacher=teacher)


def test_the_teacher_writes_greedily_first_then_samples(teacher: Any, tmp_path: Path) -> None:
    teacher.train()
    blocks = written(teacher, tmp_path, greedy_tokens=3)
    assert teacher.training and len(blocks) == 12
    teacher.eval()
    batch = blocks.rows(range(12))
    ends, sampled = tiny_tokenizer().eos_token_id, 0
    for ids, valid in zip(batch["input_ids"], batch["document_ids"] >= 0, strict=True):
        ids = ids[valid]
        assert ids[0] > 2 and ends not in ids[:-1].tolist() and (len(ids) == 24 or ids[-1] == ends)
        with torch.no_grad():
            logits = teacher(ids[None], use_cache=False).logits[0]
        greedy = logits.index_fill(1, torch.tensor([ends]), -torch.inf).argmax(1)
        assert torch.equal(ids[1:4], greedy[:3])
        sampled += int((ids[4:] != greedy[3 : len(ids) - 1]).sum())
    assert sampled > 50
    assert len(set(batch["input_ids"][:, 0].tolist())) > 6


def test_a_cold_teacher_is_greedy_throughout(teacher: Any, tmp_path: Path) -> None:
    teacher.eval()
    batch = written(teacher, tmp_path, temperature=0.01).rows(range(12))
    with torch.no_grad():
        logits = teacher(batch["input_ids"], use_cache=False).logits[:, 4:]
    targets = batch["targets"][:, 4:]
    learnt = targets != -100  # the greedy start may not end the text, sampling may
    chosen = logits.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0]
    behind = (logits.amax(2) - chosen)[learnt]
    assert behind.max() < 0.1 and (behind == 0).float().mean() > 0.95  # ten temperatures: near ties are drawn


def test_written_text_is_cached_by_weights_seed_and_settings(teacher: Any, tmp_path: Path) -> None:
    first, elsewhere = written(teacher, tmp_path, pack=True), written(teacher, tmp_path / "b", pack=True)
    assert written(teacher, tmp_path, pack=True) == first == replace(elsewhere, path=first.path)
    others = [
        written(teacher, tmp_path, pack=True, seed=1),
        written(teacher, tmp_path, pack=True, temperature=0.9),
    ]
    with torch.no_grad():
        teacher.lm_head.weight[5] += 1
    others.append(written(teacher, tmp_path, pack=True))
    assert len({first.digest, *(blocks.digest for blocks in others)}) == 4
    assert len(first) == 12 and first.source.startswith("teacher sha256:") and first.source != others[-1].source


def test_a_tokenizer_with_bos_starts_with_it(teacher: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    config = DataConfig(source="teacher", seq_len=16, pack=False, generate=Generate(tokens=48))
    batch = load_blocks(config, tokenizer, cache_dir=tmp_path, teacher=teacher).rows(range(3))
    assert batch["input_ids"][:, 0].tolist() == [1] * 3 and batch["targets"][:, 0].tolist() == [-100] * 3
    assert (batch["targets"][:, 1:4] != -100).all()


def test_a_teacher_needs_a_model_and_an_end(teacher: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs the teacher model"):
        load_blocks(DataConfig(source="teacher"), tiny_tokenizer(), num_tokens=9, cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"set generate\.tokens"):
        load_blocks(DataConfig(source="teacher"), tiny_tokenizer(), cache_dir=tmp_path, teacher=teacher)
