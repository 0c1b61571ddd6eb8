"""What tests share: signals as a terminal gives them, a small disk, groups of processes, the library's sums."""

import gc
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def signals_of_a_terminal() -> Iterator[None]:
    """Under `nohup`, or behind `&` in a script, this process inherits ignored signals, which runs respect."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in usual if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, usual[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    tool = shutil.which("mount")
    if tool is None or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    done = subprocess.run(
        [tool, "-t", "tmpfs", "-o", "size=4m", "tmpfs", mount], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"mounting a small tmpfs is not permitted: {done.stderr.strip()}")
    try:
        yield mount
    finally:
        gc.collect()  # tensors that were loaded from there still map their file
        subprocess.run(["umount", mount], check=True)


@pytest.fixture
def one() -> Iterator[None]:
    """A process group of this process alone."""
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def two() -> Iterator[None]:
    """The first of two processes, of which the second is not there: nothing is communicated."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def library_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in BF16 meet BF16 weights and are summed as the library sums them, on processors with AVX2 alone, too:
    by dense slices in the place of `cpu_avx2.c`, which rounds no weight."""
    monkeypatch.setattr("qat.kernels.packed_linear.cpu._avx2_library", lambda: None)
