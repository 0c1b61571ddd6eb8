"""Which engine loads what of gpt-oss's own checkpoints."""

from qat.checkpoints.layouts.kinds import mx
from qat.checkpoints.layouts.support import UNKNOWN, YES, Row, cell
from qat.numbers.catalog import CATALOG, E2M1

_DENSE = "plain transformers on a CPU multiplies with dequantized experts, unless it is loaded with use_kernels=True"

(FORMAT,) = (fmt for fmt in CATALOG.values() if mx(fmt, E2M1))
METHOD = FORMAT.name  # gpt-oss calls its layout after its only format

ROWS: tuple[Row, ...] = (
    Row("experts of gpt-oss", lambda w, a: w == FORMAT and a is None, (cell("exact", _DENSE), YES, UNKNOWN, UNKNOWN)),
)
