"""Engines on NPUs: who loads what, why not, and the document that shows it."""

from pathlib import Path

from qat.checkpoints.layouts import TARGETS, holders, npu, npu_table, support
from qat.numbers.catalog import lookup

DOCUMENT = Path(__file__).parents[3] / "docs" / "ascend.md"
BEGIN, END = "<!-- begin: qat.checkpoints.layouts.npu -->\n", "<!-- end -->\n"
ROWS = {name: target.ROWS for name, target in TARGETS.items()}


def found(weight: str, input: str | None) -> list[tuple[str, support.Row | None]]:
    pair = lookup(weight), lookup(input) if input else None
    return [(name, support.find(ROWS[name], *pair)) for name in holders(*pair)]


def test_who_loads_a_pair() -> None:
    row = dict(found("mxfp4", "mxfp4"))["compressed-tensors"]
    one = npu.loads(row, "vllm-ascend", "950")
    assert one is not None and one.since == npu.NPU_MX
    assert npu.loads(row, "vllm-ascend", "a2") is None and npu.loads(row, "mindie", "950") is None
    assert npu.loads(None, "vllm-ascend", "a2") is None


def test_a_refusal_names_what_is_loaded_instead() -> None:
    pairs = found("nvfp4", "nvfp4")
    said = npu.refusal(ROWS, pairs, "vllm-ascend", "950")
    assert said.startswith("vllm-ascend on 950 loads ") and "MXFP4 (compressed-tensors)" in said
    assert "W4A4_MXFP4 (ascend)" in said and "W8A8_DYNAMIC" not in said
    assert npu.refusal(ROWS, found("int8_channel", "int8_token"), "mindie", "a3") == ""
    assert npu.refusal(ROWS, pairs, "mindie", "310p") == "mindie on 310p loads nothing that is written here"


def test_every_type_of_the_target_is_loaded_somewhere() -> None:
    assert all(row.npu for row in ROWS["ascend"])
    assert all(one.engine in npu.ENGINES and one.devices for row in ROWS["ascend"] for one in row.npu)


def test_the_document_shows_the_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    shown = text.partition(BEGIN)[2].partition(END)[0]
    assert shown == npu_table(), f"paste qat.checkpoints.layouts.npu_table() into {DOCUMENT.name}"
