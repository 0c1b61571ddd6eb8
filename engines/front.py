"""The HTTP side of `qat serve`: an ASGI application that lets no request take the machine's memory, hold up the others
for longer than its tokens take, or end the process.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from typing import Any, Protocol

from qat.engines.answers import Piece
from qat.engines.replies import Reply, event
from qat.engines.requests import ENDPOINTS, MAX_BODY, Reader, Refused, Request

_log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


class Writes(Protocol):
    """What `Front` needs of `answers.Writer`."""

    def write(self, prompt: list[int], request: Request) -> AsyncGenerator[Piece, None]:
        """The pieces of an answer."""


class Front:
    """Reads requests, has their answers written, and sends them; what cannot be served is refused in words.

    An answer is cancelled when its client leaves. Models have the names that the reader knows, the first in answers.
    """

    def __init__(self, reader: Reader, writer: Writes) -> None:
        self.reader, self.writer = reader, writer

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if scope["method"] != "POST":
                return await self._other(scope["method"], scope["path"], watched)
            body = await _body(receive)
            if body is not None:
                request = await asyncio.to_thread(self.reader.read, scope["path"], body)
                await _while_there(self._answer(request, watched), receive)
        except Refused as refusal:
            await _json(send, refusal.status, _error(refusal))
        except asyncio.CancelledError:  # the server stops
            _log.info("a request ended with the server")
        except Exception as error:  # whatever a request breaks, its connection and the others go on
            _log.exception("a request failed")
            failure = _error(Refused(500, f"the answer failed ({type(error).__name__}); the server's log says more"))
            if started:
                await send({"type": "http.response.body", "body": event(failure) + b"data: [DONE]\n\n"})
            else:
                await _json(send, 500, failure)

    async def _other(self, method: str, path: str, send: Send) -> None:
        """What is not a POST."""
        cards = [{"id": name, "object": "model", "created": 0, "owned_by": "qat"} for name in self.reader.names]
        model = path.removeprefix("/v1/models/")
        if method not in ("GET", "HEAD"):
            pass
        elif path == "/health":
            return await _json(send, 200, {"status": "ok"})
        elif path == "/v1/models":
            return await _json(send, 200, {"object": "list", "data": cards})
        elif model != path and self.reader.knows(model):
            return await _json(send, 200, {**cards[0], "id": model})
        paths = "GET /v1/models or /health, or POST to " + " or ".join(ENDPOINTS)
        raise Refused(405 if path in ENDPOINTS else 404, f"{method} {path} is not served; {paths}")

    async def _answer(self, request: Request, send: Send) -> None:
        reply = Reply(request, self.reader.names[0])
        if not request.stream:
            answers = []
            for prompt in request.prompts:
                async with aclosing(self.writer.write(prompt, request)) as pieces:
                    answers.append([piece async for piece in pieces])
            return await _json(send, 200, reply.whole(answers))
        written = 0

        async def out(chunks: list[bytes], more: bool = True) -> None:
            await send({"type": "http.response.body", "body": b"".join(chunks), "more_body": more})

        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for index, prompt in enumerate(request.prompts):
            await out(reply.begin(index))
            async with aclosing(self.writer.write(prompt, request)) as pieces:
                async for piece in pieces:
                    await out(reply.piece(index, piece))
            written += piece.written
        await out(reply.end(written), more=False)


async def _while_there(answer: Any, receive: Receive) -> None:
    """Awaits `answer`, and cancels it when its client goes away."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(left())
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            answering.result()
    finally:
        answering.cancel()
        leaving.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


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
            raise Refused(413, f"the request has more than {MAX_BODY} bytes")
        if not message.get("more_body", False):
            return b"".join(parts)


def _error(refusal: Refused) -> dict[str, Any]:
    """OpenAI's shape of it."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    return {"error": {"message": refusal.words, "type": kind, "param": refusal.param, "code": refusal.code}}


async def _json(send: Send, status: int, value: dict[str, Any]) -> None:
    body = json.dumps(value, ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
