"""`qat export --overwrite` replaces what an export wrote, and nothing else."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from qat.cli import main
from tests.checkpoints.exports import pair_rules
from tests.checkpoints.test_export_plan import REST, make_run
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a run of it, an export, somebody's files, and links to some of these."""
    root = tmp_path_factory.mktemp("overwrite") / "root"
    source = tiny_model("llama", root / "inner" / "model", num_hidden_layers=1)
    run = make_run(source, [pair_rules("int4_g32", None), REST])
    assert main(["export", str(run), str(root / "out")]) == 0
    (root / "files").mkdir()
    (root / "files" / "thesis.txt").write_text("years of work")
    (root / "fake").mkdir()
    (root / "fake" / "qat.json").write_text("{}")
    (root / "link").symlink_to(root / "inner" / "model")
    return root


def listing(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_size for path in sorted(root.rglob("*"))}


CASES: dict[str, Callable[[Path], Path]] = {
    "the source": lambda root: root / "inner" / "model",
    "a link to the source": lambda root: root / "link",
    "the run": lambda root: root / "inner" / "run",
    "a parent of both": lambda root: root / "inner",
    "a parent of all": lambda root: root,
    "the root of the disk": lambda root: Path("/"),
    "home": lambda root: Path("~"),
    "somebody's files": lambda root: root / "files",
    "files with an empty record": lambda root: root / "fake",
    "the working directory": lambda root: Path("."),
    "its parent": lambda root: Path(".."),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_else_is_replaced(
    name: str, made: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (made / "files" / "deep").mkdir(exist_ok=True)
    monkeypatch.chdir(made / "files" / "deep" if name == "its parent" else made / "files")
    monkeypatch.setenv("HOME", str(made / "files"))
    before = listing(made)
    assert main(["export", str(made / "inner" / "run"), str(CASES[name](made)), "--overwrite"]) == 2
    assert "--overwrite does not replace it" in capfd.readouterr().err
    assert listing(made) == before


def test_an_export_is_replaced_unless_it_is_the_working_directory(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = made / "out"
    (out / "stale").touch()
    monkeypatch.chdir(out)
    assert main(["export", str(made / "inner" / "run"), str(out), "--overwrite"]) == 2
    monkeypatch.chdir(made)
    assert (out / "stale").exists()
    assert main(["export", str(made / "inner" / "run"), str(out), "--overwrite"]) == 0
    assert not (out / "stale").exists() and main(["verify", str(out), "--no-logits"]) == 0


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_written_files_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        source = tiny_model("llama", tmp_path / "model", num_hidden_layers=1)
        run = make_run(source, [pair_rules("int4_g32", None), REST])
        assert main(["export", str(run), str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    for folder in (run, tmp_path / "out"):
        for path in [folder, *folder.rglob("*")]:
            expected = (0o777 if path.is_dir() else 0o666) & ~umask
            assert stat.S_IMODE(path.stat().st_mode) == expected, path
