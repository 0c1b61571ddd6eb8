"""A run on what its teacher said earlier: the same numbers as with it, and a name for whatever does not fit."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qat.checkpoints.hf import load_tokenizer
from qat.cli import main
from qat.errors import ConfigError
from qat.trainers import cached, run
from qat.trainers.data import Batches, load_blocks
from qat.trainers.job import load_job
from qat.trainers.logitcache import Store
from qat.trainers.module import MicroBatches
from qat.trainers.run import train
from qat.trainers.strategy import Ranks
from qat.training.known import known_in
from qat.training.losses import IGNORE
from tests.tiny import VOCABULARY, tiny_model
from tests.trainers.jobs import curve, metrics, write

SIZES = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
EVAL = {
    "data": {"source": "heldout/reporting", "seq_len": 32, "max_tokens": 1024},
    "choose": {"source": "heldout/choosing", "seq_len": 32, "max_tokens": 1024},
    "tokens": 128,
    "every": 2,
    "why": False,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "student": tiny_model("llama", root / "student", **SIZES),
        "teacher": tiny_model("llama", root / "teacher", seed=1, vocab_size=VOCABULARY + 16, **SIZES),
    }


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))


def config(folder: Path, models: dict[str, Path], name: str, cache: Any, **changes: Any) -> Path:
    settings = {"steps": 4, "eval": EVAL, "teacher": {"id": str(models["teacher"])}, "optim": {"lr": 1e-3}, **changes}
    if cache is not None:
        settings["teacher_cache"] = {"folder": str(folder / "said"), **cache}
    return write(folder, models["student"], name=name, **settings)


def without_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_teacher", None)  # whoever calls it fails


def losses(path: Path) -> list[float]:
    return [float(row["loss"]) for row in metrics(load_job(path))]


@pytest.mark.parametrize("kind", ["topk", "hybrid"])
def test_the_curve_and_the_scores_are_those_with_the_teacher(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any, kind: str
) -> None:
    """With all columns the curve differs by what 16 bits round, with some by more; what is evaluated is the same."""
    online = config(tmp_path, models, "online", None)
    report = train(load_job(online), table=False)
    whole = config(tmp_path, models, "whole", {"kind": kind, "k": VOCABULARY})
    assert main(["teacher", str(whole), "--json"]) == 0
    (filled,) = json.loads(capsys.readouterr().out)
    assert filled["rows"] == filled["asked"] == 16 and filled["bytes_per_token"] == pytest.approx(2308, abs=1)
    without_teacher(monkeypatch)
    found = train(load_job(whole), table=False)
    assert found["rows"][1:3] == report["rows"][1:3]  # of the initialisation: the very same numbers
    assert losses(whole) == pytest.approx(losses(online), rel=2e-3)
    assert [row["kl"] for row in found["rows"]] == pytest.approx([row["kl"] for row in report["rows"]], rel=2e-3)
    if kind != "topk":
        return
    few = config(tmp_path, models, "few", {"kind": kind, "k": 8, "folder": str(tmp_path / "few")})
    assert main(["teacher", str(few)]) == 0
    said = capsys.readouterr().out
    assert "16 rows to train on, 16 of them asked now" in said and "53 bytes for each of" in said
    train(load_job(few), table=False)
    assert all(a < b for a, b in zip(losses(few), losses(online), strict=True))  # a lower bound


@pytest.mark.parametrize("kind", ["hybrid", "sample"])
def test_drawn_columns_estimate_the_loss(tmp_path: Path, models: dict[str, Path], kind: str) -> None:
    online = config(tmp_path, models, "online", None, steps=1, rows=16)
    drawn = config(tmp_path, models, "drawn", {"kind": kind, "k": 64}, steps=1, rows=16)
    train(load_job(online), table=False)
    assert main(["teacher", str(drawn)]) == 0
    train(load_job(drawn), table=False)
    assert losses(drawn) == pytest.approx(losses(online), rel=0.05 if kind == "sample" else 0.02)


@pytest.mark.parametrize("kind", ["hybrid", "sample"])
def test_a_filling_that_was_interrupted_goes_on(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any, kind: str
) -> None:
    """What the teacher said is kept; it is asked about the rest, and says there what it would have said at once."""
    path = config(tmp_path, models, "run", {"kind": kind, "k": 4})
    calls: list[int] = []
    ask = cached.hidden_states

    def interrupted(model: Any, batch: Any) -> Any:
        calls.append(len(batch["targets"]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return ask(model, batch)

    monkeypatch.setattr(cached, "hidden_states", interrupted)
    assert main(["teacher", str(path)]) == 130
    assert len(Store.read(tmp_path / "said").places) == 6
    assert main(["train", str(path)]) == 2
    assert "lacks 10 of the 16 rows of data (the first is row 6)" in capsys.readouterr().err
    assert main(["teacher", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["asked"] == 10 and sum(calls[4:]) == 10
    first = Store.read(tmp_path / "said")
    assert main(["teacher", str(path), f"teacher_cache.folder={tmp_path / 'at once'}"]) == 0
    second = Store.read(tmp_path / "at once")
    keys = sorted(first.places)
    assert keys == sorted(second.places)
    assert all(torch.equal(a, b) for a, b in zip(first.columns(keys)[:2], second.columns(keys)[:2], strict=True))
    assert main(["teacher", str(path), "steps=5", "--json"]) == 0  # a longer run asks for what is new
    capsys.readouterr()
    assert main(["train", str(path), "steps=5"]) == 0


def test_a_resumed_run_goes_on_exactly_and_its_cache_may_move(tmp_path: Path, models: dict[str, Path]) -> None:
    whole, parts = (config(tmp_path, models, name, {"k": 16}, checkpoint_every=2) for name in ("whole", "parts"))
    assert main(["teacher", str(whole)]) == 0
    train(load_job(whole), table=False)
    job = load_job(parts)
    train(job, table=False)
    for folder in (job.folder / "checkpoints").glob("step-4"):
        shutil.rmtree(folder)
    shutil.move(tmp_path / "said", tmp_path / "moved")
    again = load_job(job.folder / "job.yaml", [f"teacher_cache.folder={tmp_path / 'moved'}"])
    train(again, resume_run=True, table=False)
    assert curve(job) == curve(load_job(whole))
    with pytest.raises(ConfigError, match=r"teacher_cache\.k was 16, now 8"):
        train(load_job(job.folder / "job.yaml", ["teacher_cache.k=8"]), resume_run=True, table=False)


def test_text_that_the_teacher_wrote_is_found_without_it(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    texts = {key: {"source": "teacher", "seq_len": 32, "seed": seed} for key, seed in (("data", 0), ("calibration", 3))}
    path = config(tmp_path, models, "run", {"k": 4}, steps=1, teacher=None, **texts)  # its own teacher
    assert main(["teacher", str(path)]) == 0
    without_teacher(monkeypatch)
    assert main(["train", str(path)]) == 0
    capsys.readouterr()
    assert main(["train", str(path), "data.seed=7", "name=other"]) == 2
    assert "has not written this text yet; let it, with: qat teacher" in capsys.readouterr().err


def test_a_teacher_on_the_hub_is_not_downloaded_to_train(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its config and tokenizer are; another commit is another teacher."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "hub" / "models--some--teacher", "0123456789abcdef" * 2 + "01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = shutil.copytree(models["teacher"], repository / "snapshots" / commit)
    path = config(tmp_path, models, "run", {"k": 4}, steps=1, teacher={"id": "some/teacher"})
    assert main(["teacher", str(path)]) == 0
    (snapshot / "model.safetensors").unlink()
    assert main(["train", str(path)]) == 0
    assert main(["train", str(tmp_path / "runs" / "run" / "job.yaml"), "--resume", "steps=1"]) == 0
    (repository / "refs" / "main").write_text(commit[::-1])
    snapshot.rename(snapshot.with_name(commit[::-1]))
    assert "the teacher's weights or config.json changed" in refused(path, capsys, "name=other")


def test_without_a_teacher_in_the_loss_only_evaluation_is_cached(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = config(tmp_path, models, "run", {}, steps=1, method="qat")
    assert main(["teacher", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["rows"] == 0
    without_teacher(monkeypatch)
    with pytest.warns(UserWarning, match="asked in float32 on cpu, and this run computes in bfloat16 on cpu"):
        assert main(["train", str(path), "precision=bf16-mixed"]) == 0


@pytest.fixture
def filled(tmp_path: Path, models: dict[str, Path]) -> Path:
    own = {name: tmp_path / name for name in models}
    for name, folder in own.items():
        shutil.copytree(models[name], folder)
    path = config(tmp_path, own, "run", {"k": 4}, steps=1, rows=2)
    assert main(["teacher", str(path)]) == 0
    return path


def refused(path: Path, capsys: Any, *overrides: str) -> str:
    capsys.readouterr()
    assert main(["train", str(path), *overrides]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_nothing_filled_says_what_to_do(tmp_path: Path, models: dict[str, Path], capsys: Any) -> None:
    path = config(tmp_path, models, "run", {})
    assert "there is no cache of the teacher in" in refused(path, capsys)
    assert "qat teacher CONFIG" in refused(path, capsys, "teacher_cache={}")


def test_another_text_is_named_by_what_differs(filled: Path, capsys: Any) -> None:
    said = refused(filled, capsys, "data.seq_len=16")
    assert "lacks 2 of the 2 rows of data" in said and "data.seq_len was 32, now 16" in said
    assert "what is missing is added by: qat teacher CONFIG" in said
    said = refused(filled, capsys, "eval.data.seq_len=16")
    assert "lacks eval.data (since it was filled, eval.data.seq_len was 32, now 16)" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tokenizer", "the tokenizer changed"),
        ("template", "the chat template changed"),
        ("weights", "the teacher's weights or config.json changed"),
        ("k", "teacher_cache.k changed from 4 to 5"),
        ("kind", "teacher_cache.kind changed from hybrid to sample"),
    ],
)
def test_what_changed_is_named(filled: Path, capsys: Any, change: str, said: str) -> None:
    overrides = {"k": ["teacher_cache.k=5"], "kind": ["teacher_cache.kind=sample"]}.get(change, [])
    for name in ("student", "teacher"):
        folder = filled.parent / name
        if change == "tokenizer":
            rules = json.loads((folder / "tokenizer.json").read_text())
            rules["normalizer"] = {"type": "Lowercase"}
            (folder / "tokenizer.json").write_text(json.dumps(rules))
        elif change == "template":
            template = folder / "chat_template.jinja"
            template.write_text(template.read_text() + " ")
        elif change == "weights" and name == "teacher":
            shutil.copy(filled.parent / "student" / "model.safetensors", folder)
            shutil.copy(filled.parent / "student" / "config.json", folder)
    found = refused(filled, capsys, *overrides)
    assert f"something else: {said}. Give back" in found and "teacher_cache.folder=" in found
    assert main(["teacher", str(filled), *overrides]) == 2  # and nothing is added to it
    assert said in capsys.readouterr().err


def test_a_student_with_fewer_columns_is_refused(tmp_path: Path, models: dict[str, Path], capsys: Any) -> None:
    wide = {**models, "student": models["teacher"]}
    path = config(tmp_path, wide, "wide", {"k": 4}, steps=1, rows=2)
    assert main(["teacher", str(path)]) == 0
    narrow = config(tmp_path, models, "narrow", {"k": 4}, steps=1, rows=2)
    assert f"the student has {VOCABULARY} logits" in refused(narrow, capsys)
    assert main(["teacher", str(narrow)]) == 2
    assert f"was filled over {VOCABULARY + 16} logits" in capsys.readouterr().err


def test_a_student_that_is_quantized_already_is_refused(
    filled: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached.packed, "continues", lambda _: True)
    assert "is quantized already" in refused(filled, capsys)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"kind": "reverse_kl"}, "needs the teacher's probability of every token"),
        ({"kind": "jsd"}, "loss jsd needs"),
        ({"kind": "forward_kl", "temperature": 2}, "temperature 2 weighs"),
        ({"kind": "forward_kl", "hidden": 0.1}, "loss.hidden compares"),
        ({"kind": "top_kl", "k": 64}, "the cache holds drawn ones; use forward_kl, or teacher_cache.kind: topk"),
    ],
)
def test_losses_that_need_more_are_refused(
    tmp_path: Path, models: dict[str, Path], loss: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_job(config(tmp_path, models, "run", {}, loss=loss))


def test_two_ranks_evaluate_and_read_their_share(tmp_path: Path, models: dict[str, Path]) -> None:
    """What each reads of the cache, without processes: the rows of its batches, and of its share of a step."""
    path = config(tmp_path, models, "run", {"k": 4}, steps=2)
    assert main(["teacher", str(path)]) == 0
    job = load_job(path)
    tokenizer, store = load_tokenizer(models["student"]), Store.read(tmp_path / "said")
    blocks = load_blocks(job.data, tokenizer, num_tokens=2 * job.tokens_per_step)
    keys = [cached.row_key(row) for row in blocks.array()]
    taught = cached.Taught(store, keys)
    for rank in range(2):
        share = Batches(blocks, job.rows, job.seed, rank, 2)
        found = list(MicroBatches(share, 0, 2, 1, 2, taught))
        rows = [row for step in range(2) for row in share.indices(step)]
        assert len(found) == len(rows) == 4
        for batch, row in zip(found, rows, strict=True):
            known, own = known_in(batch), store.columns([keys[row]])
            assert known is not None and torch.equal(known.ids, own.ids) and torch.equal(known.log_p, own.log_p)
            assert len(known.ids) == int((batch["targets"] != IGNORE).sum())
    heldout = load_blocks(job.eval.data, tokenizer, num_tokens=job.eval.tokens)
    halves = []
    for rank in range(2):
        parts = SimpleNamespace(
            teacher=None, device=torch.device("cpu"), dtype=None, ranks=Ranks(rank, 2), taught=taught
        )
        halves.append(cached._evaluator(job, parts, heldout).teacher_hidden)
    whole = store.heldout(heldout.digest, torch.device("cpu"))[1]
    assert torch.equal(torch.cat([halves[0][0], halves[1][0]]), whole) and len(heldout) == 4
