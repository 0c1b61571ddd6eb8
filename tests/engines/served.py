"""A server of `qat serve` in this process, behind a real socket."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ["./out/", "tiny"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Any]:
    """An httpx client of `folder`'s server, which ends with the block."""
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn")
    from qat.engines.serve import transformers_server

    port = free_port()
    server = transformers_server(folder, NAMES, "127.0.0.1", port, "cpu", "float32")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.05)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as opened:
        yield opened
    server.should_exit = True
    thread.join(timeout=20)
    assert not thread.is_alive()
