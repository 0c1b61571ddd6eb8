"""Which engine loads what of GGUF files. llama.cpp computes with every row, and so do Ollama and LM Studio, which are
built on it; the engines of the table are those that load folders, which read a file of GGUF beside that."""

from qat.checkpoints.layouts.gguf.types import FORMATS
from qat.checkpoints.layouts.support import NO, Row, cell
from qat.numbers.format import Format

METHOD = "gguf"

_BLOCKS = next(fmt for fmt in FORMATS.values() if fmt.element.bits == 8)
_ROUNDS = "llama.cpp rounds the inputs of these layers to INT8 per 32 values, asked or not; train with them to count it"
_ROUNDS_MORE = "llama.cpp rounds the inputs of these layers to INT8 per 256 values, which training cannot count yet"
_DENSE = "plain transformers dequantizes GGUF files, with inputs as they come"


def _input(fmt: Format | None) -> bool:
    return fmt is None or fmt == _BLOCKS


ROWS: tuple[Row, ...] = (
    Row(
        "integers in blocks of 32",
        lambda w, a: w in FORMATS.values() and w.scale is _BLOCKS.scale and _input(a),
        (cell("exact", _DENSE), NO, NO, cell("no", _ROUNDS)),
    ),
    Row(
        "super-blocks of 256",
        lambda w, a: w in FORMATS.values() and w.super_block > 0 and a is None,
        (cell("exact", _DENSE), NO, NO, cell("no", _ROUNDS_MORE)),
    ),
    Row(
        "MXFP4",
        lambda w, a: w in FORMATS.values() and not w.super_block and w.scale is not _BLOCKS.scale and _input(a),
        (cell("no", "transformers (5.23) does not know MXFP4 in GGUF files"), NO, NO, cell("no", _ROUNDS)),
    ),
)

TABLES = Row("tables, packed", lambda w, a: a is None, (cell("exact"), NO, NO, NO))
