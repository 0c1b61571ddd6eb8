"""Starting, being interrupted, and writing to somebody who no longer reads."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qat.cli import main
from qat.terminal import Unbreakable, rarely_collecting, unbreakable_stderr

# numpy, which torch imports, clears errors of what it imports: an interrupt there is lost, and half of numpy is there.
SWALLOWS = """
import sys, time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException:
    pass
"""


def test_ctrl_c_ends_an_import_that_would_swallow_it(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SWALLOWS)
    code = "from qat.terminal import import_library; import_library('slow'); print('went on')"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    command = [sys.executable, "-c", f"import signal; signal.signal(2, signal.default_int_handler); {code}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT
        assert process.stdout.read() == ""


def test_the_command_starts_before_torch_is_there() -> None:
    """Otherwise an interrupt of its first seconds is a traceback, or lost."""
    code = "import sys, qat.cli; sys.exit('torch' in sys.modules)"
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert time.monotonic() - began < 5


def test_the_package_gives_what_it_promises() -> None:
    import qat

    assert all(getattr(qat, name) is not None for name in qat.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qat.nothing


def test_what_nobody_can_read_is_lost_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for stream in (open(writing, "w"), open("/dev/full", "w")):  # noqa: SIM115  # closed below, as a shell would
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            with unbreakable_stderr():
                assert isinstance(sys.stderr, Unbreakable)
                print("x" * 100_000, file=sys.stderr, flush=True)
                assert not sys.stderr.isatty()
            assert main(["train", "/nowhere.yaml"]) == 2
        stream.close()


def test_all_objects_are_looked_through_rarely_and_only_while_a_command_runs() -> None:
    before = gc.get_threshold()
    with pytest.raises(KeyError), rarely_collecting():
        assert gc.get_threshold() == (*before[:2], 10 * before[2]) and gc.isenabled()
        raise KeyError
    assert gc.get_threshold() == before


def test_a_start_looks_through_everything_once_at_most() -> None:
    """Importing torch alone took two such passes, an export eight, of a second together."""
    code = """
import gc, sys
passes = []
gc.callbacks.append(lambda phase, about: passes.append(about["generation"]) if phase == "start" else None)
from qat.cli import main
main(["formats"])
print(passes.count(2), file=sys.stderr)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stderr.split()[-1]) <= 1


LEAVES = """
import atexit, sys, threading, time
from qat.terminal import leave

class Freed:
    def __del__(self):
        print("freed")

{before}
kept = Freed()
atexit.register(print, "asked to be called")
print("written", end=" ")
sys.exit(leave(3))
"""
AS_USUAL = {
    "training": "sys.modules['lightning'] = sys",
    "a thread": "threading.Thread(target=time.sleep, args=(0.3,)).start()",
}


def left(before: str, **how: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", LEAVES.format(before=before)]
    return subprocess.run(command, text=True, env=environment, check=False, **how)


def test_a_process_that_leaves_frees_nothing_and_keeps_what_it_wrote_and_its_status() -> None:
    done = left("", capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "written asked to be called\n", "")


@pytest.mark.parametrize("before", AS_USUAL.values(), ids=AS_USUAL.keys())
def test_where_more_than_files_is_left_the_process_ends_as_usual(before: str) -> None:
    done = left(before, capture_output=True)
    assert (done.returncode, done.stdout) == (3, "written asked to be called\nfreed\n")


def test_output_that_is_not_taken_still_fails_the_process() -> None:
    with open("/dev/full", "w") as full:
        done = left("", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 120 and "No space left on device" in done.stderr


def test_a_whole_process_leaves_and_a_caller_goes_on() -> None:
    code = "import sys, atexit; from qat.cli import main; print(main(['formats', '--json'])); main(); print('went on')"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, "formats"], capture_output=True, text=True, env=environment, check=True
    )
    assert "]\n0\nname " in done.stdout and "went on" not in done.stdout
