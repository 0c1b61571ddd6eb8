"""Folders that are complete or absent: built beside their destination, synced to disk, then renamed.

A checkpoint that stopped half way must never look like a checkpoint. Everything that writes a folder of
weights goes through `atomic_folder`. The unfinished folder is hidden and locked by its process; a killed
process loses the lock, so the next run can tell what is stale and remove it.

Where nothing can be renamed over the destination (a mount point, a folder whose parent is not ours), it is filled in
place, config.json last: until then nothing takes it for a model.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from qat.errors import CheckpointError
from qat.text import size

_MAKES_A_MODEL = "config.json"
_FILLING = ".filling.json"
_AT_FDCWD = -100  # <fcntl.h> on Linux: paths are relative to the working directory


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
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; give a folder that does not exist yet")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial, lock = _claim(destination, overwrite, expected_bytes)
    try:
        yield partial
        _open_up(partial)
        _sync_tree(partial)
        _publish(partial, destination, overwrite)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (number := _no_room_number(error)) is not None:
            raise _no_room(number, partial, destination) from error
        raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def atomic_file(out: Path, *, overwrite: bool = False, expected_bytes: int | None = None) -> Iterator[Path]:
    """Yield a path beside `out` that becomes `out` when the block ends well and disappears when it does not; the rest
    as `atomic_folder`."""
    destination = Path(os.path.realpath(out.expanduser()))

    def check() -> None:
        if destination.is_dir():
            raise CheckpointError(f"{destination} is a folder; give the name of a file")
        if destination.exists() and not overwrite:
            raise CheckpointError(f"{destination} exists; give another name or ask to overwrite it")

    check()
    inside = destination.parent / f".{destination.name}.unfinished"
    with _scratch(inside, expected_bytes) as folder:
        yield folder / destination.name
        _open_up(folder)
        _sync_tree(folder)
        check()  # again: hours may have passed
        os.replace(folder / destination.name, destination)
        _sync(destination.parent)


@contextlib.contextmanager
def _scratch(name: Path, expected_bytes: int | None) -> Iterator[Path]:
    """A locked folder called like `name`, for the block; what killed runs left of the same name is removed."""
    name.parent.mkdir(parents=True, exist_ok=True)
    partial, lock = _claim(name, False, expected_bytes)
    try:
        yield partial
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (number := _no_room_number(error)) is not None:
            raise _no_room(number, partial, name.with_name(name.name[1:].removesuffix(".unfinished"))) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _staging(destination: Path) -> Path:
    """Where the unfinished folder lies: beside the destination if that may be written and is on the same disk."""
    beside = destination.parent
    if destination.is_dir() and (os.path.ismount(destination) or not os.access(beside, os.W_OK | os.X_OK)):
        return destination
    return beside


def _claim(destination: Path, overwrite: bool, expected_bytes: int | None) -> tuple[Path, int]:
    """Clear what killed runs left, check the destination, and lock a new folder beside (or in) it."""
    parent = _staging(destination)
    prefix = f".{destination.name}.partial-"
    # The parent is locked for this moment only: nobody may see our folder between its creation and its lock.
    guard = _lock(parent, wait=True)
    try:
        if parent != destination:
            settle(destination)
        for stale in parent.glob(glob.escape(prefix) + "*"):
            lock = _lock(stale)
            if lock is None:
                raise CheckpointError(f"another run is writing {destination} (in {stale}); wait for it or stop it")
            os.close(lock)
            _unfill(stale, destination)
            shutil.rmtree(stale)
        _check_destination(destination, overwrite)
        _check_space(destination, parent, expected_bytes)
        partial = parent / f"{prefix}{secrets.token_hex(4)}"
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


def settle(destination: Path) -> None:
    """Put back, or drop, the old folder that a run killed between the two renames of an overwrite left."""
    for old in _swapped_out(destination):
        if destination.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, destination)


def _check_destination(destination: Path, overwrite: bool) -> None:
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; give a folder that does not exist yet")
    if not overwrite and _content(destination):
        raise CheckpointError(f"{destination} exists and is not empty; give another folder or ask to overwrite it")


def _content(destination: Path) -> list[Path]:
    """What lies in the destination, without what we are writing there and what every new disk has."""
    if not destination.is_dir():
        return []
    own = f".{destination.name}.partial-"
    return [path for path in destination.iterdir() if path.name != "lost+found" and not path.name.startswith(own)]


def _check_space(destination: Path, parent: Path, expected_bytes: int | None) -> None:
    if expected_bytes is None:
        return
    free = shutil.disk_usage(parent).free
    if free < expected_bytes:
        raise CheckpointError(
            f"{destination} needs {size(expected_bytes)}, but only {size(free)} are free on its disk; "
            "free some space or write elsewhere"
        )


# --- the moment when it appears -------------------------------------------------------------------


def _publish(partial: Path, destination: Path, overwrite: bool) -> None:
    _check_destination(destination, overwrite)  # again: hours may have passed
    if partial.parent == destination:
        _fill(partial, destination)
        return
    try:
        _rename(partial, destination)
    except OSError as error:
        # A mount point that looks like a folder (EBUSY), a folder of a container image's lower layer (EXDEV).
        if error.errno not in (errno.EBUSY, errno.EXDEV) or not destination.is_dir():
            raise
        _fill(partial, destination)
    _sync(destination.parent)


def _rename(partial: Path, destination: Path) -> None:
    """Put `partial` in the place of `destination`; there is no moment without either where the system can swap."""
    if not _content(destination):
        os.replace(partial, destination)
        return
    if _exchange(partial, destination):
        shutil.rmtree(partial, ignore_errors=True)
        return
    old = destination.with_name(f".{destination.name}.old-{secrets.token_hex(4)}")
    os.replace(destination, old)
    try:
        os.replace(partial, destination)
    except OSError:
        os.replace(old, destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    swap = 2  # RENAME_EXCHANGE
    return rename is not None and rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), swap) == 0


def _fill(partial: Path, destination: Path) -> None:
    """Move every entry of `partial` into `destination`, in an order in which half of it is no model.

    A list of what is moved lies in `partial` meanwhile, so that the next run can undo it after a kill.
    """
    entries = sorted(partial.iterdir(), key=lambda path: path.name == _MAKES_A_MODEL)
    replaced = sorted(_content(destination), key=lambda path: path.name != _MAKES_A_MODEL)
    listing = partial / _FILLING
    listing.write_text(json.dumps([path.name for path in entries]), encoding="utf-8")
    _sync(listing)
    for path in replaced:
        _remove(path)
    for path in entries:
        try:
            os.replace(path, destination / path.name)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy(path, destination / path.name)
        _sync(destination)
    shutil.rmtree(partial, ignore_errors=True)


def _copy(path: Path, target: Path) -> None:
    """To another disk; `_MAKES_A_MODEL` is small, so that half of it is unlikely, and comes last."""
    if path.is_dir():
        shutil.copytree(path, target)
        _sync_tree(target)
    else:
        shutil.copyfile(path, target)
        _sync(target)


def _unfill(stale: Path, destination: Path) -> None:
    """Undo a `_fill` that was killed: what it moved is not whole."""
    listing = stale / _FILLING
    if listing.is_file():
        with contextlib.suppress(ValueError):  # cut short before anything was moved
            for name in reversed(json.loads(listing.read_text(encoding="utf-8"))):
                _remove(destination / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


_NO_ROOM = {
    errno.ENOSPC: "the disk became full",
    errno.EDQUOT: "your disk quota is used up",
    errno.EFBIG: "the file size limit of this process was reached (see `ulimit -f`)",
}


def _no_room_number(error: BaseException | None) -> int | None:
    """Which of `_NO_ROOM` is behind an error; libraries in Rust say the system's number in words."""
    while error is not None:
        said = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) and error.errno else int(said.group(1)) if said else None
        if number in _NO_ROOM:
            return number
        error = error.__cause__
    return None


def _no_room(number: int, partial: Path, destination: Path) -> CheckpointError:
    state = "could not be removed: remove it by hand" if partial.exists() else "was removed"
    free = size(shutil.disk_usage(destination.parent).free)
    return CheckpointError(
        f"{destination} was not written: {_NO_ROOM[number]}; the unfinished folder {partial} {state} "
        f"({free} are free now). Make room or write elsewhere, and run again"
    )
