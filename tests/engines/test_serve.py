"""`qat serve` as clients see it: a real server on a real socket, agreeing with generate, outliving bad requests."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from qat.checkpoints.hf import load_tokenizer  # noqa: E402  # the optional packages are looked for first
from qat.cli import main  # noqa: E402  # as above
from qat.engines.front import Front  # noqa: E402  # as above
from qat.engines.requests import Reader  # noqa: E402  # as above
from qat.engines.serve import serve, transformers_server  # noqa: E402  # as above
from qat.engines.transformers import load_packed  # noqa: E402  # as above
from qat.errors import ConfigError  # noqa: E402  # as above
from qat.serving.packed import PackedLinear  # noqa: E402  # as above
from tests.engines.served import NAMES, free_port, running  # noqa: E402  # as above
from tests.tiny import tiny_model  # noqa: E402  # as above

PROMPT = "The quick brown fox"


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
        lines = list(answer.iter_lines())
        assert [line for line in lines if line][-1] == "data: [DONE]" and lines.count("data: [DONE]") == 1
        for line in lines:
            if line.startswith("data: {"):
                pieces += [choice["delta"].get("content") or "" for choice in json.loads(line[6:])["choices"]]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == NAMES
    card = client.get("/v1/models/tiny").json()
    assert card["id"] == "tiny" and card["object"] == "model"
    assert client.get("/health").status_code == 200
    for path, status in (("/", 404), ("/v1/nothing", 404), ("/v1/models/other", 404), ("/v1/completions", 405)):
        answer = client.get(path)
        assert answer.status_code == status and f"GET {path} is not served" in answer.json()["error"]["message"]
    plain = client.post(
        "/v1/completions",
        content=json.dumps({"prompt": PROMPT, "max_tokens": 8, "temperature": 0}),
        headers={"content-type": "application/x-www-form-urlencoded"},
    )  # what curl -d says
    assert plain.status_code == 200 and plain.json()["choices"][0]["text"] == complete(client)


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def test_a_whole_request_of_the_real_client_passes(client: Any, openai_client: Any, folder: Path) -> None:
    """Every key that is served, and nulls, which count as absent; the answer names the model, not where it lies."""
    openai, real = pytest.importorskip("openai"), openai_client
    name = real.models.list().data[0].id
    assert real.models.retrieve(name).id == name
    more: Any = {
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.1,
        "seed": 3,
        "user": "a",
        "top_p": 0.9,
        "stop": ["~~"],
    }
    parts = [{"type": "text", "text": PROMPT}, {"type": "text", "text": "jumps"}]
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": parts, "name": "b"}]
    for limit in ({"max_tokens": None, "max_completion_tokens": 3}, {"max_tokens": 3}):
        answer = real.chat.completions.create(model=name, messages=chat, temperature=None, **limit, **more)
        assert answer.usage.completion_tokens <= 3 and answer.model == name == NAMES[0]
    pieces = list(
        real.completions.create(model=name, prompt=PROMPT, max_tokens=3, stream=True, temperature=0.5, **more)
    )
    assert {piece.model for piece in pieces} == {name}
    for other in ("tiny", "out", "out/"):  # every name, and the folder however it is written
        assert real.completions.create(model=other, prompt="a", max_tokens=1).model == name
    for other in ("other", str(folder), ""):
        with pytest.raises(openai.NotFoundError) as told:
            real.completions.create(model=other, prompt="a")
        assert told.value.code == "model_not_found" and told.value.param == "model"
        assert 'this is "./out/" or "tiny"' in told.value.message
    whole = client.post(TEXT, json={"prompt": PROMPT, "max_tokens": 2, "seed": None, "tools": None})
    assert whole.status_code == 200 and str(folder.parent) not in whole.text


def test_without_a_limit_the_longest_text_is_one(client: Any) -> None:
    answer = client.post(TEXT, json={"prompt": "fox " * 400, "temperature": 0}).json()
    assert answer["usage"]["total_tokens"] <= 512
    used = answer["usage"]["prompt_tokens"]
    exact = {"prompt": "fox " * 400, "temperature": 0, "max_tokens": 512 - used}
    assert client.post(TEXT, json=exact).status_code == 200
    refused = client.post(TEXT, json={**exact, "max_tokens": 513 - used})
    assert refused.status_code == 400 and f"the prompt has {used} tokens" in refused.json()["error"]["message"]


def test_chat_is_counted_as_the_server_counts(client: Any) -> None:
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "fox"}] * 40}], "temperature": 0}
    used = client.post(CHAT, json={**chat, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    refused = client.post(CHAT, json={**chat, "max_tokens": 513 - used}).json()
    assert f"the prompt has {used} tokens" in refused["error"]["message"]


def test_models_without_a_chat_template_say_so(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = None
    with pytest.raises(Exception, match="chat template does not take these messages"):
        Reader(tokenizer, 512, 384, ["a"]).read(CHAT, b'{"messages": [{"role": "user", "content": "a"}]}')


def test_counting_does_not_hold_up_others() -> None:
    """Whatever time a tokenizer takes, the event loop goes on."""
    order: list[str] = []

    def slow(text: str) -> dict[str, list[int]]:
        time.sleep(0.5)
        order.append("counted")
        return {"input_ids": [0] * 100}

    async def both() -> None:
        nobody: Any = None
        front, sent = Front(Reader(slow, 10, 384, ["a"]), nobody), []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b'{"prompt": "a"}'}

        async def send(message: Any) -> None:
            sent.append(message)

        request = asyncio.ensure_future(front({"type": "http", "method": "POST", "path": TEXT}, receive, send))
        await asyncio.sleep(0.1)
        order.append("others")
        await request
        assert sent[0]["status"] == 400

    asyncio.run(both())
    assert order == ["others", "counted"]


def test_nothing_is_written_for_a_client_that_left(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the next request would wait for all of its tokens, here held up to take 25 s."""
    forward = LlamaForCausalLM.forward

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return forward(*arguments, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", slow)
    body = {"prompt": PROMPT, "max_tokens": 500, "temperature": 0, "stop": "~~~~"}
    for stream in (False, True):
        with (
            contextlib.suppress(httpx.TimeoutException),
            client.stream("POST", TEXT, json={**body, "stream": stream}, timeout=0.7) as answer,
        ):
            next(answer.iter_lines())
        start = time.monotonic()
        complete(client, 2)
        assert time.monotonic() - start < 5


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
        asked = {"model": str(folder), "prompt": PROMPT, "max_tokens": 8, "temperature": 1}  # called as it was given
        told = [httpx.post(f"http://127.0.0.1:{port}{TEXT}", json={**asked, "seed": s}).json() for s in (1, 1, 2)]
        assert {each["model"] for each in told} == {str(folder)}
        texts = [each["choices"][0]["text"] for each in told]
        assert texts[0] == texts[1] != texts[2]
        listening = Path("/proc/net/tcp").read_text().splitlines() if Path("/proc/net/tcp").exists() else []
        local = [line.split()[1] for line in listening if f":{port:04X} " in line and line.split()[3] == "0A"]
        assert not local or local == [f"0100007F:{port:04X}"]
        body = json.dumps({"prompt": PROMPT, "max_tokens": 490, "stream": True, "temperature": 0}).encode()
        asker = socket.create_connection(("127.0.0.1", port), timeout=30)
        asker.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert asker.recv(64).startswith(b"HTTP/1.1 200")  # in the middle of an answer
    finally:
        process.send_signal(2)
        message = process.communicate(timeout=30)[1]
    assert f"{folder} on http://127.0.0.1:{port}/v1" in message
    assert "Traceback" not in message and "terminate" not in message


def test_other_folders_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path / "absent")]) == 2
    assert f"there is no folder {tmp_path / 'absent'}" in capsys.readouterr().err
    assert main(["serve", str(tmp_path)]) == 2
    assert "holds no model (config.json)" in capsys.readouterr().err
    (tmp_path / "job.yaml").write_text("name: a")
    assert main(["serve", str(tmp_path)]) == 2
    assert "is a run; export it first" in capsys.readouterr().err


