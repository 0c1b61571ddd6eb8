"""Which engine loads what: one table of target x scheme x engine. The writers' warnings and refusals, the pairs of
formats that the smaller targets hold, and the table in docs/export.md all come from it.

Versions are in `ENGINES`. "exact" is tested in this repository, against plain transformers on a CPU; "yes" and "no" are
read from the engines' sources and were not run, "?" was not looked up. A surprise is what an engine does silently, or
what it needs.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from qat.numbers.catalog import CATALOG, E2M1, E2M3, E4M3
from qat.numbers.element import Element
from qat.numbers.format import Format
from qat.numbers.scale import BF16, E8M0, F32, UE4M3

ENGINES = {"transformers": "5.23", "vLLM": "0.33", "SGLang": "0.5.23", "TensorRT-LLM": "2026"}
TENSOR, ROW, FP8_BLOCK = (0, 0), (1, 0), (128, 128)
GROUP = (1, FP8_BLOCK[1])

Applies = Callable[[Format, Format | None], bool]


@dataclass(frozen=True)
class Cell:
    """What one engine does with one scheme."""

    loads: Literal["exact", "yes", "no", "?"]
    surprises: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One scheme of one target: which (weight, input) formats it covers, and a cell per engine, as in `ENGINES`."""

    target: str
    scheme: str
    applies: Applies
    cells: tuple[Cell, Cell, Cell, Cell]


def _cell(loads: Literal["exact", "yes", "no", "?"], *surprises: str) -> Cell:
    return Cell(loads, surprises)


EXACT, YES, NO, UNKNOWN = _cell("exact"), _cell("yes"), _cell("no"), _cell("?")


# --- kinds of formats -----------------------------------------------------------------------------


def _is(fmt: Format, element: Element) -> bool:
    return fmt.elements == (element,)


def _integer(fmt: Format) -> bool:
    return fmt.is_single and fmt.element.is_integer


def _int_weight(fmt: Format, *bits: int, zero_point: bool = False) -> bool:
    return _integer(fmt) and fmt.scale is BF16 and fmt.element.bits in bits and fmt.zero_point == zero_point


def _int_input(fmt: Format | None, block: tuple[int, int], *bits: int) -> bool:
    scale = BF16 if block == TENSOR else F32
    plain = fmt is not None and _integer(fmt) and not fmt.zero_point
    return fmt is not None and plain and fmt.scale is scale and fmt.block == block and fmt.element.bits in bits


def _fp8_weight(fmt: Format, *blocks: tuple[int, int]) -> bool:
    return _is(fmt, E4M3) and fmt.scale is BF16 and fmt.block in blocks


def _fp8_input(fmt: Format | None, *blocks: tuple[int, int]) -> bool:
    """Dynamic ones have float32 scales, the static one is stored in BF16."""
    scale = None if fmt is None else BF16 if fmt.is_static else F32
    return fmt is not None and _is(fmt, E4M3) and fmt.scale is scale and fmt.block in blocks


def _nv(fmt: Format | None) -> bool:
    return fmt is not None and _is(fmt, E2M1) and fmt.scale is UE4M3 and fmt.global_scale and fmt.group == 16


def _mx(fmt: Format | None, *elements: Element) -> bool:
    return fmt is not None and fmt.scale is E8M0 and fmt.group == 32 and any(_is(fmt, e) for e in elements)


# --- the table ------------------------------------------------------------------------------------

