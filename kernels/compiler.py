"""C kernels for CPUs: compiled once per machine by its own compiler, kept in the cache, loaded through ctypes.

No compiler, no kernel: then the reference runs, and `qat kernels` says so. OpenMP comes from the library that torch
brought along, so that both use one pool of threads.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
SECONDS = 120


@cache
def compiler() -> str | None:
    """The C compiler: $CC, cc, gcc or clang, or None."""
    return next(
        (found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := which(name))), None
    )


def which(name: str) -> str | None:
    """Path of a program."""
    return shutil.which(name)


def load_library(source: Path) -> ctypes.CDLL:
    """The library made from one C file.

    Raises:
        OSError: there is no compiler, or it failed; carries its message.
    """
    _share_openmp()
    return ctypes.CDLL(str(_compiled(source)))


def _compiled(source: Path) -> Path:
    cc = compiler()
    if cc is None:
        raise OSError("no C compiler found ($CC, cc, gcc, clang)")
    text = source.read_bytes()
    key = hashlib.sha256(text + repr((cc, FLAGS, _processor())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("QAT_CACHE") or "~/.cache/qat").expanduser() / "kernels"
    target = folder / f"{source.parent.name}-{key}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / target.name
        for openmp in (("-fopenmp",), ()):  # some compilers come without it; one thread then
            command = [cc, *FLAGS, *openmp, "-o", str(made), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            if done.returncode == 0:
                os.replace(made, target)
                return target
    raise OSError(f"{cc} cannot compile {source.name}: {done.stderr.strip()[-500:]}")


def _processor() -> str:
    """What -march=native depends on: a cache may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return platform.machine() + platform.processor()


def _share_openmp() -> None:
    """Put torch's OpenMP in front of the system's: two pools would spin against each other."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
