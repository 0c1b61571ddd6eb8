"""Ascend NPUs as the kernels in triton-ascend's style see them (`<op>/ascend.py`): when they can run, and on how many
cores. No NPU has run any of them: they are interpreted against the reference, and triton-ascend lowers them to linalg.

The style: a kernel starts once per core and walks over blocks; bytes are int8 and words int16, for there is no unsigned
type and no float of 4 or 8 bits; warps and stages mean nothing there; no arithmetic touches a subnormal.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

INTERPRETED = 3  # cores that the interpreter plays, so that each walks over several blocks


def npu_problem() -> str | None:
    """Why the kernels for NPUs cannot run here, or None."""
    if os.environ.get("QAT_KERNELS") == "0":
        return "QAT_KERNELS=0"
    missing = [name for name in ("torch_npu", "triton") if find_spec(name) is None]
    if missing or find_spec("triton.backends.ascend") is None:
        return "they need an Ascend NPU, with torch_npu and with triton-ascend in place of Triton"
    return None if _present() else "no Ascend NPU"


def _present() -> bool:
    npu = getattr(torch, "npu", None)
    return npu is not None and bool(npu.is_available())


def cores(tensor: Tensor, kind: str) -> int:
    """Programs to start for a tensor.

    Args:
        tensor: on the NPU, or on the CPU where Triton interprets.
        kind: "num_aicore" of kernels that multiply matrices, "num_vectorcore" of others.
    """
    if tensor.device.type == "cpu":
        return INTERPRETED
    from triton.runtime.driver import driver

    return int(driver.active.utils.get_device_properties(tensor.device.index)[kind])
