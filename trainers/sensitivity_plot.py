"""The picture of `qat analyze CONFIG`: KL of every set of layers over the depth of the model, a line per kind."""

import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from qat.trainers.plots import STYLE, new_figure, save
from qat.trainers.sensitivity import Report, value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B", "#004D73")  # Okabe and Ito's


def draw(folder: Path, found: Report) -> Path:
    """Write sensitivity.png into `folder`."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return save(_picture(found), folder / "sensitivity.png")


def _picture(found: Report) -> "Figure":
    from matplotlib.ticker import MaxNLocator

    by = "kl" if any(one.kl is not None for one in found.measured) else "mse"
    kinds: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for one in found.measured:
        number = re.search(r"(?:^|\.)(\d+)\.", one.name)
        cost = value(one, by)
        if cost is not None and cost > 0:
            kinds[one.name.rpartition(".")[2]].append((int(number[1]) if number else -1, cost))
    figure = new_figure(8.0, 4.8)
    axes = figure.subplots()
    for index, (kind, points) in enumerate(sorted(kinds.items())):
        at, costs = zip(*sorted(points), strict=True)
        colour = _COLOURS[index % len(_COLOURS)]
        axes.plot(at, costs, marker="o", markersize=3.5, linewidth=1.2, color=colour, label=kind)
    if kinds:
        axes.set_yscale("log")
        axes.legend(fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer (-1: beside the numbered ones)")
    saved = "saved by leaving it unquantized" if found.others else "with it alone quantized"
    axes.set_ylabel(f"KL {saved} (nats per token)" if by == "kl" else "squared error of the output, relative")
    figure.suptitle(f"{found.name}: which layers suffer", x=0.01, ha="left", fontsize=12)
    return figure
