"""Which engine loads what of Ascend checkpoints: a row for each type."""

from qat.checkpoints.layouts.ascend.types import BY_NAME, TYPES
from qat.checkpoints.layouts.support import NO, Row

NO_PLAIN = "nothing but engines on Ascend reads these files; export compressed-tensors for others"


def _row(name: str) -> Row:
    kinds = [kind for kind in TYPES if kind.name == name]  # which differ in their group size
    return Row(name, lambda w, a: any(kind.applies(w, a) for kind in kinds), (NO, NO, NO, NO), kinds[0].npu)


ROWS: tuple[Row, ...] = tuple(map(_row, BY_NAME))
