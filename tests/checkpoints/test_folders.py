"""A folder is complete or absent: killed writers, full disks, swaps and rivals, each made to happen."""

import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
        pytest.raises(CheckpointError, match=r"needs 1000.00 TB, but only .* are free"),
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


# --- places that nothing can be renamed over --------------------------------------------------------------


def write_model(out: Path, value: str, overwrite: bool = False) -> None:
    with atomic_folder(out, overwrite=overwrite) as folder:
        (folder / "config.json").write_text(value)
        (folder / "model.safetensors").write_text(value)
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text(value)


def test_a_mount_point_is_filled_in_place(small_disk: Path) -> None:
    (small_disk / "lost+found").mkdir()  # what a new disk has
    write_model(small_disk, "one")
    names = ["config.json", "lost+found", "model.safetensors", "sub"]
    assert sorted(path.name for path in small_disk.iterdir()) == names
    with pytest.raises(CheckpointError, match="not empty"):
        write_model(small_disk, "two")
    write_model(small_disk, "two", overwrite=True)
    assert sorted(path.name for path in small_disk.iterdir()) == names
    assert (small_disk / "sub" / "a").read_text() == "two"
    with pytest.raises(CheckpointError, match="disk became full"), atomic_folder(small_disk, overwrite=True) as folder:
        (folder / "big").write_bytes(bytes(5 << 20))
    assert (small_disk / "config.json").read_text() == "two" and leftovers(small_disk) == []


def test_a_mount_of_the_same_disk_is_filled_in_place(tmp_path: Path) -> None:
    """It has the device number of its parent, so only the rename finds out."""
    real, out = tmp_path / "real", tmp_path / "out"
    real.mkdir()
    out.mkdir()
    tool = shutil.which("mount")
    if tool is None or subprocess.run([tool, "--bind", real, out], capture_output=True, check=False).returncode:
        pytest.skip("bind mounts are not permitted here")
    try:
        for value in ("one", "two"):
            write_model(out, value, overwrite=True)
            assert sorted(path.name for path in real.iterdir()) == ["config.json", "model.safetensors", "sub"]
            assert (real / "sub" / "a").read_text() == value
    finally:
        subprocess.run(["umount", out], check=True)
    assert leftovers(tmp_path) == []


FILL = """
import os, signal, sys
from pathlib import Path
from qat.checkpoints import folders
moved = []
def counting(source, target, real=os.replace):
    real(source, target)
    moved.append(target)
    if len(moved) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
folders.os.replace = counting
with folders.atomic_folder(Path(sys.argv[1])) as folder:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(name)
"""


@pytest.mark.parametrize("moves", [1, 2])
def test_a_kill_while_a_mount_point_is_filled_leaves_no_model_and_nothing_in_the_way(
    moves: int, small_disk: Path
) -> None:
    done = subprocess.run([sys.executable, "-c", FILL, str(small_disk), str(moves)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (small_disk / "config.json").exists(), "nothing takes it for a model"
    write_model(small_disk, "whole")
    assert sorted(path.name for path in small_disk.iterdir()) == ["config.json", "model.safetensors", "sub"]


SWAP = """
import sys
from pathlib import Path
out, seconds = Path(sys.argv[1]), float(sys.argv[2])
import time
end = time.monotonic() + seconds
print("looking", flush=True)
while time.monotonic() < end:
    (out / "model.safetensors").read_text()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux swaps two folders in one step")
def test_there_is_no_moment_without_the_old_or_the_new_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_model(out, "first")
    reader = subprocess.Popen([sys.executable, "-c", SWAP, str(out), "1.5"], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None and reader.stdout.readline() == "looking\n"
    while reader.poll() is None:
        write_model(out, "next", overwrite=True)
    reader.stdout.close()
    assert reader.returncode == 0, "a reader met a moment without the folder"


def test_an_error_of_a_library_in_rust_is_a_full_disk_too(small_disk: Path) -> None:
    """safetensors does not raise OSError."""
    with pytest.raises(CheckpointError, match="disk became full"), atomic_folder(small_disk / "out") as folder:
        save_file({"w": torch.zeros(5 << 20, dtype=torch.uint8)}, folder / "model.safetensors")
    assert list(small_disk.iterdir()) == []
