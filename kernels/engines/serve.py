"""`qat serve`: an exported folder behind an OpenAI-compatible HTTP server, through an engine that already exists.

transformers' own server runs anywhere, here with packed weights; vLLM's is started where it is installed. In front of
transformers' server stands `Front`: a request must neither take the machine's memory, nor hold up the others for longer
than its tokens take, nor end the process. What it lets through is listed (`ENDPOINTS`); all else is refused.
"""

import asyncio
import importlib.util
import json
import logging
import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Literal

from qat.checkpoints.hf import load_tokenizer, read_json
from qat.errors import CheckpointError, ConfigError
from qat.kernels.compiler import end_idle_threads
from qat.kernels.engines.transformers import METHODS, compute_dtype, installed

Engine = Literal["auto", "transformers", "vllm"]
MAX_BODY = 4 << 20  # bytes of a request
MOST_TOKENS = 1024  # written where a request does not say how many: transformers' own default
_CHARACTERS = 64  # per token of the longest text; no text that has more is worth a tokenizer's time
_NEEDED = ("fastapi", "uvicorn", "openai", "starlette")

_log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


def serve(folder: Path, engine: Engine, host: str, port: int, device: str, dtype: str) -> None:
    """Serve until interrupted.

    Raises:
        CheckpointError: no folder of a model.
        ConfigError: the engine is not installed, or there is no such port or device.
    """
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: ports are 1 to 65535")
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
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
    _check_device(device)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None and method not in METHODS:
        print(f"qat serve: {method} checkpoints are left to transformers itself", file=sys.stderr)
    with installed():
        server = transformers_server(folder, host, port, device, dtype)
    bind = server.startup

    async def announced(sockets: Any = None) -> None:
        await bind(sockets)  # ends the process where the port is taken
        name = folder.resolve().name
        print(f"qat serve: {name} on http://{host}:{port}/v1 (stop with Ctrl-C)", file=sys.stderr, flush=True)

    server.startup = announced
    server.run()


def transformers_server(folder: Path, host: str, port: int, device: str = "cpu", dtype: str = "auto") -> Any:
    """transformers' server (a uvicorn.Server that is not running yet) with the model loaded."""
    from transformers.cli.serve import Serve

    class Prepared(Serve):
        def start_server(self) -> None:
            """The caller does."""

    context, tokenizer, name = _context(folder), load_tokenizer(folder), folder.resolve().name
    if dtype == "auto":
        dtype = str(compute_dtype(device)).removeprefix("torch.")
    prepared: Any = Prepared(
        force_model=str(folder.resolve()), host=host, port=port, device=device, dtype=dtype, non_blocking=True
    )
    models, generations = prepared._model_manager, prepared._generation_state
    (loaded,) = models.loaded_models.values()
    models.loaded_models = {name: loaded}  # answers give this name; where the folder lies is nobody's business
    models.process_model_name, models.force_model = str, name
    manager = _stoppable()
    generations.get_manager = lambda model, use_cb=False: manager
    prepared.server.config.app.add_middleware(Front, tokenizer=tokenizer, context=context, name=name)
    end_idle_threads()  # from here on, only the generating thread computes
    return prepared.server


