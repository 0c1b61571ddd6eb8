"""C kernels that cannot be compiled, or whose library is damaged."""

import platform
from pathlib import Path

import pytest

from qat.kernels import compiler
from qat.kernels.load import cpu_problem

pytestmark = pytest.mark.skipif(cpu_problem() is not None, reason=str(cpu_problem()))


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "broken.c"
    source.write_text("int f( {")
    with pytest.raises(OSError, match=r"cannot compile broken\.c: .*error"):
        compiler.load_library(source)
    monkeypatch.setattr(compiler, "compiler", lambda: None)
    with pytest.raises(OSError, match="no C compiler found"):
        compiler.load_library(source)
    assert not [path for path in (tmp_path / "cache" / "kernels").iterdir() if path.suffix == ".so"]


def test_a_damaged_library_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_CACHE", str(tmp_path))
    source = tmp_path / "one" / "one.c"
    source.parent.mkdir()
    source.write_text("int one(void) { return 1; }")
    path = compiler._compiled(source, (*compiler.FLAGS, *compiler.ISAS["native"], "-ffp-contract=fast"))
    path.write_bytes(path.read_bytes()[:100])
    assert compiler.load_library(source).one() == 1


def test_a_slow_compiler_is_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "cc"
    slow.write_text("#!/bin/sh\nsleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setattr(compiler, "compiler", lambda: str(slow))
    monkeypatch.setattr(compiler, "SECONDS", 0.2)
    with pytest.raises(OSError, match=r"took more than 0\.2 s"):
        compiler.load_library(tmp_path / "any.c")


def test_a_header_is_part_of_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    source, header = tmp_path / "number.c", tmp_path / "number.h"
    source.write_text('#include "number.h"\nint number(void) { return NUMBER; }')
    for number in (1, 2):
        header.write_text(f"#define NUMBER {number}")
        assert compiler.load_library(source).number() == number


def test_other_instructions_can_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "wide.c"
    source.write_text("int wide(void) {\n#ifdef __AVX512F__\nreturn 1;\n#endif\nreturn 0; }")
    monkeypatch.setenv("QAT_CPU_ISA", "avx2")
    if platform.machine() == "x86_64":
        assert compiler.load_library(source).wide() == 0
    monkeypatch.setenv("QAT_CPU_ISA", "sse")
    with pytest.raises(OSError, match="QAT_CPU_ISA=sse: there are native, avx512_bf16"):
        compiler.load_library(source)
