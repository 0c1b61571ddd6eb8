"""Which engine loads what: the machinery of the support tables, whose rows each layout declares in its `engines.py`.
The pairs of formats that a layout holds, the warnings and refusals of export, and the table in docs/export.md all come
from those rows.

Versions are in `ENGINES`. "exact" is tested in this repository, against plain transformers on a CPU; "yes" and "no" are
read from the engines' sources and were not run, "?" was not looked up. A surprise is what an engine does silently, or
what it needs.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qat.checkpoints.layouts.npu import VERSIONS, Npu
from qat.numbers.catalog import CATALOG
from qat.numbers.format import Format

if TYPE_CHECKING:
    from qat.checkpoints.layouts.caches import CacheLayout

ENGINES = {"transformers": "5.23", "vLLM": "0.33", "SGLang": "0.5.23", "TensorRT-LLM": "2026"}
Applies = Callable[[Format, Format | None], bool]


@dataclass(frozen=True)
class Cell:
    """What one engine does with one scheme."""

    loads: Literal["exact", "yes", "no", "?"]
    surprises: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One scheme of a layout: which (weight, input) formats it covers, a cell per engine, as in `ENGINES`, and the
    engines on NPUs that load it (`qat.checkpoints.layouts.npu`; docs/ascend.md has their table)."""

    scheme: str
    applies: Applies
    cells: tuple[Cell, Cell, Cell, Cell]
    npu: tuple[Npu, ...] = ()


def cell(loads: Literal["exact", "yes", "no", "?"], *surprises: str) -> Cell:
    """A cell with its surprises, one sentence each."""
    return Cell(loads, surprises)


EXACT, YES, NO, UNKNOWN = cell("exact"), cell("yes"), cell("no"), cell("?")
# What engines do whatever the layout.
SM89 = "vLLM and SGLang leave the inputs of FP8 layers unquantized on GPUs before sm89"
NV_OLD = "vLLM and SGLang run NVFP4 layers weight-only, with unquantized inputs, on GPUs before sm100"


# --- what follows from rows -----------------------------------------------------------------------


def find(rows: Sequence[Row], weight: Format, input: Format | None) -> Row | None:
    """The row that covers the pair, or None where the layout does not hold it."""
    return next((row for row in rows if row.applies(weight, input)), None)


def pairs(rows: Sequence[Row]) -> list[tuple[str, str | None]]:
    """Every (weight, input) pair of catalogue names that a layout holds."""
    inputs = [None, *CATALOG.values()]
    return [(w.name, a.name if a else None) for w in CATALOG.values() for a in inputs if find(rows, w, a)]


def notes(rows: Sequence[Row], weight: Format, input: Format | None) -> list[str]:
    """What engines are known to do differently with the pair, one sentence each."""
    row = find(rows, weight, input)
    return list(dict.fromkeys(sentence for cell in row.cells for sentence in cell.surprises)) if row else []


def refusal(target: str, rows: Sequence[Row], weight: Format, input: Format | None, others: Sequence[str] = ()) -> str:
    """Why `target`, whose rows these are, does not hold the pair: which `others` do, and the nearest that it holds."""
    able = pairs(rows)
    inputs = {a for w, a in able if w == weight.name}
    pair = f"{weight.name} weights"
    if inputs:
        pair += f" with {input.name} inputs" if input else " without quantized inputs"
    can = f" ({', '.join(others)} can)" if others else ""
    if not inputs:
        near = _nearest(weight, {w for w, _ in able})
        return f"{target} cannot hold {pair}{can}; nearest it can: {near}"
    near = _nearest(input or weight, {name for name in inputs if name})
    near += (", " if near else "") + "none (weight-only)" if None in inputs else ""
    return f"{target} cannot hold {pair}{can}; nearest inputs for them: {near}"


def _nearest(fmt: Format, names: set[str], count: int = 3) -> str:
    """Names of the formats most like `fmt`: element first, then width, then block."""

    def distance(name: str) -> tuple[float, ...]:
        other = CATALOG[name]
        block = abs(math.log2((fmt.group or 4096) / (other.group or 4096)))
        kind = other.element.kind != fmt.element.kind
        return (abs(other.element.bits - fmt.element.bits), kind, other.zero_point != fmt.zero_point, block)

    return ", ".join(sorted(sorted(names), key=distance)[:count])


