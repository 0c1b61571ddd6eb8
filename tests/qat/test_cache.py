"""One folder for everything that can be made again: who decides where it is, and what happens where it cannot be."""

import stat
from pathlib import Path

import pytest

from qat import cache
from qat.cache import cache_folder
from qat.errors import ConfigError


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("QAT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache._temporary.cache_clear()


def test_the_first_of_three_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder("data") == tmp_path / "home" / ".cache" / "qat" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: ignore it
    assert cache_folder("data") == tmp_path / "home" / ".cache" / "qat" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("models") == tmp_path / "xdg" / "qat" / "models"
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "own"))
    assert cache_folder("kernels") == tmp_path / "own" / "kernels"
    assert (tmp_path / "own" / "kernels").is_dir()


def test_a_chosen_folder_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"QAT_CACHE=.*file cannot be written \(Not a directory"):
        cache_folder("data")


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nobody"])
def test_a_home_that_cannot_be_written_gives_a_folder_for_now_with_a_note(
    home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.warns(UserWarning, match="set QAT_CACHE"):
        folder = cache_folder("kernels")
    assert folder.parent.parent == tmp_path and cache_folder("data").parent == folder.parent, "one for the process"
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700, "nobody else may put code there"
