"""Which engine loads what of gpt-oss's own checkpoints."""

from qat.checkpoints.layouts.kinds import mx
from qat.checkpoints.layouts.support import UNKNOWN, YES, Row, cell
from qat.numbers.catalog import E2M1

_DENSE = "plain transformers on a CPU multiplies with dequantized experts, unless it is loaded with use_kernels=True"

ROWS: tuple[Row, ...] = (
    Row("experts of gpt-oss", lambda w, a: mx(w, E2M1) and a is None, (cell("exact", _DENSE), YES, UNKNOWN, UNKNOWN)),
)
