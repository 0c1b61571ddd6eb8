"""What a run runs on: its name and the versions of what computes, for the report, and how it is set up."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = {"torch": "torch", "transformers": "transformers", "lightning": "lightning", "qat": "qat-native"}


def machine(device: torch.device, count: int = 1) -> str:
    """The accelerator's name, or the CPU's with the number of threads; and how many train together."""
    times = f"{count} x " if count > 1 else ""
    if device.type == "cuda":
        return times + torch.cuda.get_device_name(device)
    return f"{times}{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python and what a run's numbers depend on; "not installed" for a source tree that is only on the path."""
    return {"python": platform.python_version(), **{key: _version(name) for key, name in _PACKAGES.items()}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def repeatable(device: torch.device) -> None:
    """Ask for sums in one order on a GPU, so that a resumed run repeats the interrupted one; torch warns of an
    operation that has none. CPUs need no asking."""
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # made on import