_ASYMMETRIC = (
    "plain transformers (with compressed-tensors >= 0.18) cannot load asymmetric weights by default; pass "
    "quantization_config=CompressedTensorsConfig(dequantize=True)"
)
_STRADDLE = "compressed-tensors before 0.18 packs 3-bit weights differently and would misread these"
_NOT_48 = "SGLang unpacks 4- and 8-bit integers only"
_HUMMING = "vLLM quantizes the inputs only with its Humming kernels (--linear-backend humming), else runs weight-only"
_SM90 = "vLLM runs INT4 weights with FP8 inputs only on sm90"
_AS_FP8 = "TensorRT-LLM takes 8-bit integers with one scale per row for FP8 and computes garbage"
_SM89 = "vLLM and SGLang leave the inputs of FP8 layers unquantized on GPUs before sm89"
_BLOCKS = "vLLM quantizes the inputs of block-scaled FP8 in groups of 128 and needs widths that 128 divides"
_ROWS = "vLLM refuses block-scaled FP8 where 128 does not divide the rows of a fused layer other than the last one"
_LLAMA = (
    "SGLang's Llama class renames weight_scale_inv and then skips the scales with a warning: serve Llama models "
    "elsewhere; its Qwen and DeepSeek classes keep the name"
)
_NV_OLD = "vLLM and SGLang run NVFP4 layers weight-only, with unquantized inputs, on GPUs before sm100"
_NV_PARSER = "TensorRT-LLM reads compressed-tensors NVFP4 in its newest versions only"
_MX_CEIL = "vLLM's dense MXFP4 kernel on sm100+ rounds input scales up (ceil); older GPUs run weight-only"
_MX_A4 = "vLLM quantizes the inputs of MXFP4 layers on sm100+ although this checkpoint does not ask for it"
_MX_A8 = "vLLM gives the FP8 inputs of MXFP4 layers float32 scales, and quantizes them on few GPUs"
_MX_AS_A16 = "TensorRT-LLM reads MXFP4 layers as weight-only"
_MX6 = "vLLM 0.33 and compressed-tensors before 0.20 have no MXFP6"
_MX8_A16 = "vLLM also quantizes the inputs of weight-only MXFP8 layers where its kernel does"
NO_MODELOPT = "plain transformers fails on modelopt checkpoints (shapes do not fit); export compressed-tensors for it"
_REROUND = "SGLang rounds fused FP8 layers once more through FP16 while loading, which moves weights below about 1e-6"
_NO_CHANNEL = "SGLang knows modelopt's FP8 with one scale per tensor only"
_MX8_100 = "SGLang runs MXFP8 on sm100+ only, and its Llama class skips the scales"
_DENSE = "plain transformers on a CPU multiplies with the dequantized weights and does not quantize the inputs"

_CT, _MO, _HF = "compressed-tensors", "modelopt", "fp8"

