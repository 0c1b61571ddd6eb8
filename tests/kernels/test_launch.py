"""Launches past Triton's own binding of arguments, on a GPU that is played: they launch what Triton would."""

import pytest

from tests.kernels.processes import in_a_process

pytest.importorskip("triton")


def test_kernels_are_launched_as_triton_launches_them() -> None:
    """Every operator's, by the kinds of its arguments (sizes of 1 are constants, which have no methods: one token of a
    split weight did not compile); hooks are told; and a product of one token calls few functions."""
    assert "all compiled" in in_a_process("compile_launches.py")
