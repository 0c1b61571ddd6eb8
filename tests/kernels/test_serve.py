"""`qat serve` as clients see it: a real server on a real socket, agreeing with generate, outliving bad requests."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from qat.checkpoints.hf import load_tokenizer  # noqa: E402  # the optional packages are looked for first
from qat.cli import main  # noqa: E402  # as above
from qat.kernels.engines.serve import MAX_BODY, serve, transformers_server  # noqa: E402  # as above
from qat.kernels.engines.transformers import installed, load_packed  # noqa: E402  # as above
from qat.packed import PackedLinear  # noqa: E402  # as above
from tests.checkpoints.exports import export_pair  # noqa: E402  # as above
from tests.tiny import tiny_model  # noqa: E402  # as above

PROMPT = "The quick brown fox"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tiny_model("llama", tmp_path_factory.mktemp("served") / "model", num_hidden_layers=1)
    export_pair(source, source.parent / "out", ("nvfp4", None))
    return source.parent / "out"


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Any]:
    port = free_port()
    with installed():
        server = transformers_server(folder, "127.0.0.1", port, "cpu", "float32")
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


def complete(client: Any, tokens: int = 8) -> str:
    answer = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": tokens, "temperature": 0})
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_the_server_says_what_generate_says(client: Any, folder: Path) -> None:
    model, tokenizer = load_packed(folder, torch.float32), load_tokenizer(folder)
    assert any(isinstance(layer, PackedLinear) for layer in model.modules())
    inputs = tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert complete(client) == tokenizer.decode(made, skip_special_tokens=True)


def test_chat_streams_and_models_are_listed(client: Any, folder: Path) -> None:
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6, "temperature": 0}
    whole = client.post("/v1/chat/completions", json=body).json()
    assert whole["usage"]["completion_tokens"] == 6
    pieces = []
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                pieces += [choice["delta"].get("content") or "" for choice in json.loads(line[6:])["choices"]]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert client.get("/v1/models").json()["data"][0]["id"] == folder.name
    assert client.get("/health").status_code == 200


BAD: list[tuple[str, Any, int, str]] = [
    ("/v1/completions", "{bad", 400, "not JSON"),
    ("/v1/completions", "[" * 100_000, 400, "not JSON"),
    ("/v1/completions", [1, 2], 400, "must be a JSON object, not list"),
    ("/v1/completions", {}, 400, "give `messages`"),
    ("/v1/completions", {"prompt": 7}, 400, "give `messages`"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "give `messages`"),
    ("/v1/chat/completions", {"messages": []}, 400, "give `messages`"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 600}, 400, "600 more are asked for; the model takes 512"),
    ("/v1/completions", {"prompt": "fox " * 2000}, 400, "the model takes 512"),
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}, 400, "must be a whole number, not -1"),
    ("/v1/completions", {"prompt": "a", "max_tokens": "many"}, 400, "must be a whole number, not 'many'"),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature must be a number"),
    ("/v1/completions", {"prompt": "x" * MAX_BODY}, 413, f"more than {MAX_BODY} bytes"),
    ("/reset", {}, 400, "the model stays loaded"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), BAD, ids=range(len(BAD)))
def test_bad_requests_are_refused_in_words(client: Any, path: str, body: Any, status: int, message: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_it_outlives_clients_that_go_away(client: Any) -> None:
    expected = complete(client)
    body = {"prompt": PROMPT, "max_tokens": 400, "stream": True, "temperature": 0}
    for _ in range(3):  # leave in the middle of an answer
        with contextlib.suppress(httpx.HTTPError), client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    for sent in (b"POST /v1/completions HTTP/1.1\r\n", b"\x00\xff\r\n\r\n",
                 b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n{"):  # fmt: skip
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=5) as raw:
            raw.sendall(sent)  # and in the middle of a request
    for bad in ({"messages": [{"role": "nobody", "content": "a"}]}, {"prompt": "a", "stop": 7, "max_tokens": 2}):
        path = "/v1/chat/completions" if "messages" in bad else "/v1/completions"
        answer = client.post(path, json=bad)
        assert answer.status_code == 200 or answer.json()["error"]["message"]  # in words, on the same connection
    assert complete(client) == expected
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: complete(client), range(8))) == {expected}


def test_the_command_listens_on_this_machine_only(folder: Path) -> None:
    """The whole command in a process of its own; it stops cleanly when asked to."""
    port = free_port()
    command = [sys.executable, "-m", "qat.cli", "serve", str(folder), "--engine", "transformers", "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        deadline, answer = time.monotonic() + 90, None
        while answer is None and time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.get(f"http://127.0.0.1:{port}/health", timeout=1)
            time.sleep(0.2)
        assert answer is not None and answer.status_code == 200
        listening = Path("/proc/net/tcp").read_text().splitlines() if Path("/proc/net/tcp").exists() else []
        local = [line.split()[1] for line in listening if f":{port:04X} " in line and line.split()[3] == "0A"]
        assert not local or local == [f"0100007F:{port:04X}"]
    finally:
        process.send_signal(2)
        message = process.communicate(timeout=30)[1]
    assert f"on http://127.0.0.1:{port}/v1" in message and "Traceback" not in message


def test_other_folders_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path)]) == 2
    assert "holds no model (config.json)" in capsys.readouterr().err
    (tmp_path / "job.yaml").write_text("name: a")
    assert main(["serve", str(tmp_path)]) == 2
    assert "is a run; export it first" in capsys.readouterr().err


def test_missing_engines_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qat.errors import ConfigError

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--engine vllm needs vLLM"):
        serve(folder, "vllm", "127.0.0.1", 1, "auto", "auto")
    with pytest.raises(ConfigError, match="--device cpu is for --engine transformers"):
        serve(folder, "vllm", "127.0.0.1", 1, "cpu", "auto")
    with pytest.raises(ConfigError, match="serving needs fastapi, uvicorn, openai, starlette: pip install"):
        serve(folder, "transformers", "127.0.0.1", 1, "cpu", "auto")