def test_what_cannot_run_is_named_before_the_model_loads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qat.engines.serve.load_packed", lambda *a, **k: pytest.fail("the model was loaded"))
    there = torch.cuda.is_available()
    for option, words in (
        ("--port=99999", "--port 99999: ports are 1 to 65535"),
        ("--port=0", "--port 0: ports are"),
        ("--served-model-name=", "--served-model-name is empty"),
        ("--device=banana", "--device banana cannot be used"),
        ("--device=meta", "--device meta cannot be used"),
        ("--device=cuda:99" if there else "--device=cuda", "cannot be used"),
    ):
        assert main(["serve", str(folder), "--engine=transformers", option]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


@pytest.mark.parametrize("scaled", [True, False])
def test_the_longest_text_is_what_the_model_takes(tmp_path: Path, scaled: bool) -> None:
    if scaled:
        rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
        model, most = tiny_model("llama", tmp_path, max_position_embeddings=128, rope_parameters=rope), 512
    else:
        model, most = tiny_model("bloom", tmp_path), 1 << 20  # ALiBi: nothing limits it
        config = json.loads((model / "config.json").read_text())
        del config["max_position_embeddings"]  # which Bloom does not know
        (model / "config.json").write_text(json.dumps(config))
    server = transformers_server(model, NAMES, "127.0.0.1", free_port(), "cpu", "float32")
    assert server.config.app.reader.context == most


def test_generate_samples_as_the_server_does(tmp_path: Path, capfd: Any) -> None:
    model = tiny_model("llama", tmp_path, num_hidden_layers=1, initializer_range=0.02)
    ask = {"prompt": PROMPT, "max_tokens": 24, "seed": 5, "temperature": 0.9}
    own = json.loads((model / "generation_config.json").read_text())
    for more in ({}, {"top_k": 3, "min_p": 0.01}, {"repetition_penalty": 1.4, "top_p": 0.5}):
        (model / "generation_config.json").write_text(json.dumps(own | more))
        with running(model) as client:
            answer = client.post(TEXT, json=ask).json()["choices"][0]["text"]
        capfd.readouterr()
        options = ["--tokens=24", "--seed=5", "--temperature=0.9", "--device=cpu"]
        assert main(["generate", str(model), PROMPT, *options]) == 0
        assert capfd.readouterr().out.rstrip("\n") == (PROMPT + answer).rstrip("\n")


def test_a_taken_port_is_said_before_anything_is_loaded(folder: Path, capsys: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(folder), "--engine", "transformers", "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}" in told and "--port" in told and "Loading" not in told


@pytest.mark.parametrize(
    ("more", "names"), [([], ["{}/"]), (["--served-model-name", "a", "--served-model-name=b/c"], ["a", "b/c"])]
)
def test_vllm_is_started_with_the_same_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], names: list[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("os.execv", lambda program, command: started.append(command))
    assert main(["serve", *more, f"{folder}/", "--engine=vllm"]) == 0
    command = started[0]
    at = command.index("--served-model-name") + 1
    assert command[at : command.index("--host")] == [name.format(folder) for name in names]
    assert command[command.index("--host") + 1] == "127.0.0.1"


@pytest.mark.parametrize(("rank", "room"), [(4, "8"), (64, "64"), (65, "128")])
def test_vllm_serves_an_adapter_under_the_name_of_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, room: str
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("os.execv", lambda program, command: started.append(command))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": rank}))
    serve(tmp_path, "vllm", "127.0.0.1", 1, "auto", "auto", ["a", "b"])
    command = " ".join(started[0])
    place = tmp_path / "adapter"
    assert f"--enable-lora --max-lora-rank {room} --max-loras 2 --lora-modules a={place} b={place}" in command
    assert "--served-model-name a-base b-base --host" in command
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 513}))
    with pytest.raises(ConfigError, match="rank 513 is more than vLLM serves"):
        serve(tmp_path, "vllm", "127.0.0.1", 1, "auto", "auto")


