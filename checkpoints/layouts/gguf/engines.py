"""Which engine loads what of GGUF files. llama.cpp computes with every row, and so do Ollama and LM Studio, which are
built on it; the engines of the table are those that load folders, which read a file of GGUF beside that."""

from qat.checkpoints.layouts.gguf.types import FORMATS
from qat.checkpoints.layouts.support import NO, Row, cell
from qat.numbers.format import Format
from qat.numbers.scale import E8M0, F16, UE4M3
from qat.training.activations import llama_cpp_input

METHOD = "gguf"

_ROUNDS = "llama.cpp rounds the inputs of these layers to INT8 per 32 values, asked or not; train with them to count it"
_ROUNDS_MORE = _ROUNDS.replace("32", "256")
_DENSE = "plain transformers dequantizes GGUF files, with inputs as they come"


def _holds(w: Format, a: Format | None) -> bool:
    return w in FORMATS.values() and (a is None or a == llama_cpp_input(w))


ROWS: tuple[Row, ...] = (
    Row(
        "integers in blocks of 32",
        lambda w, a: _holds(w, a) and w.scale is F16,
        (cell("exact", _DENSE), NO, NO, cell("no", _ROUNDS)),
    ),
    Row(
        "super-blocks of 256",
        lambda w, a: _holds(w, a) and w.super_block > 0,
        (cell("exact", _DENSE), NO, NO, cell("no", _ROUNDS_MORE)),
    ),
    Row(
        "MXFP4",
        lambda w, a: _holds(w, a) and w.scale is E8M0,
        (cell("no", "transformers (5.23) does not know MXFP4 in GGUF files"), NO, NO, cell("no", _ROUNDS)),
    ),
    Row(
        "NVFP4",
        lambda w, a: _holds(w, a) and w.scale is UE4M3,
        (cell("no", "transformers (5.23) does not know NVFP4 in GGUF files"), NO, NO, cell("no", _ROUNDS)),
    ),
)

TABLES = Row("tables, packed", lambda w, a: a is None, (cell("exact"), NO, NO, NO))
