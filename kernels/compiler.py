"""C kernels for CPUs: compiled once per machine by its own compiler, kept in the cache, loaded through ctypes.

No compiler, no kernel: then the reference runs, and `qat kernels` says so. OpenMP comes from the library that torch
brought along, so that both use one pool of threads. QAT_CPU_ISA in the environment compiles for less than
this processor has, to see what another one would do.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

from qat.cache import cache_folder
from qat.errors import ConfigError

FLAGS = ("-O3", "-fno-math-errno", "-shared", "-fPIC")
ISAS = {  # instructions that C kernels are compiled with
    "native": ("-march=native",),
    "avx512_bf16": ("-march=x86-64-v4", "-mavx512bf16"),
    "avx512": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
}
SECONDS = 120
_SOFT = 1  # omp_pause_soft: settings stay


@cache
def compiler() -> str | None:
    """The C compiler: $CC, cc, gcc or clang, or None."""
    return next(
        (program for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (program := shutil.which(name))),
        None,
    )


def isa() -> str:
    """Which of `ISAS` kernels are compiled for: $QAT_CPU_ISA, or what this processor has.

    Raises:
        OSError: there is no such.
    """
    given = os.environ.get("QAT_CPU_ISA") or "native"
    if given not in ISAS:
        raise OSError(f"QAT_CPU_ISA={given}: there are {', '.join(ISAS)}")
    return given


def load_library(source: Path, *, exact: bool = False) -> ctypes.CDLL:
    """The library made from one C file and the headers beside it.

    Args:
        source: the file.
        exact: round every operation, for results that must have the reference's bits; else products and sums may fuse.

    Raises:
        OSError: there is no compiler, or it failed; carries its message.
    """
    _share_openmp()
    flags = (*FLAGS, *ISAS[isa()], f"-ffp-contract={'off' if exact else 'fast'}")
    try:
        path = _compiled(source, flags)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # cut short by a full disk, or made for another C library: once more
            path.unlink(missing_ok=True)
            return ctypes.CDLL(str(_compiled(source, flags)))
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{error.cmd[0]} took more than {SECONDS} s for {source.name}") from error
    except ConfigError as error:
        raise OSError(f"nowhere to keep compiled kernels: {error}") from error


def _compiled(source: Path, flags: tuple[str, ...]) -> Path:
    cc = compiler()
    if cc is None:
        raise OSError("no C compiler found ($CC, cc, gcc, clang)")
    version = subprocess.run([cc, "--version"], capture_output=True, timeout=SECONDS, check=False).stdout
    text = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256(text + version + repr((cc, flags, _processor())).encode()).hexdigest()[:16]
    folder = cache_folder("kernels")
    for threads, openmp in (("", ("-fopenmp",)), ("-one-thread", ())):  # some compilers come without OpenMP
        target = folder / f"{source.parent.name}-{key}{threads}.so"
        error = None if target.is_file() else _compile([cc, *flags, *openmp], source, target)
        if error is None:
            if threads:
                warnings.warn(f"{cc} has no OpenMP: {source.parent.name} runs on one thread", stacklevel=2)
            return target
    raise OSError(f"{cc} cannot compile {source.name}: {error}")


def _compile(command: list[str], source: Path, target: Path) -> str | None:
    """Make `target`, complete or not at all; returns the compiler's complaint, or None."""
    print(f"qat: compiling {source.parent.name} for this CPU, once (some seconds)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        library = Path(scratch) / target.name
        process = subprocess.run(
            [*command, "-o", str(library), str(source)], capture_output=True, text=True, timeout=SECONDS, check=False
        )
        if process.returncode == 0:
            os.replace(library, target)
            return None
    return process.stderr.strip()[-500:]


def _processor() -> str:
    """What -march=native depends on: a cache may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return platform.machine() + platform.processor()


def _openmp() -> list[Path]:
    return sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))


def _share_openmp() -> None:
    """Put torch's OpenMP in front of the system's: two pools would spin against each other."""
    for path in _openmp():
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def end_idle_threads() -> None:
    """End the calling thread's OpenMP workers; they come back with its next parallel work.

    Every thread that computes keeps workers of its own. With more of them than processors, GNU's OpenMP lets all of
    them sleep between any two operations instead of spinning, which doubles the time of a small model's token. So a
    thread that is done with computing (a server's, once its model is loaded) calls this.
    """
    for path in _openmp():
        pause = getattr(ctypes.CDLL(str(path)), "omp_pause_resource_all", None)  # OpenMP 5.0
        if pause is not None:
            pause(_SOFT)