ROWS: tuple[Row, ...] = (
    Row(_CT, "4- and 8-bit integers", lambda w, a: a is None and _int_weight(w, 4, 8), (EXACT, YES, YES, NO)),
    Row(_CT, "2-bit integers", lambda w, a: a is None and _int_weight(w, 2), (EXACT, YES, _cell("no", _NOT_48), NO)),
    Row(
        _CT,
        "3-bit integers",
        lambda w, a: a is None and _int_weight(w, 3),
        (_cell("exact", _STRADDLE), YES, _cell("no", _NOT_48), NO),
    ),
    Row(
        _CT,
        "4- and 8-bit integers with zero points",
        lambda w, a: a is None and _int_weight(w, 4, 8, zero_point=True),
        (_cell("yes", _ASYMMETRIC), YES, YES, NO),
    ),
    Row(
        _CT,
        "2-bit integers with zero points",
        lambda w, a: a is None and _int_weight(w, 2, zero_point=True),
        (_cell("yes", _ASYMMETRIC), YES, _cell("no", _NOT_48), NO),
    ),
    Row(
        _CT,
        "3-bit integers with zero points",
        lambda w, a: a is None and _int_weight(w, 3, zero_point=True),
        (_cell("yes", _ASYMMETRIC, _STRADDLE), YES, _cell("no", _NOT_48), NO),
    ),
    Row(
        _CT,
        "8-bit integers, 8-bit inputs",
        lambda w, a: _int_weight(w, 8) and w.group is None and (_int_input(a, ROW, 8) or _int_input(a, TENSOR, 8)),
        (EXACT, YES, YES, _cell("no", _AS_FP8)),
    ),
    Row(
        _CT,
        "4-bit integers, 8-bit inputs",
        lambda w, a: _int_weight(w, 4) and _int_input(a, ROW, 8),
        (EXACT, _cell("yes", _HUMMING), NO, NO),
    ),
    Row(
        _CT,
        "other integers, integer inputs",
        lambda w, a: _int_weight(w, 2, 4, 8) and _int_input(a, ROW, 4, 8),
        (EXACT, _cell("?", _HUMMING), NO, NO),
    ),
    Row(
        _CT,
        "3-bit integers, integer inputs",
        lambda w, a: _int_weight(w, 3) and _int_input(a, ROW, 4, 8),
        (_cell("exact", _STRADDLE), _cell("?", _HUMMING), NO, NO),
    ),
    Row(
        _CT,
        "4-bit integer groups, FP8 inputs",
        lambda w, a: _int_weight(w, 4) and w.group is not None and _fp8_input(a, ROW),
        (EXACT, _cell("yes", _SM90), NO, NO),
    ),
    Row(_CT, "FP8 weights", lambda w, a: _fp8_weight(w, TENSOR, ROW) and a is None, (EXACT, YES, YES, UNKNOWN)),
    Row(
        _CT,
        "FP8",
        lambda w, a: _fp8_weight(w, TENSOR, ROW) and _fp8_input(a, ROW),
        (EXACT, _cell("yes", _SM89), YES, YES),
    ),
    Row(
        _CT,
        "FP8, static inputs",
        lambda w, a: _fp8_weight(w, TENSOR, ROW) and _fp8_input(a, TENSOR),
        (EXACT, _cell("yes", _SM89), YES, NO),
    ),
    Row(
        _CT,
        "FP8 in blocks",
        lambda w, a: _fp8_weight(w, FP8_BLOCK) and _fp8_input(a, GROUP),
        (EXACT, _cell("yes", _BLOCKS), YES, YES),
    ),
    Row(
        _CT,
        "FP8 in blocks, other inputs",
        lambda w, a: _fp8_weight(w, FP8_BLOCK) and (a is None or _fp8_input(a, ROW)),
        (EXACT, _cell("yes", _BLOCKS), UNKNOWN, UNKNOWN),
    ),
    Row(_CT, "NVFP4", lambda w, a: _nv(w) and _nv(a), (EXACT, _cell("yes", _NV_OLD), YES, _cell("yes", _NV_PARSER))),
    Row(_CT, "NVFP4 weights", lambda w, a: _nv(w) and a is None, (EXACT, YES, YES, YES)),
    Row(
        _CT,
        "MXFP4",
        lambda w, a: _mx(w, E2M1) and _mx(a, E2M1),
        (EXACT, _cell("yes", _MX_CEIL), NO, _cell("yes", _MX_AS_A16)),
    ),
    Row(_CT, "MXFP4 weights", lambda w, a: _mx(w, E2M1) and a is None, (EXACT, _cell("yes", _MX_A4), NO, YES)),
    Row(
        _CT,
        "MXFP4, FP8 inputs",
        lambda w, a: _mx(w, E2M1) and (_mx(a, E4M3) or _fp8_input(a, ROW, GROUP)),
        (EXACT, _cell("yes", _MX_A8), NO, UNKNOWN),
    ),
    Row(
        _CT,
        "MXFP6",
        lambda w, a: _mx(w, E2M3) and (a is None or _mx(a, E4M3)),
        (EXACT, _cell("no", _MX6), UNKNOWN, UNKNOWN),
    ),
    Row(_CT, "MXFP8", lambda w, a: _mx(w, E4M3) and _mx(a, E4M3), (EXACT, YES, NO, NO)),
    Row(_CT, "MXFP8 weights", lambda w, a: _mx(w, E4M3) and a is None, (EXACT, _cell("yes", _MX8_A16), NO, NO)),
    # In modelopt's rows the scheme is the `quant_algo` that is written.
    Row(_MO, "NVFP4", lambda w, a: _nv(w) and _nv(a), (_cell("no", NO_MODELOPT), _cell("yes", _NV_OLD), YES, YES)),
    Row(_MO, "W4A16_NVFP4", lambda w, a: _nv(w) and a is None, (_cell("no", NO_MODELOPT), YES, YES, YES)),
    Row(
        _MO,
        "FP8",
        lambda w, a: _fp8_weight(w, TENSOR) and _fp8_input(a, TENSOR),
        (_cell("no", NO_MODELOPT), _cell("yes", _SM89), _cell("yes", _REROUND), YES),
    ),
    Row(
        _MO,
        "FP8_PER_CHANNEL_PER_TOKEN",
        lambda w, a: _fp8_weight(w, ROW) and _fp8_input(a, ROW),
        (_cell("no", NO_MODELOPT), _cell("yes", _SM89), _cell("no", _NO_CHANNEL), YES),
    ),
    Row(
        _MO,
        "MXFP8",
        lambda w, a: _mx(w, E4M3) and _mx(a, E4M3),
        (_cell("no", NO_MODELOPT), YES, _cell("yes", _MX8_100), YES),
    ),
    Row(
        _HF,
        "FP8 in blocks",
        lambda w, a: _fp8_weight(w, FP8_BLOCK) and _fp8_input(a, GROUP),
        (_cell("exact", _DENSE), _cell("yes", _ROWS), _cell("yes", _LLAMA), YES),
    ),
)


