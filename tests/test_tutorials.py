"""The tutorials, and README's examples, run as printed, on a tiny model and with short rows."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from qat.numbers.catalog import CATALOG
from tests.tiny import tiny_model
from tests.tutorials import ROOT, TUTORIALS, blocks, in_process, run

README, PLUG_IN = ROOT / "README.md", ROOT / "docs" / "plug_in.md"
TOGETHER = [path for path in TUTORIALS if path.name[0] in "134"]  # 3 reads the run of 1, 4 exports it
ALONE = [[path] for path in TUTORIALS if path not in TOGETHER]


@pytest.fixture
def changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A working directory, what is replaced in it, and afterwards the catalogue as it was."""
    known = dict(CATALOG)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    model = tiny_model("llama", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield {
        "embedded:smollm2-135m": str(model),
        '"MODEL"': repr(str(model)),
        "seq_len: 512": "seq_len: 64",
        "tokens: 4096": "tokens: 256",
        "--tokens 2048": "--tokens 256",
        "8000": port,
    }
    CATALOG.clear()
    CATALOG.update(known)


def test_there_are_five_and_each_runs_something() -> None:
    assert [path.name[0] for path in TUTORIALS] == list("12345")
    assert all(any(what == "run" for _, what, _ in blocks(path)) for path in TUTORIALS)


@pytest.mark.parametrize(
    "pages", [TOGETHER, *ALONE, [README], [PLUG_IN]], ids=lambda pages: "+".join(path.stem for path in pages)
)
def test_pages_run_as_printed(pages: list[Path], changes: dict[str, str]) -> None:
    for page in pages:
        run(page, in_process, changes)
