"""Starts tests/trainers/serve_logprobs.py: another process, a real socket."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("serve_logprobs.py")
ROOT = SCRIPT.parents[2]
SECONDS = 60.0  # to wait for anything


@dataclass
class Served:
    """A running server, and the model that it serves unless told otherwise."""

    port: int
    process: "subprocess.Popen[str]"
    folder: Path

    @property
    def url(self) -> str:
        """As a job names it."""
        return f"http://127.0.0.1:{self.port}/v1"

    def set(self, **settings: Any) -> "Served":
        """What to do from here on."""
        self._post("set", {"folder": str(self.folder), **settings})
        return self

    @property
    def said(self) -> list[str]:
        """What became of each request since then."""
        return self._post("said", {})

    def wait(self, what: str, count: int) -> None:
        """Until so many requests had this fate."""
        ends = time.monotonic() + SECONDS
        while self.said.count(what) < count:
            assert time.monotonic() < ends, self.said
            time.sleep(0.02)

    def stop(self) -> None:
        """As a machine that goes down."""
        self.process.kill()
        self.process.wait()

    def _post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """A server on this machine."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, "the server did not start"
        yield Served(int(port), process, folder).set()
    finally:
        process.kill()
        process.wait()
