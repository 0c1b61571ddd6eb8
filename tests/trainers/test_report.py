"""The report says what the numbers say: strict JSON, an honest headline, pictures whose words can be read."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from qat.trainers.report import headline, page, print_table, remarks, write_report
from tests.trainers.reports import build, layers, write_metrics


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


# --- report.json and report.md --------------------------------------------------------------------


def test_written_report_is_strict_json_and_reads_back(tmp_path: Path) -> None:
    write_metrics(tmp_path, 80)
    report = build(ptq=0.0, best=0.0, student=0.0, qsnr=layers(3))  # no gap, so the share closed is NaN
    assert math.isnan(report.gap_closed["kl"])
    write_report(tmp_path, report)
    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert data["gap_closed"] == {"kl": None, "nll": None}
    assert [row["name"] for row in data["rows"]] == ["bf16", "ptq", "best_ptq", "student"]
    promised = {"rows", "gap_closed", "bits_per_weight", "model_bytes", "tokens", "seconds", "seed", "eval_hash"}
    assert promised <= set(data)
    assert {"nll", "ppl", "kl", "top1"} <= set(data["rows"][0])
    assert data["rows"][1]["ppl"] == pytest.approx(math.exp(data["rows"][1]["nll"]))
    assert data["scheme"][0] == {
        "weight": "nvfp4",
        "input": "nvfp4",
        "modules": 210,
        "parameters": 106_168_320,
        "bits_per_weight": 4.5,
    }


def test_page_shows_scores_commands_and_existing_pictures(tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "a-run"
    write_metrics(run, 80)
    write_report(run, build(qsnr=layers(3)))
    text = (run / "report.md").read_text()
    assert "| trained student | 0.1000 | 3.1000 | 22.20 | 90.0% | 75 % | 116.4 MB |" in text
    assert "| BF16 | 0.0000 | 3.0000 | 20.09 | 100.0% | – | 269.0 MB |" in text
    assert "| nvfp4 | nvfp4 | 210 | 106,168,320 | 4.50 |" in text
    assert f"qat train '{run}/job.yaml' name=a-run-again" in text  # quoted: the path has a space
    assert "e" * 64 in text and "d" * 64 in text and "seed 7" in text and "torch 2.13.0" in text
    pictures = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert pictures == ["plots/loss.png", "plots/recovery.png", "plots/qsnr.png"]
    for picture in pictures:
        assert (run / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {path.name for path in run.iterdir()} == {"metrics.csv", "report.json", "report.md", "plots"}
    assert len(list((run / "plots").iterdir())) == 3  # and no temporary file


def test_numbers_survive_a_plot_that_fails(tmp_path: Path) -> None:
    write_metrics(tmp_path, 3)
    (tmp_path / "metrics.csv").write_text((tmp_path / "metrics.csv").read_text().replace("1024", "broken"))
    with pytest.warns(UserWarning, match="could not be drawn: ValueError"):
        write_report(tmp_path, build())
    assert json.loads((tmp_path / "report.json").read_text())["gap_closed"]["kl"] == pytest.approx(0.75)
    assert "![" not in (tmp_path / "report.md").read_text()


# --- words ----------------------------------------------------------------------------------------


def test_headline_of_a_run_that_helped() -> None:
    text = headline(build(0.4, 0.352, 0.212).to_dict())
    assert text == (
        "Training closed 47 % of the KL gap left by round-to-nearest (0.4000 → 0.2120 nats per token); "
        "the best PTQ initialisation, without training, closed 12 %."
    )


@pytest.mark.parametrize(
    ("ptq", "best", "student", "step", "said"),
    [
        (0.4, 0.2, 0.2, 0, "Training did not help measurably: the student closes 50 %"),
        (0.4, 0.2, 0.198, 20, "Training did not help measurably"),  # half a per cent of the gap is no success
        (0.4, 0.2, 0.3, 20, "Training did not help measurably: the student closes 25 %"),
        (0.4, 0.2, 0.5, 20, "Training did harm: KL 0.4000 → 0.5000 nats per token, worse than RTN"),
        (0.4, 0.5, 0.3, 20, "the best PTQ initialisation, without training, widened it by 25 %"),
        (0.0, 0.0, 0.1, 20, "RTN lost nothing measurable"),
        (math.inf, 0.2, 0.1, 20, "are not finite"),
    ],
)
def test_headline_does_not_claim_what_did_not_happen(
    ptq: float, best: float, student: float, step: int, said: str
) -> None:
    text = build(ptq, best, student, step).to_dict()["headline"]
    assert said in text
    assert ("The PTQ initialisation is reported" in text) == (step == 0)
    assert ("Training closed" in text) == (best == 0.5)


def test_without_a_teacher_next_token_loss_leads_and_the_page_warns() -> None:
    rows = [{**row, "kl": math.nan, "top1": math.nan} for row in build().rows]
    data = build(rows=rows, overlap=None).to_dict()
    assert data["headline"].startswith("Training closed 75 % of the next-token loss gap")
    text = page(Path("runs/a"), data, [])
    assert "| trained student | – | 3.1000 |" in text
    assert "Nothing gave a KL" in text and "not measured" in text


def test_remarks_name_what_makes_numbers_misleading() -> None:
    assert remarks(build().to_dict()) == []
    assert "25 % of the held-out 13-grams" in remarks(build(overlap=0.25).to_dict())[0]
    rows = build().rows
    better = replace(build(), rows=[*rows[:3], {**rows[3], "nll": 2.9}])
    assert "moved towards the training text" in remarks(better.to_dict())[0]
    worse = replace(build(), rows=[*rows[:3], {**rows[3], "top1": 0.1}])
    assert "top-1 agreement is worse" in remarks(worse.to_dict())[0]
    few = replace(build(), rows=[{**row, "tokens": 200} for row in rows])
    assert "Only 200 held-out tokens" in remarks(few.to_dict())[0]


@pytest.mark.parametrize(
    ("closed", "said"), [(0.004, "0.4 %"), (0.9999, "99.99 %"), (1.0, "100 %"), (0.0, "0 %"), (1.093, "109 %")]
)
def test_shares_are_never_rounded_into_a_lie(closed: float, said: str) -> None:
    table = page(Path("r"), build(ptq=1.0, best=1.0, student=1.0 - closed).to_dict(), [])
    assert f"| {said} | 116.4 MB |" in next(line for line in table.splitlines() if "trained student" in line)


def test_table_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)  # a terminal's, and a log's
    print_table(build(), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO above
    assert "0.4000" in text and "75 %" in text and "116.4 MB" in text
    assert "Training closed 75 %" in text and "…" not in text


# --- pictures -------------------------------------------------------------------------------------
