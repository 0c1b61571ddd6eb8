"""What a run reports: four models side by side, what they cost, how to repeat them; as JSON, page and table.

The headline is made from the numbers, so it says as plainly that training did not help as that it did. KL to
the teacher leads, because a student can beat its teacher's perplexity and still have lost abilities.
"""

import json
import math
import shlex
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.config import write_text_atomic
from qat.text import duration, percent, size
from qat.trainers import why

if TYPE_CHECKING:
    from rich.console import Console

JSON, PAGE = "report.json", "report.md"
LABELS = {"bf16": "BF16", "ptq": "RTN", "best_ptq": "PTQ initialisation", "student": "trained student"}
CONTAMINATED = 0.01  # share of the held-out 13-grams seen in training above which runs and reports warn
FEW_TOKENS = 4096  # held-out tokens below which differences of a few per cent are noise
# Training has to win more than this share of the gap over the best PTQ initialisation for the page to say so.
MEASURABLE = 0.01

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Everything a finished run says about itself.

    Attributes:
        rows: `Scores.row` of "bf16", "ptq", "best_ptq" and "student", in this order.
        gap_closed: {"kl", "nll"}: share of the way from RTN back to BF16; NaN where there was no gap.
        gap_closed_over_best_ptq: the same, measured from the best PTQ initialisation.
        model_bytes, dense_bytes: stored size of the quantized model and of its BF16 original.
        tokens, seconds: of training alone; evaluation and calibration are not counted.
        best_step: the step whose student is reported; 0 is the initialisation, before any training.
        eval_hash, data_hash: digests of the held-out and of the training rows.
        overlap: share of held-out 13-grams that occur in the training text; None where not measured.
        scheme, caches: `Coverage.by_format` and `by_cache`.
        machine: accelerator, or CPU and threads.
        finished_at: ISO 8601, UTC.
        qsnr: (layer, dB at the start, dB after training), each against the weights that were quantized.
        compiled: which blocks ran as graphs of `torch.compile`, and which did not and why.
        graphs: whether passes ran as CUDA graphs, and which did not and why.
        rates: (learning rate, KL on the text that decides) of those that `optim.lr: auto` tried.
        texts: what was read of the training, the held-out and the choosing text, and what of it was left out.
        choosing: "ptq", "best_ptq" and "student" on the text that decided; empty where that was the held-out text.
        choosing_hash: digest of its rows.
        why: what `qat.trainers.why` measured: "moved", "gap" and "disagreement"; empty where it was not asked to.
    """

    name: str
    method: str
    rows: list[Row]
    gap_closed: dict[str, float]
    gap_closed_over_best_ptq: dict[str, float]
    bits_per_weight: float
    model_bytes: int
    dense_bytes: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    seed: int
    steps: int
    best_step: int
    eval_hash: str
    data_hash: str
    overlap: float | None
    scheme: list[tuple[str, str, int, int, float]]
    machine: str
    versions: dict[str, str]
    precision: str
    finished_at: str
    qsnr: list[tuple[str, float, float]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    caches: list[tuple[str, str, int, float, float]] = field(default_factory=list)
    choosing: list[Row] = field(default_factory=list)
    choosing_hash: str = ""
    why: dict[str, Any] = field(default_factory=dict)
    rates: list[list[float]] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)
    graphs: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The content of `report.json`: plain JSON values, with None for what is not a finite number."""
        data = asdict(self)
        names = ("weight", "input", "modules", "parameters", "bits_per_weight")
        data["scheme"] = [dict(zip(names, row, strict=True)) for row in self.scheme]
        names = ("key", "value", "modules", "bytes_per_token", "dense_bytes_per_token")
        data["caches"] = [dict(zip(names, row, strict=True)) for row in self.caches]
        data["headline"] = headline(data)
        return {key: _finite(value) for key, value in data.items()}


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities, which JSON cannot say, replaced by None."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# --- reading and writing --------------------------------------------------------------------------


def write_report(run: Path, report: RunReport) -> None:
    """Write report.json and report.md into `run`, then draw plots/*.png.

    A failure to draw is a warning: the numbers of a long run must not depend on a plotting library.
    """
    from qat.trainers.plots import draw

    data = report.to_dict()
    write_text_atomic(run / JSON, json.dumps(data, indent=1, allow_nan=False) + "\n")
    pictures: list[Path] = []
    try:
        pictures = draw(run, data, report.qsnr or None)
    except Exception as error:  # whatever the library raises: the run is finished and its numbers are safe
        warnings.warn(f"the plots of {run} could not be drawn: {type(error).__name__}: {error}", stacklevel=2)
    write_text_atomic(run / PAGE, page(run, data, [picture.relative_to(run) for picture in pictures]))


