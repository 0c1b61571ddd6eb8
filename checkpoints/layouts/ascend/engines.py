"""Which engine loads what of Ascend checkpoints: a row for each type."""

from qat.checkpoints.layouts.ascend.types import TYPES, Type
from qat.checkpoints.layouts.support import NO, Row

NO_PLAIN = "nothing but engines on Ascend reads these files; export compressed-tensors for others"


def _row(kind: Type) -> Row:
    return Row(kind.name, kind.applies, (NO, NO, NO, NO), kind.npu)


ROWS: tuple[Row, ...] = tuple(map(_row, TYPES))
