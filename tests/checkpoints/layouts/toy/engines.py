"""The only scheme of the toy layout, which no engine knows."""

from qat.checkpoints.layouts.kinds import ROW, int_weight
from qat.checkpoints.layouts.support import NO, Row, cell

ROWS: tuple[Row, ...] = (
    Row("bytes", lambda w, a: a is None and int_weight(w, 8) and w.block == ROW, (cell("no", "toys"), NO, NO, NO)),
)