def _stoppable() -> Any:
    """transformers' thread for one generation after the other, which stops writing an answer that nobody waits for."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList
    from transformers.cli.serving.utils import GenerateManager

    class Left(StoppingCriteria):
        def __init__(self) -> None:
            self.left = threading.Event()

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), self.left.is_set(), dtype=torch.bool, device=input_ids.device)

    class Stoppable(GenerateManager):
        def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            client = Left()
            made = super().async_submit(fn, *args, **kwargs, stopping_criteria=StoppingCriteriaList([client]))
            answer = asyncio.shield(made)  # the thread sets `made` when it stops, cancelled or not
            answer.add_done_callback(lambda done: client.left.set() if done.cancelled() else None)
            return answer

    return Stoppable()


def _context(folder: Path) -> int:
    config = read_json(folder / "config.json")
    keys = ("max_position_embeddings", "n_positions")
    found = [part.get(key) for part in (config, config.get("text_config") or {}) for key in keys]
    for value in found:
        if isinstance(value, int):
            return value
    raise CheckpointError(f"{folder / 'config.json'} says neither {' nor '.join(keys)}, the longest text")


def _check_device(device: str) -> None:
    import torch

    try:
        device == "auto" or torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


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


# --- what a request may say ---------------------------------------------------------------------------


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and _number(low, high)(value)


def _stops(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return 1 <= len(texts) <= 4 and all(isinstance(text, str) and 1 <= len(text) <= 100 for text in texts)


def _messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


_TOKENS = (_whole(1, 1 << 31), "a whole number of tokens from 1")
_SHARED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, str), "a text"),
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "stream_options": (lambda value: isinstance(value, dict), "an object"),
    "max_tokens": _TOKENS,
    "temperature": (lambda value: _number(0.01, 100)(value) or _number(0, 0)(value), "0, or a number from 0.01 to 100"),
    "top_p": (lambda value: _number(0, 1)(value) and value > 0, "a number above 0, up to 1"),
    "frequency_penalty": (_number(-0.9, 2), "a number from -0.9 to 2 (1 + it is a repetition penalty)"),
    "presence_penalty": (_number(0, 0), "0: it is not served"),
    "n": (_whole(1, 1), "1: more answers are not served"),
    "seed": (_whole(0, (1 << 63) - 1), "a whole number from 0, of 63 bits"),
    "stop": (_stops, "a text or a list of up to 4 texts, of 1 to 100 characters"),
    "user": (lambda value: isinstance(value, str), "a text"),
}
ENDPOINTS = {  # path -> key -> (what is allowed, in words); the first key is needed
    "/v1/chat/completions": {
        "messages": (_messages, "a list of {role, content}"),
        "max_completion_tokens": _TOKENS,
        **_SHARED,
    },
    "/v1/completions": {"prompt": (lambda value: isinstance(value, str) and value != "", "a text"), **_SHARED},
}
_MESSAGE = ("role", "content", "name", "refusal", "reasoning_content")  # the last three are not put before the model


class _Refused(Exception):
    """(status, words)"""


def _message(message: dict[str, Any]) -> dict[str, str]:
    """{role, content}, both texts, as transformers would hand them to the chat template."""
    message = {key: value for key, value in message.items() if value is not None}
    other = sorted(set(message) - set(_MESSAGE))
    if other:
        raise _Refused(400, f"messages with {', '.join(other)} are not served; allowed are {', '.join(_MESSAGE)}")
    role, content = message.get("role"), message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(role, str) or not isinstance(parts, list):
        raise _Refused(400, "each message needs a role (a text) and content (a text, or a list of {type: text, text})")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise _Refused(400, "content other than {type: text, text} is not served")
    return {"role": role, "content": " ".join(str(text) for text in texts)}


class Front:
    """ASGI middleware: refuses what a server must not start on, with a readable 4xx, and keeps serving.

    A request reaches transformers' server only if `ENDPOINTS` allows each of its keys, and its tokens, as the server
    will count them, and the tokens to write fit into the model's longest text (`context`). It is handed on without
    nulls and with the number of tokens to write, and ends when its client leaves. Front also answers /v1/models,
    which transformers answers from the hub's cache folder.
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
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            body = await _body(receive)
            if body is not None:
                body = await asyncio.to_thread(self._checked, scope["path"], body)
                await self._pass(scope, body, receive, watched)
        except _Refused as refusal:
            await _refuse(send, *refusal.args)
        except Exception as error:  # whatever a request breaks, its connection and the others go on
            _log.exception("a request failed")
            if not started:
                await _refuse(send, 500, f"{type(error).__name__}: {error}")

    async def _pass(self, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send) -> None:
        """Hands the request on, and cancels it when its client goes away."""
        unread = [body]

        async def replay() -> Message:
            if not unread:
                await asyncio.Event().wait()  # this method looks after the client
            return {"type": "http.request", "body": unread.pop(), "more_body": False}

        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        answer, client = asyncio.ensure_future(self.app(scope, replay, send)), asyncio.ensure_future(left())
        try:
            await asyncio.wait((answer, client), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            answer.cancel()
            client.cancel()
            await asyncio.gather(answer, client, return_exceptions=True)

    def _checked(self, path: str, body: bytes) -> bytes:
        """The request to hand on.

        Raises:
            _Refused: with what the client is told.
        """
        keys = ENDPOINTS.get(path)
        if keys is None:
            raise _Refused(404, f"{path} is not served; POST to {' or '.join(ENDPOINTS)}")
        try:
            request = json.loads(body)
            json.dumps(request, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _Refused(400, f"the text is not valid Unicode: {error.reason}") from error
        except (ValueError, RecursionError) as error:
            raise _Refused(400, f"the body is not JSON: {error}") from error
        if not isinstance(request, dict):
            raise _Refused(400, f"the body must be a JSON object, not {type(request).__name__}")
        request = {key: value for key, value in request.items() if value is not None}
        needed = next(iter(keys))
        if needed not in request:
            raise _Refused(400, f"give `{needed}`, {keys[needed][1]}")
        for key, value in request.items():
            if key not in keys:
                raise _Refused(400, f"{key!r} is not served; allowed are {', '.join(keys)}")
            allowed, words = keys[key]
            if not allowed(value):
                raise _Refused(400, f"{key} must be {words}, not {_short(value)}")
        if request.setdefault("model", self.name) != self.name:
            raise _Refused(404, f"there is no model {_short(request['model'])} here; this is {self.name!r}")
        if needed == "messages":
            request["messages"] = [_message(message) for message in request["messages"]]
        length = self._length(request)
        asked = max((request[key] for key in ("max_tokens", "max_completion_tokens") if key in request), default=0)
        if length + max(asked, 1) > self.context:
            more = f"and {asked} more are asked for" if asked else "and none can follow"
            raise _Refused(400, f"the prompt has {length} tokens {more}; the model takes {self.context}")
        if not asked:
            request["max_tokens"] = min(MOST_TOKENS, self.context - length)
        return json.dumps(request).encode()

    def _length(self, request: dict[str, Any]) -> int:
        """Tokens of the prompt, exactly as the server makes them."""
        messages = request.get("messages", [])
        texts = [request["prompt"]] if "prompt" in request else [text for item in messages for text in item.values()]
        characters = sum(map(len, texts))
        if characters > _CHARACTERS * self.context:
            raise _Refused(400, f"the prompt has {characters} characters; the model takes {self.context} tokens")
        if "prompt" in request:
            length = len(self.tokenizer(request["prompt"])["input_ids"])
        else:
            try:
                made = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            except Exception as error:  # templates raise what they like, such as jinja2's errors
                raise _Refused(400, f"the model's chat template does not take these messages: {error}") from error
            length = len(made["input_ids"])
        if length == 0:
            raise _Refused(400, "the prompt has no tokens")
        return length


async def _body(receive: Receive) -> bytes | None:
    """The whole body, or None where the client left."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise _Refused(413, f"the request has more than {MAX_BODY} bytes")
        if not message.get("more_body", False):
            return b"".join(parts)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


async def _refuse(send: Send, status: int, message: str) -> None:
    kind = "invalid_request_error" if status < 500 else "server_error"
    await _answer(send, status, {"error": {"message": message, "type": kind, "code": status}})


async def _answer(send: Send, status: int, value: dict[str, Any]) -> None:
    body = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
