"""Pictures whose numbers are those of the run and whose words can be read."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from qat.trainers import plots
from tests.trainers.reports import build, layers, write_metrics


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


@pytest.mark.parametrize("count", [2, 80])
def test_words_of_the_picture_of_codes_do_not_collide(count: int) -> None:
    import matplotlib

    sites = {path: abs(value) / 100 for path, value, _ in layers(count)}
    moved = {"codes": 1, "flipped": 0.2, "sites": sites, "drift": {}}
    with matplotlib.rc_context(plots.STYLE):
        figure = plots._flipped(build(why={"moved": moved}).to_dict(), sites)
    assert words_collide(figure) == []
    lines = figure.axes[0].get_lines()
    assert len(lines) == 7 and lines[0].get_ydata()[0] == pytest.approx(100 * sites["model.layers.0.self_attn.q_proj"])