def headline(report: dict[str, Any]) -> str:
    """What happened, in one or two sentences, by KL (or by next-token loss where nothing gave a KL)."""
    rows = {row["name"]: row for row in report["rows"]}
    key, name = ("kl", "KL") if _number(rows["student"]["kl"]) else ("nll", "next-token loss")
    scores = [rows[who][key] for who in ("bf16", "ptq", "best_ptq", "student")]
    if not all(map(_number, scores)):
        return "The held-out scores are not finite numbers, so nothing can be said about this run."
    dense, plain, best, student = scores
    gap, path = plain - dense, f"{plain:.4f} → {student:.4f} nats per token"
    if gap <= 0:
        return f"RTN lost nothing measurable on this text, so there was no gap to close ({name} {path})."
    closed, alone = (plain - student) / gap, (plain - best) / gap
    without = f"closed {percent(alone)}" if alone >= 0 else f"widened it by {percent(-alone)}"
    without = f"the best PTQ initialisation, without training, {without}"
    if closed < 0:
        return f"Training did harm: {name} {path}, worse than RTN; {without}. Do not use this student."
    what = f"{percent(closed)} of the {name} gap left by round-to-nearest ({path})"
    if closed - alone > MEASURABLE:
        return f"Training closed {what}; {without}."
    fallback = " The PTQ initialisation is reported as the student." if report["best_step"] == 0 else ""
    return f"Training did not help measurably: the student closes {what}; {without}.{fallback}"


def remarks(report: dict[str, Any]) -> list[str]:
    """What a reader must know before quoting the numbers."""
    rows = {row["name"]: row for row in report["rows"]}
    dense, best, student = rows["bf16"], rows["best_ptq"], rows["student"]
    share, sentences = report["overlap"], []
    if share is None:
        sentences.append("Whether the held-out text occurs in the training text was not measured.")
    elif share > CONTAMINATED:
        words = f"{percent(share)} of the held-out 13-grams also occur in the training text"
        sentences.append(f"{words}: part of the recovery may be memory.")
    if not _number(student["kl"]):
        sentences.append("Nothing gave a KL to a teacher; next-token loss alone does not show lost abilities.")
    if _less(student["nll"], dense["nll"]):
        sentences.append(
            "The student predicts this text better than BF16 does: it has moved towards the training text, "
            "which is not the same as having recovered. Trust KL and top-1."
        )
    if _less(student["kl"], best["kl"]) and _less(student["top1"], best["top1"]):
        sentences.append("KL is better than after the best PTQ initialisation, but top-1 agreement is worse.")
    sentences += why.warnings_of(report["why"])
    if student["tokens"] < FEW_TOKENS:
        few = f"Only {student['tokens']:,} held-out tokens were evaluated"
        sentences.append(f"{few}; differences of a few per cent are noise.")
    return sentences


