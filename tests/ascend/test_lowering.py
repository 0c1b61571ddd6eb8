"""triton-ascend takes every kernel of `kernels/*/ascend.py` from Python to linalg: frontend-checked, run by no NPU."""

import pytest

from tests.ascend.places import ROOT, by_triton_ascend

pytestmark = pytest.mark.ascend


def test_every_kernel_is_lowered() -> None:
    lines = by_triton_ascend("lower.py").splitlines()
    assert lines[-1] == "all lowered by triton-ascend 3.2.0"
    lowered = {line.split()[1] for line in lines if line.startswith("lowered ")}
    assert lowered == {path.parent.name for path in (ROOT / "kernels").glob("*/ascend.py")}
    assert {"packed_linear int4_g128 bf16", "packed_linear mxfp4 bf16", "packed_linear nvfp4 bf16"} <= {
        line.removeprefix("lowered ").partition(":")[0] for line in lines
    }
