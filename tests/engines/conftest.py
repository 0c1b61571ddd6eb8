"""A server for each module of tests of `qat serve`: a tiny export behind a real socket, and clients of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.exports import export_pair
from tests.engines.served import running
from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export."""
    source = tiny_model("llama", tmp_path_factory.mktemp("served") / "model", num_hidden_layers=1)
    export_pair(source, source.parent / "out", ("nvfp4", None))
    return source.parent / "out"


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Any]:
    """httpx, at the server of `folder`."""
    with running(folder) as opened:
        yield opened


@pytest.fixture
def openai_client(client: Any) -> Any:
    """The client that OpenAI publishes, at the same server."""
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
