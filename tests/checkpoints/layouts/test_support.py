"""The table of who loads what: it covers exactly what the targets write, and the document shows it as it is."""

from pathlib import Path

import pytest
import torch

from qat.checkpoints.layouts import FILES, TARGETS, holders, support, table
from qat.checkpoints.layouts.arguments import input_args, weight_args
from qat.cli import main
from qat.numbers.catalog import lookup
from qat.numbers.numerics import quantize

DOCUMENT = Path(__file__).parents[3] / "docs" / "export.md"
BEGIN, END = "<!-- begin: qat.checkpoints.layouts -->\n", "<!-- end -->\n"


@pytest.mark.parametrize("target", TARGETS)
def test_every_row_is_reached_and_can_be_written(target: str) -> None:
    rows, layout = TARGETS[target].ROWS, TARGETS[target]
    formats = {support.find(rows, lookup(w), lookup(a) if a else None): (w, a) for w, a in support.pairs(rows)}
    assert set(formats) == set(rows) and len({row.scheme for row in rows}) == len(rows)
    assert all(len(row.cells) == len(support.ENGINES) for row in rows)
    for weight, input in support.pairs(rows):
        fmt, other = lookup(weight), lookup(input) if input else None
        affine = other is not None and other.is_static and other.zero_point
        amax = None if other is None else torch.tensor([-3.0, 5.0] if affine else 5.0)
        assert layout.pack(quantize(torch.ones(256, 256), fmt), other, amax)
        if target not in FILES:
            assert weight_args(fmt) is not None and (other is None or input_args(other) is not None)


def test_who_holds_a_pair() -> None:
    assert holders(lookup("nvfp4"), None) == ["compressed-tensors", "gguf", "modelopt"]
    assert holders(lookup("nf4_g64"), None) == []


def test_notes_are_the_surprises_of_the_row() -> None:
    nvfp4, tables = lookup("nvfp4"), {name: target.ROWS for name, target in TARGETS.items()}
    (only,) = support.notes(tables["modelopt"], nvfp4, None)
    assert only.startswith("plain transformers fails on modelopt")
    assert support.notes(tables["compressed-tensors"], nvfp4, None) == []
    notes = support.notes(tables["compressed-tensors"], lookup("int4_g64"), lookup("int8_token"))
    assert any("Humming" in note for note in notes)
    assert support.notes(tables["fp8"], nvfp4, None) == []


def test_the_document_shows_the_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    shown = text.partition(BEGIN)[2].partition(END)[0]
    assert shown == table(), f"paste qat.checkpoints.layouts.table() into {DOCUMENT.name}"


def test_the_command_line_names_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert all(target in shown for target in TARGETS)


def test_names_are_folded() -> None:
    assert support._names(["int8_channel", "int8_g64", "int4_channel", "int4_g64", "nvfp4", None]) == (
        "-, `{int8,int4}_{channel,g64}`, `nvfp4`"
    )
