"""`qat serve`: an exported folder behind an OpenAI-compatible HTTP server, through an engine that already exists.

transformers' own server runs anywhere, here with packed weights; vLLM's is started where it is installed. In front of
transformers' server stands `Front`, because a request must neither take the machine's memory nor end the process.
"""

import importlib.util
import json
import logging
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Literal

from qat.checkpoints.hf import load_tokenizer, read_json
from qat.errors import CheckpointError, ConfigError
from qat.kernels.engines.transformers import METHODS, compute_dtype, install

Engine = Literal["auto", "transformers", "vllm"]
MAX_BODY = 4 << 20  # bytes of a request
_NEEDED = ("fastapi", "uvicorn", "openai", "starlette")

_log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


def serve(folder: Path, engine: Engine, host: str, port: int, device: str, dtype: str) -> None:
    """Serve until interrupted.

    Raises:
        CheckpointError: no folder of a model.
        ConfigError: the engine is not installed.
    """
    if (folder / "job.yaml").is_file():
        raise CheckpointError(f"{folder} is a run; export it first: qat export {folder} OUT, then: qat serve OUT")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no model (config.json); give what `qat export` wrote, or a model")
    config = read_json(folder / "config.json")
    if engine == "auto":
        engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if engine == "vllm":
        if device != "auto":
            raise ConfigError(f"--device {device} is for --engine transformers; vLLM runs on the device of its build")
        return _serve_vllm(folder, host, port, dtype)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serving needs {', '.join(missing)}: pip install 'qat-native[serve]'")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method in METHODS:
        install()
    elif method is not None:
        print(f"qat serve: {method} checkpoints are left to transformers itself", file=sys.stderr)
    server = transformers_server(folder, host, port, device, dtype)
    print(f"qat serve: {folder.name} on http://{host}:{port}/v1 (stop with Ctrl-C)", file=sys.stderr, flush=True)
    server.run()


def transformers_server(folder: Path, host: str, port: int, device: str = "cpu", dtype: str = "auto") -> Any:
    """transformers' server (a uvicorn.Server that is not running yet) with the model loaded."""
    from transformers.cli.serve import Serve

    class Prepared(Serve):
        def start_server(self) -> None:
            """The caller does."""

    if dtype == "auto":
        dtype = str(compute_dtype(device)).removeprefix("torch.")
    prepared: Any = Prepared(
        force_model=str(folder.resolve()), host=host, port=port, device=device, dtype=dtype, non_blocking=True
    )
    server = prepared.server
    name, tokenizer = folder.resolve().name, load_tokenizer(folder)
    server.config.app.add_middleware(Front, tokenizer=tokenizer, context=_context(folder), name=name)
    return server


def _context(folder: Path) -> int:
    config = read_json(folder / "config.json")
    found = config.get("max_position_embeddings") or (config.get("text_config") or {}).get("max_position_embeddings")
    if not isinstance(found, int):
        raise CheckpointError(f"{folder / 'config.json'} does not say max_position_embeddings, the longest text")
    return found


def _serve_vllm(folder: Path, host: str, port: int, dtype: str) -> None:
    """Becomes vLLM's server, so that signals reach it; our plugin is found through its entry point."""
    import os

    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("--engine vllm needs vLLM: pip install vllm, or use --engine transformers")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", folder.resolve().name, "--host", host, "--port", str(port)]
    command += ["--dtype", dtype]
    print(f"qat serve: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    os.execv(sys.executable, command)


class Front:
    """ASGI middleware: refuses what a server must not start on, with a readable 4xx, and keeps serving.

    Refused are bodies above `MAX_BODY`, JSON that is no object, and prompts that, with the tokens asked for, exceed the
    model's longest text. It also answers /v1/models, which transformers answers from the hub's cache folder.
    """

    def __init__(self, app: Any, tokenizer: Any, context: int, name: str) -> None:
        self.app, self.tokenizer, self.context, self.name = app, tokenizer, context, name

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            if scope["type"] == "http" and scope["path"] == "/v1/models":
                card = {"id": self.name, "object": "model", "created": 0, "owned_by": "qat"}
                return await _answer(send, 200, {"object": "list", "data": [card]})
            return await self.app(scope, receive, send)
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY:
                return await _refuse(send, 413, f"the request has more than {MAX_BODY} bytes")
        problem = self._problem(scope["path"], body)
        if problem is not None:
            return await _refuse(send, 400, problem)
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()  # waits for the client to go away
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, replay, watched)
        except Exception as error:  # whatever a request breaks, its connection and the others go on
            _log.exception("a request failed")
            if not started:
                await _refuse(send, 500, f"{type(error).__name__}: {error}")

    def _problem(self, path: str, body: bytes) -> str | None:
        if not path.startswith("/v1/"):
            return None if path == "/health" else f"{path} is not served: the model stays loaded"
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            return f"the body is not JSON: {error}"
        if not isinstance(request, dict):
            return f"the body must be a JSON object, not {type(request).__name__}"
        text = _text(request)
        if text is None:
            return "give `messages` (a list of {role, content}) or `prompt` or `input` (a text)"
        asked = next(
            (request[k] for k in ("max_completion_tokens", "max_tokens", "max_output_tokens") if k in request), 0
        )
        if not isinstance(asked, int) or asked < 0:
            return f"the number of tokens to write must be a whole number, not {asked!r}"
        length = len(self.tokenizer(text)["input_ids"])
        if length + asked > self.context:
            return f"the prompt has {length} tokens and {asked} more are asked for; the model takes {self.context}"
        temperature = request.get("temperature", 0)
        if not isinstance(temperature, int | float) or not 0 <= temperature <= 100:
            return f"temperature must be a number from 0, not {temperature!r}"
        return None


def _text(request: dict[str, Any]) -> str | None:
    """All text of a request, or None where there is none."""
    messages = request.get("messages", request.get("input"))
    if isinstance(messages, str):
        return messages
    if isinstance(messages, list):
        contents = [message.get("content") if isinstance(message, dict) else None for message in messages]
        parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
        texts = [part.get("text", "") if isinstance(part, dict) else part for part in parts]
        return "\n".join(text for text in texts if isinstance(text, str)) if texts and all(contents) else None
    prompt = request.get("prompt")
    return prompt if isinstance(prompt, str) else None


async def _refuse(send: Send, status: int, message: str) -> None:
    kind = "invalid_request_error" if status < 500 else "server_error"
    await _answer(send, status, {"error": {"message": message, "type": kind, "code": status}})


async def _answer(send: Send, status: int, value: dict[str, Any]) -> None:
    body = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