def test_missing_engines_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (folder.parent / "model.gguf").touch()
    with pytest.raises(ConfigError, match=r"llama\.cpp needs its server: pip install 'llama-cpp-python\[server\]'"):
        serve(folder.parent / "model.gguf", "auto", "127.0.0.1", 1, "auto", "auto")
    for place, engine in ((folder, "llama.cpp"), (folder.parent / "model.gguf", "vllm"), (Path("no.gguf"), "auto")):
        with pytest.raises(ConfigError, match=r"--engine llama\.cpp serves a \.gguf file"):
            serve(place, engine, "127.0.0.1", 1, "auto", "auto")  # type: ignore[arg-type]  # both are engines
    with pytest.raises(ConfigError, match="--engine vllm needs vLLM"):
        serve(folder, "vllm", "127.0.0.1", 1, "auto", "auto")
    with pytest.raises(ConfigError, match="--device cpu is for --engine transformers"):
        serve(folder, "vllm", "127.0.0.1", 1, "cpu", "auto")
    with pytest.raises(ConfigError, match="serving needs uvicorn: pip install"):
        serve(folder, "transformers", "127.0.0.1", 1, "cpu", "auto")


def test_checkpoints_with_rotated_inputs_are_not_for_vllm(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else name)
    monkeypatch.setattr("os.execv", lambda program, command: started.append(command))
    serve(folder, "auto", "127.0.0.1", 1, "auto", "auto")
    assert len(started) == 1
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["transform_config"] = {"config_groups": {"hadamard_32": {"type": "hadamard"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="serving needs uvicorn"):
        serve(tmp_path, "auto", "127.0.0.1", 1, "auto", "auto")
