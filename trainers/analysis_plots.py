"""The pictures of `qat analyze`: QSNR layer by layer in every format, and where theory puts each weight.

Integers are solid lines and squares, minifloats dashed lines and circles; a format has one colour in both pictures.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qat.analysis import crossover, expected_qsnr, has_theory
from qat.numbers.catalog import lookup
from qat.numbers.format import Format
from qat.trainers.analyze import Analysis
from qat.trainers.plots import STYLE, by_kind, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, without yellow, and two darker ones.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#6B6B6B",
    "#004D73",
    "#803800",
    "#005C43",
)
OTHER = "other"


def draw(folder: Path, analysis: Analysis) -> list[Path]:
    """Write qsnr.png and theory.png into `folder`; theory.png only where a format has a theory."""
    import matplotlib

    formats = [lookup(name) for name in analysis.formats]
    with matplotlib.rc_context(STYLE):
        pictures = [save(_qsnr(analysis, formats), folder / "qsnr.png")]
        known = [fmt for fmt in formats if has_theory(fmt)]
        if known:
            pictures.append(save(_theory(analysis, known), folder / "theory.png"))
    return pictures


def _styles(formats: list[Format]) -> dict[str, dict[str, Any]]:
    return {
        fmt.name: {
            "color": _COLOURS[index % len(_COLOURS)],
            "linestyle": "-" if fmt.element.kind == "integer" else (0, (4, 2)),
            "marker": "s" if fmt.element.kind == "integer" else "o",
        }
        for index, fmt in enumerate(formats)
    }


def _by_bits(formats: list[Format]) -> dict[int, list[Format]]:
    """Formats by the bits of a code, most first."""
    bits = sorted({fmt.element.bits for fmt in formats}, reverse=True)
    return {count: [fmt for fmt in formats if fmt.element.bits == count] for count in bits}


# --- qsnr.png: which layers does each format hold badly? ------------------------------------------


def _qsnr(analysis: Analysis, formats: list[Format]) -> "Figure":
    from matplotlib.lines import Line2D

    rows, styles = _by_bits(formats), _styles(formats)
    curves = {fmt.name: _curves(analysis, fmt.name) for fmt in formats}
    kinds = list(dict.fromkeys(kind for panels in curves.values() for kind in panels))
    figure = new_figure(max(6.0, 1.75 * len(kinds) + 1.2), 2.6 * len(rows) + 1.5)
    title = f"{analysis.model}: how well each format holds the weights, rounded to the nearest (higher is better)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    grid = figure.subplots(len(rows), len(kinds), sharex="col", sharey="row", squeeze=False)
    for line, (bits, members) in zip(grid, rows.items(), strict=True):
        for axes, kind in zip(line, kinds, strict=True):
            for fmt in members:
                _line(axes, curves[fmt.name].get(kind, {}), styles[fmt.name])
        line[0].set_ylabel(f"{bits} bits: QSNR (dB)")
    for above, below, kind in zip(grid[0], grid[-1], kinds, strict=True):
        above.set_title(kind, loc="left", fontsize=10)
        below.set_xlabel("" if kind == OTHER else "layer")
    handles = [Line2D([], [], label=fmt.name, **styles[fmt.name], markersize=5) for fmt in formats]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 9), fontsize=9)
    return figure


def _curves(analysis: Analysis, name: str) -> dict[str, dict[int | str, float]]:
    """QSNR in one format by kind of layer and its number; what has no number is OTHER, by its name."""
    ordered = sorted(analysis.weights, key=lambda w: _natural(w.name))
    values = {w.name.removesuffix(".weight"): w.formats[name].qsnr for w in ordered if name in w.formats}
    finite = {path: qsnr for path, qsnr in values.items() if math.isfinite(qsnr)}
    numbered = {path for path in finite if any(part.isdigit() for part in path.split("."))}
    kinds = by_kind([(path, qsnr, qsnr) for path, qsnr in finite.items() if path in numbered])
    curves: dict[str, dict[int | str, float]] = {
        kind: {at: qsnr for at, qsnr, _ in points} for kind, points in kinds.items()
    }
    rest: dict[int | str, float] = {path: qsnr for path, qsnr in finite.items() if path not in numbered}
    return {**curves, OTHER: rest} if rest else curves


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _line(axes: "Axes", points: dict[int | str, float], style: dict[str, Any]) -> None:
    """A line over layers, or points over names."""
    from matplotlib.ticker import MaxNLocator

    if any(isinstance(at, str) for at in points):
        places = range(len(points))
        axes.plot(places, [*points.values()], **{**style, "linestyle": "none"}, markersize=5)
        axes.set_xticks(places, [str(at).rpartition(".")[2] for at in points], rotation=30, ha="right", fontsize=9)
        axes.set_xlim(-0.6, len(points) - 0.4)
    elif points:
        axes.plot([*points], [*points.values()], **style, markersize=2.5 if len(points) < 48 else 0, linewidth=1.2)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


# --- theory.png: what decides that? ---------------------------------------------------------------


def _theory(analysis: Analysis, formats: list[Format]) -> "Figure":
    rows, styles = _by_bits(formats), _styles([lookup(name) for name in analysis.formats])
    figure = new_figure(5.6 * len(rows) + 0.4, 5.6)
    title = f"{analysis.model}: QSNR against the crest factor of a format's blocks"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    for axes, (bits, members) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        measured = {fmt.name: _points(analysis, fmt.name) for fmt in members}
        crests = np.array([crest for points in measured.values() for crest, _ in points] or [2.0, 4.0])
        low, high = max(1.05, 0.85 * crests.min()), 1.15 * float(np.percentile(crests, 99.5))
        for fmt in members:
            _curve(axes, fmt, measured[fmt.name], (low, high), styles[fmt.name])
        _crossings(axes, members, (low, high))
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        _plain_ticks(axes, low, high)
        axes.set_title(f"{bits} bits", loc="left", fontsize=10)
        axes.set_xlabel("crest factor: max |w| / rms(w), mean over blocks")
        axes.legend(fontsize=8.5, loc="best", title="line: theory, points: weights", title_fontsize=8.5)
    figure.axes[0].set_ylabel("QSNR (dB), higher is better")
    return figure


def _points(analysis: Analysis, name: str) -> list[tuple[float, float]]:
    losses = [w.formats[name] for w in analysis.weights if name in w.formats]
    return [(loss.crest, loss.qsnr) for loss in losses if math.isfinite(loss.crest) and math.isfinite(loss.qsnr)]


def _curve(
    axes: "Axes", fmt: Format, points: list[tuple[float, float]], limits: tuple[float, float], style: dict[str, Any]
) -> None:
    crests = np.geomspace(*limits, 200)
    line = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 1.6}
    axes.plot(crests, [expected_qsnr(fmt, float(crest)) for crest in crests], label=fmt.name, zorder=2, **line)
    if points:
        size = 14 if len(points) < 500 else 6
        at, qsnr = zip(*points, strict=True)
        axes.scatter(at, qsnr, s=size, c=style["color"], marker=style["marker"], alpha=0.55, linewidths=0, zorder=3)


def _crossings(axes: "Axes", formats: list[Format], limits: tuple[float, float]) -> None:
    """Where integers and minifloats with the same blocks and scales are equally good."""
    for integer in formats:
        for other in formats:
            same = (integer.block, str(integer.scale)) == (other.block, str(other.scale))
            if not same or (integer.element.kind, other.element.kind) != ("integer", "minifloat"):
                continue
            crest = crossover(integer, other)
            if crest is not None and limits[0] < crest < limits[1]:
                at = (crest, expected_qsnr(integer, crest))
                axes.plot(*at, marker="x", color="black", markersize=8, markeredgewidth=1.6, zorder=4, linestyle="none")
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
                text = f"{integer.name} = {other.name}\nat {crest:.2f}"
                axes.annotate(text, at, (10, 26), textcoords="offset points", fontsize=8, bbox=box, zorder=5)


def _plain_ticks(axes: "Axes", low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    steps = (1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 4.5, 5, 6, 8, 10, 15, 20, 30, 50, 100)
    inside = [step for step in steps if low <= step <= high] or [low, high]
    axes.xaxis.set_major_locator(FixedLocator(inside))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
