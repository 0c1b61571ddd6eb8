"""What stands in front of transformers' server, so that no request takes the machine's memory, holds up the others for
longer than its tokens take, or ends the process. `ENDPOINTS` lists what `Front` lets through; all else is refused.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

MAX_BODY = 4 << 20  # bytes of a request
MOST_TOKENS = 1024  # written where a request does not say how many: transformers' own default
_CHARACTERS = 64  # per token of the longest text; no text that has more is worth a tokenizer's time

_log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


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
_IGNORED = ("user", "n", "presence_penalty", "stream_options")  # allowed as far as they change nothing
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
            return await self._other(scope, receive, send)
        started = streaming = False

        async def watched(message: Message) -> None:
            nonlocal started, streaming
            if message["type"] == "http.response.start":
                started = True
                streaming = any(b"text/event-stream" in value for key, value in message["headers"])
            elif streaming and not message.get("more_body", False):
                message = {**message, "body": message.get("body", b"") + b"data: [DONE]\n\n"}  # clients wait for it
            await send(message)

        try:
            body = await _body(receive)
            if body is not None:
                body = await asyncio.to_thread(self._checked, scope["path"], body)
                await self._pass(scope, body, receive, watched)
        except _Refused as refusal:
            await _refuse(send, *refusal.args)
        except asyncio.CancelledError:  # the server stops
            _log.info("a request ended with the server")
        except Exception as error:  # whatever a request breaks, its connection and the others go on
            _log.exception("a request failed")
            if not started:
                await _refuse(send, 500, f"{type(error).__name__}: {error}")

    async def _other(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """What is not a POST."""
        path, method = scope["path"], scope.get("method")
        card = {"id": self.name, "object": "model", "created": 0, "owned_by": "qat"}
        if scope["type"] != "http" or path == "/health" or method == "OPTIONS":
            await self.app(scope, receive, send)
        elif path == "/v1/models":
            await _answer(send, 200, {"object": "list", "data": [card]})
        elif path == f"/v1/models/{self.name}":
            await _answer(send, 200, card)
        else:
            paths = "GET /v1/models or /health, or POST to " + " or ".join(ENDPOINTS)
            await _refuse(send, 405 if path in ENDPOINTS else 404, f"{method} {path} is not served; {paths}")

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

        headers = [(key, value) for key, value in scope["headers"] if key not in (b"content-type", b"content-length")]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = {**scope, "headers": headers}
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
        return json.dumps({key: value for key, value in request.items() if key not in _IGNORED}).encode()

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
