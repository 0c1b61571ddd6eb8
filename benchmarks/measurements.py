"""What operators.py has measured: one row per timing, as a table, as a plot, and as JSON that grows row by row."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One timing: microseconds of the median call, and bytes that it cannot avoid to read and write."""

    family: str
    what: str
    shape: str
    tokens: int
    contender: str
    us: float
    bytes: int
    note: str = ""
    version: str = ""


def table(rows: list[Row]) -> str:
    """Markdown: one line per layer and token count, BF16 in microseconds, the others as speed-up over it."""
    lines = []
    for family in dict.fromkeys(row.family for row in rows):
        own = [row for row in rows if row.family == family]
        names = list(dict.fromkeys(row.contender for row in own))
        lines += [f"| {family} | tokens | {names[0]}, us | " + " | ".join(names[1:]) + " |"]
        lines += ["|---|---:|" + "---:|" * len(names)]
        for what, shape, tokens in dict.fromkeys((row.what, row.shape, row.tokens) for row in own):
            at = {row.contender: row.us for row in own if (row.what, row.shape, row.tokens) == (what, shape, tokens)}
            base = at.get(names[0])  # absent where it failed
            cells = [f"{base / at[name]:.2f}x" if base and name in at else "-" for name in names[1:]]
            lines.append(f"| {what} {shape} | {tokens} | {f'{base:,.0f}' if base else '-'} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(rows: list[Row], bandwidth: float, path: Path, about: str) -> None:
    """Over tokens, one column per layer: speed against BF16, and the share of the memory bandwidth (a roofline)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    own = [row for row in rows if row.family == "packed"]
    if not own:
        return
    layers = list(dict.fromkeys((row.what, row.shape) for row in own))
    wide = 3.4 * len(layers) + 1.6
    figure, axes = plt.subplots(2, len(layers), figsize=(wide, 6.2), sharex=True, sharey="row", squeeze=False)
    base = {(row.what, row.tokens): row.us for row in own if row.contender == "BF16"}
    markers = dict(zip(dict.fromkeys(row.contender for row in own), "osv^D*<>pPXhd8" * 4, strict=False))
    for (speed, share), (what, shape) in zip(axes.T, layers, strict=True):
        for name, marker in markers.items():
            line = [row for row in own if (row.what, row.contender) == (what, name)]
            line = [row for row in line if (what, row.tokens) in base]  # but where BF16 itself failed
            tokens, style = [row.tokens for row in line], {"marker": marker, "markersize": 4, "label": name}
            speed.plot(tokens, [base[what, row.tokens] / row.us for row in line], **style)
            share.plot(tokens, [row.bytes / row.us * 1e6 / bandwidth for row in line], **style)
        share.axhline(1.0, color="black", linewidth=0.8, linestyle="--", label="a copy")
        for axis in (speed, share):
            axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.3)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}" if axis is speed else "")
        share.set_xticks(tokens, [str(count) for count in tokens])
        share.minorticks_off()
        share.set_xlabel("tokens")
        speed.set_title(f"{what}\n{shape}" if what not in shape else shape, fontsize=10)
    axes[0][0].set_ylabel("times as fast as BF16")
    axes[1][0].set_ylabel(f"share of a copy's {bandwidth / 1e9:,.0f} GB/s")
    figure.legend(*axes[1][0].get_legend_handles_labels(), loc="center right", fontsize=8)
    figure.suptitle(about, fontsize=8, y=0.995)
    figure.tight_layout(rect=(0, 0, 1 - 1.5 / wide, 1))
    figure.savefig(path, dpi=140)


def write(folder: Path | None, about: dict[str, Any], peers: list[str], rows: list[Row]) -> None:
    """All rows so far, in operators.json: a run that is stopped leaves what it has measured."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        report = {**about, "peers": peers, "rows": [asdict(row) for row in rows]}
        (folder / "operators.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
