"""Folders that are complete or absent: built beside their destination, synced to disk, then renamed.

A checkpoint that stopped half way must never look like a checkpoint. Everything that writes a folder of
weights goes through `atomic_folder`. The unfinished folder is hidden and locked by its process; a killed
process loses the lock, so the next run can tell what is stale and remove it.
"""

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from qat.errors import CheckpointError


@contextlib.contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False, expected_bytes: int | None = None) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block ends well and disappears when it does not.

    Args:
        out: destination; must not exist, or be an empty folder, unless `overwrite`.
        overwrite: replace a non-empty destination, by two renames after the new content is on disk.
        expected_bytes: what the block will write at its peak; refused at once when the disk has less free.

    Raises:
        CheckpointError: destination in the way, another run is writing it, not enough disk, or disk full.
    """
    destination = Path(os.path.realpath(out.expanduser()))
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial, lock = _claim(destination, overwrite, expected_bytes)
    try:
        yield partial
        _open_up(partial)
        _sync_tree(partial)
        _publish(partial, destination, overwrite)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _no_room(error, partial, destination) from error
        raise
    finally:
        os.close(lock)


def _claim(destination: Path, overwrite: bool, expected_bytes: int | None) -> tuple[Path, int]:
    """Clear what killed runs left, check the destination, and lock a new folder beside it."""
    parent, name = destination.parent, destination.name
    # The parent is locked for this moment only: nobody may see our folder between its creation and its lock.
    guard = _lock(parent, wait=True)
    try:
        _settle_swaps(destination)
        for stale in parent.glob(glob.escape(f".{name}.partial-") + "*"):
            held = _lock(stale)
            if held is None:
                raise CheckpointError(f"another run is writing {destination} (in {stale}); wait for it or stop it")
            os.close(held)
            shutil.rmtree(stale)
        _check_destination(destination, overwrite)
        _check_space(destination, expected_bytes)
        partial = parent / f".{name}.partial-{secrets.token_hex(4)}"
        partial.mkdir()
        lock = _lock(partial)
        assert lock is not None, "a folder created a moment ago is locked"
        return partial, lock
    finally:
        if guard is not None:
            os.close(guard)


def _lock(folder: Path, wait: bool = False) -> int | None:
    """Lock a folder until the descriptor closes or the process dies; None when somebody else holds it.

    On a file system without locks the descriptor comes back unlocked: two runs that write one destination
    at the same time then stop each other with an error, though a less clear one.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass
    return descriptor


def _swapped_out(destination: Path) -> list[Path]:
    return sorted(destination.parent.glob(glob.escape(f".{destination.name}.old-") + "*"))


def _settle_swaps(destination: Path) -> None:
    """Put back, or drop, the old folder that a run killed between the two renames of an overwrite left."""
    for old in _swapped_out(destination):
        if destination.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, destination)


def _check_destination(destination: Path, overwrite: bool) -> None:
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; give a folder that does not exist yet")
    if not overwrite and destination.is_dir() and any(destination.iterdir()):
        raise CheckpointError(f"{destination} exists and is not empty; give another folder or ask to overwrite it")


def _check_space(destination: Path, expected_bytes: int | None) -> None:
    if expected_bytes is None:
        return
    free = shutil.disk_usage(destination.parent).free
    if free < expected_bytes:
        raise CheckpointError(
            f"{destination} needs {_size(expected_bytes)}, but only {_size(free)} are free on its disk; "
            "free some space or write elsewhere"
        )


def _publish(partial: Path, destination: Path, overwrite: bool) -> None:
    _check_destination(destination, overwrite)  # again: hours may have passed
    old = None
    if destination.exists() and any(destination.iterdir()):
        old = destination.with_name(f".{destination.name}.old-{secrets.token_hex(4)}")
        os.replace(destination, old)
    try:
        os.replace(partial, destination)
    except OSError:
        if old is not None:
            os.replace(old, destination)
        raise
    _sync(destination.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _open_up(folder: Path) -> None:
    """Give files the permissions that the umask leaves: some libraries write theirs for their owner only."""
    probe = folder / f".mode-{secrets.token_hex(4)}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_room(error: OSError, partial: Path, destination: Path) -> CheckpointError:
    reason = {
        errno.ENOSPC: "the disk became full",
        errno.EDQUOT: "your disk quota is used up",
        errno.EFBIG: "the file size limit of this process was reached (see `ulimit -f`)",
    }[error.errno or errno.ENOSPC]
    state = "could not be removed: remove it by hand" if partial.exists() else "was removed"
    free = _size(shutil.disk_usage(destination.parent).free)
    return CheckpointError(
        f"{destination} was not written: {reason}; the unfinished folder {partial} {state} "
        f"({free} are free now). Make room or write elsewhere, and run again"
    )


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, bigger
    return f"{value:.4g} {unit}"
