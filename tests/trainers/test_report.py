"""The report says what the numbers say: strict JSON, an honest headline, pictures whose words can be read."""

import io
import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from qat.trainers import plots
from qat.trainers.evaluate import Scores, gap_closed
from qat.trainers.report import RunReport, headline, page, print_table, remarks, write_report

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def build(ptq: float = 0.4, best: float = 0.3, student: float = 0.1, best_step: int = 40, **changes: Any) -> RunReport:
    """A report whose KL values are given; its next-token loss is 3 + KL."""
    rows = [
        Scores(3.0 + kl, kl, 1 - kl, 8176).row(name)
        for name, kl in (("bf16", 0.0), ("ptq", ptq), ("best_ptq", best), ("student", student))
    ]
    settings: dict[str, Any] = {
        "name": "a-run",
        "method": "qad",
        "rows": rows,
        "gap_closed": {key: gap_closed(rows[0][key], rows[1][key], rows[3][key]) for key in ("kl", "nll")},
        "gap_closed_over_best_ptq": {
            key: gap_closed(rows[0][key], rows[2][key], rows[3][key]) for key in ("kl", "nll")
        },
        "bits_per_weight": 6.92,
        "model_bytes": 116_400_000,
        "dense_bytes": 269_000_000,
        "tokens": 81_920,
        "seconds": 960.0,
        "tokens_per_second": 85.3,
        "peak_memory_bytes": 4_100_000_000,
        "seed": 7,
        "steps": 80,
        "best_step": best_step,
        "eval_hash": "e" * 64,
        "data_hash": "d" * 64,
        "overlap": 0.0,
        "scheme": [("nvfp4", "nvfp4", 210, 106_168_320, 4.5), ("not quantized: kept", "-", 1, 28_311_552, 16.0)],
        "machine": "a CPU, 2 threads",
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "precision": "fp32",
        "finished_at": "2026-01-01T00:00:00+00:00",
    }
    return RunReport(**{**settings, **changes})


def layers(count: int) -> list[tuple[str, float, float]]:
    noise = np.random.default_rng(0).normal(size=(count, len(KINDS), 2))
    return [
        (f"model.layers.{i}.{kind}", 20 + noise[i, j, 0], 19.5 + noise[i, j, 1])
        for i in range(count)
        for j, kind in enumerate(KINDS)
    ]


