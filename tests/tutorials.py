"""Runs docs/tutorials as they are printed: `make tutorials` on the embedded model, the tests on a tiny one.

A fenced block whose first line says `bash run` or `python run` is executed, one that says `file=NAME` is written to
that file; all others are shown only. Tutorials run in the order of their names, in one empty folder with a copy of
configs/, and the first command that fails ends them.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from qat.cli import main

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
Execute = Callable[[str, str], None]

_BLOCK = re.compile(r"^```(?P<language>\w+) (?P<what>run|file=\S+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """(language, "run" or "file=NAME", text) of what a page asks for, in order."""
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield match["language"], match["what"], match["text"]


def run(page: Path, execute: Execute, changes: dict[str, str]) -> None:
    """Do what `page` says in the working directory, with texts replaced by others, here and in the configs."""
    if not Path("configs").exists():
        shutil.copytree(ROOT / "configs", "configs")
        for path in Path("configs").rglob("*.yaml"):
            path.write_text(_changed(path.read_text(encoding="utf-8"), changes), encoding="utf-8")
    for language, what, text in blocks(page):
        text = _changed(text, changes)
        print(f"--- {page.name}: {language} {what}\n{text}", flush=True)
        if what == "run":
            execute(language, text)
        else:
            Path(what.removeprefix("file=")).write_text(text, encoding="utf-8")


def _changed(text: str, changes: dict[str, str]) -> str:
    for before, after in changes.items():
        text = text.replace(before, after)
    return text


def by_shell(language: str, text: str) -> None:
    """As a user does it, with this Python and this checkout before whatever else is installed."""
    first = {"PATH": Path(sys.executable).parent, "PYTHONPATH": ROOT}
    paths = {key: f"{path}{os.pathsep}{os.environ.get(key, '')}" for key, path in first.items()}
    command = [sys.executable, "-c", text] if language == "python" else ["bash", "-ec", text]
    subprocess.run(command, env={**os.environ, **paths}, check=True)


def in_process(language: str, text: str) -> None:
    """The same without waiting for imports: lines that begin with `qat` by its entry point."""
    if language == "python":
        Path("block.py").write_text(text, encoding="utf-8")
        runpy.run_path("block.py", run_name="__main__")
        return
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["qat"]:
            status = main(words[1:])
            assert status == 0, f"{line}: exit status {status}"
        else:
            subprocess.run(["bash", "-c", line], check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="qat-tutorials-") as place:
        os.chdir(place)
        for tutorial in TUTORIALS:
            run(tutorial, by_shell, {})
    print(f"{len(TUTORIALS)} tutorials ran as printed")