def page(run: Path, report: dict[str, Any], pictures: list[Path]) -> str:
    """The text of report.md.

    Args:
        run: the folder of the run, for the commands.
        report: as `RunReport.to_dict` gives it.
        pictures: paths relative to `run`.
    """
    heads, cells = _table(report)
    scheme = [[*map(str, row.values())] for row in _readable_scheme(report["scheme"])]
    stored = (
        f"{report['bits_per_weight']:.2f} bits per weight with scales, {size(report['model_bytes'])} instead "
        f"of {size(report['dense_bytes'])} in BF16."
    )
    notes = [f"- {remark}" for remark in remarks(report)]
    sections = [
        [f"# {report['name']}"],
        [f"**{report['headline']}**"],
        _markdown(heads, cells, left=1),
        [
            f"Evaluated on {report['rows'][-1]['tokens']:,} held-out tokens. KL (to the teacher) and NLL (next "
            "token) are in nats per token, lower is better. KL gap closed is the share of the way from plain "
            "PTQ back to BF16."
        ],
        notes,
        why.lines(report["why"]),
        [f"![{picture.stem}]({picture.as_posix()})" for picture in pictures],
        ["## What is stored how"],
        _markdown(["weights", "inputs", "modules", "parameters", "bits per weight"], scheme, left=2),
        [stored, *_readable_caches(report["caches"])],
        ["## Again"],
        ["```", f"qat train {shlex.quote(str(run / 'job.yaml'))} name={report['name']}-again", "```"],
        ["## Provenance"],
        _provenance(report),
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _markdown(heads: list[str], cells: list[list[str]], left: int) -> list[str]:
    """A Markdown table whose first `left` columns are text."""
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return ["| " + " | ".join(row) + " |" for row in (heads, rule, *cells)]


def _readable_scheme(scheme: list[Row]) -> list[Row]:
    return [
        {**row, "parameters": f"{row['parameters']:,}", "bits_per_weight": f"{row['bits_per_weight']:.2f}"}
        for row in scheme
    ]


def _readable_caches(caches: list[Row]) -> list[str]:
    return [
        f"Caches of {row['modules']} modules: {row['key']} keys and {row['value']} values, "
        f"{row['bytes_per_token']:,.0f} bytes per token instead of {row['dense_bytes_per_token']:,.0f} in BF16."
        for row in caches
    ]


def _provenance(report: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    overlap = "not measured" if report["overlap"] is None else percent(report["overlap"])
    speed = f"{report['tokens_per_second'] or 0.0:,.0f} tokens/s"
    trained = f"{report['tokens']:,} tokens in {report['steps']:,} steps, {duration(report['seconds'])}"
    facts = {
        "method": f"{report['method']}, seed {report['seed']}, precision {report['precision']}",
        "training": f"{trained} ({speed})",
        "student": f"step {report['best_step']:,}, the one with the lowest {_chosen(report)}",
        **_rates(report.get("rates") or []),
        **({"torch.compile": "; ".join(report["compiled"])} if report.get("compiled") else {}),
        **({"passes": "; ".join(report["graphs"])} if report.get("graphs") else {}),
        "machine": f"{report['machine']}; peak memory {size(report['peak_memory_bytes'])}",
        "versions": versions,
        **{f"{name} text": text for name, text in report.get("texts", {}).items()},
        "held-out rows": f"sha256 `{report['eval_hash']}`",
        **({"choosing rows": f"sha256 `{report['choosing_hash']}`"} if report["choosing"] else {}),
        "training rows": f"sha256 `{report['data_hash']}`; held-out 13-grams found there: {overlap}",
        "finished": report["finished_at"],
    }
    return [f"- {name}: {value}" for name, value in facts.items()]


def _chosen(report: dict[str, Any]) -> str:
    """By what the student was chosen."""
    rows = {row["name"]: row["kl"] for row in report["choosing"]}
    if not rows:
        return "held-out KL (chosen on the very text that is reported, which flatters it)"
    path = " → ".join(_cell(rows[name], "{:.4f}") for name in ("ptq", "best_ptq", "student"))
    return f"KL on the choosing text ({path}: RTN, initialisation, student), which is not reported above"


def _rates(tried: list[list[float]]) -> dict[str, str]:
    """What `optim.lr: auto` tried, the chosen one first."""
    best = sorted(tried, key=lambda pair: (math.inf if pair[1] is None else pair[1], pair[0]))
    said = ", ".join(f"{rate:.3g} (KL {_cell(kl, '{:.4f}')})" for rate, kl in best)
    return {"learning rate": f"{said}; the first was chosen after a few steps with each"} if tried else {}


def print_table(report: RunReport, console: "Console") -> None:
    """The rows, the headline and the remarks, for a terminal."""
    from rich.box import SIMPLE
    from rich.table import Table

    data = report.to_dict()
    heads, cells = _table(data)
    title = f"{report.name}: {report.bits_per_weight:.2f} bits per weight"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, collapse_padding=True)
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    console.print(table)
    for text in (data["headline"], *(f"- {remark}" for remark in remarks(data))):
        console.print(text, highlight=False, markup=False)


def _table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column heads and formatted cells: every model with its scores, share of the KL gap closed, and size."""
    by_name = {row["name"]: row for row in report["rows"]}
    dense, plain = by_name["bf16"]["kl"], by_name["ptq"]["kl"]
    cells = []
    for row in report["rows"]:
        closed = None
        if row["name"] in ("best_ptq", "student") and _less(dense, plain) and _number(row["kl"]):
            closed = (plain - row["kl"]) / (plain - dense)
        stored = report["dense_bytes"] if row["name"] == "bf16" else report["model_bytes"]
        scores = [_cell(row["kl"], "{:.4f}"), _cell(row["nll"], "{:.4f}"), _cell(row["ppl"], "{:.2f}")]
        agreement = _cell(row["top1"], "{:.1%}")
        share = "–" if closed is None else percent(closed)
        cells.append([LABELS.get(row["name"], row["name"]), *scores, agreement, share, size(stored)])
    return ["model", "KL", "NLL", "PPL", "top-1", "KL gap closed", "size"], cells


def _cell(value: Any, form: str) -> str:
    return form.format(value) if _number(value) else "–"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _less(first: Any, second: Any) -> bool:
    return _number(first) and _number(second) and first < second
