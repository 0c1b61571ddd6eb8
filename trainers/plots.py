"""The pictures of a run: how training went, what was recovered, and what the weights lost layer by layer.

Each picture answers one question and says its units. Colours are Okabe and Ito's, distinguished by colour-blind readers
too, and one model has one colour everywhere. matplotlib is imported when something is drawn, never on import.
"""

import csv
import math
import re
import secrets
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Qsnr = list[tuple[str, float, float]]
COLOURS = {"bf16": "#6B6B6B", "ptq": "#D55E00", "best_ptq": "#E69F00", "student": "#0072B2"}
NAMES = {"bf16": "BF16", "ptq": "RTN", "best_ptq": "PTQ\ninit", "student": "trained\nstudent"}
_LIGHT = "#A9CCE3"  # the student's colour, thinned: single steps behind their mean
_INK = "#333333"
_SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B")
STYLE: Any = {  # matplotlib types each key of it on its own
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}


def draw(run: Path, report: dict[str, Any], qsnr: Qsnr | None) -> list[Path]:
    """Write `run`/plots/*.png; returns the files, in the order a reader wants them.

    Args:
        run: holds `metrics.csv`; without one there is no loss.png.
        report: as `RunReport.to_dict` gives it.
        qsnr: (layer, dB before training, dB after); without it there is no qsnr.png.
    """
    import matplotlib

    history = read_metrics(run / "metrics.csv")
    pictures: list[Path] = []
    with matplotlib.rc_context(STYLE):
        if history:
            pictures.append(save(_loss(report, history), run / "plots" / "loss.png"))
        pictures.append(save(_recovery(report), run / "plots" / "recovery.png"))
        if qsnr:
            pictures.append(save(_qsnr(report, qsnr), run / "plots" / "qsnr.png"))
        if moved := report["why"].get("moved"):
            pictures.append(save(_flipped(report, moved["sites"]), run / "plots" / "flipped.png"))
    return pictures


