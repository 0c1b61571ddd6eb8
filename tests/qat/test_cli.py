"""The commands as a user types them: the whole road on a tiny model, real JSON, and errors that are sentences."""

import json
from pathlib import Path

import pytest
import torch

from qat.checkpoints.layouts import TARGETS
from qat.cli import main
from qat.kernels.load import cpu_problem
from qat.numbers.catalog import CATALOG
from qat.numbers.scale import F32
from tests.tiny import tiny_model
from tests.trainers.jobs import write


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a tiny Qwen3 with a tied head, and its config beside it."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_model("qwen3", folder / "model", tie_word_embeddings=True)
    rules = [
        {"match": "lm_head", "skip": "shares its tensor with the embedding"},
        {"match": "model.embed_tokens", "skip": "kept in BF16"},
        {"match": "*.down_proj", "weight": "int8_channel", "input": "int8_token"},
        {"match": "*_proj", "weight": "nvfp4", "input": "nvfp4"},
    ]
    job = write(folder, model, scheme={"rules": rules}, steps=2)
    assert main(["train", str(job), "--json"]) == 0
    return folder / "runs" / "tiny"


def test_train_export_verify_eval_generate(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    assert "qat verify" in capfd.readouterr().out
    assert main(["verify", str(out), "--json"]) == 0
    checks = json.loads(capfd.readouterr().out)
    assert checks["ok"] and all(check["ok"] for check in checks["checks"])
    teacher = ["--teacher", str(run.parents[1] / "model")]
    assert main(["eval", str(out), "--tokens", "128", "--json", *teacher]) == 0
    exported = json.loads(capfd.readouterr().out)["rows"][-1]
    assert main(["eval", str(run), "--tokens", "128", "--json", *teacher]) == 0
    trained = json.loads(capfd.readouterr().out)["rows"][-1]
    assert exported["kl"] == pytest.approx(trained["kl"], rel=1e-3) and exported["tokens"] == trained["tokens"]
    for folder in (out, run):
        assert main(["generate", str(folder), "The quick", "--tokens", "4"]) == 0
        printed = capfd.readouterr()
        assert printed.out.startswith("The quick") and "tokens/s" in printed.err


def test_report_was_printed_as_json(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    promised = {"rows", "gap_closed", "bits_per_weight", "model_bytes", "tokens", "seconds", "seed", "eval_hash"}
    assert promised <= set(report)


def test_formats_lists_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(CATALOG)
    assert main(["formats"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in CATALOG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "configs/quikstart.yaml"], "nearest in configs: quickstart.yaml"),
        (["train", "configs/quickstart.yaml", "optim.learning_rate=1"], "unknown key 'optim.learning_rate'"),
        (["train", "configs/quickstart.yaml", "steps"], "not of the form key.subkey=value"),
        (["train", "configs/quickstart.yaml", "scheme.rules.2.weight=nvfp5"], "no format called 'nvfp5'"),
        (["export", "runs/nowhere", "out"], "is not a run"),
        (["export", "runs/nowhere", "out", "--target", "compressed"], "compressed-tensors"),
        (["verify", "runs/nowhere"], "nowhere"),
        (["eval", "runs/nowhere"], "neither a run"),
        (["generate", "runs/nowhere", "hello"], "neither a run"),
        (["generate", "runs/nowhere", "hello", "--tokens", "0"], "must be positive"),
        (["generate", "runs/nowhere", "hello", "--seed", "9" * 30], "a whole number from 0, of 63 bits"),
        (["generate", "runs/nowhere", "hello", "--temperature", "1e-300"], "a number from 0.01 to 100"),
        (["train", "configs"], "configs is a folder, not a config file"),
        (["train", "configs/quickstart.yaml", "seed=99999999999"], "less than 4294967296"),
        (
            ["train", "configs/qad/smollm2-135m-nvfp4.yaml", "calibration.source=embedded", "--dry-run"],
            "calibration.generate=null",
        ),
    ],
)
def test_errors_are_one_sentence_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err and not printed.out


def test_kernels_say_what_runs_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--tokens", "16", "--json"]) == 0
    told = {row["format"]: row for row in json.loads(capsys.readouterr().out)}
    assert told.keys() == {name for name, fmt in CATALOG.items() if fmt.scale is not F32}
    assert told["nf4_g64"]["kernel"] == "none" and "table" in told["nf4_g64"]["why"]
    here = "triton" if torch.cuda.is_available() else "c" if cpu_problem() is None else "reference"
    assert told["nvfp4"]["kernel"] == here
    assert main(["kernels", "--training"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("nvfp4 ") and "_input" in line)
    assert here in row and "one pass over memory" in row
    assert main(["kernels", "--training", "--input", "nvfp4"]) == 2
    assert "leave out --tokens" in capsys.readouterr().err
    assert main(["kernels", "--rows", "0"]) == 2
    assert "must be positive" in capsys.readouterr().err


def test_export_help_names_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in TARGETS)