# --- what follows from it -------------------------------------------------------------------------


def find(target: str, weight: Format, input: Format | None) -> Row | None:
    """The row of `target` that covers the pair, or None where the target does not hold it."""
    return next((row for row in ROWS if row.target == target and row.applies(weight, input)), None)


def held_anywhere(weight: Format, input: Format | None) -> bool:
    """Whether any target holds the pair."""
    return any(row.applies(weight, input) for row in ROWS)


def pairs(target: str) -> list[tuple[str, str | None]]:
    """Every (weight, input) pair of catalogue names that `target` holds."""
    inputs = [None, *CATALOG.values()]
    return [(w.name, a.name if a else None) for w in CATALOG.values() for a in inputs if find(target, w, a)]


def notes(target: str, weight: Format, input: Format | None) -> list[str]:
    """What engines are known to do differently with the pair, one sentence each."""
    row = find(target, weight, input)
    return [sentence for cell in row.cells for sentence in cell.surprises] if row else []


def refusal(target: str, weight: Format, input: Format | None) -> str:
    """Why `target` does not hold the pair: who does, and the nearest that it holds."""
    held = pairs(target)
    inputs = {a for w, a in held if w == weight.name}
    pair = f"{weight.name} weights"
    if inputs:
        pair += f" with {input.name} inputs" if input else " without quantized inputs"
    others = sorted({row.target for row in ROWS if row.applies(weight, input)} - {target})
    can = f" ({', '.join(others)} can)" if others else ""
    if not inputs:
        near = _nearest(weight, {w for w, _ in held})
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


def markdown() -> str:
    """The table of docs/export.md, with its footnotes."""
    marks: dict[str, int] = {}
    heads = [f"{engine} {version}" for engine, version in ENGINES.items()]
    lines = ["| target | scheme | weights | inputs | " + " | ".join(heads) + " |", "|---" * (4 + len(heads)) + "|"]
    for row in ROWS:
        held = [(w, a) for w, a in pairs(row.target) if _covers(row, w, a)]
        cells = [_mark(cell, marks) for cell in row.cells]
        names = [_names(dict.fromkeys(w for w, _ in held)), _names(dict.fromkeys(a for _, a in held))]
        lines.append("| " + " | ".join([f"`{row.target}`", row.scheme, *names, *cells]) + " |")
    return "\n".join([*lines, "", *(f"{number}. {sentence}." for sentence, number in marks.items())]) + "\n"


def _covers(row: Row, weight: str, input: str | None) -> bool:
    return find(row.target, CATALOG[weight], CATALOG[input] if input else None) is row


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