def read_metrics(path: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Columns of metrics.csv, NaN where a cell is empty; {} where there is no file or no row.

    A line cut short by a crash is left out, and of a step written twice the later line counts.
    """
    if not path.is_file():
        return {}
    rows: dict[float, dict[str, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if None in line.values() or not line["step"]:
                continue
            values = {name: float(cell) if cell else math.nan for name, cell in line.items()}
            rows[values["step"]] = values
    ordered = [rows[step] for step in sorted(rows)]
    return {name: np.array([row[name] for row in ordered]) for name in ordered[0]} if ordered else {}


def save(figure: "Figure", path: Path) -> Path:
    """Write the picture so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # not by tempfile, which ignores the umask
    try:
        with partial.open("xb") as file:
            figure.savefig(file, format="png", facecolor="white")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def new_figure(width: float, height: float) -> "Figure":
    """A figure outside pyplot's global state, so that nothing opens a window or stays in memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# --- loss.png: did training go well, and when was the student best? -------------------------------


def _loss(report: dict[str, Any], history: dict[str, Any]) -> "Figure":
    figure = new_figure(8.0, 6.4)
    above, below = figure.subplots(2, 1, sharex=True)
    figure.suptitle(f"{report['name']}: training", x=0.01, ha="left", fontsize=12)
    step, loss = history["step"], history["loss"]
    few: dict[str, Any] = {"marker": "o", "clip_on": False} if len(step) < 10 else {}  # whole, on the border too
    above.plot(step, loss, color=_LIGHT, linewidth=0.9, label="each step", **few)
    if len(step) >= 10:
        above.plot(step, smooth(loss), color=COLOURS["student"], linewidth=1.8, label="running median")
    _cut_spikes(above, loss)
    above.set_ylabel("training loss\n(nats per token)")
    above.legend(loc="upper right", ncols=2, fontsize=9)
    last = max(1.0, float(step[-1]))
    _heldout(below, report, history, last)
    below.set_xlabel(f"optimizer step ({history['tokens'][-1] / last:,.0f} tokens each)")
    below.set_xlim(0, last)
    below.locator_params(axis="x", integer=True)
    return figure


def smooth(values: Any) -> Any:
    """Running median over a twentieth of the steps (9 to 501), at the ends over what there is; ignores spikes."""
    half = min(250, max(4, len(values) // 40))
    padded = np.pad(np.asarray(values, dtype=float), half, constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def _cut_spikes(axes: "Axes", values: Any) -> None:
    """Let rare spikes leave the picture rather than flatten everything else."""
    finite = values[np.isfinite(values)]
    if len(finite) < 20:
        return
    low, high = float(finite.min()), float(np.percentile(finite, 99))
    if float(finite.max()) > high + 0.5 * (high - low):
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))


def _heldout(axes: "Axes", report: dict[str, Any], history: dict[str, Any], last: float) -> None:
    rows = {row["name"]: row for row in report["choosing"] or report["rows"]}  # of the text measured while training
    evaluated = np.isfinite(history["heldout_kl"])
    points = dict(zip(history["step"][evaluated].tolist(), history["heldout_kl"][evaluated].tolist(), strict=True))
    if rows["best_ptq"]["kl"] is not None:  # training starts from the PTQ initialisation
        points = {0.0: rows["best_ptq"]["kl"], **points}
    text = "choosing" if report["choosing"] else "held-out"
    axes.set_ylabel(f"{text} KL to the teacher\n(nats per token)")
    if not points:
        axes.text(0.5, 0.5, "no KL was measured", transform=axes.transAxes, ha="center")
        return
    line: dict[str, Any] = {"color": COLOURS["student"], "linewidth": 1.8, "markersize": 4 if len(points) < 80 else 2}
    axes.plot([*points], [*points.values()], marker="o", zorder=3, clip_on=False, **line)
    levels = {name: rows[name]["kl"] for name in ("ptq", "best_ptq") if rows[name]["kl"] is not None}
    top = 1.14 * max([*points.values(), *levels.values()]) or 1.0
    axes.set_ylim(0, top)
    _levels(axes, levels, last, top)
    best = float(report["best_step"])
    if best in points:
        axes.plot(best, points[best], "o", ms=10, mfc="none", mec="black", zorder=4, clip_on=False)
        axes.set_title(f"circled: the best, {points[best]:.4f} at step {best:,.0f}", loc="left", fontsize=9)


def _levels(axes: "Axes", levels: dict[str, float], last: float, top: float) -> None:
    """Horizontal lines with their names above them; the lower name goes below where two lines are close."""
    labels = {"ptq": "RTN", "best_ptq": "PTQ initialisation, where training starts"}
    for name, value in levels.items():
        axes.axhline(value, color=COLOURS[name], linewidth=1.4, linestyle=(0, (5, 3)), zorder=1)
        crowded = any(0 < other - value < 0.07 * top for other in levels.values())
        twin = name == "best_ptq" and list(levels.values()).count(value) > 1
        offset, side = ((-2, -2), "top") if crowded or twin else ((-2, 2), "bottom")
        _write(axes, f"{labels[name]}: {value:.4f}", (last, value), offset, "right", side)


def _write(axes: "Axes", text: str, at: tuple[float, float], offset: tuple[int, int], ha: str, va: str) -> None:
    """Text beside a point, legible where it crosses a line."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8}
    style: dict[str, Any] = {"ha": ha, "va": va, "fontsize": 9, "bbox": box, "zorder": 2}
    axes.annotate(text, at, offset, textcoords="offset points", **style)


# --- recovery.png: how much of what rounding lost came back? --------------------------------------


def _recovery(report: dict[str, Any]) -> "Figure":
    figure = new_figure(10.4, 3.9)
    rows = report["rows"]
    dense = next((row for row in rows if row["name"] == "bf16"), rows[0])
    share = report["gap_closed"]["kl"]
    closed = "" if share is None else f": {100 * share:.0f} % of the KL gap closed"
    bits = f" at {report['bits_per_weight']:.2f} bits per weight"
    figure.suptitle(f"{report['name']}{closed}{bits}", x=0.01, ha="left", fontsize=12)
    kl, nll, top1 = figure.subplots(1, 3, gridspec_kw={"wspace": 0.08})
    _bars(kl, rows, [row["kl"] for row in rows], ["{:.4f}"], [[row["kl"]] for row in rows])
    kl.set_title("KL to the teacher, lower is better", loc="left", fontsize=10)
    kl.set_ylabel("nats per token")
    excess = [None if row["nll"] is None else row["nll"] - dense["nll"] for row in rows]
    labels = [[row["nll"], more] for row, more in zip(rows, excess, strict=True)]
    _bars(nll, rows, excess, ["{:.4f}", "{:+.4f}"], labels)
    nll.set_title("next-token loss, lower is better", loc="left", fontsize=10)
    nll.set_ylabel("nats per token above BF16")
    percent = [None if row["top1"] is None else 100 * row["top1"] for row in rows]
    _bars(top1, rows, percent, ["{:.1f} %"], [[value] for value in percent])
    top1.set_title("same top-1 token, higher is better", loc="left", fontsize=10)
    top1.set_ylabel("% of tokens")
    return figure


def _bars(
    axes: "Axes", rows: list[dict[str, Any]], heights: list[Any], forms: list[str], labels: list[list[Any]]
) -> None:
    """One bar per model, with the values that `forms` write above (below, where the bar hangs)."""
    if all(height is None for height in heights):
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    drawn = [0.0 if height is None else height for height in heights]
    colours = [COLOURS.get(row["name"], _INK) for row in rows]
    axes.bar(range(len(rows)), drawn, color=colours, width=0.68)
    axes.axhline(0, color=_INK, linewidth=0.8)
    for index, (height, values) in enumerate(zip(drawn, labels, strict=True)):
        lines = [form.format(v) for form, v in zip(forms, values, strict=True) if v is not None] or ["no value"]
        if rows[index]["name"] == "bf16":
            lines = lines[:1]  # its distance from itself
        offset, side = ((0, 3), "bottom") if height >= 0 else ((0, -3), "top")
        text = "\n".join(lines).replace("-", "−")  # the axis has a true minus sign too
        axes.annotate(text, (index, height), offset, textcoords="offset points", ha="center", va=side, fontsize=9)
    axes.set_xticks(range(len(rows)), [NAMES.get(row["name"], row["name"]) for row in rows])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    span = max([*drawn, 0.0]) - min([*drawn, 0.0]) or 1.0
    room = 0.10 + 0.09 * len(forms)  # for the numbers
    low = min(drawn) - room * span if min(drawn) < 0 else 0.0
    axes.set_ylim(low, max([*drawn, 0.0]) + room * span)


# --- qsnr.png: which layers does the format hurt, and did training change that? -------------------


def _qsnr(report: dict[str, Any], qsnr: Qsnr) -> "Figure":
    kinds = by_kind(qsnr)
    columns = min(len(kinds), 4)
    lines = math.ceil(len(kinds) / columns)
    figure = new_figure(max(5.0, 2.7 * columns + 0.8), 2.35 * lines + 1.3)
    figure.suptitle(
        f"{report['name']}: how well the format holds the weights, layer by layer", x=0.01, ha="left", fontsize=12
    )
    grid = figure.subplots(lines, columns, sharey=True, sharex=True, squeeze=False).flatten()
    finite = [v for points in kinds.values() for point in points for v in point[1:] if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    margin = max(0.5, 0.08 * (high - low))
    last = max(point[0] for points in kinds.values() for point in points)
    for axes, (kind, points) in zip(grid, kinds.items(), strict=False):
        _dumbbells(axes, points, last)
        axes.set_title(kind, loc="left", fontsize=10)
        axes.set_ylim(low - margin, high + margin)
    for axes in grid[len(kinds) :]:
        axes.set_visible(False)
    for index in range(len(kinds)):
        if index + columns >= len(kinds):  # nothing is drawn below this panel
            grid[index].tick_params(labelbottom=True)
            grid[index].set_xlabel("layer")
    figure.supylabel("weight QSNR (dB), higher is better", fontsize=10)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=10)
    return figure


def _dumbbells(axes: "Axes", points: list[tuple[int, float, float]], last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    layer, start, final = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    size = 30 if last < 48 else 14  # rings around dots, so that equal values show both
    axes.vlines(layer, start, final, color="#BBBBBB", linewidth=1.2, zorder=1)
    axes.scatter(layer, start, s=size, facecolors="white", edgecolors=COLOURS["ptq"], linewidths=1.2, zorder=2,
                 label="before training")  # fmt: skip
    axes.scatter(layer, final, s=size / 3, color=COLOURS["student"], zorder=3, label="after training")
    axes.set_xlim(-0.04 * last - 0.6, 1.04 * last + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


# --- flipped.png: where did training change codes at all? ----------------------------------------


def _flipped(report: dict[str, Any], shares: dict[str, float]) -> "Figure":
    kinds = by_kind([(path, 0.0, 100 * share) for path, share in shares.items()])
    figure = new_figure(8.0, 3.9)
    axes = figure.subplots()
    total = 100 * report["why"]["moved"]["flipped"]
    figure.suptitle(f"{report['name']}: {total:.2f} % of the codes changed in training", x=0.01, ha="left", fontsize=12)
    for index, (kind, points) in enumerate(kinds.items()):
        layer, _, share = zip(*points, strict=True)
        colour, marker = _SERIES[index % len(_SERIES)], "osD^vPX"[index % 7]
        axes.plot(layer, share, color=colour, marker=marker, markersize=4, linewidth=1.2, label=kind)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("% of codes unlike\nthose at the start")
    axes.locator_params(axis="x", integer=True)
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def by_kind(qsnr: Qsnr) -> dict[str, list[tuple[int, float, float]]]:
    """{"q_proj": [(layer, before, after), ...], ...}; layers without a number are "other", in order of appearance.

    Several matrices of one kind in one layer (experts) become their mean.
    """
    layers_of: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    others = 0
    for path, start, final in qsnr:
        number = re.search(r"(?:^|\.)(\d+)\.", path)
        if number:
            layers_of[path.rsplit(".", 1)[-1]][int(number[1])].append((start, final))
        else:
            layers_of["other"][others].append((start, final))
            others += 1
    return {
        kind: [(layer, *map(float, np.mean(values, axis=0))) for layer, values in sorted(layers.items())]  # type: ignore[misc]  # the items are pairs
        for kind, layers in layers_of.items()
    }