def write_metrics(run: Path, steps: int, every: int = 20, kl: float = 0.1) -> None:
    lines = ["step,tokens,seconds,loss,lr,scale_lr,grad_norm,tokens_per_second,heldout_kl,heldout_nll,heldout_top1"]
    for step in range(1, steps + 1):
        evaluated = f"{kl + 0.2 * math.exp(-step / 20)},3.1,0.8" if step % every == 0 or step == steps else ",,"
        lines.append(f"{step},{step * 1024},{step * 12.0},{0.2 + 0.1 / step},1e-4,1e-3,1.0,85.0,{evaluated}")
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")


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
    console = Console(file=io.StringIO(), width=100)
    print_table(build(), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO above
    assert "0.4000" in text and "75 %" in text and "116.4 MB" in text
    assert "Training closed 75 %" in text


# --- pictures -------------------------------------------------------------------------------------


def test_metrics_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert plots.read_metrics(path) == {}
    path.write_text("step,loss,heldout_kl\n1,0.5,\n3,0.3,0.2\n2,0.4,\n3,0.25,0.1\n4,0.")  # resumed once, then killed
    found = plots.read_metrics(path)
    assert found["step"].tolist() == [1, 2, 3]
    assert found["loss"].tolist() == [0.5, 0.4, 0.25]
    assert np.isnan(found["heldout_kl"][:2]).all() and found["heldout_kl"][2] == 0.1
    path.write_text("step,loss\n")
    assert plots.read_metrics(path) == {}


@pytest.mark.parametrize("count", [1, 7, 80, 999])
def test_smoothing_is_a_running_median(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    half = min(250, max(4, count // 40))
    expected = [np.median(values[max(0, i - half) : i + half + 1]) for i in range(count)]
    np.testing.assert_allclose(plots.smooth(values), expected)


def test_layers_are_grouped_by_kind() -> None:
    found = plots.by_kind(
        [
            ("model.layers.1.mlp.down_proj", 3.0, 4.0),
            ("model.layers.0.mlp.down_proj", 1.0, 2.0),
            ("model.layers.0.mlp.experts.0.up_proj", 1.0, 5.0),
            ("model.layers.0.mlp.experts.1.up_proj", 3.0, 7.0),
            ("lm_head", 8.0, 9.0),
        ]
    )
    assert found == {
        "down_proj": [(0, 1.0, 2.0), (1, 3.0, 4.0)],
        "up_proj": [(0, 2.0, 6.0)],
        "other": [(0, 8.0, 9.0)],
    }


def drawn_words(figure: Figure) -> list[Text]:
    """All texts of the figure, of the tick labels only those within the axes."""
    found = [text for text in figure.texts if text.get_text()]
    for legend in [*figure.legends, *(axes.get_legend() for axes in figure.axes)]:
        found += legend.get_texts() if legend is not None else []
    if figure._supylabel is not None:  # type: ignore[attr-defined]  # there is no public getter of the object
        found.append(figure._supylabel)  # type: ignore[attr-defined]  # as above
    for axes in filter(lambda axes: axes.get_visible(), figure.axes):
        found += [axes.xaxis.label, axes.yaxis.label, *axes.texts, axes.title, axes._left_title]  # type: ignore[attr-defined]  # no public getter
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            shown = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found += [tick.label1 for tick in shown if tick.label1.get_visible()]
    return [text for text in dict.fromkeys(found) if text.get_text().strip()]


def words_collide(figure: Figure) -> list[str]:
    """Texts that lie outside the figure or over one another."""
    figure.canvas.draw()
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]  # only Agg has it
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in drawn_words(figure)]
    edge = figure.bbox
    outside = [w for w, b in boxes if b.x0 < edge.x0 or b.y0 < edge.y0 or b.x1 > edge.x1 or b.y1 > edge.y1]
    pairs = combinations([(word, box.shrunk(0.98, 0.9)) for word, box in boxes], 2)
    assert len(boxes) > 8
    return outside + [f"{a} / {b}" for (a, first), (b, second) in pairs if first.overlaps(second)]


@pytest.mark.parametrize(
    ("steps", "kls"),
    [
        (1, (0.4, 0.3, 0.1)),
        (80, (0.4, 0.398, 0.39)),
        (80, (0.0521, 0.0521, 0.0519)),
        (80, (0.3, 0.4, 0.35)),
        (1000, (0.4, 0.3, 0.1)),
    ],
)
def test_words_of_the_loss_picture_do_not_collide(tmp_path: Path, steps: int, kls: tuple[float, ...]) -> None:
    import matplotlib

    write_metrics(tmp_path, steps, max(1, steps // 10), kls[2])
    with matplotlib.rc_context(plots.STYLE):
        data = build(*kls, best_step=steps).to_dict()
        assert words_collide(plots._loss(data, plots.read_metrics(tmp_path / "metrics.csv"))) == []


@pytest.mark.parametrize("nll", [2.9, 9.0])
def test_words_of_the_recovery_picture_do_not_collide(nll: float) -> None:
    import matplotlib

    rows = build().rows
    with matplotlib.rc_context(plots.STYLE):
        figure = plots._recovery(replace(build(), rows=[*rows[:3], {**rows[3], "nll": nll}]).to_dict())
    assert words_collide(figure) == []
    written = {text.get_text() for text in figure.findobj(Text) if isinstance(text, Text)}
    sign = "−" if nll < 3 else "+"
    assert {"0.4000", "0.1000", "90.0 %", f"{nll:.4f}\n{sign}{abs(nll - 3):.4f}"} <= written


@pytest.mark.parametrize("count", [2, 80])
def test_words_of_the_qsnr_picture_do_not_collide(count: int) -> None:
    import matplotlib

    with matplotlib.rc_context(plots.STYLE):
        figure = plots._qsnr(build().to_dict(), [*layers(count), ("lm_head", 20.0, 19.0)])
    assert words_collide(figure) == []
    assert sum(axes.get_visible() for axes in figure.axes) == 8