def markdown(tables: Mapping[str, Sequence[Row]], besides: Mapping[str, Sequence[Row]]) -> str:
    """The table of docs/export.md, with its footnotes, of the rows by target, and of those for any pair of formats."""
    marks: dict[str, int] = {}
    heads = [f"{engine} {version}" for engine, version in ENGINES.items()]
    lines = ["| target | scheme | weights | inputs | " + " | ".join(heads) + " |", "|---" * (4 + len(heads)) + "|"]
    for target, rows in tables.items():
        names: dict[str, list[tuple[str, str | None]]] = {row.scheme: [] for row in rows}
        for weight, input in pairs(rows):
            row = find(rows, CATALOG[weight], CATALOG[input] if input else None)
            names[row.scheme if row else ""].append((weight, input))
        for row in rows:
            shown = [_names(dict.fromkeys(side)) for side in zip(*names[row.scheme], strict=True)]
            cells = [_mark(cell, marks) for cell in row.cells]
            lines.append("| " + " | ".join([f"`{target}`", row.scheme, *shown, *cells]) + " |")
        for row in besides.get(target, ()):
            cells = [_mark(cell, marks) for cell in row.cells]
            inputs = "-" if row.applies(next(iter(CATALOG.values())), None) else "any"
            lines.append("| " + " | ".join([f"`{target}`", row.scheme, "any", inputs, *cells]) + " |")
    return "\n".join([*lines, "", *(f"{number}. {sentence}." for sentence, number in marks.items())]) + "\n"


def npu_markdown(tables: Mapping[str, Sequence[Row]], caches: Mapping[str, "CacheLayout"]) -> str:
    """The table of docs/ascend.md, with its footnotes: rows that an engine on an NPU loads, and caches that one reads,
    by target."""
    heads = [f"{engine} {version}" for engine, version in VERSIONS.items()]
    lines = ["| target | scheme | weights | inputs | " + " | ".join(heads) + " |", "|---" * (4 + len(heads)) + "|"]
    marks: dict[str, int] = {}
    for target, rows in tables.items():
        able = pairs(rows)
        for row in (row for row in rows if row.npu):
            own = [(w, a) for w, a in able if find(rows, CATALOG[w], CATALOG[a] if a else None) is row]
            shown = [_names(dict.fromkeys(side)) for side in zip(*own, strict=True)]
            cells = [_npu_cell([one for one in row.npu if one.engine == engine], marks) for engine in VERSIONS]
            lines.append("| " + " | ".join([f"`{target}`", row.scheme, *shown, *cells]) + " |")
        if (layout := caches.get(target)) is not None and layout.npu:
            cells = [_npu_cell([one for one in layout.npu if one.engine == engine], marks) for engine in VERSIONS]
            shown = ["any", f"any; keys and values {_names(layout.holds())}"]
            lines.append("| " + " | ".join([f"`{target}`", f"{layout.scheme} (caches)", *shown, *cells]) + " |")
    return "\n".join([*lines, "", *(f"{number}. {sentence}." for sentence, number in marks.items())]) + "\n"


def _npu_cell(entries: Sequence[Npu], marks: dict[str, int]) -> str:
    numbers = [marks.setdefault(one.remark, len(marks) + 1) for one in entries if one.remark]
    said = "; ".join(", ".join(one.devices) + (f" (from {one.since})" if one.since else "") for one in entries)
    return (said or "-") + (f" ({', '.join(map(str, numbers))})" if numbers else "")


def _mark(cell: Cell, marks: dict[str, int]) -> str:
    numbers = [marks.setdefault(sentence, len(marks) + 1) for sentence in cell.surprises]
    return cell.loads + (f" ({', '.join(map(str, numbers))})" if numbers else "")


def _names(names: Iterable[str | None]) -> str:
    """Catalogue names with the blocks of one element together: `int8_{channel,g64}`."""
    elements: dict[str, list[str]] = {}
    given = list(names)
    for name in filter(None, given):
        element, _, block = name.partition("_")
        elements.setdefault(element, []).append(block)
    groups: dict[tuple[str, ...], list[str]] = {}
    for element, blocks in elements.items():
        groups.setdefault(tuple(blocks), []).append(element)
    shown = [f"`{_braces(same)}{'_' if any(blocks) else ''}{_braces(blocks)}`" for blocks, same in groups.items()]
    return ", ".join(["-"] * (None in given) + shown)


def _braces(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else "{" + ",".join(parts) + "}"
