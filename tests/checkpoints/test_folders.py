"""A folder is complete or absent: killed writers, full disks, swaps and rivals, each made to happen."""

import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qat.checkpoints.folders import atomic_folder
from qat.errors import CheckpointError


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_appears_complete_with_ordinary_permissions(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert not out.exists()
        assert folder.parent == out.parent, "a rename is atomic only within one file system"
    assert (out / "sub" / "a.txt").read_text() == "a"
    plain = tmp_path / "plain"
    plain.mkdir()
    assert out.stat().st_mode == plain.stat().st_mode
    assert leftovers(out.parent) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_non_empty_destination_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(CheckpointError, match="not empty"), atomic_folder(out):
        pytest.fail("the block must not start")
    assert (out / "old").read_text() == "old"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(CheckpointError, match="is a file"), atomic_folder(file, overwrite=True):
        pytest.fail("the block must not start")


def test_empty_destination_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "out" / "a").exists()


def test_destination_filled_meanwhile_is_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="not empty"), atomic_folder(out) as folder:
        (folder / "new").write_text("new")
        out.mkdir()
        (out / "theirs").write_text("theirs")
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert leftovers(tmp_path) == []


def test_overwrite_replaces_everything_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in ("old", "new"):
        with atomic_folder(out, overwrite=True) as folder:
            (folder / content).write_text(content)
            assert not out.exists() or (out / "old").exists()
    assert [path.name for path in out.iterdir()] == ["new"]
    with pytest.raises(ZeroDivisionError), atomic_folder(out, overwrite=True):
        raise ZeroDivisionError
    assert [path.name for path in out.iterdir()] == ["new"]
    assert leftovers(tmp_path) == []


def test_overwrite_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").exists()


@pytest.mark.parametrize("new_arrived", [False, True])
def test_swap_cut_between_its_renames_is_settled(tmp_path: Path, new_arrived: bool) -> None:
    aside = tmp_path / ".out.old-0123abcd"  # the state on disk after the first, or second, of the two renames
    aside.mkdir()
    (aside / "old").write_text("old")
    out = tmp_path / "out"
    if new_arrived:
        out.mkdir()
        (out / "new").write_text("new")
    with pytest.raises(CheckpointError, match="not empty"), atomic_folder(out):
        pytest.fail("the block must not start")
    assert [path.name for path in out.iterdir()] == (["new"] if new_arrived else ["old"])
    assert leftovers(tmp_path) == []


def test_rival_writer_is_refused_and_not_disturbed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as folder:
        (folder / "a").write_text("a")
        with pytest.raises(CheckpointError, match="another run is writing"), atomic_folder(out):
            pytest.fail("the block must not start")
        with atomic_folder(tmp_path / "out2"):  # a name that only starts alike is nobody's rival
            pass
    assert (out / "a").exists()


KILLED = """
import sys, time
from pathlib import Path
from qat.checkpoints.folders import atomic_folder
with atomic_folder(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "half").write_bytes(bytes(1000))
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_kill_leaves_the_old_state_and_the_next_run_cleans_up(tmp_path: Path, existing: bool) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "old").write_text("old")
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    assert out.exists() == existing
    assert len(leftovers(tmp_path)) == 1, "the killed run could not clean up"
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert leftovers(tmp_path) == []


def test_too_small_a_disk_is_refused_before_writing(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"needs 1000 TB, but only .* are free"),
        atomic_folder(tmp_path / "out", expected_bytes=10**15),
    ):
        pytest.fail("the block must not start")
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "out", expected_bytes=1):
        pass


def test_full_disk_is_named_and_given_back(small_disk: Path) -> None:
    out = small_disk / "out"
    with pytest.raises(CheckpointError, match="disk became full") as caught, atomic_folder(out) as folder:
        for number in range(8):
            (folder / str(number)).write_bytes(bytes(1 << 20))
    assert "was removed" in str(caught.value)
    assert list(small_disk.iterdir()) == []
    assert shutil.disk_usage(small_disk).free > 3_900_000
    with atomic_folder(out) as folder:
        (folder / "small").write_bytes(bytes(1 << 20))
    assert (out / "small").stat().st_size == 1 << 20


LIMITED = """
import sys
from pathlib import Path
from qat.checkpoints.folders import atomic_folder
from qat.errors import CheckpointError
try:
    with atomic_folder(Path(sys.argv[1])) as folder:
        (folder / "big").write_bytes(bytes(1 << 20))
except CheckpointError as error:
    print(error)
"""


def test_file_size_limit_is_named(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "out")],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "file size limit" in done.stdout
    assert list(tmp_path.iterdir()) == []
