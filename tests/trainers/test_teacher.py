"""A teacher that does not fit its student is refused by what differs, before a weight is read; padding is said."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer

from qat.cli import main
from qat.config import load_yaml
from tests.tiny import VOCABULARY, tiny_model

SIZES = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("student") / "student", **SIZES)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(
        "llama", tmp_path_factory.mktemp("padded") / "padded", seed=1, vocab_size=VOCABULARY + 16, **SIZES
    )


def teacher(student: Path, folder: Path, **changes: Any) -> Path:
    """The student with `changes` to tokenizer.json, and weights that nobody may read."""
    shutil.copytree(student, folder)
    (folder / "model.safetensors").write_bytes(b"not to be read")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def job(folder: Path, source: Path, reference: Path, **changes: Any) -> str:
    settings: dict[str, Any] = {
        "name": "run",
        "model": {"id": str(source)},
        "teacher": {"id": str(reference)},
        "scheme": {
            "rules": [
                {"match": "lm_head", "skip": "dense"},
                {"match": "model.embed_tokens", "skip": "dense"},
                {"match": "*_proj", "weight": "int8_channel"},
            ]
        },
        "data": {"source": "embedded", "seq_len": 32, "max_tokens": 2048},
        "eval": {"data": {"source": "heldout", "seq_len": 32}, "tokens": 64},
        "steps": 1,
        "runs": str(folder / "runs"),
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return str(path)


def swapped(student: Path) -> dict[str, Any]:
    """The same tokens with two ids exchanged: nothing about the sizes tells."""
    model = json.loads((student / "tokenizer.json").read_text())["model"]
    vocabulary = model["vocab"]
    first, second = [token for token, index in vocabulary.items() if index in (100, 200)]
    exchanged = {**vocabulary, first: vocabulary[second], second: vocabulary[first]}
    return {"model": {**model, "vocab": exchanged}}


def test_another_tokenizer_is_refused_by_its_tokens(student: Path, tmp_path: Path, capsys: Any) -> None:
    other = teacher(student, tmp_path / "other", **swapped(student))
    for extra in ([], ["--dry-run"]):
        assert main(["train", job(tmp_path, student, other), *extra]) == 2
        error = capsys.readouterr().err
        assert "another tokenizer" in error and "2 tokens have another id" in error and "200 and 100" in error
    assert not (tmp_path / "runs").exists()
    assert main(["eval", str(student), "--teacher", str(other), "--tokens", "64"]) == 2
    assert "2 tokens have another id" in capsys.readouterr().err


@pytest.mark.parametrize(
    "normalizer", [{"type": "Lowercase"}, {"type": "Replace", "pattern": {"String": "Q"}, "content": "Z"}]
)
def test_other_rules_for_splitting_are_refused(
    student: Path, tmp_path: Path, capsys: Any, normalizer: dict[str, Any]
) -> None:
    """Equal vocabularies, but one changes what it reads, the second time without changing its length."""
    other = teacher(student, tmp_path / "other", normalizer=normalizer)
    assert main(["train", job(tmp_path, student, other)]) == 2
    assert "is split differently" in capsys.readouterr().err


def test_tokens_of_one_side_are_named(student: Path, tmp_path: Path, capsys: Any) -> None:
    tokenizer = Tokenizer.from_file(str(student / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|tool|>"])
    other = teacher(student, tmp_path / "other", **json.loads(tokenizer.to_str()))
    assert main(["train", job(tmp_path, student, other)]) == 2
    assert "1 tokens are only the teacher's ('<|tool|>')" in capsys.readouterr().err
    assert main(["train", job(tmp_path, other, student)]) == 2
    assert "1 tokens are only the student's ('<|tool|>')" in capsys.readouterr().err


def test_a_teacher_without_a_tokenizer_is_refused_and_still_estimated(
    student: Path, tmp_path: Path, capsys: Any
) -> None:
    other = teacher(student, tmp_path / "other")
    (other / "tokenizer.json").unlink()
    assert main(["train", job(tmp_path, student, other)]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    assert main(["train", job(tmp_path, student, other), "--dry-run", "--json"]) == 0
    assert "whether the teacher fits the student is not known" in capsys.readouterr().out


def test_too_few_rows_for_the_tokenizer_are_refused(student: Path, tmp_path: Path, capsys: Any) -> None:
    small = tiny_model("llama", tmp_path / "small", vocab_size=200, **SIZES)
    assert main(["train", job(tmp_path, student, small)]) == 2
    assert "the teacher's output layer has 200 rows for the tokenizer's" in capsys.readouterr().err


@pytest.mark.parametrize("larger", ["teacher", "student"])
def test_padding_is_left_out_and_said(student: Path, padded: Path, tmp_path: Path, capsys: Any, larger: str) -> None:
    own, other = (student, padded) if larger == "teacher" else (padded, student)
    path = job(tmp_path, own, other)
    said = f"compared over the first {VOCABULARY}"
    assert main(["train", path, "--dry-run", "--json"]) == 0
    assert said in json.loads(capsys.readouterr().out)["notes"][0]
    assert main(["train", path, "--json"]) == 0
    output = capsys.readouterr()
    assert said in output.err
    rows = {row["name"]: row for row in json.loads(output.out)["rows"]}
    assert all(0 < row["kl"] < 20 for row in rows.values())
    with pytest.warns(UserWarning, match=said):
        assert main(["eval", str(tmp_path / "runs" / "run"), "--tokens", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in found] == ["teacher", "run"] and found[0]["kl"] < 1e-6 < found[1]["kl"]


def test_other_roles_of_tokens_are_said(student: Path, tmp_path: Path, capsys: Any) -> None:
    """A base model and its instruction-tuned sibling end texts differently; that is no reason to refuse."""
    other = tiny_model("llama", tmp_path / "other", seed=1, **SIZES)
    path = other / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|pad|>"}))
    assert main(["train", job(tmp_path, student, other), "--dry-run", "--json"]) == 0
    note = json.loads(capsys.readouterr().out)["notes"][0]
    assert "eos_token is '<|im_end|>' for the student and '<|pad|>' for the teacher" in note


def test_the_job_on_disk_says_which_attention_ran(student: Path, padded: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", job(tmp_path, student, padded, name="auto"), "--json"]) == 0
    wanted = {"model": {"id": str(student), "attn_implementation": "eager"}, "name": "asked"}
    assert main(["train", job(tmp_path, student, padded, **wanted), "--json"]) == 0
    auto, asked = (load_yaml(tmp_path / "runs" / name / "job.yaml") for name in ("auto", "asked"))
    assert (auto["model"]["attn_implementation"], auto["teacher"]["attn_implementation"]) == ("sdpa", "sdpa")
    assert (asked["model"]["attn_implementation"], asked["teacher"]["attn_implementation"]) == ("eager", "sdpa")
    assert main(["train", job(tmp_path, student, padded, name="auto"), "--resume", "--json"]) == 0
