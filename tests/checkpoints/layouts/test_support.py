"""The table of who loads what: it covers exactly what the targets write, and the document shows it as it is."""

from pathlib import Path

import pytest

from qat.checkpoints.layouts import TARGETS, support
from qat.cli import main
from qat.numbers.catalog import CATALOG, lookup

DOCUMENT = Path(__file__).parents[3] / "docs" / "export.md"
BEGIN, END = "<!-- begin: qat.checkpoints.layouts.support -->\n", "<!-- end -->\n"


@pytest.mark.parametrize("target", TARGETS)
def test_rows_cover_what_the_target_writes_and_nothing_else(target: str) -> None:
    assert set(support.pairs(target)) == set(TARGETS[target].pairs())
    for weight, input in support.pairs(target):
        args = lookup(weight), lookup(input) if input else None
        exactly = [row for row in support.ROWS if row.target == target and row.applies(*args)]
        assert exactly[0] is support.find(target, *args)


def test_every_row_is_reached() -> None:
    formats = list(CATALOG.values())
    found = {id(support.find(t, w, a)) for t in TARGETS for w in formats for a in [None, *formats]}
    assert found >= {id(row) for row in support.ROWS}
    assert {row.target for row in support.ROWS} == TARGETS.keys()
    assert all(len(row.cells) == len(support.ENGINES) for row in support.ROWS)


def test_notes_are_the_surprises_of_the_row() -> None:
    nvfp4 = lookup("nvfp4")
    (only,) = support.notes("modelopt", nvfp4, None)
    assert only.startswith("plain transformers fails on modelopt")
    assert support.notes("compressed-tensors", nvfp4, None) == []
    assert any(
        "Humming" in note for note in support.notes("compressed-tensors", lookup("int4_g64"), lookup("int8_token"))
    )
    assert support.notes("fp8", nvfp4, None) == []


def test_the_document_shows_the_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    shown = text.partition(BEGIN)[2].partition(END)[0]
    assert shown == support.markdown(), f"paste qat.checkpoints.layouts.support.markdown() into {DOCUMENT.name}"


def test_the_command_line_names_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert all(target in shown for target in TARGETS)


def test_names_are_folded() -> None:
    assert support._names(["int8_channel", "int8_g64", "int4_channel", "int4_g64", "nvfp4", None]) == (
        "-, `{int8,int4}_{channel,g64}`, `nvfp4`"
    )
