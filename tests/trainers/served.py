"""Starts tests/trainers/serve_logprobs.py: another process, a real socket."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SCRIPT = Path(__file__).with_name("serve_logprobs.py")
ROOT = SCRIPT.parents[2]


@dataclass
class Served:
    """A running server: where, and what became of each request so far."""

    url: str
    process: "subprocess.Popen[str]"
    said: list[str] = field(default_factory=list)

    def read(self) -> None:
        """Until it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.strip())

    def stop(self) -> None:
        """As a machine that goes down."""
        self.process.kill()
        self.process.wait()


@contextmanager
def serving(model: Path, *options: str) -> Iterator[Served]:
    """A server of `model` on this machine."""
    command = [sys.executable, str(SCRIPT), str(model), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=_environment())
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, "the server did not start"
        served = Served(f"http://127.0.0.1:{port}/v1", process)
        reader = threading.Thread(target=served.read, daemon=True)
        reader.start()
        yield served
    finally:
        process.kill()
        process.wait()


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
